"""The model card: what the model is for, what it was made from, how good it is and where it ends.

After Mitchell et al., Model Cards for Model Reporting, 2019, arXiv 1810.03993. The same sections stand in ``card.md``
and in the report.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

from dermaflow.evaluation.figures import Evaluation
from dermaflow.evaluation.wording import number, percent
from dermaflow.learning.recipe import shipped_recipes
from dermaflow.schemas.bundle import Bundle
from dermaflow.taxonomy import DIAGNOSES

HAM10000_IDS = range(24_306, 34_321)
"""Numbers of the ``ISIC_`` image ids of HAM10000."""
SYNTHETIC_IDS = range(9_000_000, 10_000_000)
"""Numbers of the ``ISIC_`` image ids that `dermaflow data synth` gives."""


@dataclass(frozen=True)
class Section:
    """A titled part of the card: paragraphs, then facts (name, value), then a block of code."""

    title: str
    paragraphs: tuple[str, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()
    code: str | None = None


def card_sections(
    bundle: Bundle, evaluation: Evaluation, image_ids: Iterable[str], command: str | None
) -> list[Section]:
    """Sections of the model card.

    Args:
        bundle: The model.
        evaluation: Its figures on the test split.
        image_ids: Images of the test split; they tell HAM10000 and synthetic data from others.
        command: The command that made the evaluation.
    """
    return [
        Section(
            "Intended use",
            (
                "Research on dermoscopy images of pigmented skin lesions, and decision support that a clinician checks."
                " The model sees one dermoscopy image, centred on one lesion, and gives a calibrated probability for "
                "each of seven diagnoses: " + ", ".join(f"{d.name} ({d.code})" for d in DIAGNOSES) + ".",
                "It is not for diagnosis. It is no medical device. It must not be used without a clinician, for "
                "clinical photographs without a dermatoscope, for lesions of mucosa or nails, or for any diagnosis "
                "outside the seven: it will still name one of them.",
            ),
        ),
        Section("Training data", _data_paragraphs(image_ids), (("data hash", bundle.training.data_hash),)),
        Section("Figures on the test split", _figure_paragraphs(evaluation), _figure_facts(evaluation)),
        Section(
            "Limits",
            (
                "HAM10000 and its relatives have no field for skin type and come almost only from light skin; how the "
                "model does on dark skin is not known from these figures.",
                "Images come from few sites and devices. On images of another clinic or camera, expect worse figures "
                "than these until they have been measured there.",
                "Nevi confirmed by follow-up only are easy and lift every average; the histology-proven figures stand "
                "beside the others for that reason.",
                "Probabilities and thresholds hold for the class mix of the calibration split. Where melanoma is rarer "
                "or more common, they have to be fitted again.",
            ),
        ),
        Section("How it was made", (), _making_facts(bundle)),
        Section("Recipe", (), (), json.dumps(bundle.training.recipe, indent=2, sort_keys=True)),
        *([] if bundle.training.federation else [Section("Made with", (), (), making_commands(bundle))]),
        *([Section("Measured with", (), (), command)] if command else []),
    ]


def _data_paragraphs(image_ids: Iterable[str]) -> tuple[str, ...]:
    numbers = [int(name[5:]) if name.startswith("ISIC_") and name[5:].isdecimal() else -1 for name in image_ids]
    if all(number in HAM10000_IDS for number in numbers):
        return (
            "HAM10000 (Tschandl, Rosendahl, Kittler, Sci Data 5, 180161, 2018, doi 10.1038/sdata.2018.161): 10,015 "
            "dermoscopy images of 7,470 lesions from Vienna and Queensland, split by lesion.",
            "Licence of the data: CC BY-NC 4.0. It forbids commercial use, and a model trained on the data should be "
            "treated alike.",
        )
    if all(number in SYNTHETIC_IDS for number in numbers):
        return (
            "Synthetic: drawn by a program (dermaflow data synth), caricatures of seven kinds of lesion. No patient is "
            "in it, and these figures say nothing of patients.",
        )
    return ("An archive of the user; its licence is that of its source and is not known here.",)


def _figure_paragraphs(evaluation: Evaluation) -> tuple[str, ...]:
    counts = evaluation.populations["all"].counts
    return (
        f"{counts.images:,} images of {counts.lesions:,} lesions that neither training nor calibration saw. "
        f"95 % intervals by lesion bootstrap ({evaluation.resamples:,} resamples, seed {evaluation.seed}).",
    )


def _figure_facts(evaluation: Evaluation) -> tuple[tuple[str, str], ...]:
    population = evaluation.populations["all"]
    points, ranking = population.points, population.ranking
    facts = [
        ("accuracy", percent(points["accuracy"].accuracy)),
        ("balanced accuracy", percent(points["accuracy"].balanced_accuracy)),
        ("balanced accuracy at the balanced point", percent(points["balanced"].balanced_accuracy)),
        ("macro-AUC", number(ranking.macro_auc)),
        ("melanoma AUC", number(ranking.melanoma_auc)),
    ]
    if "mel" not in population.absent:
        usual, safe = points["accuracy"].classes["mel"], points["melanoma_safe"].classes["mel"]
        facts += [
            ("melanoma sensitivity", percent(usual.sensitivity)),
            ("melanoma sensitivity at the melanoma-safe point", percent(safe.sensitivity)),
            ("melanoma specificity at the melanoma-safe point", percent(safe.specificity)),
        ]
    return (*facts, ("expected calibration error", number(population.calibration.ece)))


def making_commands(bundle: Bundle) -> str:
    """The commands that make such a model again from a data set; ``recipe.yaml`` is what stands in the card."""
    training = bundle.training
    recipe = training.recipe_name if training.recipe_name in shipped_recipes() else "recipe.yaml"
    train = f"dermaflow train --shards shards --recipe {recipe} --set seed={training.seed} --out model"
    if training.initial_weights not in (None, "none", "imagenet"):
        train += f" --weights {training.initial_weights}"
    if training.recipe.get("distillation"):
        train += " --teacher TEACHER"
    commands = ["dermaflow prepare --data DATA --out shards", train]
    if bundle.made_small_from:
        commands.append(f"dermaflow models shrink model --out small --name {bundle.name}")
    return "\n".join(commands)


def _making_facts(bundle: Bundle) -> tuple[tuple[str, str], ...]:
    training, calibration = bundle.training, bundle.calibration
    facts = [
        ("name", bundle.name),
        ("backbone", f"{bundle.backbone}, input {bundle.input.height}×{bundle.input.width} pixels"),
        ("initial weights", training.initial_weights or "none"),
        ("recipe", f"{training.recipe_name} ({training.recipe_hash[:12]})"),
        ("seed", str(training.seed)),
        ("training", f"{training.epochs} epochs in {training.seconds / 60:.0f} min, started {training.started}"),
        ("device", f"{training.device}, {training.workers} worker" + "s" * (training.workers != 1)),
        ("weights SHA-256", bundle.weights_sha256),
        ("versions", ", ".join(f"{name} {version}" for name, version in sorted(training.versions.items()))),
    ]
    if bundle.made_small_from:
        facts.append(("stored anew", f"in float16, from model {bundle.made_small_from[:12]}; no training image named"))
    if training.federation:
        facts.append(("federation", training.federation.in_words()))
    if calibration:
        facts.append(
            (
                "calibration",
                f"temperature {calibration.temperature:.3f}"
                + (", a bias for each class" if any(calibration.bias) else "")
                + f", melanoma threshold {calibration.mel_threshold:.3f}, "
                f"on {calibration.images:,} images of {calibration.lesions:,} lesions",
            )
        )
    return tuple(facts)
