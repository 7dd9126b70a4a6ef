"""When a new model becomes the champion without a person: one written rule, its reason in the registry's history."""

from __future__ import annotations

from pydantic import BaseModel

from dermaflow.bundles.registry import Registry, Version

METRIC = "balanced_accuracy"


class Decision(BaseModel):
    """What became of a model.

    Attributes:
        version: Its id in the registry.
        promoted: Whether it was made the champion.
        reason: Why, or why not.
    """

    version: str
    promoted: bool
    reason: str


def decide(model: str, registry: str, by: str) -> Decision:
    """Add a model to a registry, and make it the champion if there is none or if it is better on the same data.

    Better is a higher balanced accuracy on the test split. A champion of other data was measured on another test split:
    then nothing is promoted, and a person decides with ``dermaflow models compare`` and ``promote``.

    Args:
        model: An evaluated bundle.
        registry: A folder or ``s3://``.
        by: Who decides, for the history.
    """
    models = Registry(registry)
    version, champion = models.add(model), models.champion()
    better, reason = _judge(models, version, champion)
    if better:
        models.promote(version.id, reason=reason, by=by)
    return Decision(version=version.id, promoted=better, reason=reason)


def _judge(models: Registry, version: Version, champion: Version | None) -> tuple[bool, str]:
    if champion is None:
        return True, "the first model of this registry"
    if champion.id == version.id:
        return False, "it is the champion already"
    found = models.compare(champion.id, version.id)
    if not found.same_data:
        return False, f"the champion {champion.id} was trained and measured on other data"
    old, new = ((v.bundle.metrics or {}).get(METRIC) for v in (champion, version))
    if old is None or new is None:
        return False, f"no balanced accuracy to compare: champion {old}, this model {new}"
    said = f"balanced accuracy {new:.4f} against {old:.4f} of {champion.id} on the same data"
    return new > old, said
