"""The flow `lifecycle`: drift on new images, a challenger where it is called for, one written rule, the way back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pyarrow.parquet as pq
from prefect import flow
from prefect.runtime import flow_run
from pydantic import Field

from dermaflow import storage
from dermaflow.bundles.bundle import parse_bundle, read_description
from dermaflow.errors import DataError
from dermaflow.evaluation.challenge import Rule, Verdict, judge
from dermaflow.evaluation.frozen import freeze, only_frozen
from dermaflow.evaluation.run import PREDICTIONS_NAME
from dermaflow.learning.recipe import load_recipe
from dermaflow.preparation.reading import ShardFolder
from dermaflow.schemas.bundle import Calibration
from dermaflow.settings import settings
from dermaflow.trust.drift import Limits, Measures, drifted, reasons_to_train
from flows.cycle import Action, Decision, Turn, alone, now, take_turn
from flows.decisions import publish
from flows.rollover import await_service
from flows.running import library_run
from flows.steps import evaluated, trained
from flows.tasks import grow_shards, measure_arrivals, predict_champion, promote_challenger

Share = Annotated[float, Field(gt=0, lt=1)]
Margin = Annotated[float, Field(ge=-1, le=1)]
Count = Annotated[int, Field(ge=1)]


@flow
def lifecycle(
    landing: str,
    data: Path,
    shards: str,
    out: Path,
    registry: str | None = None,
    recipe: str = "ham10000-cpu",
    weights: Path | None = None,
    workers: int | None = None,
    retrain: bool = True,
    site: str = "landing",
    new_lesions: Count = 100,
    few_lesions: Count = 20,
    mix_limit: Annotated[float, Field(gt=0)] = 0.25,
    distance_limit: Share = 0.10,
    calibration_limit: Annotated[float, Field(gt=0)] = 3.0,
    fewest: Count = 30,
    balanced_accuracy_margin: Margin = 0.01,
    melanoma_sensitivity_margin: Margin = 0.05,
    safe_accuracy_margin: Margin = 0.05,
    service: str | None = None,
    seed: Annotated[int, Field(ge=0)] = 0,
    resamples: Count = 1000,
    hours: Annotated[float, Field(gt=0)] = 72,
) -> Decision:
    """Measure drift on new images, train a challenger where a limit is crossed, promote it by a written rule.

    One turn a run; a turn that was cut off is continued. Every decision is an artifact and stays in the folder out.

    Args:
        landing: Folder or s3:// where new images, tables of diagnoses and signed pathways arrive.
        data: HAM10000 folder that the shards were prepared from.
        shards: Shard folder that the champion was trained from, local or s3://; labelled images are added to it.
        out: Folder of the lifecycle: turns, decisions, the growing archive, the frozen test.
        registry: Model registry with a champion, a folder or s3://; default DERMAFLOW_REGISTRY.
        recipe: Name of a shipped recipe, or a .yaml file, for the challenger.
        weights: First weights of the backbone, in place of the recipe's.
        workers: Ray Train workers; without it, the flow's own process trains.
        retrain: Train a challenger where a limit is crossed; without it, only say so, for an automation to start it.
        site: Where new images come from, unless their table says it.
        new_lesions: Newly labelled lesions that are reason enough to train a challenger.
        few_lesions: With fewer of them, drift alone trains nothing.
        mix_limit: Stability index of the mix of diagnoses, beyond what chance gives.
        distance_limit: Share of pictures unlike the training images, by the lower end of its interval.
        calibration_limit: Absolute z of malignant lesions by histology against those announced.
        fewest: Images or lesions below which nothing is said about drift.
        balanced_accuracy_margin: How much balanced accuracy may be lost, by the lower end of its interval.
        melanoma_sensitivity_margin: How much melanoma sensitivity at the melanoma-safe point may be lost, likewise.
        safe_accuracy_margin: How much accuracy at the melanoma-safe point may be lost, likewise.
        service: Address of a running service, which is waited for until it has a new champion.
        seed: Seed of the paired lesion bootstrap.
        resamples: Resamples of it.
        hours: Longest time that each step may take.
    """
    registry = registry or settings().registry
    shards, registry, landing = (_absolute(address) for address in (shards, registry, landing))
    out, data = out.absolute(), data.absolute()
    limits = Limits(
        new_lesions=new_lesions, few_lesions=few_lesions, mix=mix_limit, distance=distance_limit,
        calibration=calibration_limit, fewest=fewest,
    )  # fmt: skip
    rule = Rule(
        balanced_accuracy=balanced_accuracy_margin, melanoma_sensitivity=melanoma_sensitivity_margin,
        safe_accuracy=safe_accuracy_margin,
    )  # fmt: skip
    with library_run(), alone(out):
        chosen = load_recipe(recipe)  # first: a misspelt recipe shall not cost a night of scoring
        turn = take_turn(out, landing, data, shards, registry, site)
        frozen = freeze(ShardFolder(shards), out / "frozen.parquet")
        limited = {"timeout_seconds": hours * 3600}
        measures = measure_arrivals.with_options(**limited)(turn)
        reasons = reasons_to_train(measures, limits)
        if not reasons or not retrain:
            return _end(turn, measures, limits, len(frozen), **_not_trained(reasons, measures, limits))
        data_hash = grow_shards.with_options(**limited)(turn, data, shards)
        predict_champion.with_options(**limited)(turn, shards)
        model = trained(shards, chosen, turn.place("model"), weights=weights, workers=workers, hours=hours)
        report = evaluated(model.path, shards, turn.place("report"), seed=seed, resamples=resamples, hours=hours)
        verdict, arrived = _judge(turn, model.path, report.path, frozen, rule, seed, resamples)
        said, sha256 = _outcome(verdict), read_description(model.path)[1]
        promotion = promote_challenger(turn, model.path, registry, verdict.holds, said, by=_by())
        served = await_service(service, promotion.version) if service and promotion.promoted else None
        way_back = f'dermaflow models rollback --registry {registry} --reason "WHY"' if promotion.promoted else None
        return _end(
            turn, measures, limits, len(frozen), action="promoted" if promotion.promoted else "refused",
            reasons=[*reasons, promotion.reason], challenger=promotion.version, challenger_sha256=sha256,
            data_hash=data_hash, verdict=verdict, arrived=arrived, served=served, way_back=way_back,
        )  # fmt: skip


def _not_trained(reasons: list[str], found: Measures, limits: Limits) -> dict[str, object]:
    if reasons:
        return {"action": "retraining wanted", "reasons": reasons}
    drift = drifted(found, limits)
    if drift:
        return {"action": "nothing", "reasons": [
            *drift, f"With {found.labelled_lesions} newly labelled lesions there is too little to learn from; "
            f"{limits.few_lesions} are asked for. Have lesions labelled, or calibrate for the site."
        ]}  # fmt: skip
    return {"action": "nothing", "reasons": ["No limit is crossed."]}


def _end(
    turn: Turn, measures: Measures, limits: Limits, frozen: int, *, action: Action, reasons: list[str], **more: object
) -> Decision:
    """Show the decision and write it down; a run that is killed before the last line decides the same again."""
    decision = Decision.model_validate(
        {
            "cycle": turn.cycle.number, "at": now(), "by": _by(), "action": action, "reasons": reasons,
            "champion": turn.cycle.champion, "champion_sha256": turn.cycle.champion_sha256,
            "landing": turn.cycle.landing, "left_out": turn.cycle.left_out, "measures": measures, "limits": limits,
            "frozen_images": frozen, "frozen_sha256": storage.sha256_file(turn.out / "frozen.parquet"), **more,
        }
    )  # fmt: skip
    turn.decide(decision, publish(decision))
    return decision


def _judge(
    turn: Turn, model: str, report: str, frozen: object, rule: Rule, seed: int, resamples: int
) -> tuple[Verdict, Verdict | None]:
    """The verdict on the frozen test, and that on the other test lesions where they can be judged."""
    tables = [
        pq.read_table(place).to_pandas() for place in (turn.place("champion.parquet"), Path(report, PREDICTIONS_NAME))
    ]
    calibrations = (_calibration(turn.cycle.champion_uri), _calibration(model))
    old, new = (only_frozen(table, frozen) for table in tables)  # type: ignore[arg-type]
    verdict = judge(old, new, calibrations, rule, seed=seed, resamples=resamples)
    others = [table[~table["image_id"].isin(old["image_id"])] for table in tables]
    try:
        arrived = judge(others[0], others[1], calibrations, rule, seed=seed, resamples=resamples)
    except DataError:  # none, or none with a melanoma
        arrived = None
    return verdict, arrived


def _calibration(model: str) -> Calibration:
    found = parse_bundle(read_description(model)[0], where=model).calibration
    assert found is not None  # nothing without one is evaluated or found by `resolve_model`
    return found


def _outcome(verdict: Verdict) -> str:
    """The verdict in one sentence, for the registry's history."""
    said = "; ".join(
        f"{c.name} {c.challenger:.3f} against {c.champion:.3f}, difference at least "
        + ("unknown" if c.low is None else f"{c.low:+.3f}") + f", must be above {-c.margin:+g}"
        for c in verdict.conditions
    )  # fmt: skip
    return (
        f"{'The rule holds' if verdict.holds else 'The rule does not hold'} on {verdict.lesions} frozen lesions: {said}"
    )


def _by() -> str:
    return f"flow run {flow_run.name}"


def _absolute(address: str) -> str:
    return address if storage.is_remote(address) else str(Path(address).absolute())
