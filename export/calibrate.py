"""Calibration and figures of somebody else's classifier on our held-out rows."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from sklearn.linear_model import LogisticRegression

from detectors.calibrate import Calibration
from detectors.harms import COLUMNS
from detectors.labels import LabelMap
from detectors.protocol import FloatArray, Window
from detectors.tokens import PairTokens
from training import measure, rows
from training.measure import Labelled, Scored
from training.rows import Row

IDENTITY: Final = Calibration(np.ones(len(COLUMNS)), np.zeros(len(COLUMNS)))
_A_SOURCE: Final = 40  # rows of each source, at most
_WEAKEST: Final = 0.1  # weight of a label that still calibrates
_FEWEST: Final = 20  # rows of either class that a column needs


class Sample(NamedTuple):
    """Which rows, and how many at once."""

    folder: Path
    threads: int


class Fitted(NamedTuple):
    """What a manifest says of scores."""

    calibration: Calibration
    thresholds: dict[str, float]
    metrics: Mapping[str, Any]
    columns: tuple[str, ...]  # the calibrated ones; the others give the model's own probabilities


def fit(
    sample: Sample,
    tokens: PairTokens,
    log_odds_of: Callable[[Window], FloatArray],
    labels: LabelMap,
    thresholds: dict[str, float],
) -> Fitted:
    """Calibrated on one part, measured on two others: rows of known sources, whole sources left
    out. The thresholds stay the label file's."""
    parts = rows.split(rows.read(sample.folder))
    scored = {
        part: measure.score(_some(getattr(parts, part)), tokens, log_odds_of, sample.threads)
        for part in ("calibrate", "report", "unseen")
    }
    calibration, columns = of_scored(scored["calibrate"], labels)
    metrics = {
        part: {
            column: found._asdict()
            for column, found in measure.table(scored[part], calibration, thresholds).items()
            if column not in labels.silent()
        }
        for part in ("report", "unseen")
    }
    return Fitted(calibration, thresholds, metrics, columns)


def of_scored(scored: Scored, labels: LabelMap) -> tuple[Calibration, tuple[str, ...]]:
    """Platt scaling of each column that has labels, rows of both classes and the right slope.

    The others stay as they are: a column whose slope is not positive says nothing here, and
    turning it round would make it say what it does not mean.
    """
    slopes, intercepts, fitted = np.ones(len(COLUMNS)), np.zeros(len(COLUMNS)), []
    for i, column in enumerate(COLUMNS):
        labelled = scored.labels(i, least=_WEAKEST)
        if column in labels.silent() or _too_few(labelled):
            continue
        slope, intercept = _platt(labelled)
        if slope > 0:
            slopes[i], intercepts[i] = slope, intercept
            fitted.append(column)
    return Calibration(slopes, intercepts), tuple(fitted)


def _platt(labelled: Labelled) -> tuple[float, float]:
    found = LogisticRegression(C=1e3).fit(
        labelled.logits[:, None], labelled.targets, sample_weight=labelled.weights
    )
    return float(found.coef_[0, 0]), float(found.intercept_[0])


def _too_few(labelled: Labelled) -> bool:
    positives = int((labelled.targets > 0).sum())
    return min(positives, len(labelled.targets) - positives) < _FEWEST


def _some(members: Iterable[Row]) -> list[Row]:
    """The first rows of each source by id, so that the choice needs no seed."""
    by_source: dict[str, list[Row]] = {}
    for row in sorted(members, key=lambda row: row.id):
        by_source.setdefault(row.source, []).append(row)
    return [row for group in by_source.values() for row in group[:_A_SOURCE]]
