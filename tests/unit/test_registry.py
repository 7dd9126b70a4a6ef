"""The registry on a local folder: lineage, one champion, a history, and writers at the same time."""

from __future__ import annotations

import multiprocessing
import multiprocessing.synchronize
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from tiny_bundle import a_bundle, save_tiny

from dermaflow.bundles.bundle import load_bundle
from dermaflow.bundles.registry import Registry
from dermaflow.errors import BundleError, RegistryError


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


@pytest.fixture
def abc(registry: Registry, tmp_path: Path) -> tuple[str, str, str]:
    """The ids of three models, added one after the other."""
    a, b, c = (registry.add(save_tiny(tmp_path / "out" / n, a_bundle(name=n), i)).id for i, n in enumerate("abc"))
    return a, b, c


def test_a_version_is_named_by_its_content_and_says_where_it_comes_from(registry: Registry, tmp_path: Path) -> None:
    bundle = a_bundle(name="ham", data_hash="d1", metrics={"accuracy": 0.8})
    path = save_tiny(tmp_path / "model", bundle)
    added = registry.add(path)
    assert added.sha256 == load_bundle(path).sha256
    assert added.id == f"ham-{added.sha256[:10]}"
    assert added.bundle.training.data_hash == "d1"
    assert added.bundle.metrics == {"accuracy": 0.8}
    assert timedelta() <= datetime.now(UTC) - added.added < timedelta(minutes=5)
    assert registry.list() == [added] == [registry.show(added.id)]
    assert registry.add(path, name="other").id == f"other-{added.sha256[:10]}"


def test_adding_a_bundle_twice_changes_nothing(registry: Registry, tmp_path: Path) -> None:
    path = save_tiny(tmp_path / "model", a_bundle())
    assert registry.add(path) == registry.add(path)
    assert len(registry.list()) == 1


def test_the_list_is_in_order_of_time(registry: Registry, abc: tuple[str, str, str]) -> None:
    assert [version.id for version in registry.list()] == list(abc)
    assert not any(version.champion for version in registry.list())


def test_promotion_and_rollback_walk_the_line_of_champions(registry: Registry, abc: tuple[str, str, str]) -> None:
    a, b, c = abc
    assert registry.champion() is None
    for version in abc:
        assert registry.promote(version, reason=f"try {version}", by="Ada").champion
    assert registry.champion().id == registry.show("champion").id == c
    assert [v.id for v in registry.list() if v.champion] == [c]
    assert registry.rollback(reason="false alarms", by="Bob").id == b
    assert registry.rollback(reason="still", by="Bob").id == a  # not back to c
    with pytest.raises(RegistryError, match="no earlier champion to go back to"):
        registry.rollback(reason="again", by="Bob")
    assert registry.promote(c, reason="fixed", by="Ada").id == c
    assert registry.rollback(reason="not fixed", by="Ada").id == a

    entries = registry.history()
    assert [(e.action, e.from_version, e.to_version) for e in entries] == [
        ("promote", None, a), ("promote", a, b), ("promote", b, c), ("rollback", c, b), ("rollback", b, a),
        ("promote", a, c), ("rollback", c, a),
    ]  # fmt: skip
    assert (entries[3].by, entries[3].reason) == ("Bob", "false alarms")
    assert [e.at for e in entries] == sorted(e.at for e in entries)


def test_promoting_the_champion_adds_no_entry(registry: Registry, abc: tuple[str, str, str]) -> None:
    registry.promote(abc[0], reason="first", by="Ada")
    registry.promote("champion", reason="again", by="Ada")
    assert len(registry.history()) == 1


def test_the_champion_is_rebuilt_from_the_history(registry: Registry, abc: tuple[str, str, str]) -> None:
    for version in abc[:2]:
        registry.promote(version, reason="r", by="Ada")
    pointer = Path(registry.uri) / "champion.json"
    before = pointer.read_bytes()
    pointer.unlink()
    assert registry.champion().id == abc[1]
    registry.promote(abc[2], reason="r", by="Ada")
    assert pointer.read_bytes() != before
    assert registry.champion().id == abc[2]


