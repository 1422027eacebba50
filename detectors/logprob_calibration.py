"""Margins of a log-prob classifier to probabilities that mean what they say.

With labels: `temperature` and `platt`. Without: `contextual` and `batch`, which take away what the
prompts prefer whatever the text. Each gives one slope and one intercept, found once and then fixed:
a calibration that followed the batch would make a score depend on its neighbours.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np

from detectors.calibrate import sigmoid
from detectors.logprob import Affine, log_mean_exp, log_sigmoid
from detectors.protocol import FloatArray

LEAST: Final = 50  # examples; below, a slope says more of the sample than of the model
_STEPS: Final = 100  # of Newton; ten are usual
_ENOUGH: Final = 1e-9  # gradient of the mean loss at which it stops
_RIDGE: Final = 1e-12  # keeps the Hessian invertible, as in Lin, Lin & Weng


def temperature(margins: Sequence[float], labels: Sequence[int]) -> Affine:
    """p = sigmoid(margin / T) with the T of least cross-entropy (Guo et al. 2017, 1706.04599).

    margins: (N,) nats, not calibrated; labels: (N,) 0 or 1; N at least 50, of both classes.
    Targets as in `platt`, so that T stays above 0 where the classes separate perfectly.
    Raises ValueError otherwise, and where no positive T fits: the margins rank the wrong way round.
    """
    given, targets = _checked(margins, labels)
    scale = _scale(given)
    (slope,) = _fitted((given / scale)[:, None], targets)
    return Affine(_positive(slope / scale), 0.0)


def platt(margins: Sequence[float], labels: Sequence[int]) -> Affine:
    """p = sigmoid(a * margin + b) of least cross-entropy (Platt 1999). Takes and raises as above.

    Targets are (N+ + 1) / (N+ + 2) and 1 / (N- + 2) instead of 1 and 0, Platt's own prior: classes
    that separate perfectly would have an infinite slope. Newton with a line search, after Lin, Lin
    & Weng, "A note on Platt's probabilistic outputs" (2007).
    """
    given, targets = _checked(margins, labels)
    scale, middle = _scale(given), float(given.mean())
    standard = (given - middle) / scale
    slope, intercept = _fitted(np.stack([standard, np.ones_like(standard)], axis=1), targets)
    slope = _positive(slope / scale)
    return Affine(slope, intercept - slope * middle)


def contextual(content_free: Sequence[float]) -> Affine:
    """Takes away the mean verdict on texts that say nothing, as "N/A" (Zhao et al. 2102.09690).

    content_free: (M,) their margins, nats, at least one. Raises ValueError otherwise.
    The paper divides each class's probability by its mean over those texts and normalises: for two
    classes that shifts the margin by log mean P_neg - log mean P_pos. Meant for "token" and
    "byte": the margins of a sum grow with length, and these texts are short.
    """
    return _without_preference(content_free)


def batch(margins: Sequence[float]) -> Affine:
    """Takes away the mean verdict on a sample of real texts (Zhou et al. 2309.17249).

    margins: (M,) of a sample without labels, nats. Raises ValueError for none.
    The same shift as `contextual`. It assumes that the sample holds as many texts of each class:
    on traffic that is nearly all harmless it moves harmless texts towards 0.5.
    """
    return _without_preference(margins)


def _without_preference(margins: Sequence[float]) -> Affine:
    given = np.asarray(margins, dtype=float)
    if given.ndim != 1 or not len(given) or not np.isfinite(given).all():
        raise ValueError("no margins, or one that is not finite")
    harmful, harmless = log_mean_exp(np.stack([log_sigmoid(given), log_sigmoid(-given)]))
    return Affine(1.0, float(harmless - harmful))


def _checked(margins: Sequence[float], labels: Sequence[int]) -> tuple[FloatArray, FloatArray]:
    """Margins and Platt's targets."""
    given, truth = np.asarray(margins, dtype=float), np.asarray(labels, dtype=float)
    if given.ndim != 1 or given.shape != truth.shape or len(given) < LEAST:
        raise ValueError(
            f"{given.shape} margins, {truth.shape} labels: need as many, {LEAST} or more"
        )
    if not np.isfinite(given).all() or not ((truth == 0) | (truth == 1)).all():
        raise ValueError("a margin is not finite, or a label neither 0 nor 1")
    positive = float(truth.sum())
    negative = len(truth) - positive
    if not positive or not negative:
        raise ValueError("examples of one class alone cannot calibrate")
    return given, np.where(truth == 1, (positive + 1) / (positive + 2), 1 / (negative + 2))


def _scale(margins: FloatArray) -> float:
    """Sums of log-probs spread over hundreds of nats; Newton wants numbers near 1."""
    spread = float(np.abs(margins - margins.mean()).max())
    if spread == 0.0:
        raise ValueError("all margins are the same: there is nothing to calibrate")
    return spread


def _fitted(features: FloatArray, targets: FloatArray) -> list[float]:
    """(P,) weights of least mean cross-entropy of (N, P) features, by damped Newton.

    The loss is convex, and the targets are strictly between 0 and 1, so there is one minimum.
    """
    weights = np.zeros(features.shape[1])
    loss = _loss(features, targets, weights)
    for _ in range(_STEPS):
        predicted = sigmoid(features @ weights)  # (N,)
        gradient = features.T @ (predicted - targets) / len(targets)  # (P,)
        if np.abs(gradient).max() < _ENOUGH:
            break
        curved = features * (predicted * (1 - predicted))[:, None]  # (N, P)
        hessian = features.T @ curved / len(targets) + _RIDGE * np.eye(len(weights))
        step: FloatArray = np.linalg.solve(hessian, gradient).astype(np.float64)
        weights, loss, moved = _downhill(features, targets, weights, loss, step, gradient)
        if not moved:
            break  # to within rounding
    return [float(weight) for weight in weights]


def _downhill(
    features: FloatArray, targets: FloatArray, weights: FloatArray, loss: float,
    step: FloatArray, gradient: FloatArray,
) -> tuple[FloatArray, float, bool]:  # fmt: skip
    """The step, halved until the loss falls by a share of what the slope promises (Armijo)."""
    share = 1.0
    while share > 1e-10:
        tried = weights - share * step
        found = _loss(features, targets, tried)
        if found < loss - 1e-4 * share * float(gradient @ step):
            return tried, found, True
        share /= 2
    return weights, loss, False


def _loss(features: FloatArray, targets: FloatArray, weights: FloatArray) -> float:
    margins = features @ weights
    return float(-(targets * log_sigmoid(margins) + (1 - targets) * log_sigmoid(-margins)).mean())


def _positive(slope: float) -> float:
    if slope <= 0.0:
        raise ValueError("the margins rank harmless above harmful: no slope can mend the prompts")
    return slope
