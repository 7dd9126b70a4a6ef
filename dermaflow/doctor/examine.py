"""The whole examination, in order."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from dermaflow import storage
from dermaflow.doctor import machine, packages, services
from dermaflow.doctor.checks import Check, looked
from dermaflow.settings import settings


def examine(
    *,
    places: Sequence[str] = (),
    ports: Sequence[int] = (),
    certificates: Sequence[str] = (),
    authority: str | None = None,
    constraints: Path | None = None,
) -> Iterator[Check]:
    """Look at this machine and at what its settings name; each line comes as it is found.

    Args:
        places: Folders or ``s3://`` prefixes that are to be written, beside the registry.
        ports: Ports that a server is to listen on.
        certificates: PEM files and ``https://`` addresses, beside those of Prefect and the object store.
        authority: Certificates that servers are held to, PEM.
        constraints: File of tested versions.
    """
    clocks = services.Clocks()
    yield from looked("packages", lambda: packages.check_packages(constraints or packages.default_constraints()))
    yield from looked("processors", machine.check_processors)
    yield from looked("memory", machine.check_memory)
    written = [settings().registry, *places]
    local = [Path(place) for place in written if not storage.is_remote(place)]
    yield from looked("disk", lambda: machine.check_disk([Path(), *local]))
    yield from looked("gpu", machine.check_gpus)
    if (data := settings().data) is not None:
        yield from looked("DERMAFLOW_DATA", lambda: services.check_readable("DERMAFLOW_DATA", str(data)))
    for name, place in (("DERMAFLOW_REGISTRY", settings().registry), *(("storage", place) for place in places)):
        yield from looked(name, lambda name=name, place=place: services.check_writable(name, place))  # type: ignore[misc]
    yield from looked("prefect", lambda: services.check_prefect(clocks))
    yield from looked("ray", lambda: services.check_ray(clocks))
    yield from looked("ports", lambda: machine.check_ports(ports))
    own = [services.prefect_settings(os.environ).get("PREFECT_API_URL", ""), os.environ.get("AWS_ENDPOINT_URL", "")]
    served = [url for url in own if url.startswith("https://")]
    yield from looked("certificates", lambda: services.check_certificates([*certificates, *served], authority))
    yield from looked("clock", lambda: services.check_clock(clocks))
