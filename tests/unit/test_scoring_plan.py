"""The folder of a run says what is to be done, what is done and how it stands; parts, status, refusals, summary."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from small_archives import hostile_zip, jpeg, lesion_jpegs, scoring_bundle
from tiny_bundle import a_bundle, a_calibration

from dermaflow import storage
from dermaflow.bundles.registry import Registry
from dermaflow.bundles.small import shipped_model
from dermaflow.errors import BundleError, DataError, RegistryError, StorageError
from dermaflow.schemas.finding import Finding, findings_table
from dermaflow.scoring import plan as plans
from dermaflow.scoring.bulk import score
from dermaflow.scoring.parts import PartScorer, verified_part
from dermaflow.scoring.patients import image_lesions, without_images
from dermaflow.scoring.plan import Commit, Inputs, Options, Progress, read_failures, read_status
from dermaflow.scoring.planning import Model, begin, model_of_run, resolve_model
from dermaflow.scoring.summary import active_seconds, drift, summarise, summary_page
from dermaflow.settings import settings
from dermaflow.taxonomy import CODES


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scoring_bundle(tmp_path_factory.mktemp("bundle") / "model")


@pytest.fixture(scope="module")
def model(bundle: Path) -> Model:
    return resolve_model(str(bundle))


def folder_of(path: Path, images: int) -> Path:
    path.mkdir()
    for i in range(images):
        (path / f"image{i:03}.jpg").write_bytes(lesion_jpegs()[i % 12])
    return path


def test_parts_are_row_groups_cut_by_number_and_bytes(
    tmp_path: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = folder_of(tmp_path / "in", 50), str(tmp_path / "out")
    seen: list[int] = []
    plan = begin(str(source), out, model, None, Options(part_size=20), seen.append)
    assert (plan.inputs, plan.parts, seen[-1], plan.kind) == (50, 3, 50, "folder")
    inputs = Inputs(out)
    assert [inputs.rows(i) for i in range(3)] == [20, 20, 10]
    assert inputs.part(2)["image_id"].to_pylist() == [f"image{i:03}" for i in range(40, 50)]
    assert begin(str(source), out, model, None, Options(part_size=20, workers=3)) == plan
    monkeypatch.setattr("dermaflow.scoring.planning.PART_BYTES", 3 * max(map(len, lesion_jpegs())))
    assert begin(str(source), str(tmp_path / "small"), model, None, Options(part_size=20)).parts > 10


def test_another_run_is_refused_and_nothing_touched(tmp_path: Path, model: Model) -> None:
    source, out = folder_of(tmp_path / "in", 3), str(tmp_path / "out")
    begin(str(source), out, model, None, Options())
    before = (tmp_path / "out" / "plan.json").read_bytes()
    other = resolve_model(str(scoring_bundle(tmp_path / "other", "other", 1)))
    table = tmp_path / "patients.csv"
    table.write_text("patient_id,lesion_id\nP1,L1\n")
    for arguments, what in (
        ((source, other, None, Options()), "another model: tiny"),
        ((source, model, None, Options(views=4)), "another options"),
        ((source, model, str(table), Options()), "another patients"),
        ((folder_of(tmp_path / "in2", 3), model, None, Options()), "another source"),
    ):
        with pytest.raises(DataError, match=what):
            begin(str(arguments[0]), out, *arguments[1:])  # type: ignore[arg-type]
    (source / "image001.jpg").write_bytes(jpeg(1))
    with pytest.raises(DataError, match="another content of the source"):
        begin(str(source), out, model, None, Options())
    assert (tmp_path / "out" / "plan.json").read_bytes() == before


def test_the_folder_of_the_run_may_lie_in_the_source(tmp_path: Path, model: Model) -> None:
    source = folder_of(tmp_path / "in", 3)
    (source / "patients.csv").write_text("patient_id,lesion_id,image_id\nP1,L1,image000\nP1,L1,image001.jpg\n")
    for _ in range(2):
        plan = begin(str(source), str(source / "out"), model, str(source / "patients.csv"), Options())
        assert plan.inputs == 3
    rows = Inputs(str(source / "out")).part(0)
    assert rows["lesion_id"].to_pylist() == ["L1", "L1", None]


def test_no_source_no_model_no_disk(tmp_path: Path, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no file"):
        begin(str(tmp_path / "empty"), str(tmp_path / "out"), model, None, Options())
    assert read_status(str(tmp_path / "out")).state == "planning"

    monkeypatch.setenv("DERMAFLOW_REGISTRY", str(tmp_path / "registry"))
    settings.cache_clear()
    assert resolve_model("champion").uri == str(shipped_model())
    with pytest.raises(RegistryError, match="holds no model"):
        resolve_model("another")
    with pytest.raises(BundleError, match="no such file"):
        resolve_model("file:///nowhere/model")
    registry = Registry(tmp_path / "registry")
    version = registry.add(scoring_bundle(tmp_path / "model"))
    with pytest.raises(RegistryError, match="no champion yet"):
        resolve_model("champion")
    registry.promote(version.id, reason="r", by="Ada")
    assert resolve_model("champion").sha256 == version.sha256 == resolve_model(version.id[:6]).sha256
    settings.cache_clear()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"No space left on device.*run the same command again"):
        begin(str(folder_of(tmp_path / "in", 2)), str(tmp_path / "full"), model, None, Options())
    assert read_status(str(tmp_path / "full")).state == "planning"


def test_a_run_keeps_the_champion_it_was_begun_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DERMAFLOW_REGISTRY", str(tmp_path / "registry"))
    settings.cache_clear()
    registry, out = Registry(tmp_path / "registry"), str(tmp_path / "out")
    first, second = (registry.add(scoring_bundle(tmp_path / name, seed=i)) for i, name in enumerate("ab"))
    registry.promote(first.id, reason="r", by="Ada")
    folder_of(tmp_path / "in", 12)
    begin(str(tmp_path / "in"), out, model_of_run("champion", out), None, Options())
    registry.promote(second.id, reason="better", by="Ada")
    assert model_of_run("champion", out).sha256 == first.sha256
    assert model_of_run("champion", str(tmp_path / "other")).sha256 == second.sha256
    assert score(str(tmp_path / "in"), out, use_ray=False).model_sha256 == first.sha256
    assert score(str(tmp_path / "in"), out, use_ray=False).model_sha256 == first.sha256  # finished, and stays so
    with pytest.raises(DataError, match="a run with another model"):
        score(str(tmp_path / "in"), out, model=second.id, use_ray=False)
    settings.cache_clear()


def test_a_part_is_done_when_its_commit_stands(tmp_path: Path, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    said = hostile_zip(tmp_path / "in.zip")
    out = str(tmp_path / "out")
    plan = begin(str(tmp_path / "in.zip"), out, model, None, Options(part_size=10))
    assert (plan.inputs, plan.parts) == (len(said), 2)
    scorer = PartScorer(out, plan)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
        with pytest.raises(StorageError, match="No space left"):
            scorer.score(0)
    assert read_status(out) == plans.Status(total=len(said), state="scoring")
    first = scorer.score(0)
    status = read_status(out)
    assert (status.done, status.state) == (10, "scoring") and status.images_per_second and status.eta_seconds
    again = scorer.score(0)
    assert again.sha256 == first.sha256, "a part that is done twice gives the same"
    scorer.score(1)
    status = read_status(out)
    assert (status.done, status.state) == (len(said), "finishing")
    assert status.failed == sum(reason is not None for reason in said.values())
    failures = read_failures(out)
    found = {f["image_id"]: f["reason"].partition(":")[0] for f in failures if f["status"] == "failed"}
    assert sorted(found.values()) == sorted(reason for reason in said.values() if reason)
    assert found["secret"] == "encrypted" and len(read_failures(out, 2)) == 2

    part = Path(plans.part_file(out, 0))
    assert verified_part(out, again) == part.read_bytes()
    part.write_bytes(part.read_bytes()[:-1])
    assert verified_part(out, again) is None
    Path(plans.commit_file(out, 1)).write_bytes(b"{")
    assert read_status(out).done == 10, "a damaged commit does not count"
    (tmp_path / "gone.zip").write_bytes(b"")
    (tmp_path / "in.zip").unlink()
    with pytest.raises(StorageError, match="the archive that was listed"):
        scorer.score(0)


def test_a_source_that_is_unplugged_is_no_failed_row(tmp_path: Path, model: Model) -> None:
    source, out = folder_of(tmp_path / "in", 3), str(tmp_path / "out")
    plan = begin(str(source), out, model, None, Options())
    source.rename(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match="the source is gone"):
        PartScorer(out, plan).score(0)
    (tmp_path / "elsewhere").rename(source)
    (source / "image001.jpg").unlink()
    commit = PartScorer(out, plan).score(0)
    assert (commit.rows, commit.failed, commit.reasons) == (3, 1, {"unreadable": 1})


def a_commit(part: int, finished: float, seconds: float, rows: int = 100) -> Commit:
    return Commit(
        part=part, rows=rows, ok=rows, not_assessable=0, failed=0, reasons={}, sha256="", seconds=seconds,
        finished=finished,
    )  # fmt: skip


def test_rate_and_time_left_are_those_of_the_last_minute(tmp_path: Path, model: Model) -> None:
    plan = begin(str(folder_of(tmp_path / "in", 1)), str(tmp_path / "out"), model, None, Options())
    progress = Progress(str(tmp_path / "out"), plan.model_copy(update={"inputs": 1000, "parts": 10}))
    assert progress.status().images_per_second is None
    progress.add(a_commit(0, 1000.0, 10))  # yesterday, and slow
    progress.add(a_commit(1, 90_000.0, 4))
    progress.add(a_commit(2, 90_001.0, 4))  # beside the one before
    status = progress.status()
    assert status.images_per_second == pytest.approx(200 / 5) and status.eta_seconds == pytest.approx(700 / 40)
    assert active_seconds(progress.commits.values()) == pytest.approx(15)


def test_patients_with_images(tmp_path: Path) -> None:
    table = tmp_path / "p.csv"
    table.write_text("Patient ID;lesion_id;Image-ID;age\nP1;L1;a;50\nP1;L1;b.jpg;50\nP2;L2;;60\n", encoding="utf-8-sig")
    assert image_lesions(str(table)) == {"a": "L1", "b.jpg": "L1"}
    with without_images(str(table)) as without:
        lines = Path(without).read_text().splitlines()
    assert len(lines) == 2 and "image" not in lines[0].lower()
    table.write_text("patient_id,lesion_id\nP1,L1\n")
    with without_images(str(table)) as without:
        assert without == str(table)
    table.write_text("patient_id,lesion_id,image_id\nP1,L1,a\nP2,L2,a\n")
    with pytest.raises(DataError, match="two lesions"):
        image_lesions(str(table))


def test_drift() -> None:
    mix = np.array([0.03, 0.05, 0.11, 0.01, 0.11, 0.67, 0.02])
    assert drift(mix, mix, 1000).psi == 0
    shifted = drift(mix[::-1], mix, 1000)
    by_hand = sum((a - e) * np.log(a / e) for a, e in zip(mix[::-1], mix, strict=True))
    assert shifted.psi == pytest.approx(by_hand) and shifted.verdict.startswith("another mix")
    few = drift(np.array([0.03, 0.09, 0.11, 0.01, 0.09, 0.65, 0.02]), mix, 20)
    assert few.verdict == "like the training images", "so few images show no drift"
    assert drift(None, mix, 0).psi is None


def test_summary_flags_lesions_first_and_shows_names_as_text(tmp_path: Path, model: Model) -> None:
    out = str(tmp_path / "out")
    plan = begin(str(folder_of(tmp_path / "in", 5)), out, model, None, Options())
    base = {"model": "tiny", "model_sha256": "x"}

    def ok(image: str, lesion: str | None, mel: float) -> Finding:
        p = dict.fromkeys((f"p_{code}" for code in CODES), 0.0) | {"p_mel": mel, "p_nv": 1 - mel}
        return Finding(
            image_id=image, lesion_id=lesion, status="ok", prediction="mel" if mel > 0.5 else "nv", p_malignant=mel,
            conformal_set=["mel", "nv"], **p, **base,
        )  # fmt: skip

    findings = [
        ok("a", "L1", 0.01), ok("b", "L2", 0.2), ok("c", "L2", 0.9), ok("<script>alert(1)</script>", None, 0.95),
        Finding(image_id="e", status="not_assessable", quality_flags=["blur"], ood=True, reason="blur", **base),
    ]  # fmt: skip
    with storage.open_atomic(storage.join(out, plans.FINDINGS)) as stream:
        pq.write_table(findings_table(findings), stream)
    progress = Progress(out, plan)
    progress.add(a_commit(0, 10.0, 2.0, 4).model_copy(update={"not_assessable": 1}))
    bundle = a_bundle(a_calibration(ood=False))
    found = summarise(out, plan, bundle, progress)
    assert [f.lesion_id for f in found.flagged] == ["<script>alert(1)</script>", "L2"]
    assert (found.flagged[1].image_id, found.flagged[1].images) == ("c", 2)
    assert (found.flagged_lesions, found.lesions, found.ood, found.quality) == (2, 4, 1, {"blur": 1})
    shares = {c.code: (c.predicted, c.share) for c in found.classes}
    assert shares["mel"] == (2, pytest.approx(2.06 / 4)) and shares["nv"][0] == 2
    page = summary_page(found)
    assert "&lt;script&gt;alert(1)" in page and "<script" not in page
