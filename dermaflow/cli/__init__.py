"""`dermaflow …`: thin commands over the library. They parse, call and print."""
