"""The coordinator; all of it is in the installed DermaFlow."""

from clients.server_app import app

__all__ = ["app"]
