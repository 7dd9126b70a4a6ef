"""This machine: processors, memory, disks, GPUs, ports, limits of processes."""

from __future__ import annotations

import errno
import os
import shutil
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

from dermaflow.doctor.checks import Check, ok, problem, warning
from dermaflow.settings import settings

GIB = 1 << 30
LEAST_MEMORY, SMALL_MEMORY = 2 * GIB, 6 * GIB
"""A training process of the recipe ham10000-cpu takes about 2 GiB; Ray, Serve and a batch beside it need the rest."""
LEAST_DISK, SMALL_DISK = GIB, 10 * GIB
"""Shards of HAM10000 as published are 3 GiB, and prepared anew beside the old ones before those go."""
SMALL_SHM = 2 * GIB  # Ray's object store; where it does not fit into /dev/shm it goes to disk, at a tenth of the speed
FEW_FILES = 4096  # open files; a Ray cluster of one machine holds about a thousand


def check_processors() -> Iterator[Check]:
    """CPUs that this process may use, and the threads it was told to take."""
    may, threads = usable_cpus(), settings().threads
    found = f"{may:g} of {os.cpu_count()} CPUs may be used, DERMAFLOW_THREADS {threads}"
    if threads > max(1, round(may)):
        yield warning(
            "processors", found, f"export DERMAFLOW_THREADS={max(1, int(may))}: more only wait for each other"
        )
    else:
        yield ok("processors", found)
    own = os.environ.get("OMP_NUM_THREADS", "")
    if own.isdigit() and int(own) > max(1, round(may)):
        yield warning("OMP_NUM_THREADS", own, f"at most {max(1, int(may))}, or leave it out")


def usable_cpus() -> float:
    """CPUs of this process: what the scheduler allows, and the quota of its control group."""
    may = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    quota, _, period = _control_group("cpu.max").partition(" ")
    return min(may, int(quota) / int(period)) if quota.isdigit() and period.isdigit() else may


def _control_group(name: str) -> str:
    try:
        return (Path("/sys/fs/cgroup") / name).read_text().strip()
    except OSError:
        return ""


def check_memory() -> Iterator[Check]:
    """Memory that is free for this process, Ray's shared memory, and open files."""
    free = free_memory()
    if free is None:
        yield warning("memory", "not known on this system", f"see that {SMALL_MEMORY // GIB} GiB are free")
    elif free < LEAST_MEMORY:
        yield problem("memory", f"{free / GIB:.1f} GiB free", f"free {LEAST_MEMORY // GIB} GiB, or use --workers 1")
    elif free < SMALL_MEMORY:
        yield warning("memory", f"{free / GIB:.1f} GiB free", "train and score with --workers 1 or 2")
    else:
        yield ok("memory", f"{free / GIB:.1f} GiB free")
    shared = Path("/dev/shm")
    if shared.is_dir():
        size = shutil.disk_usage(shared).total
        todo = "a container gets more with --shm-size=2g"
        found = f"/dev/shm {size / GIB:.1f} GiB"
        yield warning("shared memory", found, todo) if size < SMALL_SHM else ok("shared memory", found)
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < FEW_FILES:
        yield warning("open files", f"{soft} allowed", f"ulimit -n {FEW_FILES if hard < 0 else min(hard, 65536)}")
    else:
        yield ok("open files", f"{'any number' if soft == resource.RLIM_INFINITY else soft} allowed")


def free_memory() -> int | None:
    """Bytes that this process can still take: of the machine, and within the limit of its control group."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    except OSError:
        return None
    free = int(lines["MemAvailable"].split()[0]) * 1024
    limit, used = _control_group("memory.max"), _control_group("memory.current")
    return min(free, max(0, int(limit) - int(used))) if limit.isdigit() and used.isdigit() else free


def check_disk(folders: Sequence[Path]) -> Iterator[Check]:
    """Free space where work is written; folders on one disk are one line."""
    seen: dict[int, tuple[Path, int]] = {}
    for folder in folders:
        there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        seen.setdefault(there.stat().st_dev, (there, shutil.disk_usage(there).free))
    for place, free in seen.values():
        found = f"{free / GIB:.1f} GiB free at {place}"
        if free < LEAST_DISK:
            yield problem("disk", found, "free space, or write elsewhere: what is done stays, and work goes on later")
        elif free < SMALL_DISK:
            yield warning("disk", found, "enough for a model and its report; free more before preparing an archive")
        else:
            yield ok("disk", found)


def check_gpus() -> Iterator[Check]:
    """GPUs that PyTorch can compute on, tried with a small product, and what DERMAFLOW_DEVICE asks for."""
    import torch

    wanted = settings().device
    driver = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        if wanted.startswith("cuda"):
            yield problem("gpu", f"DERMAFLOW_DEVICE is {wanted}, and PyTorch {torch.__version__} finds no GPU",
                          "install the driver and a CUDA build of PyTorch, or set DERMAFLOW_DEVICE=auto")  # fmt: skip
        elif driver:
            yield warning("gpu", f"a driver is there, and PyTorch {torch.__version__} finds no GPU",
                          "install the CUDA build of PyTorch that fits the driver (nvidia-smi)")  # fmt: skip
        else:
            yield ok("gpu", f"none; PyTorch {torch.__version__} computes on the CPU")
        return
    for number in range(count):
        name, total = torch.cuda.get_device_name(number), torch.cuda.get_device_properties(number).total_memory
        try:
            square = torch.eye(8, device=f"cuda:{number}")
            works = bool(torch.equal(square @ square, square))
        except RuntimeError as error:
            yield problem(f"gpu {number}", f"{name}: {error}", "reset it or leave it out: CUDA_VISIBLE_DEVICES")
            continue
        free = torch.cuda.mem_get_info(number)[0]
        found = f"{name}, {free / GIB:.0f} of {total / GIB:.0f} GiB free"
        yield (
            ok(f"gpu {number}", found) if works else problem(f"gpu {number}", f"{name} computes wrongly", "replace it")
        )
    if wanted == "cpu":
        yield warning("gpu", "DERMAFLOW_DEVICE is cpu, so none is used", "set DERMAFLOW_DEVICE=auto")


def check_ports(ports: Sequence[int], host: str = "127.0.0.1") -> Iterator[Check]:
    """Whether a server could listen here."""
    for port in ports:
        name = f"port {port}"
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((host, port))
            except OSError as error:
                if error.errno == errno.EACCES:
                    yield problem(name, "may not be opened by this user", "choose one from 1024 on")
                else:
                    yield warning(name, f"taken: something listens on {host}",
                                  "stop it, or give your service another port")  # fmt: skip
                continue
        yield ok(name, "free")
