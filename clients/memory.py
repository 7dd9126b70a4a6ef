"""What a site remembers between messages, on its own disk: Flower's SuperNode forgets everything when it restarts."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save

from dermaflow import storage


class Memory:
    """Named arrays of one federated run.

    Args:
        folder: The site's own folder.
        run: Name of the run; its arrays are kept apart from those of others.

    Attributes:
        site_folder: For what belongs to the site and not to a run.
    """

    def __init__(self, folder: Path, run: str) -> None:
        self.site_folder = folder
        self._folder = folder / re.sub(r"[^A-Za-z0-9_.-]", "_", run)

    def recall(self, name: str) -> dict[str, np.ndarray] | None:
        """The arrays kept under a name, or None."""
        path = self._folder / f"{name}.safetensors"
        return load_file(path) if path.exists() else None

    def keep(self, name: str, **arrays: np.ndarray) -> None:
        """Replace the arrays under a name, whole or not at all."""
        self._folder.mkdir(parents=True, exist_ok=True)
        storage.write_bytes(self._folder / f"{name}.safetensors", save(arrays))

    def begin(self, digest: str) -> bool:
        """Whether this run is the one that began under its name: what is remembered belongs to one run only.

        Args:
            digest: SHA-256 of what does not change during the run.
        """
        mine = np.frombuffer(bytes.fromhex(digest), np.uint8)
        kept = self.recall("run")
        if kept is None:
            self.keep("run", digest=mine)
        return kept is None or np.array_equal(kept["digest"], mine)