def test_versions_are_found_by_the_beginning_of_their_id(registry: Registry, tmp_path: Path) -> None:
    first = registry.add(save_tiny(tmp_path / "1", a_bundle(name="tiny"), 1.0))
    second = registry.add(save_tiny(tmp_path / "2", a_bundle(name="tiny"), 2.0))
    other = registry.add(save_tiny(tmp_path / "3", a_bundle(name="large"), 3.0))
    assert registry.show("la").id == other.id
    assert registry.show(first.id[:-1]).id == first.id
    with pytest.raises(
        RegistryError, match=f"several models begin with 'tiny-'.*{min(first.id, second.id)}.*more digits"
    ):
        registry.show("tiny-")


def test_what_is_not_there_is_said_with_the_next_step(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match=r"registry: holds no model.*Train a model and add it"):
        registry.show("tiny")
    with pytest.raises(RegistryError, match=r"no champion yet.*dermaflow models promote"):
        registry.show("champion")
    known = registry.add(save_tiny(tmp_path / "model", a_bundle())).id
    for unknown in ("nothing", "", "../models"):
        with pytest.raises(RegistryError, match=f"no model begins with '{unknown}'; expected one of {known}"):
            registry.show(unknown)
    with pytest.raises(RegistryError, match=r"blank.*Say why"):
        registry.promote(known, reason=" ", by="Ada")
    with pytest.raises(RegistryError, match="blank"):
        registry.promote(known, reason="r", by="")
    with pytest.raises(RegistryError, match=r"model name '\.\./up'"):
        registry.add(tmp_path / "model", name="../up")
    assert registry.history() == []


