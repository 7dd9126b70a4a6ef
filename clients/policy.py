"""What a site allows, decided at the site: `policy.yaml` in its folder, read again for every message.

The coordinator proposes, the site disposes: which code may run there, how much of the network may be trained on its
images, when, for how many rounds, with how many images of a class and with what guarantee of differential privacy.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime, time
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from dermaflow import storage
from dermaflow.errors import DermaflowError

NAME = "policy.yaml"
Scope = Literal["head", "last_block", "all"]  # as in dermaflow.learning.optimisation, which takes seconds to import
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class PolicyError(DermaflowError):
    """The policy cannot be read, or says something that makes no sense."""


class Refused(DermaflowError):
    """A site does not do what it was asked. The text goes to the coordinator, so it names no data of the site."""


class Hours(BaseModel):
    """A part of the day, local time; `end` before `start` means over midnight."""

    model_config = ConfigDict(extra="forbid")

    start: time
    end: time

    def hold(self, moment: time) -> bool:
        """Whether the moment lies within; the end no longer does."""
        if self.start <= self.end:
            return self.start <= moment < self.end
        return moment >= self.start or moment < self.end


class Policy(BaseModel):
    """Everything a site can allow or refuse. The defaults let nobody run anything."""

    model_config = ConfigDict(extra="forbid")

    approved_apps: list[Sha256] = Field([], description="SHA-256 of each app (FAB) that may run here")
    allowed_strategies: list[str] = Field([], description="strategies by name")
    allowed_scopes: list[Scope] = Field([], description="how much of the network may be trained here")
    max_rounds: int = Field(0, ge=0, description="most rounds of a run")
    hours: Hours | None = Field(None, description="only in this part of the day, local time")
    min_images_per_class: int = Field(
        0, ge=0, description="training images of every diagnosis that is there at all: few images speak of few persons"
    )
    secure_only: bool = Field(False, description="updates and sums leave only under secure aggregation")
    max_epsilon: float | None = Field(
        None, gt=0, description="noise of this site's own must guarantee at most this epsilon, over all runs together"
    )
    delta: float = Field(1e-5, gt=0, lt=1, description="at which max_epsilon is meant")


def app_refusal(policy: Policy, sha256: str) -> str | None:
    """Why an app may not run here, or None if it may.

    Args:
        policy: Of the site.
        sha256: Hex SHA-256 of the app's bytes, computed at the site.
    """
    if sha256 in policy.approved_apps:
        return None
    return f"app {sha256} is not approved at this site"


def refusal(
    policy: Policy, *, strategy: str, scope: str, round: int, rounds: int, epsilon: float | None,
    class_counts: Mapping[str, int], now: datetime, secure: bool = False,
) -> str | None:  # fmt: skip
    """Why a round may not be trained here, in one sentence, or None if it may.

    The sentence goes to the coordinator: it names no count of the site.

    Args:
        policy: Of the site.
        strategy: How the updates are brought together.
        scope: What is trained and sent: ``head``, ``last_block`` or ``all``.
        round: The round, from 1; 0 for questions before the first.
        rounds: Rounds of the run.
        epsilon: Of the guarantee that noise of the site's own gives in the run; None without such noise.
        class_counts: Training images by diagnosis.
        now: Local time at the site.
        secure: Whether the answer is masked, or none that could be.
    """
    if strategy not in policy.allowed_strategies:
        return f"strategy {strategy} is not allowed at this site, only {_listed(policy.allowed_strategies)}"
    if scope not in policy.allowed_scopes:
        return f"scope {scope} is not allowed at this site, only {_listed(policy.allowed_scopes)}"
    if max(round, rounds) > policy.max_rounds:
        return f"{max(round, rounds)} rounds are more than the {policy.max_rounds} that this site allows"
    if policy.hours is not None and not policy.hours.hold(now.time()):
        return f"this site takes part from {policy.hours.start:%H:%M} to {policy.hours.end:%H:%M} local time only"
    if policy.secure_only and not secure:
        return "this site answers under secure aggregation only (secure=true)"
    if policy.max_epsilon is not None and epsilon is None:
        return f"this site demands differential privacy with epsilon of at most {policy.max_epsilon:g}"
    if policy.max_epsilon is not None and epsilon is not None and epsilon > policy.max_epsilon:
        return f"epsilon {epsilon:g} is above the {policy.max_epsilon:g} that this site allows"
    if few := sorted(dx for dx, count in class_counts.items() if 0 < count < policy.min_images_per_class):
        return f"this site has too few images of {_listed(few)} for its policy"
    return None


def _listed(names: list[str] | list[Scope]) -> str:
    return " ".join(names) or "none"


def load_policy(folder: str | Path) -> Policy:
    """Read the policy of a site's folder.

    Raises:
        PolicyError: The file is missing, is no YAML, or holds an unknown key or an impossible value.
    """
    path = Path(folder) / NAME
    try:
        return _parse(path.read_text(), path)
    except (OSError, UnicodeDecodeError) as error:
        raise PolicyError(str(error), where=path, expected="a policy", todo="make one: dermaflow site init") from error


def _parse(text: str, path: Path) -> Policy:
    try:
        return Policy.model_validate(yaml.safe_load(text) or {})
    except yaml.YAMLError as error:
        raise PolicyError(f"no YAML: {error}", where=path) from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise PolicyError(
            f"{place}: {first['msg']}, found {first['input']!r}" if place else first["msg"], where=path,
            expected=f"keys {' '.join(Policy.model_fields)}", todo="correct the file",
        ) from error  # fmt: skip


def approve(folder: str | Path, sha256: str, note: str) -> bool:
    """Add an app to the approved ones; the rest of the file, comments included, stays as it is.

    Args:
        folder: Of the site.
        sha256: Hex SHA-256 of the app.
        note: Comment behind it, one line.

    Returns:
        Whether it is new.

    Raises:
        PolicyError: This is no SHA-256, or the list is written in a way that is not changed by program.
    """
    path, sha256 = Path(folder) / NAME, sha256.strip().lower()
    if not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise PolicyError(f"{sha256!r} is no SHA-256", where="HASH", expected="64 hexadecimal digits")
    if sha256 in load_policy(folder).approved_apps:
        return False
    line = f"  - {sha256}  # {note.splitlines()[0] if note else 'approved'}\n"
    before = path.read_text().rstrip("\n") + "\n"
    text, found = re.subn(r"(?m)^approved_apps:[ \t]*(?:\[\])?[ \t]*\n", f"approved_apps:\n{line}", before, count=1)
    try:
        whole = found == 1 and sha256 in _parse(text, path).approved_apps
    except PolicyError:
        whole = False
    if not whole:
        raise PolicyError(
            "approved_apps is not written as a list with a line for each app", where=path,
            todo=f"add the line '- {sha256}' by hand",
        )  # fmt: skip
    storage.write_bytes(path, text.encode())
    return True


TEMPLATE = """\
# What this site allows. Read again for every message: a change holds at once, also in a run under way.

# Which code may run here: the SHA-256 of each app, one a line. `dermaflow site approve HASH` adds one; take a line out
# to withdraw it. Empty: nothing runs.
approved_apps: []

# How updates may be brought together.
allowed_strategies: [fedavg, fedprox, fedavgm, fedadam, fedyogi, scaffold, trimmed_mean, median, krum]

# How much of the network may be trained on this site's images and sent: head, last_block, all.
allowed_scopes: [head, last_block, all]

# Most rounds of a run.
max_rounds: 100

# Only in this part of the day, local time; over midnight if the end comes first.
# hours: {start: "20:00", end: "06:00"}

# Training images that every diagnosis must have here, if it is here at all. Few images speak of few persons.
min_images_per_class: 0

# Let updates and sums leave only under secure aggregation, so that the coordinator sees those of all sites together.
# secure_only: true

# Take part only in runs in which this site adds noise of its own (dp=lesion or dp=site), so that all runs together
# guarantee differential privacy with at most this epsilon at this delta. What is spent lies in state/privacy.json.
# max_epsilon: 8.0
# delta: 1.0e-5
"""
