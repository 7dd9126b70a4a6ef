"""The door to Ray for preparation and training: connect, map over tables, unwrap errors."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator

import pyarrow as pa

from dermaflow.settings import settings

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # the coming default, without its warning

import ray
import ray.data
from ray.exceptions import RayTaskError

log = logging.getLogger(__name__)


def connect(cpus: int | None = None) -> None:
    """Use the Ray that is there (``RAY_ADDRESS`` or an open connection), or start one on this machine, quietly.

    Args:
        cpus: CPUs of a Ray started here; by default those of ``DERMAFLOW_THREADS``. Ignored on an existing cluster.
    """
    if not ray.is_initialized():
        if os.environ.get("RAY_ADDRESS"):
            ray.init(log_to_driver=False)
        else:
            ray.init(
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
    logging.getLogger("ray.data").setLevel(logging.WARNING)


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
