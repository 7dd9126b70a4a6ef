"""Someone is forgotten: gone from everything, the others as before, the logs whole, a kill anywhere mended."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from serve_parts import a_jpeg, save_servable
from tiny_bundle import REFERENCE, a_bundle, a_calibration, save_tiny
from tiny_data import draw, image_files, metadata, prepare_here, snapshot
from typer.testing import CliRunner

from dermaflow import storage
from dermaflow.audit import entries, verify
from dermaflow.bundles.registry import Registry
from dermaflow.cli.main import app
from dermaflow.errors import DataError, SignOffError
from dermaflow.forgetting.batches import blank_members
from dermaflow.forgetting.forget import KEY_NAME, LOG_NAME, Places, Records, forget, look
from dermaflow.forgetting.places import Ids, Link, meaning
from dermaflow.pathways.outputs.folder import read_folder, sign_folder
from dermaflow.pathways.signoff import read_log
from dermaflow.preparation.reading import ShardFolder
from dermaflow.schemas.shard import SPLITS
from dermaflow.scoring.bulk import score
from dermaflow.scoring.plan import Options, read_status

PATIENTS = """patient_id,lesion_id,image_id,age
Grete Muster,NAEVUS-7,IMG-7a,61
Grete Muster,NAEVUS-7,IMG-7b,61
Grete Muster,NAEVUS-8,IMG-8,61
Otto,SPOT-1,IMG-1,50
Ida,SPOT-2,IMG-2,40
"""
GRETE = ("Grete Muster", "NAEVUS-7", "NAEVUS-8", "IMG-7a", "IMG-7b", "IMG-8")


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A service's state with one finished batch of three people, of whom two are signed for."""
    folder = tmp_path_factory.mktemp("serve")
    upload, out = folder / "batches/b1/upload", folder / "batches/b1/out"
    upload.mkdir(parents=True)
    with zipfile.ZipFile(upload / "archive.zip", "w") as archive:
        for seed, name in enumerate(("IMG-1", "IMG-2", "IMG-7a", "IMG-7b", "IMG-8")):
            archive.writestr(f"{name}.jpg", a_jpeg(seed))
    (upload / "patients.csv").write_text(PATIENTS)
    score(
        str(upload / "archive.zip"), str(out), model=str(save_servable(folder / "model")), use_ray=False,
        patients=str(upload / "patients.csv"), options=Options(part_size=2),
    )  # fmt: skip
    sign_folder(out / "pathways", "NAEVUS-7", by="Dr Ada Byron", decision="edited", reason="as Grete Muster wished")
    sign_folder(out / "pathways", "SPOT-1", by="Dr Ada Byron", decision="accepted")
    (folder / "batches/b2/upload").mkdir(parents=True)
    return folder


@pytest.fixture
def copy(state: Path, tmp_path: Path) -> Path:
    """A copy of it in the very place of the original's paths, which the run names."""
    backup = tmp_path / "backup"
    shutil.copytree(state, backup)
    yield state  # type: ignore[misc]
    shutil.rmtree(state)
    shutil.copytree(backup, state)


def mentions(folder: Path, *names: str) -> list[str]:
    """Files of a folder in which one of the names stands, in their bytes or in a Parquet table."""
    found = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        content = path.read_bytes()
        if path.suffix == ".parquet":
            content += str(pq.read_table(path).drop_columns(
                [n for n in pq.read_schema(path).names if n == "image"]).to_pylist()).encode()  # fmt: skip
        found += [
            f"{path.relative_to(folder)}: {name}" for name in names if name.encode() in content or name in path.name
        ]
    return found


