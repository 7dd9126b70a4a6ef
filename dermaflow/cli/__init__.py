"""`dermaflow …`: thin commands over the library. They parse, call and print."""

from dermaflow.cli.main import app

__all__ = ["app"]
