"""Calibration and thresholds from scored rows; others than those that are reported."""

from typing import Final

import numpy as np
import numpy.typing as npt
from sklearn.linear_model import LogisticRegression

from detectors.calibrate import Calibration, calibrated, sigmoid
from detectors.harms import COLUMNS, THRESHOLD_KEYS
from detectors.protocol import FloatArray
from training.measure import Labelled, Scored, blocked

FALSE_BLOCKS: Final = 0.004  # share of long harmless replies that may be blocked at any segment
LOOK_ALIKES_BLOCKED: Final = 0.08  # share of harmless texts that look harmful
_LOWEST, _HIGHEST = 0.30, 0.99  # whatever the rows say: few of them lie at the ends
_WEAKEST: Final = 0.1  # weight of a label that still calibrates
_PRECISION_COUNTS: Final = 1.0  # beta of the F score that each threshold starts from


def calibrate(scored: Scored) -> Calibration:
    """Platt scaling, one logistic regression a column. ValueError where the slope is not positive.

    A slope of 0 or less would turn the order round: the model has then learnt nothing there.
    """
    pairs = [_platt(scored.labels(column, least=_WEAKEST)) for column in range(len(COLUMNS))]
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
    scored: Scored, harmless: Scored, calibration: Calibration, look_alikes: Scored | None = None
) -> dict[str, float]:
    """Thresholds by THRESHOLD_KEYS: the best F1 each, raised until harmless texts pass.

    harmless: long harmless replies, the highest logits over their segments; look_alikes: harmless
    texts that look harmful.
    """
    best = [_best(scored.labels(i), calibration, i) for i in range(len(COLUMNS))]
    found = _raised(best, harmless, calibration, FALSE_BLOCKS)
    if look_alikes is not None and len(look_alikes.rows):
        found = _raised(found, look_alikes, calibration, LOOK_ALIKES_BLOCKED)
    return dict(zip(THRESHOLD_KEYS, found, strict=True))


def _raised(
    limits: list[float], harmless: Scored, calibration: Calibration, most: float
) -> list[float]:
    """The thresholds, together raised as little as lets all but a share of the rows pass."""
    benign = calibrated(harmless.logits, calibration)  # (N, 7)
    for quantile in np.linspace(0.5, 1.0, 1001):
        floors = np.quantile(benign, quantile, axis=0)
        raised = np.clip(np.maximum(limits, floors), _LOWEST, _HIGHEST).round(3)
        found: list[float] = raised.tolist()
        thresholds = dict(zip(THRESHOLD_KEYS, found, strict=True))
        if blocked(harmless, calibration, thresholds).mean() <= most:
            return found
    return found


def _best(labelled: Labelled, calibration: Calibration, column: int) -> float:
    """The threshold of the best F score on its own."""
    slope, intercept = calibration.slopes[column], calibration.intercepts[column]
    probabilities = sigmoid(slope * labelled.logits + intercept)
    grid = np.linspace(_LOWEST, _HIGHEST, 70)
    scores = [_f(labelled.targets, probabilities > threshold) for threshold in grid]
    return float(grid[int(np.argmax(scores))])


def _f(targets: FloatArray, above: npt.NDArray[np.bool_]) -> float:
    weight = _PRECISION_COUNTS**2
    hit = float(targets[above].sum())
    return (1 + weight) * hit / max(1.0, weight * float(targets.sum()) + int(above.sum()))
