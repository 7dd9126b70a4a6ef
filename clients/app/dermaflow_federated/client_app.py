"""A site; all of it is in the installed DermaFlow."""

from clients.client_app import app

__all__ = ["app"]