def test_a_person_leaves_a_batch_and_its_uploads_and_the_others_stay(copy: Path, tmp_path: Path) -> None:
    out = copy / "batches/b1/out"
    assert mentions(copy, "Grete Muster")
    picture = zipfile.ZipFile(copy / "batches/b1/upload/archive.zip").read("IMG-1.jpg")
    otto = [p for p in read_folder(out / "pathways")[0] if p.patient_id == "Otto"]
    records, places = Records(tmp_path / "log"), Places(states=(str(copy),))
    found = look(Ids(patients=frozenset({"Grete Muster"})), places, records, registry="none", by="Ada")
    assert found.order.counts == {
        str(copy / "batches/b1"): {"findings": 3, "inputs": 3, "pathways": 2, "sign-offs made anonymous": 1,
                                   "uploads": 1, "rows of patients": 3}
    }  # fmt: skip
    assert found.unfinished == [str(copy / "batches/b2")]
    assert not (tmp_path / "log").exists()  # a look leaves nothing behind

    forget(found, records)
    assert mentions(copy, *GRETE) == [] and mentions(tmp_path / "log", *GRETE) == []
    # the others are as they were, and the run is whole
    assert [p for p in read_folder(out / "pathways")[0] if p.patient_id == "Otto"] == otto
    assert pq.read_table(out / "findings.parquet")["image_id"].to_pylist() == ["IMG-1", "IMG-2"]
    status = read_status(str(out))
    assert (status.state, status.total, status.done) == ("finished", 2, 2)
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["images"], summary["lesions"], sum(summary["urgencies"].values())) == (2, 2, 2)
    with zipfile.ZipFile(copy / "batches/b1/upload/archive.zip") as archive:
        assert archive.read("IMG-1.jpg") == picture
    from serve.results import image_bytes  # the pictures of the others are still found

    assert image_bytes(str(out), "IMG-2") == a_jpeg(1)
    assert (copy / "batches/b1/upload/patients.csv").read_text().count("Otto") == 1


def test_the_logs_stay_whole_name_nobody_and_still_show_every_other_change(copy: Path, tmp_path: Path) -> None:
    folder, records = copy / "batches/b1/out/pathways", Records(tmp_path / "log")
    before = read_log(folder)
    ask = Ids(patients=frozenset({"Grete Muster"}))
    forget(look(ask, Places(pathways=(str(folder),)), records, registry="none", by="Ada"), records)
    after = read_log(folder)
    assert [(e.sha256, e.decision, e.by) for e in after] == [(e.sha256, e.decision, e.by) for e in before]
    assert after[0].patient_id == records.pseudonym("Grete Muster") and after[0].reason == "(removed)"
    assert after[1] == before[1]
    sign_folder(folder, "SPOT-2", by="Dr Ada Byron", decision="accepted")  # the chain goes on
    assert len(read_log(folder)) == 3

    [entry] = entries(tmp_path / "log" / LOG_NAME)
    assert entry["asked"] == {"patients": [records.pseudonym("Grete Muster")]} and entry["by"] == "Ada"
    assert verify(tmp_path / "log" / LOG_NAME) == 1
    assert (tmp_path / "log" / KEY_NAME).stat().st_mode & 0o077 == 0
    assert not list((tmp_path / "log").glob("order-*"))

    log = folder / "audit.jsonl"
    whole = log.read_text()
    for old, new in (("edited", "rejected"), (after[0].patient_id, "Otto"), ('"forgotten"', '"accepted"')):
        log.write_text(whole.replace(old, new, 1))
        with pytest.raises(SignOffError):
            read_log(folder)


class Killed(BaseException):
    """As by SIGKILL: nothing in between catches it."""


