"""The app that travels: a shell around the DermaFlow that is installed at the site."""
