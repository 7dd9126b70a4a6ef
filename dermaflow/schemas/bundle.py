"""What a trained model is on disk: ``weights.safetensors``, ``bundle.json`` (this schema), ``card.md``.

``bundle.json`` holds the SHA-256 of the other files, and ``bundle.sha256`` that of ``bundle.json``, which identifies
the model. ``ood.safetensors`` and ``reference.json`` hold what new images are compared with (`Reference`).

`Calibration` is fitted on the ``calibration`` split only and turns logits into findings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from dermaflow.taxonomy import CODES

WEIGHTS_NAME = "weights.safetensors"
OOD_NAME = "ood.safetensors"
REFERENCE_NAME = "reference.json"
BUNDLE_NAME = "bundle.json"
CARD_NAME = "card.md"
DIGEST_NAME = "bundle.sha256"


class _Strict(BaseModel):
    # JSON has no NaN: a metric that cannot be computed is written as "NaN" and read back as a float
    model_config = ConfigDict(extra="forbid", protected_namespaces=(), ser_json_inf_nan="strings")


class Copies(_Strict):
    """How the training images were stored: small JPEGs of one size (pixels) and one quality (of libjpeg, 1 to 100)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    height: int = Field(ge=1)
    width: int = Field(ge=1)
    quality: int = Field(ge=1, le=100)


class InputSpec(_Strict):
    """How an image becomes the network's input."""

    height: int
    width: int
    mean: tuple[float, float, float]  # of RGB in [0, 1]
    std: tuple[float, float, float]
    views: Literal[1, 4] = 1  # 4: logits are the mean over the image and its flips
    copies: Copies | None = None  # a larger image is first copied likewise: the network knows the traces of JPEG


class OperatingPoint(_Strict):
    """A way to turn calibrated probabilities into one diagnosis.

    The score of class k is ``log p_k - tau * log prior_k``; the largest wins, unless ``p_mel >= mel_threshold``, then
    melanoma does.
    """

    name: Literal["accuracy", "balanced", "melanoma_safe"]
    tau: float
    mel_threshold: float | None = None


class OodSpec(_Strict):
    """Mahalanobis distance from the features of the training split (`Reference`), which lie beside ``bundle.json``."""

    method: Literal["mahalanobis"] = "mahalanobis"
    quantile: float  # share of the calibration images that counts as ordinary
    threshold: float  # that quantile of their distance; above it an image is unlike the training images
    features_sha256: str = ""  # of ``ood.safetensors``; this and the next are filled in when the bundle is saved
    reference_sha256: str = ""  # of ``reference.json``


@dataclass(frozen=True)
class Reference:
    """The training images that a new one is compared with.

    They stand in the bundle by id and diagnosis, never as pictures; a bundle that may not name them has no reference.

    Attributes:
        features: float16 [N, D], L2-normalised features of the network (one view).
        mean: float32 [D], of the features as they are.
        whitener: float32 [D, D]; (feature - mean) @ whitener has the length of the Mahalanobis distance over sqrt(D).
        image_ids: [N].
        lesion_ids: [N].
        dx: [N], codes of the diagnoses.
    """

    features: np.ndarray
    mean: np.ndarray
    whitener: np.ndarray
    image_ids: tuple[str, ...]
    lesion_ids: tuple[str, ...]
    dx: tuple[str, ...]


class SafetyPolicy(_Strict):
    """When a lesion counts as suspicious although its most probable diagnosis is benign (`dermaflow.trust.policy`)."""

    mel_threshold: float | None = None  # p_mel from which on; None: not looked at
    malignant_threshold: float | None = None  # p_malignant from which on
    use_set: bool = False  # a malignant class in the conformal set


class Calibration(_Strict):
    """Everything fitted after training, on the calibration split.

    Calibrated probabilities are ``softmax(logits / temperature + bias)``. Source of the methods: temperature, Guo et
    al. 2017; class-conditional conformal sets, Vovk 2012 (Mondrian), with the LAC score 1 - p of the true class.
    """

    temperature: float
    bias: list[float] = Field(default_factory=lambda: [0.0] * len(CODES))  # 0 unless it lowers held-out log loss
    priors: list[float]  # class frequencies of the calibration split, in the order of the classes, sum 1
    conformal_alpha: float
    conformal_quantiles: list[float]  # class k is in the set if 1 - p_k <= quantile_k; 1.0 where too few lesions
    mel_threshold: float  # p_mel from which melanoma is not missed: 95 % sensitivity with a margin, at most 0.10
    malignant_threshold: float  # the same for p_malignant (mel, bcc, akiec), without a limit
    entropy_threshold: float  # nats; 95 % quantile of the entropy of the probabilities
    policy: SafetyPolicy  # finds most melanomas while few benign lesions are flagged
    operating_points: list[OperatingPoint]
    ood: OodSpec | None
    images: int
    lesions: int
    data_hash: str = ""  # of the shards it was fitted on


class FederationRecord(_Strict):
    """How sites that keep their images trained a model together."""

    origin: Literal["simulation", "deployment"]
    strategy: str
    sites: list[str]  # that trained, sorted
    rounds: int
    data: dict[str, str]  # data hash of each of them; in a simulation that of the divided shards
    plan_sha256: str  # of the plan in result.json, as JSON with sorted keys
    privacy: str | None = None  # what differential privacy guarantees, in words
    run: str = ""  # under which its sites remember it; older bundles do not say

    def in_words(self) -> str:
        """One line for a card."""
        said = f"{self.strategy} over {', '.join(self.sites)}, {self.rounds} rounds, {self.origin}"
        return f"{said}, plan {self.plan_sha256[:12]}" + (f"; {self.privacy}" if self.privacy else "")


class TrainingRecord(_Strict):
    """Where the weights come from."""

    recipe_name: str
    recipe: dict[str, Any]  # the whole recipe, as given
    recipe_hash: str
    seed: int
    data_hash: str
    started: str  # ISO 8601, UTC
    seconds: float
    epochs: int
    device: str
    workers: int
    history: list[dict[str, float]]  # one entry an epoch: epoch, loss, lr, seconds, and on evaluation epochs val_*
    initial_weights: str | None  # file name or "torchvision" or None
    versions: dict[str, str]
    federation: FederationRecord | None = None  # None: trained in one place
    teacher: str | None = None  # SHA-256 of ``bundle.json`` of the model it learnt from
    members: dict[str, str] = Field(default_factory=dict)  # of an ensemble: name and SHA-256 of ``bundle.json``


class Bundle(_Strict):
    """The content of ``bundle.json``."""

    format: Literal["dermaflow-bundle/2"] = "dermaflow-bundle/2"
    name: str
    backbone: str  # of an ensemble those of its members, joined by +
    classes: tuple[str, ...] = CODES
    input: InputSpec
    dropout: float
    weights_sha256: str = ""  # this and the next are filled in when the bundle is saved
    card_sha256: str = ""
    train_priors: list[float]  # class frequencies of the training split before balancing, sum 1
    training: TrainingRecord
    calibration: Calibration | None = None
    metrics: dict[str, float] | None = None  # headline figures on the test split, once evaluated
    made_small_from: str | None = None  # SHA-256 of ``bundle.json`` of the model it was stored anew from
