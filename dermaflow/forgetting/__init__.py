"""`dermaflow data forget`: a person, a lesion or an image leaves everything that DermaFlow keeps."""
