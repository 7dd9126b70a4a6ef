"""Put the flows on a Prefect server: work pool, deploy/prefect.yaml, deploy/automations.yaml.

Doing it again brings everything up to date and makes nothing twice.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import httpx
import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.events.schemas.automations import AutomationCore
from prefect.exceptions import ObjectNotFound
from prefect.workers.process import ProcessWorker

from dermaflow.errors import DermaflowError

PoolType = Literal["process", "docker", "kubernetes"]
IN_CONTAINER = Path("/var/lib/dermaflow")
"""Working folder of the image of deploy/container."""
ALONE = "models"
"""Queue of runs that write to shards and registry: one at a time."""


class DeployError(DermaflowError):
    """The flows cannot be deployed as asked."""


def deploy(
    folder: Path,
    *,
    pool: str,
    kind: str,
    home: Path | None,
    schedules: bool,
    notify: str | None,
    say: Callable[[str], None],
) -> None:
    """Make or update everything.

    Args:
        folder: With ``prefect.yaml``, ``automations.yaml`` and ``pools/``.
        pool: Name of the work pool; made if it is not there.
        kind: process, docker or kubernetes, for a new pool.
        home: Where relative paths of the deployments begin, on the machine or in the container of a run; default this
            folder, or that of the container image.
        schedules: Whether schedules are active.
        notify: Notification block as ``type/name``, None for no notifications.
        say: Called with a line about each step.

    Raises:
        DeployError: No server, another kind of pool under this name, no such block, or Prefect refused a deployment.
    """
    if kind not in get_args(PoolType):
        raise DeployError(f"type {kind!r}", where="--type", expected=" ".join(get_args(PoolType)))
    file = folder / "prefect.yaml"
    if not file.is_file():
        raise DeployError("no such file", where=file, todo="run it in the project's folder, or name the folder")
    home = home or (Path.cwd() if kind == "process" else IN_CONTAINER)
    url = os.environ.get("PREFECT_API_URL")
    if not url:
        raise DeployError(
            "no server", where="PREFECT_API_URL", expected="the address of a Prefect server, http://HOST:4200/api",
            todo="start one with: prefect server start",
        )  # fmt: skip
    try:
        with get_client(sync_client=True) as client:
            block = None if notify is None else _block(client, notify)
            say(_make_pool(client, folder, pool, kind))
            _prefect_deploy(file, pool, home, schedules)
            say(f"deployments of {file} are in pool {pool}; schedules are {'active' if schedules else 'paused'}")
            _one_at_a_time(client, pool)
            for line in _automations(client, folder / "automations.yaml", block):
                say(line)
    except httpx.TransportError as error:
        raise DeployError(f"does not answer ({type(error).__name__})", where=url, todo="start the server") from error
    except httpx.HTTPStatusError as error:
        raise DeployError(
            f"answers {error.response.status_code}", where=url, expected="a Prefect server that is up",
            todo="wait until it says so (it may be making its database) and deploy again, or look into its log",
        ) from error  # fmt: skip


def _make_pool(client: SyncPrefectClient, folder: Path, pool: str, kind: str) -> str:
    try:
        found = client.read_work_pool(pool)
    except ObjectNotFound:
        template: dict[str, Any] = (
            ProcessWorker.get_default_base_job_template()
            if kind == "process"
            else json.loads((folder / "pools" / f"{kind}.json").read_bytes())
        )
        client.create_work_pool(WorkPoolCreate(name=pool, type=kind, base_job_template=template))
        return f"work pool {pool} of type {kind} is made"
    if found.type != kind:
        raise DeployError(f"is of type {found.type}", where=f"work pool {pool}", expected=kind, todo="name another")
    return f"work pool {pool} of type {kind} is there"


def _prefect_deploy(file: Path, pool: str, home: Path, schedules: bool) -> None:
    """Prefect's own command: what it understands of the file is what counts."""
    chosen = {
        "DERMAFLOW_POOL": pool, "DERMAFLOW_HOME": str(home.absolute()), "DERMAFLOW_SCHEDULES": str(schedules).lower(),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(file)],
        env=os.environ | chosen, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        said = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise DeployError(f"Prefect refused: {' '.join(said[-3:])}", where=file)


def _one_at_a_time(client: SyncPrefectClient, pool: str) -> None:
    for queue in client.read_work_queues(work_pool_name=pool):
        if queue.name == ALONE:
            client.update_work_queue(queue.id, concurrency_limit=1)


def _block(client: SyncPrefectClient, notify: str) -> str:
    """The id of a notification block."""
    kind, _, name = notify.partition("/")
    try:
        return str(client.read_block_document_by_name(name, kind).id)
    except ObjectNotFound:
        raise DeployError(
            f"no block {notify!r}", where="--notify", expected="TYPE/NAME of a notification block",
            todo="make one in Prefect's page under Blocks; its address stays there, encrypted",
        ) from None  # fmt: skip


def _automations(client: SyncPrefectClient, file: Path, block: str | None) -> list[str]:
    wanted = yaml.safe_load(file.read_text(encoding="utf-8"))["automations"]
    lines = []
    for content in wanted:
        messages = [action for action in content["actions"] if action["type"] == "send-notification"]
        if messages and block is None:
            lines.append(f"automation {content['name']!r} is left out: name a block with --notify")
            continue
        for action in messages:
            action["block_document_id"] = block
        automation = AutomationCore.model_validate(content)
        there = client.read_automations_by_name(automation.name)
        if there:
            client.update_automation(there[0].id, automation)
        else:
            client.create_automation(automation)
        lines.append(f"automation {automation.name!r}: {automation.description}")
    return lines