def test_a_damaged_model_is_not_promoted_or_fetched_and_does_not_hide_the_others(
    registry: Registry, abc: tuple[str, str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    a, b, _ = abc
    weights = Path(registry.uri) / "models" / a / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    with pytest.raises(BundleError, match=r"weights\.safetensors: changed"):
        registry.promote(a, reason="r", by="Ada")
    with pytest.raises(BundleError, match=r"weights\.safetensors: changed"):
        registry.fetch(a, tmp_path / "fetched")
    assert registry.champion() is None and not (tmp_path / "fetched").exists()
    (Path(registry.uri) / "models" / a / "bundle.json").write_text("{}")
    assert a not in [version.id for version in registry.list()]
    assert f"{a}/bundle.json: changed" in caplog.text
    assert registry.promote(b, reason="r", by="Ada").id == b


def test_a_damaged_bundle_is_not_added(registry: Registry, tmp_path: Path) -> None:
    path = save_tiny(tmp_path / "model", a_bundle())
    (path / "card.md").write_text("better than it is")
    with pytest.raises(BundleError, match=r"card\.md: changed"):
        registry.add(path)
    assert registry.list() == []


def test_a_fetched_model_is_the_one_that_was_added(
    registry: Registry, abc: tuple[str, str, str], tmp_path: Path
) -> None:
    fetched = registry.fetch(abc[1], tmp_path / "fetched")
    assert load_bundle(tmp_path / "fetched").sha256 == fetched.sha256
    assert load_bundle(tmp_path / "fetched").weights["w"].item() == 1.0


def test_comparison_shows_what_differs(registry: Registry, tmp_path: Path) -> None:
    for name, recipe, data, metrics in [
        ("a", {"epochs": 5, "optimizer": {"name": "adam", "lr": 0.1}}, "d1", {"accuracy": 0.80, "ece": 0.04}),
        (
            "b",
            {"epochs": 5, "optimizer": {"name": "adamw", "lr": 0.1}, "ema": True},
            "d1",
            {"accuracy": 0.83, "auc": 0.95},
        ),
        ("c", {"epochs": 5, "optimizer": {"name": "adam", "lr": 0.1}}, "d2", None),
    ]:
        registry.add(save_tiny(tmp_path / name, a_bundle(name=name, recipe=recipe, data_hash=data, metrics=metrics)))
    comparison = registry.compare("a", "b")
    assert [(m.name, m.a, m.b) for m in comparison.metrics] == [
        ("accuracy", 0.80, 0.83), ("auc", None, 0.95), ("ece", 0.04, None),
    ]  # fmt: skip
    assert comparison.metrics[0].difference == pytest.approx(0.03)
    assert comparison.metrics[1].difference is None
    assert comparison.recipe == {"ema": (None, True), "optimizer.name": ("adam", "adamw")}
    assert comparison.same_data
    other = registry.compare("a", "c")
    assert not other.same_data and other.recipe == {}


def test_who_compared_with_a_champion_that_is_none_any_more_is_refused(
    registry: Registry, abc: tuple[str, str, str]
) -> None:
    a, b, c = abc
    registry.promote(a, reason="first", by="Ada")
    assert registry.promote(b, reason="better than a", by="one", instead_of=a).champion
    with pytest.raises(RegistryError, match=rf"the champion is {b} by now; expected {a}.*models history"):
        registry.promote(c, reason="better than a", by="two", instead_of=a)
    assert registry.rollback(reason="false alarms", by="Ada", instead_of=b).id == a
    with pytest.raises(RegistryError, match="by now"):
        registry.rollback(reason="false alarms", by="Bob", instead_of=b)
    assert [entry.to_version for entry in registry.history()] == [a, b, a]


def test_a_writer_killed_between_history_and_pointer_leaves_no_doubt(
    registry: Registry, abc: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b, c = abc
    registry.promote(a, reason="first", by="Ada")

    def killed(self: Registry) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Registry, "_point_to_latest", killed)
        registry.promote(b, reason="better", by="Ada")
    assert registry.champion().id == b
    assert registry.rollback(reason="worse", by="Ada").id == a
    assert f'"to_version": "{a}"' in (Path(registry.uri) / "champion.json").read_text()
    assert registry.promote(c, reason="r", by="Ada", instead_of=a).id == c


def _meet(gate: multiprocessing.synchronize.Barrier) -> None:
    gate.wait()


def _add_and_promote(uri: str, bundles: list[Path]) -> None:
    registry = Registry(uri)
    for bundle in bundles:
        registry.promote(registry.add(bundle).id, reason="race", by=bundle.name)


def test_processes_at_the_same_time_lose_nothing(registry: Registry, tmp_path: Path) -> None:
    bundles = [save_tiny(tmp_path / f"m{i}", a_bundle(name=f"m{i}"), i) for i in range(6)]
    shared = save_tiny(tmp_path / "shared", a_bundle(name="shared"), 9.0)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(3, mp_context=context, initializer=_meet, initargs=(context.Barrier(3),)) as pool:
        jobs = [pool.submit(_add_and_promote, registry.uri, [shared, *bundles[2 * i : 2 * i + 2]]) for i in range(3)]
        for job in jobs:
            job.result()
    assert sorted(v.bundle.name for v in registry.list()) == [*(f"m{i}" for i in range(6)), "shared"]
    entries = registry.history()
    assert {e.to_version for e in entries} == {v.id for v in registry.list()}
    assert registry.champion().id == entries[-1].to_version
    for version in registry.list():
        assert registry.fetch(version.id, tmp_path / "fetched" / version.id) == version


def _challenge(uri: str, challenger: str, champion: str) -> bool:
    try:
        return Registry(uri).promote(challenger, reason="race", by=challenger, instead_of=champion).champion
    except RegistryError:
        return False


def test_of_two_challengers_of_one_champion_one_wins(registry: Registry, tmp_path: Path) -> None:
    """Each is better than the champion; whether one is better than the other nobody has looked at."""
    first, *others = (registry.add(save_tiny(tmp_path / f"m{i}", a_bundle(name=f"m{i}"), i)).id for i in range(4))
    registry.promote(first, reason="first", by="Ada")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(3, mp_context=context, initializer=_meet, initargs=(context.Barrier(3),)) as pool:
        won = list(pool.map(_challenge, [registry.uri] * 3, others, [first] * 3))
    assert sum(won) == 1
    assert [e.to_version for e in registry.history()] == [first, others[won.index(True)]]