def test_a_kill_at_any_write_is_mended_by_the_same_command(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every write in turn is the last one; then the command is run again."""
    ask, places = Ids(patients=frozenset({"Grete Muster"})), Places(states=(str(copy),))
    base = tmp_path / "base"
    shutil.copytree(copy, base)
    real = storage.open_atomic
    kills = 0
    while True:
        shutil.rmtree(copy)
        shutil.copytree(base, copy)
        records = Records(tmp_path / f"log{kills}")
        left = [kills]

        def counted(uri: Any, left: list[int] = left) -> Any:
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return real(uri)

        with monkeypatch.context() as patch:
            patch.setattr(storage, "open_atomic", counted)
            try:
                forget(look(ask, places, records, registry="none", by="Ada"), records)
                break
            except Killed:
                pass
        found = look(ask, places, records, registry="none", by="Ada")
        assert found.resumed == (kills > 1)  # key and order are the first two writes
        forget(found, records)
        assert mentions(copy, *GRETE) == [], kills
        assert len(read_log(copy / "batches/b1/out/pathways")) == 2
        assert verify(tmp_path / f"log{kills}" / LOG_NAME) == 1
        assert read_status(str(copy / "batches/b1/out")).done == 2
        kills += 1
    assert kills > 15


def test_a_process_that_is_killed_for_good(copy: Path, tmp_path: Path) -> None:
    """SIGKILL while the run is rewritten; the next process, which knows nothing of it, finishes."""
    code = (
        "import os, signal, sys\n"
        "from dermaflow import storage\n"
        "real = storage.write_bytes\n"
        "def write(uri, content):\n"
        "    real(uri, content)\n"
        "    if 'cases.jsonl' in str(uri): os.kill(os.getpid(), signal.SIGKILL)\n"
        "storage.write_bytes = write\n"
        "from dermaflow.cli.main import app\n"
        "app(sys.argv[1:])\n"
    )
    command = ["data", "forget", "--patient", "Grete Muster", "--state", str(copy), "--by", "Ada", "--yes",
               "--log", str(tmp_path / "log"), "--registry", "none"]  # fmt: skip
    killed = subprocess.run([sys.executable, "-c", code, *command], capture_output=True)
    assert killed.returncode == -signal.SIGKILL and mentions(copy, "Grete Muster")
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0 and "begun earlier and cut off" in done.stdout
    assert mentions(copy, *GRETE) == [] and verify(tmp_path / "log" / LOG_NAME) == 1


# --- shards, models, reports ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An archive and its shards."""
    folder = tmp_path_factory.mktemp("prepared")
    prepare_here(draw(folder / "data"), folder / "shards")
    return folder / "data", folder / "shards"


def test_what_stays_is_what_prepare_would_have_written(prepared: tuple[Path, Path], tmp_path: Path) -> None:
    data, shards = tmp_path / "data", tmp_path / "shards"
    shutil.copytree(prepared[0], data)
    shutil.copytree(prepared[1], shards)
    table = metadata(data)
    lesion = table["lesion_id"].value_counts().index[0]
    images = set(table.loc[table["lesion_id"] == lesion, "image_id"])
    old = ShardFolder(shards).manifest
    records = Records(tmp_path / "log")
    registry = Registry(tmp_path / "registry")
    a = registry.add(save_tiny(tmp_path / "a", a_bundle(name="a", data_hash=old.data_hash)))
    registry.add(save_tiny(tmp_path / "b", a_bundle(name="b", data_hash="other"), 1.0))

    found = look(
        Ids(lesions=frozenset({lesion})), Places(shards=(str(shards),)), records, registry=registry.uri, by="A"
    )
    assert found.order.counts[str(shards)] == {"images": len(images), "lesions": 1, "inspected": len(images)}
    assert found.order.models == {a.id: "same data"}
    forget(found, records)
    assert mentions(shards, lesion, *images) == []
    left = ShardFolder(shards)
    assert left.manifest.data_hash != old.data_hash
    assert sum(sum(c.values()) for c in left.manifest.counts.values()) == len(table) - len(images)
    assert not {i for split in SPLITS for i, _ in left.images(split)} & images

    table[~table["image_id"].isin(images)].to_csv(data / "HAM10000_metadata.csv", index=False)
    for image in images:
        image_files(data)[image].unlink()
    before = snapshot(shards)
    again = prepare_here(data, shards)
    assert (again.inspected, again.written) == (0, 0) and again.manifest == left.manifest
    assert {n: s for n, (_, s) in snapshot(shards).items()} == {n: s for n, (_, s) in before.items()}


def test_shards_killed_at_any_write_are_finished(
    prepared: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lesion = metadata(prepared[0])["lesion_id"].value_counts().index[0]
    real, kills = storage.open_atomic, 0
    while True:
        shards, records = tmp_path / f"shards{kills}", Records(tmp_path / f"log{kills}")
        shutil.copytree(prepared[1], shards)
        left = [kills]

        def counted(uri: Any, left: list[int] = left) -> Any:
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return real(uri)

        ask = Ids(lesions=frozenset({lesion})), Places(shards=(str(shards),)), records
        with monkeypatch.context() as patch:
            patch.setattr(storage, "open_atomic", counted)
            try:
                forget(look(*ask, registry="none", by="Ada"), records)
                break
            except Killed:
                pass
        forget(look(*ask, registry="none", by="Ada"), records)
        assert mentions(shards, lesion) == [] and ShardFolder(shards)
        kills += 1
    assert kills >= 5


def test_a_model_that_names_an_image_is_listed(tmp_path: Path) -> None:
    from dermaflow.bundles.bundle import save_bundle
    from dermaflow.forgetting.lineage import models_trained_on

    save_bundle(tmp_path / "m", a_bundle(a_calibration()), {}, REFERENCE, "# Card\n")
    version = Registry(tmp_path / "registry").add(tmp_path / "m")
    assert models_trained_on(str(tmp_path / "registry"), Ids(images=frozenset({"image3"})), ()) == {
        version.id: "names it"
    }
    assert models_trained_on(str(tmp_path / "registry"), Ids(images=frozenset({"image99"})), ()) == {}


# --- whose it is ---------------------------------------------------------------------------------------------------


def test_ids_that_two_places_use_for_two_people_do_not_mix() -> None:
    one = [Link("P", "L1", "a"), Link("P", "L1", "b"), Link("Q", "L2", "c")]
    other = [Link("R", "L1", "d"), Link("R", "L9", "a")]  # another clinic's L1 and a
    bare = [Link(None, "L1", "a"), Link(None, "L2", "c"), Link(None, None, "b")]
    found = meaning(Ids(patients=frozenset({"P"})), [one, other, bare])
    assert (found[0].lesions, found[0].images) == ({"L1"}, {"a", "b"})
    assert (found[1].lesions, found[1].images) == (set(), set())
    assert (found[2].lesions, found[2].images) == ({"L1"}, {"a", "b"})
    asked = meaning(Ids(lesions=frozenset({"L1"})), [other])[0]  # asked for by that very id
    assert (asked.lesions, asked.images) == ({"L1"}, {"d"})


def test_an_image_takes_its_lesion_along_only_where_it_was_the_last() -> None:
    links = [Link("P", "L1", "a"), Link("P", "L1", "b"), Link("P", "L1", None), Link("P", "L2", "c")]
    assert meaning(Ids(images=frozenset({"a"})), [links])[0].lesions == set()
    assert meaning(Ids(images=frozenset({"c"})), [links])[0].lesions == {"L2"}


def test_a_blanked_member_is_gone_and_the_others_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("one", "two", "three"):
            archive.writestr(name, name * 1000)
        archive.comment = b"a comment"
    offsets = {info.filename: info.header_offset for info in zipfile.ZipFile(path).infolist()}
    size = path.stat().st_size
    for _ in range(2):  # doing it again gives the same
        blank_members(path, {offsets["two"]})
        assert path.stat().st_size == size and b"two" not in path.read_bytes()
        with zipfile.ZipFile(path) as archive:
            assert [archive.read(name)[:5] for name in ("one", "three")] == [b"oneon", b"three"]


def test_a_dry_run_changes_nothing_and_nobody_or_nowhere_is_refused(copy: Path, tmp_path: Path) -> None:
    before = snapshot(copy)
    said = CliRunner().invoke(
        app, ["data", "forget", "--patient", "Otto", "--state", str(copy), "--by", "Ada", "--log", str(tmp_path / "l")]
    )
    assert said.exit_code == 0 and "nothing was changed" in said.stdout and "not finished" in said.stdout
    assert snapshot(copy) == before and not (tmp_path / "l").exists()
    records = Records(tmp_path / "l")
    with pytest.raises(DataError, match="nobody to forget"):
        look(Ids(), Places(states=(str(copy),)), records, registry="none", by="Ada")
    with pytest.raises(DataError, match="nowhere to look"):
        look(Ids(images=frozenset({"x"})), Places(), records, registry="none", by="Ada")
    with pytest.raises(DataError, match="no finished run"):
        look(Ids(images=frozenset({"x"})), Places(runs=(str(tmp_path),)), records, registry="none", by="Ada")


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Long paths are not broken over lines."""
    monkeypatch.setenv("COLUMNS", "300")
    yield
