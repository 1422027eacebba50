"""Calibration and thresholds from scored rows; others than those that are reported.

Sources that nothing was trained on (sources.CALIBRATING) count as much as all known ones together:
a model is surer of sources that it knows, and what it will meet is neither.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
from sklearn.linear_model import LogisticRegression

from detectors.calibrate import Calibration, calibrated, sigmoid
from detectors.harms import COLUMNS, THRESHOLD_KEYS
from training import sources
from training.measure import SURE, Labelled, Scored, blocked

FALSE_BLOCKS: Final = 0.004  # share of long harmless replies that may be blocked at any segment
LOOK_ALIKES_BLOCKED: Final = 0.08  # share of harmless texts that look harmful
COUNTER_SPEECH_BLOCKED: Final = 0.10  # share of answers to hate
LEAST_PRECISION: Final = 0.75  # of a column at its threshold
_LOWEST, _HIGHEST = 0.30, 0.99  # whatever the rows say: few of them lie at the ends
_WEAKEST: Final = 0.1  # weight of a label that still calibrates
_LOUDEST: Final = 10.0  # times a known row, that one of an unknown source counts at most
_PRECISION_COUNTS: Final = 1.0  # beta of the F score that each threshold starts from


class Passing(NamedTuple):
    """Harmless rows that are to pass, with the highest logits over their segments."""

    scored: Scored
    most: float  # share of them that may be blocked


def evened(scored: Scored, column: int, least: float = SURE) -> Labelled:
    """The rows labelled for a column, those of unknown sources weighing as much as the others.

    At most _LOUDEST times a known row each, so that a handful of them does not decide.
    """
    known = scored.only(lambda row: row.source not in sources.CALIBRATING).labels(column, least)
    unknown = scored.only(lambda row: row.source in sources.CALIBRATING).labels(column, least)
    louder = 1.0
    if known.weights.sum() > 0 and unknown.weights.sum() > 0:
        louder = min(_LOUDEST, float(known.weights.sum() / unknown.weights.sum()))
    return Labelled(
        np.concatenate([known.targets, unknown.targets]),
        np.concatenate([known.logits, unknown.logits]),
        np.concatenate([known.weights, unknown.weights * louder]),
    )


def calibrate(scored: Scored) -> Calibration:
    """Platt scaling, one logistic regression a column. ValueError where the slope is not positive.

    A slope of 0 or less would turn the order round: the model has then learnt nothing there.
    """
    pairs = [_platt(evened(scored, column, _WEAKEST)) for column in range(len(COLUMNS))]
    for column, (slope, _) in zip(COLUMNS, pairs, strict=True):
        if slope <= 0:
            raise ValueError(f"{column}: slope {slope:.3f}; train longer or on more rows")
    return Calibration(
        slopes=np.array([slope for slope, _ in pairs]),
        intercepts=np.array([intercept for _, intercept in pairs]),
    )


def _platt(labelled: Labelled) -> tuple[float, float]:
    fitted = LogisticRegression(C=1e3).fit(
        labelled.logits[:, None], labelled.targets, sample_weight=labelled.weights
    )
    return float(fitted.coef_[0, 0]), float(fitted.intercept_[0])


def choose(
    scored: Scored, calibration: Calibration, passing: Sequence[Passing]
) -> dict[str, float]:
    """Thresholds by THRESHOLD_KEYS: of each column the best F1 among those that keep the least
    precision; then all raised together, as little as lets enough of each `passing` pass."""
    found = [_best(evened(scored, i), calibration, i) for i in range(len(COLUMNS))]
    for harmless in passing:
        if len(harmless.scored.rows):
            found = _raised(found, harmless, calibration)
    return dict(zip(THRESHOLD_KEYS, found, strict=True))


def _raised(limits: list[float], harmless: Passing, calibration: Calibration) -> list[float]:
    benign = calibrated(harmless.scored.logits, calibration)  # (N, 7)
    for quantile in np.linspace(0.0, 1.0, 1001):
        floors = np.quantile(benign, quantile, axis=0)
        raised = np.clip(np.maximum(limits, floors), _LOWEST, _HIGHEST).round(3)
        found: list[float] = raised.tolist()
        thresholds = dict(zip(THRESHOLD_KEYS, found, strict=True))
        if blocked(harmless.scored, calibration, thresholds).mean() <= harmless.most:
            return found
    return found


def _best(labelled: Labelled, calibration: Calibration, column: int) -> float:
    """The threshold of the best F score on its own; the highest where none is precise enough."""
    slope, intercept = calibration.slopes[column], calibration.intercepts[column]
    probabilities = sigmoid(slope * labelled.logits + intercept)
    grid = np.linspace(_LOWEST, _HIGHEST, 70)
    scores = [_f(labelled, probabilities > threshold) for threshold in grid]
    return float(grid[int(np.argmax(scores))]) if max(scores) > 0 else _HIGHEST


def _f(labelled: Labelled, above: npt.NDArray[np.bool_]) -> float:
    """F score of what is above, by weight; 0 where its precision is too low."""
    beta = _PRECISION_COUNTS**2
    hit = float((labelled.weights * labelled.targets)[above].sum())
    flagged = float(labelled.weights[above].sum())
    if hit < LEAST_PRECISION * flagged:
        return 0.0
    positives = float((labelled.weights * labelled.targets).sum())
    return (1 + beta) * hit / max(1.0, beta * positives + flagged)
