"""Begin a run of bulk scoring: resolve the model, list the source, write the plan; or find the plan that is there."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dermaflow import __version__, storage
from dermaflow.bundles.bundle import parse_bundle, read_description
from dermaflow.bundles.registry import CHAMPION, Registry
from dermaflow.bundles.small import shipped_model
from dermaflow.errors import BundleError, DataError, RegistryError, StorageError
from dermaflow.schemas.bundle import BUNDLE_NAME, Bundle
from dermaflow.scoring.archives import unpack
from dermaflow.scoring.naming import Names
from dermaflow.scoring.patients import image_lesions
from dermaflow.scoring.plan import (
    INPUTS,
    PLAN,
    UNPACKED,
    Options,
    Plan,
    check_same_run,
    read_plan,
    write_plan,
)
from dermaflow.scoring.references import INPUT_SCHEMA, Reference, Source
from dermaflow.scoring.sources import Skip, fingerprint, identify, list_inputs
from dermaflow.settings import settings

log = logging.getLogger(__name__)

MOST_ROWS, FEWEST_ROWS = 512, 16
"""Inputs of a part: about a second of work or two, and never so few that writing them costs more than scoring."""
PARTS_AIMED_AT = 64
"""Of a small source, so that several workers end at the same time."""
PART_BYTES = 256 << 20
"""A part ends before this: what a kill costs is read again."""
_SPOOLED = 8192  # references written to the spool at a time
_SPOOL = pa.schema([*INPUT_SCHEMA, ("path", pa.string())])


@dataclass(frozen=True)
class Model:
    """A model that can be loaded from anywhere: `uri` is absolute or s3://."""

    name: str
    uri: str
    sha256: str
    bundle: Bundle


def resolve_model(model: str) -> Model:
    """A bundle folder or address as it is; anything else is a version of the registry.

    Where there is no registry yet, the champion is the model that comes with DermaFlow.

    Raises:
        RegistryError: The registry does not know it.
        BundleError: It is damaged or has no calibration.
    """
    uri = _absolute(model)
    if "://" in model or storage.exists(storage.join(uri, BUNDLE_NAME)):
        name = ""
    else:
        registry = Registry(_absolute(settings().registry))
        try:
            version = registry.show(model)
            uri, name = storage.join(registry.uri, "models", version.id), version.id
        except RegistryError:
            if model != CHAMPION or registry.list():
                raise
            uri, name = str(shipped_model()), ""
            log.warning(
                "the registry %s is empty: using the model that comes with DermaFlow, for research only",
                settings().registry,
            )
    content, sha256 = read_description(uri)
    bundle = parse_bundle(content, where=uri)
    if bundle.calibration is None:
        raise BundleError("no calibration", where=uri, todo="run dermaflow calibrate")
    return Model(name or bundle.name, uri, sha256, bundle)


def model_of_run(model: str, out: str) -> Model:
    """The model to score into a folder with: the champion of a run is the one it was begun with.

    So a run that was cut off can go on, and one that is finished stays so, when another model is promoted meanwhile.

    Args:
        model: See `resolve_model`.
        out: Folder of the run, absolute or s3://.

    Raises:
        RegistryError, BundleError: As `resolve_model`.
    """
    plan = read_plan(out) if model == CHAMPION else None
    if plan is None:
        return resolve_model(model)
    begun = resolve_model(plan.model_uri)
    log.info(
        "%s was begun with the model %s, and keeps it; another folder is scored with the champion", out, plan.model
    )
    return Model(plan.model, begun.uri, begun.sha256, begun.bundle)


