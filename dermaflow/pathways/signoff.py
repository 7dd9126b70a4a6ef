"""Sign-off: a named clinician accepts, edits or rejects a pathway, and an append-only log keeps every decision.

``audit.jsonl`` holds one entry a line. Each entry names the hash of the one before it, so a line that is changed, moved
or removed breaks the chain; ``audit.head.json`` keeps number and hash of the last entry, so removed last lines are
found too. Both together can be forged by someone who may write the folder: keep a copy of the head elsewhere.

An entry is about one exact pathway, named by its hash. When other inputs or another model give another pathway, the
earlier sign-off stays in the log and no longer holds.

When a person is forgotten, their ids in earlier entries become pseudonyms. Such an entry keeps its hash, so the chain
stays whole, and a `Forgetting` later in the chain names that hash and the one of the new content: any other change of
an entry is still found.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from dermaflow import storage
from dermaflow.errors import SignOffError
from dermaflow.locks import locked
from dermaflow.schemas.pathway import Pathway, SignOff

LOG_NAME, HEAD_NAME, LOCK_NAME = "audit.jsonl", "audit.head.json", "audit.lock"
FIRST = "0" * 64
"""What the first entry names as the one before it."""

MAX_NAME, MAX_REASON = 120, 2000  # characters
REMOVED = "(removed)"  # what stands for the reason of a decision about someone who was forgotten
Decision = Literal["accepted", "edited", "rejected"]


class Entry(BaseModel):
    """One decision about one pathway."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    sequence: int  # from 1
    at: str  # ISO 8601, UTC
    by: str
    decision: Decision
    reason: str | None
    patient_id: str
    lesion_id: str
    pathway_sha256: str
    model_sha256: str
    knowledge_sha256: str
    dermaflow: str
    amends: str | None  # sha256 of the entry about this lesion that this one follows
    previous: str
    sha256: str = ""  # of all other fields

    def digest(self) -> str:
        """The hash this entry should have."""
        return _hash(self.model_dump(exclude={"sha256"}))


class Redacted(BaseModel):
    """An earlier entry whose ids were replaced."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sequence: int
    sha256: str  # of the entry as it was written, which it keeps
    content: str  # digest of the entry as it is now


class Forgetting(BaseModel):
    """That entries about someone were made to name nobody; `dermaflow data forget` writes it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sequence: int
    at: str  # ISO 8601, UTC
    by: str
    event: Literal["forgotten"] = "forgotten"
    entries: tuple[Redacted, ...]
    previous: str
    sha256: str = ""

    def digest(self) -> str:
        """The hash this entry should have."""
        return _hash(self.model_dump(mode="json", exclude={"sha256"}))


_LINE: TypeAdapter[Entry | Forgetting] = TypeAdapter(Entry | Forgetting)


class _Chain(NamedTuple):
    """What a log holds."""

    lines: list[Entry | Forgetting]
    whole: int  # bytes of the file that they are

    @property
    def decisions(self) -> list[Entry]:
        return [line for line in self.lines if isinstance(line, Entry)]


def fingerprint(pathway: Pathway) -> str:
    """SHA-256 of a pathway as it was computed, whatever was signed since."""
    return _hash(pathway.model_copy(update={"status": "preliminary", "sign_off": None}).model_dump(mode="json"))


def read_log(folder: Path) -> list[Entry]:
    """All decisions in order, each checked against the chain; empty if none was made.

    Raises:
        SignOffError: A line was changed, moved or removed; the message names the first one.
    """
    return _read(folder).decisions


