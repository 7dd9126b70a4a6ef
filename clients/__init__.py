"""Federation of hospital sites. Begun: how an update travels (`wire`); nothing to run yet."""