def begin(
    source: str, out: str, model: Model, patients: str | None, options: Options,
    listed: Callable[[int], None] = lambda count: None,
) -> Plan:  # fmt: skip
    """The plan of a run: the one in its folder, or a new one.

    Args:
        source: See `dermaflow.scoring.sources`.
        out: Folder of the run, absolute or s3://.
        model: From `resolve_model`.
        patients: Table of patients, absolute or s3://.
        options: Choices.
        listed: Called now and then with the number of inputs found so far.

    Raises:
        DataError: The source is empty or cannot be read, or the folder belongs to another run.
        StorageError: The folder cannot be written, or the store does not answer.
    """
    known = read_plan(out)
    what = identify(source)
    skip = _not_of_the_source(out, patients)
    plan = Plan(
        source=what.uri, kind=what.kind, fingerprint=fingerprint(what, skip), model=model.name, model_uri=model.uri,
        model_sha256=model.sha256, patients=patients, options=options, inputs=0, parts=0, ignored=0,
        patients_sha256=storage.sha256_file(patients) if patients else None,
        created=datetime.now(UTC).isoformat(timespec="seconds"), dermaflow_version=__version__,
    )  # fmt: skip
    if known is not None:
        check_same_run(known, plan, out)
        return known
    if storage.list_folder(storage.join(out, "parts")):
        raise StorageError(
            f"holds parts, and no {PLAN}", where=out, expected="an empty folder", todo="choose another folder"
        )
    lesions = image_lesions(patients) if patients else {}
    if what.kind == "packed_tar":
        plain = storage.join(out, UNPACKED)
        if not storage.exists(plain):
            unpack(what.uri, plain, options.limits)
        what = Source(plain, "tar")
    with tempfile.TemporaryDirectory(prefix="dermaflow-list-") as folder:
        spool = Path(folder, "references.parquet")
        names = Names(lesions)
        inputs, ignored = _spool(list_inputs(what, options.limits, skip), spool, names, listed)
        if not inputs:
            raise DataError("holds no file", where=source, expected="at least one image")
        for reference in _spooled(spool):
            names.settle(reference)
        size = options.part_size or min(MOST_ROWS, max(FEWEST_ROWS, inputs // PARTS_AIMED_AT))
        parts = _write_inputs(_spooled(spool), names, out, size)
    plan = plan.model_copy(update={"inputs": inputs, "parts": parts, "ignored": ignored})
    write_plan(out, plan)
    return plan


def _absolute(address: str) -> str:
    return address if storage.is_remote(address) else str(Path(address).expanduser().absolute())


def _not_of_the_source(out: str, patients: str | None) -> Skip:
    """The folder of the run and the table of patients may lie in the folder that is scored."""
    others = {_absolute(place).rstrip("/") for place in (out, patients) if place}
    return lambda uri: uri in others


def _spool(
    found: Iterator[Reference | None], spool: Path, names: Names, listed: Callable[[int], None]
) -> tuple[int, int]:
    """Write references to a file and learn their names; returns how many there are, and how many were ignored."""
    count, ignored, rows = 0, 0, []
    try:
        with pq.ParquetWriter(spool, _SPOOL) as writer:
            for reference in found:
                if reference is None:
                    ignored += 1
                    continue
                names.learn(reference)
                rows.append({name: getattr(reference, name) for name in _SPOOL.names})
                count += 1
                if len(rows) == _SPOOLED:
                    writer.write_table(pa.Table.from_pylist(rows, _SPOOL))
                    rows = []
                    listed(count)
            if rows:
                writer.write_table(pa.Table.from_pylist(rows, _SPOOL))
    except OSError as error:
        raise StorageError(
            f"could not write: {error.strerror or error}", where=spool, expected="a disk with free space for the list",
            todo="free space or set TMPDIR, then run the same command again",
        ) from error  # fmt: skip
    listed(count)
    return count, ignored


def _spooled(spool: Path) -> Iterator[Reference]:
    with pq.ParquetFile(spool) as file:
        for batch in file.iter_batches(_SPOOLED):
            for row in batch.to_pylist():
                yield Reference(**row)


def _write_inputs(references: Iterator[Reference], names: Names, out: str, part_size: int) -> int:
    """Write ``inputs.parquet``, one row group a part; returns the number of parts."""
    parts, size = 0, 0
    rows: list[dict[str, object]] = []
    with (
        storage.open_atomic(storage.join(out, INPUTS)) as stream,
        pq.ParquetWriter(stream, INPUT_SCHEMA, compression="zstd") as writer,
    ):
        for number, reference in enumerate(references):
            length = 0 if reference.frame else reference.bytes or 0  # frames share a file, which is read once
            if rows and (len(rows) == part_size or size + length > PART_BYTES):
                writer.write_table(pa.Table.from_pylist(rows, INPUT_SCHEMA))
                parts, rows, size = parts + 1, [], 0
            row = {name: getattr(reference, name) for name in INPUT_SCHEMA.names}
            row["image_id"], row["lesion_id"] = names.name(reference, number)
            rows.append(row)
            size += length
        if rows:
            writer.write_table(pa.Table.from_pylist(rows, INPUT_SCHEMA))
            parts += 1
    return parts
