"""The door to Ray for preparation and training: connect, map over tables, unwrap errors."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import pyarrow as pa

from dermaflow.settings import settings

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # the coming default, without its warning

import ray
import ray.data
from ray.exceptions import RayTaskError

log = logging.getLogger(__name__)

_connected_here = False


def connect(cpus: int | None = None) -> None:
    """Use the Ray that is there (``RAY_ADDRESS`` or an open connection), or start one on this machine, quietly.

    Args:
        cpus: CPUs of a Ray started here; by default those of ``DERMAFLOW_THREADS``. Ignored on an existing cluster.
    """
    global _connected_here
    if not ray.is_initialized():
        with _sigterm_kept():
            _connected_here = True  # before it is: what a signal cuts off midway is stopped, too
            if os.environ.get("RAY_ADDRESS"):
                ray.init(log_to_driver=False)
            else:
                ray.init(
                    "local",  # or it would join whatever cluster was last started on this machine
                    num_cpus=cpus or settings().threads,
                    include_dashboard=False,
                    _node_ip_address="127.0.0.1",
                    object_store_memory=1 << 30,
                    logging_level=logging.ERROR,
                    log_to_driver=False,
                )
        log.info("Ray: %s CPUs", ray.cluster_resources().get("CPU"))
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.verbose_stats_logs = False
    context.raise_original_map_exception = True  # or `own_error` finds a wrapper that has lost what it wrapped
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    # What fails in a task is raised here as itself; Ray Data's own page about it would bury the message.
    logging.getLogger("ray.data.exceptions").setLevel(logging.CRITICAL)


def disconnect() -> None:
    """Stop the Ray that `connect` started, or leave the cluster that it joined, which ends this process's work there.

    A connection that was open before `connect` stays open.
    """
    global _connected_here
    if _connected_here:
        ray.shutdown()
        _connected_here = False


@contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Restore the handler of SIGTERM that ``ray.init`` replaces: by it a flow learns that it is cancelled."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(handler) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def map_tables(tables: Iterable[pa.Table], function: Callable[[pa.Table], pa.Table]) -> Iterator[pa.Table]:
    """Apply a function to each table on the cluster; results come as they are ready, in any order.

    Args:
        tables: Small tables (references and metadata, not pixels); each is one task.
        function: Pure but for files it reads or writes.

    Raises:
        Exception: What the function raised, as itself and not as Ray's wrapper.
    """
    connect()
    dataset = ray.data.from_arrow(list(tables)).map_batches(
        function, batch_format="pyarrow", batch_size=None, zero_copy_batch=True
    )
    try:
        yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow")
    except RayTaskError as error:
        raise own_error(error) from None


def own_error(error: BaseException) -> BaseException:
    """The exception that a task raised, out of Ray's wrappers."""
    while isinstance(error, RayTaskError) and isinstance(getattr(error, "cause", None), BaseException):
        error = error.cause
    return error
