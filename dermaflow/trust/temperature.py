"""From logits to probabilities that mean what they say.

A network is usually too sure of itself; one number, the temperature, cures that (Guo et al., On calibration of modern
neural networks, ICML 2017). A network trained on weighted or re-sampled classes has also learnt class frequencies that
are not those of the patients; one number a class, the bias, cures that (the bias half of vector scaling, same paper).
"""

from __future__ import annotations

import numpy as np
from scipy.special import log_softmax, softmax

from dermaflow.schemas.bundle import Calibration

PRIOR_SD = 1.0
"""Standard deviation of the normal prior on log temperature and each bias. Weak: it keeps them finite where a handful
of lesions is separated without an error, and moves them by about 1 / N otherwise."""

FOLDS = 5


def calibrated_probabilities(logits: np.ndarray, calibration: Calibration) -> np.ndarray:
    """Probabilities of the seven diagnoses. The only place where logits become probabilities.

    Args:
        logits: [N, 7], as the network gives them.
        calibration: Fitted on the calibration split.

    Returns:
        float64 [N, 7]; rows sum to 1.
    """
    return scale(logits, calibration.temperature, np.asarray(calibration.bias))


def scale(logits: np.ndarray, temperature: float, bias: np.ndarray) -> np.ndarray:
    """``softmax(logits / temperature + bias)``, float64 [N, K]."""
    return softmax(np.asarray(logits, dtype=np.float64) / temperature + bias, axis=1)


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature with the largest likelihood.

    Args:
        logits: [N, K].
        labels: [N], integers in 0..K-1.

    Returns:
        A positive number; above 1 for a network that is too sure of itself.
    """
    return _fit(logits, labels, with_bias=False)[0]


def fit_temperature_and_bias(logits: np.ndarray, labels: np.ndarray) -> tuple[float, np.ndarray]:
    """Temperature and class bias with the largest likelihood under a weak prior.

    Args:
        logits: [N, K].
        labels: [N], integers in 0..K-1.

    Returns:
        The temperature, and float64 [K] with mean 0. At a bias of 0 this is plain temperature scaling.
    """
    return _fit(logits, labels, with_bias=True)


def fit_scaling(logits: np.ndarray, labels: np.ndarray, lesions: np.ndarray, seed: int) -> tuple[float, np.ndarray]:
    """Temperature, with a class bias only if that predicts unseen lesions better.

    Both are fitted on four fifths of the lesions and judged by log loss on the last, five times. The bias is kept if it
    lowers the log loss by more than one standard error of the difference (over lesions): seven more numbers have to
    earn their place.

    Args:
        logits: [N, K].
        labels: [N], integers in 0..K-1.
        lesions: [N], lesion of each image.
        seed: Of the division of the lesions.

    Returns:
        Temperature and float64 [K] bias, zeros where plain temperature is enough.
    """
    from sklearn.model_selection import GroupKFold  # as below: slow to import

    temperature, bias = fit_temperature_and_bias(logits, labels)
    plain = fit_temperature(logits, labels), np.zeros_like(bias)
    _, lesion = np.unique(lesions, return_inverse=True)
    counts = np.bincount(lesion)
    if len(counts) < FOLDS:
        return plain
    gain = np.zeros(len(labels))  # log loss that the bias saves on each image, by fits that did not see its lesion
    for fit, held in GroupKFold(FOLDS, shuffle=True, random_state=seed).split(logits, groups=lesion):
        one, both = fit_temperature(logits[fit], labels[fit]), fit_temperature_and_bias(logits[fit], labels[fit])
        gain[held] = _log_loss(logits[held] / one, labels[held]) - _log_loss(
            logits[held] / both[0] + both[1], labels[held]
        )
    by_lesion = np.bincount(lesion, weights=gain)
    standard_error = np.sqrt(np.sum((by_lesion - counts * gain.mean()) ** 2)) / len(gain)
    return (temperature, bias) if gain.mean() > standard_error else plain


def _log_loss(scaled: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return -log_softmax(scaled, axis=1)[np.arange(len(labels)), labels]


def _fit(logits: np.ndarray, labels: np.ndarray, with_bias: bool) -> tuple[float, np.ndarray]:
    logits = np.asarray(logits, dtype=np.float64)
    images, classes = logits.shape
    truth = np.eye(classes)[labels]

    from scipy.optimize import minimize  # slow to import: those who only score need not wait for it

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:  # negative log posterior an image, and its gradient
        log_temperature, bias = parameters[0], parameters[1:]
        scaled = logits * np.exp(-log_temperature)
        excess = softmax(scaled + bias, axis=1) - truth
        likelihood = _log_loss(scaled + bias, labels).mean()
        prior = parameters @ parameters / (2 * PRIOR_SD**2 * images)
        gradient = np.concatenate([[-(excess * scaled).sum() / images], excess.mean(axis=0) * with_bias])
        return likelihood + prior, gradient + parameters / (PRIOR_SD**2 * images)

    best = minimize(loss, np.zeros(1 + classes), jac=True, method="L-BFGS-B", options={"ftol": 1e-12, "gtol": 1e-8})
    return float(np.exp(best.x[0])), best.x[1:]
