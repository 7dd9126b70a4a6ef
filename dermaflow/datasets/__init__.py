"""Where lesion images come from: HAM10000 as published, a download of it, or a synthetic caricature of it."""