class AuditLog:
    """The log of one folder, held by this process alone; get it from `open_log`."""

    def __init__(self, folder: Path) -> None:
        self._path, self._head = folder / LOG_NAME, folder / HEAD_NAME
        chain = _read(folder)
        self.entries, self._lines, self._whole = chain.decisions, chain.lines, chain.whole

    def sign(
        self, pathway: Pathway, *, by: str, decision: str, reason: str | None = None, at: datetime | None = None
    ) -> Entry:
        """Append a decision; it is on disk when this returns.

        Args:
            pathway: The pathway as shown to the clinician.
            by: Name of the clinician.
            decision: ``accepted``, ``edited`` or ``rejected``.
            reason: Needed unless accepted, and for every decision that amends an earlier one.
            at: Time of the decision, with time zone; default now.

        Raises:
            SignOffError: The name, the decision or the reason is missing or wrong.
            StorageError: The log could not be written.
        """
        name, reason = _checked_name(by), _checked_reason(reason)
        about = (pathway.patient_id, pathway.lesion_id)
        earlier = next((e for e in reversed(self.entries) if (e.patient_id, e.lesion_id) == about), None)
        if decision not in get_args(Decision):
            raise SignOffError(f"decision {decision!r}", expected="accepted, edited or rejected")
        if reason is None and decision != "accepted":
            raise SignOffError(f"{decision} without a reason", where=pathway.lesion_id, todo="say why with --reason")
        if reason is None and earlier:
            raise SignOffError(
                f"already {earlier.decision} by {earlier.by} at {earlier.at}", where=pathway.lesion_id,
                expected="a reason for an amendment",
                todo="say why with --reason; the earlier sign-off stays in the log",
            )  # fmt: skip
        entry = Entry(
            sequence=len(self._lines) + 1, at=(at or datetime.now(UTC)).astimezone(UTC).isoformat(timespec="seconds"),
            by=name, decision=decision, reason=reason, patient_id=pathway.patient_id, lesion_id=pathway.lesion_id,
            pathway_sha256=fingerprint(pathway), model_sha256=pathway.versions.model_sha256,
            knowledge_sha256=pathway.versions.knowledge_sha256, dermaflow=pathway.versions.dermaflow,
            amends=earlier.sha256 if earlier else None, previous=self._last(),
        )  # fmt: skip
        entry = entry.model_copy(update={"sha256": entry.digest()})
        self._append(entry)
        self.entries.append(entry)
        return entry

    def forget(self, about: Callable[[Entry], bool], pseudonym: Callable[[str], str], *, by: str) -> int:
        """Put pseudonyms in place of the ids in the entries about someone, and take their reasons out.

        First the chain gets an entry that allows it, then the file is replaced as a whole: killed between the two, the
        log is whole, and doing it again finishes it.

        Args:
            about: Whether an entry is one of them.
            pseudonym: What stands for an id from now on.
            by: Who has it done.

        Returns:
            Number of entries changed.

        Raises:
            StorageError: The log could not be written.
        """
        redacted: dict[int, Entry] = {}
        for entry in filter(about, self.entries):
            ids = {"patient_id": pseudonym(entry.patient_id), "lesion_id": pseudonym(entry.lesion_id)}
            redacted[entry.sequence] = entry.model_copy(update=ids | {"reason": entry.reason and REMOVED})
        if not redacted:
            return 0
        note = Forgetting(
            sequence=len(self._lines) + 1, at=datetime.now(UTC).isoformat(timespec="seconds"), by=by,
            previous=self._last(),
            entries=tuple(Redacted(sequence=n, sha256=e.sha256, content=e.digest()) for n, e in redacted.items()),
        )  # fmt: skip
        self._append(note.model_copy(update={"sha256": note.digest()}))
        self._lines = [redacted.get(line.sequence, line) for line in self._lines]
        self.entries = [line for line in self._lines if isinstance(line, Entry)]
        content = b"".join(line.model_dump_json().encode() + b"\n" for line in self._lines)
        storage.write_bytes(self._path, content)
        self._whole = len(content)
        return len(redacted)

    def _last(self) -> str:
        return self._lines[-1].sha256 if self._lines else FIRST

    def _append(self, entry: Entry | Forgetting) -> None:
        line = entry.model_dump_json().encode() + b"\n"
        try:
            with self._path.open("ab") as stream:
                if stream.tell() > self._whole:  # a write that was cut off and never confirmed
                    stream.truncate(self._whole)
                stream.write(line)
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise SignOffError(f"not signed: {error.strerror}", where=self._path, expected="a writable disk") from error
        self._whole += len(line)
        self._lines.append(entry)
        # the head follows the log: after a crash between the two the log is one entry ahead, which is no damage
        storage.write_bytes(self._head, json.dumps({"entries": entry.sequence, "sha256": entry.sha256}).encode())


@contextmanager
def open_log(folder: Path) -> Iterator[AuditLog]:
    """The log of a folder, locked against every other process until the block ends.

    Raises:
        SignOffError: The folder is not there, or the log was tampered with.
    """
    if not folder.is_dir():
        raise SignOffError("no such folder", where=folder, expected="a folder that `dermaflow recommend` wrote")
    with locked(folder / LOCK_NAME):
        yield AuditLog(folder)


