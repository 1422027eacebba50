"""Calibration and thresholds from scored rows; others than those that are reported.

For weights and thresholds, sources that nothing was trained on (sources.CALIBRATING) count as much
as all known ones together. Probabilities are calibrated on known sources alone: with unknown ones
among them they were worse on further unknown ones, each of which is off in its own way
(docs/log.md).
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
from sklearn.linear_model import LogisticRegression

from detectors.calibrate import Calibration, calibrated, sigmoid
from detectors.harms import COLUMNS, THRESHOLD_KEYS
from training import sources
from training.measure import Labelled, Scored

FALSE_BLOCKS: Final = 0.004  # share of long harmless replies that may be blocked at any segment
LOOK_ALIKES_BLOCKED: Final = 0.08  # share of harmless texts that look harmful
COUNTER_SPEECH_BLOCKED: Final = 0.10  # share of answers to hate
LEAST_PRECISION: Final = 0.70  # of a column at its threshold
_LOWEST, _HIGHEST = 0.30, 0.99  # whatever the rows say: few of them lie at the ends
_WEAKEST: Final = 0.1  # weight of a label that still calibrates
_LOUDEST: Final = 10.0  # times a known row, that one of an unknown source counts at most
_PRECISION_COUNTS: Final = 1.0  # beta of the F score that each threshold starts from


class Passing(NamedTuple):
    """Harmless rows that are to pass, with the highest logits over their segments."""

    scored: Scored
    most: float  # share of them that may be blocked


def evened(scored: Scored, column: int) -> Labelled:
    """The rows labelled for a column, those of unknown sources weighing as much as the others.

    At most _LOUDEST times a known row each, so that a handful of them does not decide.
    """
    known = of_known(scored).labels(column)
    unknown = scored.only(lambda row: row.source in sources.CALIBRATING).labels(column)
    louder = 1.0
    if known.weights.sum() > 0 and unknown.weights.sum() > 0:
        louder = min(_LOUDEST, float(known.weights.sum() / unknown.weights.sum()))
    return Labelled(
        np.concatenate([known.targets, unknown.targets]),
        np.concatenate([known.logits, unknown.logits]),
        np.concatenate([known.weights, unknown.weights * louder]),
    )


def of_known(scored: Scored) -> Scored:
    """The rows of sources that were trained on."""
    return scored.only(lambda row: row.source not in sources.CALIBRATING)


def calibrate(scored: Scored) -> Calibration:
    """Platt scaling on known sources, one logistic regression a column. ValueError where the slope
    is not positive.

    A slope of 0 or less would turn the order round: the model has then learnt nothing there.
    """
    known = of_known(scored)
    pairs = [platt(known.labels(column, _WEAKEST)) for column in range(len(COLUMNS))]
    for column, (slope, _) in zip(COLUMNS, pairs, strict=True):
        if slope <= 0:
            raise ValueError(f"{column}: slope {slope:.3f}; train longer or on more rows")
    return Calibration(
        slopes=np.array([slope for slope, _ in pairs]),
        intercepts=np.array([intercept for _, intercept in pairs]),
    )


def platt(labelled: Labelled) -> tuple[float, float]:
    """Slope and intercept of a logistic regression on the logits."""
    fitted = LogisticRegression(C=1e3).fit(
        labelled.logits[:, None], labelled.targets, sample_weight=labelled.weights
    )
    return float(fitted.coef_[0, 0]), float(fitted.intercept_[0])


def choose(
    scored: Scored, calibration: Calibration, passing: Sequence[Passing]
) -> dict[str, float]:
    """Thresholds by THRESHOLD_KEYS: of each column the best F1 among those that keep the least
    precision; then raised, where that loses least, until enough of each `passing` pass."""
    columns = [_column(scored, calibration, i) for i in range(len(COLUMNS))]
    found = [_best(column) for column in columns]
    for harmless in passing:
        if len(harmless.scored.rows):
            found = _raised(found, harmless, calibration, columns)
    return dict(zip(THRESHOLD_KEYS, (round(limit, 3) for limit in found), strict=True))


def _column(scored: Scored, calibration: Calibration, column: int) -> Labelled:
    """The labelled rows of a column, with probabilities for logits."""
    labelled = evened(scored, column)
    slope, intercept = calibration.slopes[column], calibration.intercepts[column]
    return labelled._replace(logits=sigmoid(slope * labelled.logits + intercept))


def _raised(
    limits: list[float], harmless: Passing, calibration: Calibration, columns: Sequence[Labelled]
) -> list[float]:
    """The thresholds, raised step by step: of all columns that still block one of the rows, the
    next step is that of the column which loses fewest rows that it rightly finds by letting its
    lowest such row pass. Not least F1: that of a rare harm would count as much as any harm's."""
    found = list(limits)
    benign = calibrated(harmless.scored.logits, calibration)  # (N, 7)
    while (above := benign > np.array(found)).any(axis=1).mean() > harmless.most:
        steps = []
        for i in np.flatnonzero(above.any(axis=0)):
            # A thousandth up, since that is how thresholds are written.
            limit = float(np.ceil(benign[above[:, i], i].min() * 1_000) / 1_000)
            lost = _hits(columns[i], found[i]) - _hits(columns[i], limit)
            steps.append((lost, limit, i))
        _, limit, i = min(steps)
        found[i] = limit
    return found


def _best(column: Labelled) -> float:
    """The threshold of the best F score on its own; the highest where none is precise enough."""
    grid = np.linspace(_LOWEST, _HIGHEST, 70)
    scores = [_f(column, limit) if _precise(column, limit) else 0.0 for limit in grid]
    return float(grid[int(np.argmax(scores))]) if max(scores) > 0 else _HIGHEST


def _precise(column: Labelled, limit: float) -> bool:
    above = column.logits > limit
    hit = (column.weights * column.targets)[above].sum()
    return bool(hit >= LEAST_PRECISION * column.weights[above].sum())


def _hits(column: Labelled, limit: float) -> float:
    """Weight of the positive rows above a threshold."""
    return float((column.weights * column.targets)[column.logits > limit].sum())


def _f(column: Labelled, limit: float) -> float:
    """F score of the rows above a threshold, by weight."""
    beta, above = _PRECISION_COUNTS**2, column.logits > limit
    hit = _hits(column, limit)
    positives = float((column.weights * column.targets).sum())
    flagged = float(column.weights[above].sum())
    return (1 + beta) * hit / max(1e-9, beta * positives + flagged)
