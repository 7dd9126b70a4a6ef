"""Which bundle is meant: a folder, an address, a version of the registry, or the champion."""

from __future__ import annotations

from typing import Any, NamedTuple

from dermaflow.scoring.planning import resolve_model


class Chosen(NamedTuple):
    """A bundle by its place, and what it is called in answers: ``<name>-<first ten digits of its hash>``."""

    uri: str
    version: str
    sha256: str

    def user_config(self, **others: Any) -> dict[str, Any]:
        """What `Classifier.reconfigure` takes."""
        return {"uri": self.uri, "version": self.version, "sha256": self.sha256, **others}


def choose(model: str) -> Chosen:
    """Find a bundle and read its description, not its weights.

    Args:
        model: A bundle folder or address; else a version, its beginning or ``champion``, of ``DERMAFLOW_REGISTRY``.

    Raises:
        BundleError: It is damaged or not calibrated.
        RegistryError: There is no such version.
        StorageError: The place cannot be read.
    """
    found = resolve_model(model)
    short = found.sha256[:10]
    version = found.name if found.name.endswith(f"-{short}") else f"{found.bundle.name}-{short}"
    return Chosen(found.uri, version, found.sha256)