def apply_sign_offs(pathways: Iterable[Pathway], entries: Iterable[Entry]) -> list[Pathway]:
    """Give every pathway the status that its last sign-off gave it; one without a sign-off is preliminary."""
    last = {(e.patient_id, e.lesion_id, e.pathway_sha256): e for e in entries}
    about = {key[:2] for key in last}
    return [
        _signed(p, last.get((*key, fingerprint(p))) if (key := (p.patient_id, p.lesion_id)) in about else None)
        for p in pathways
    ]


def outdated(pathways: Iterable[Pathway], entries: Iterable[Entry]) -> list[Pathway]:
    """Pathways that are not signed, though an earlier version of them was."""
    about = {(e.patient_id, e.lesion_id) for e in entries}
    return [p for p in pathways if p.sign_off is None and (p.patient_id, p.lesion_id) in about]


def _signed(pathway: Pathway, entry: Entry | None) -> Pathway:
    if entry is None:
        return pathway.model_copy(update={"status": "preliminary", "sign_off": None})
    sign_off = SignOff(by=entry.by, at=entry.at, decision=entry.decision, reason=entry.reason)
    status = "rejected" if entry.decision == "rejected" else "final"
    return pathway.model_copy(update={"status": status, "sign_off": sign_off})


def _read(folder: Path) -> _Chain:
    path = folder / LOG_NAME
    head = _read_head(folder / HEAD_NAME)  # before the log, which may grow meanwhile
    content = path.read_bytes() if path.exists() else b""
    *texts, rest = content.split(b"\n")
    lines: list[Entry | Forgetting] = []
    changed: list[Entry] = []
    previous = FIRST
    for number, text in enumerate(texts, 1):
        try:
            line = _LINE.validate_json(text)
        except ValidationError:
            raise _tampered(path, number, "is no entry of an audit log") from None
        if line.previous != previous or line.sequence != number:
            raise _tampered(path, number, "does not follow the line before: a line was removed, added or moved")
        if line.sha256 != line.digest():
            if not isinstance(line, Entry):
                raise _changed(path, number)
            changed.append(line)
        lines.append(line)
        previous = line.sha256
    allowed = {redacted for line in lines if isinstance(line, Forgetting) for redacted in line.entries}
    for entry in changed:
        if Redacted(sequence=entry.sequence, sha256=entry.sha256, content=entry.digest()) not in allowed:
            raise _changed(path, entry.sequence)
    if head and (len(lines) < head[0] or lines[head[0] - 1].sha256 != head[1]):
        raise _tampered(path, len(lines) + 1, f"is missing: {HEAD_NAME} says that {head[0]} entries were written")
    return _Chain(lines, len(content) - len(rest))


def _read_head(path: Path) -> tuple[int, str] | None:
    if not path.exists():
        return None
    try:
        head = json.loads(path.read_bytes())
        return int(head["entries"]), str(head["sha256"])
    except (ValueError, KeyError, TypeError):
        raise SignOffError("not readable", where=path, todo="put it back from a backup, with the log") from None


def _changed(path: Path, number: int) -> SignOffError:
    return _tampered(path, number, "was changed: its content does not have its hash")


def _tampered(path: Path, number: int, what: str) -> SignOffError:
    return SignOffError(
        f"line {number} {what}", where=path, expected="an unbroken chain of entries",
        todo="find out who changed it, and put the log back from a backup; nothing is signed meanwhile",
    )  # fmt: skip


def _checked_name(by: str) -> str:
    name = " ".join(by.split())
    if sum(letter.isalpha() for letter in name) < 2 or not name.isprintable() or len(name) > MAX_NAME:
        raise SignOffError(
            "no name of a clinician", where="--by", expected=f"a person's name, up to {MAX_NAME} characters",
            todo="give the name of the person who decides",
        )  # fmt: skip
    return name


def _checked_reason(reason: str | None) -> str | None:
    text = (reason or "").strip()
    if len(text) > MAX_REASON:
        raise SignOffError(f"{len(text)} characters", where="--reason", expected=f"at most {MAX_REASON}")
    return text or None


def _hash(content: object) -> str:
    return storage.sha256(json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode())
