"""Its place makes pytest put this folder on the path, so that tests of every kind can import `ham_predictions`."""

import os
from collections.abc import Iterator

import pytest

# Ray's workers give way to every other process, and two test files run at a time: those with Ray would starve.
os.environ.setdefault("RAY_worker_niceness", "0")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Sums of floats are added in one order only with one thread: here and in processes started from here."""
    import torch

    from dermaflow.settings import settings

    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DERMAFLOW_THREADS", "1")
        patch.setenv("DERMAFLOW_DEVICE", "cpu")
        settings.cache_clear()
        torch.set_num_threads(1)
        yield
    settings.cache_clear()
    torch.set_num_threads(threads)
