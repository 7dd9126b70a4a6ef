"""Promotion on a test that all have agreed on: only a model that is better by a stated margin becomes the champion."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
from pydantic import BaseModel, Field

from dermaflow import storage
from dermaflow.bundles.bundle import LoadedBundle, load_bundle
from dermaflow.bundles.registry import Registry
from dermaflow.evaluation.paired import PairedDifference, paired_difference
from flows.promotion import Decision


class Rule(BaseModel):
    """What better means.

    Attributes:
        metric: One of `dermaflow.evaluation.paired.FIGURES`.
        margin: What the lower end of the interval of the difference must be above; 0 asks for a difference that the
            test can tell from nothing, more asks for more, and less than 0 lets a model pass that is not worse by that.
        resamples: Of the paired lesion bootstrap.
        seed: Of its draws.
    """

    metric: str = "balanced_accuracy"
    margin: float = Field(0.0, ge=-1, le=1)
    resamples: int = Field(1000, ge=1)
    seed: int = 0

    def in_words(self) -> str:
        """The rule, as it stands in the artifact and in the registry's history."""
        return (
            f"Rule: promoted if the lower end of the 95 % interval of the difference in {self._name}, new model less "
            f"champion, is above {self.margin:+.3f} on the agreed test ({self.resamples} resamples of its lesions for "
            f"both at once, seed {self.seed})."
        )

    def judge(self, found: PairedDifference) -> tuple[bool, str]:
        """Whether the rule holds, and the figures it was decided by."""
        said = (
            f"{self._name} {found.challenger:.4f} against {found.champion:.4f} of the champion, on {found.n_lesions} "
            f"lesions: difference {found.difference:+.4f}"
        )
        if found.low is None or found.high is None:
            return False, f"{said}, too few lesions for an interval"
        return found.low > self.margin, f"{said}, 95 % interval {found.low:+.4f} to {found.high:+.4f}"

    @property
    def _name(self) -> str:
        return self.metric.replace("_", " ")


def decide_on_test(
    model: str, registry: str, table: pd.DataFrame, predict: Callable[[LoadedBundle], pd.DataFrame], rule: Rule, by: str
) -> Decision:
    """Add a model to a registry, and make it the champion if there is none or if the rule holds.

    A champion or a model that was trained on lesions of the test is not compared: the test would flatter it.

    Args:
        model: An evaluated bundle.
        registry: A folder or ``s3://``.
        table: What the model says of the agreed test: ``image_id``, ``lesion_id``, ``dx``, ``p_<code>``.
        predict: The same of the champion.
        rule: What better means.
        by: Who decides, for the history.

    Raises:
        RegistryError: Another model became the champion meanwhile; the same call compares with that one.
    """
    models = Registry(registry)
    version, champion = models.add(model), models.champion()
    if champion is None:
        better, reason = True, "the first model of this registry"
    elif champion.id == version.id:
        return Decision(version=version.id, promoted=False, reason="it is the champion already")
    else:
        old = load_bundle(storage.join(registry, "models", champion.id))
        seen = {name: _seen(b, table) for name, b in ((champion.id, old), (version.id, load_bundle(model)))}
        if learnt := [f"{name} was trained on {count} of its lesions" for name, count in seen.items() if count]:
            better, reason = False, "the agreed test cannot compare them: " + ", ".join(learnt)
        else:
            found = paired_difference(predict(old), table, rule.metric, resamples=rule.resamples, seed=rule.seed)
            better, reason = rule.judge(found)
            reason = f"{reason} (champion {champion.id})"
        reason = f"{reason}. {rule.in_words()}"
    if better:
        models.promote(version.id, reason=reason, by=by, instead_of=champion and champion.id)
    return Decision(version=version.id, promoted=better, reason=reason)


def _seen(model: LoadedBundle, table: pd.DataFrame) -> int:
    """Lesions of the test that are among the training images that a bundle names; a federated one names none."""
    named = set() if model.reference is None else set(model.reference.lesion_ids)
    return len(named & set(table["lesion_id"].astype(str)))
