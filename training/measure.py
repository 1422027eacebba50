"""Rows to logits as the worker would get them, and figures from logits."""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, NamedTuple

import numpy as np

from detectors.calibrate import Calibration, calibrated, sigmoid
from detectors.harms import COLUMNS, THRESHOLD_KEYS
from detectors.protocol import FloatArray, Window
from detectors.tokens import PairTokens
from training.metrics import auprc, auroc, calibration_error, f1, share
from training.rows import Row
from training.windows import judged

SURE: Final = 1.0  # an inferred label of less weight trains and calibrates, but does not judge


class Labelled(NamedTuple):
    """One column of rows that have a label, (M,) each."""

    targets: FloatArray  # 0 or 1
    logits: FloatArray
    weights: FloatArray


class Scored(NamedTuple):
    """Rows with the highest logits over their segments."""

    rows: list[Row]
    logits: FloatArray  # (N, 7)

    def labels(self, column: int, least: float = SURE) -> Labelled:
        """The rows whose label for a column weighs at least `least`."""
        weights = np.array([row.weights[column] for row in self.rows])
        targets = np.array([row.targets[column] for row in self.rows])
        known = weights >= least
        return Labelled(targets[known], self.logits[known, column], weights[known])

    def only(self, chosen: Callable[[Row], bool]) -> "Scored":
        """The rows for which `chosen` holds."""
        mask = np.array([chosen(row) for row in self.rows], dtype=bool)
        return Scored([row for row in self.rows if chosen(row)], self.logits[mask])


def stacked(highest: Sequence[FloatArray]) -> FloatArray:
    """(N, 7) of N rows of (7,), of none too."""
    return np.stack(highest) if highest else np.empty((0, len(COLUMNS)))


class Figures(NamedTuple):
    """How one column does on one part. NaN where a class is missing."""

    positives: int
    negatives: int
    auprc: float
    auroc: float
    precision: float
    recall: float
    f1: float
    ece: float


def score(
    rows: Sequence[Row], tokens: PairTokens, logits_of: Callable[[Window], FloatArray], threads: int
) -> Scored:
    """Every segment of every row through the model, the highest logit of each column kept."""

    def highest(row: Row) -> FloatArray:
        windows = [w for passage in judged(row) for w in tokens.encode(passage).windows]
        return np.stack([logits_of(window) for window in windows]).max(axis=0)  # (7,)

    with ThreadPoolExecutor(threads) as pool:
        return Scored(list(rows), np.stack(list(pool.map(highest, rows))))


def table(
    scored: Scored, calibration: Calibration, thresholds: dict[str, float]
) -> dict[str, Figures]:
    """Figures by column."""
    found = {}
    for i, (column, key) in enumerate(zip(COLUMNS, THRESHOLD_KEYS, strict=True)):
        labelled = scored.labels(i)
        slope, intercept = calibration.slopes[i], calibration.intercepts[i]
        probabilities = sigmoid(slope * labelled.logits + intercept)
        found[column] = figures(labelled.targets, probabilities, thresholds[key])
    return found


def figures(targets: FloatArray, probabilities: FloatArray, threshold: float) -> Figures:
    """targets: (M,) 0 or 1; probabilities: (M,)."""
    positives = int(targets.sum())
    negatives = len(targets) - positives
    above = (probabilities > threshold).astype(float)
    if not len(targets):
        return Figures(0, 0, *(float("nan"),) * 6)
    return Figures(
        positives,
        negatives,
        float(auprc(targets, probabilities)),
        float(auroc(targets, probabilities)),
        float(share(targets[above > 0])),
        float(share(above[targets > 0])),
        float(f1(targets, above)),
        float(calibration_error(targets, probabilities)),
    )


def blocked(scored: Scored, calibration: Calibration, thresholds: dict[str, float]) -> FloatArray:
    """(N,) 1 where any column of a row is above its threshold."""
    limits = np.array([thresholds[key] for key in THRESHOLD_KEYS])
    margins = calibrated(scored.logits, calibration) - limits  # (N, 7)
    return np.where(margins.max(axis=1) > 0, 1.0, 0.0)


def blocked_by_source(
    scored: Scored, calibration: Calibration, thresholds: dict[str, float]
) -> dict[str, dict[str, float]]:
    """Per source: rows, share of them harmful, share blocked among harmful and harmless."""
    flags = blocked(scored, calibration, thresholds)
    found: dict[str, dict[str, float]] = {}
    for source in sorted({row.source for row in scored.rows}):
        found[source] = {
            "harmless": _count(scored.rows, source, 0.0),
            "harmless_blocked": _share(scored.rows, flags, source, 0.0),
            "harmful": _count(scored.rows, source, 1.0),
            "harmful_blocked": _share(scored.rows, flags, source, 1.0),
        }
    return found


def _is(row: Row, source: str, harmful: float) -> bool:
    return row.source == source and row.weights[-1] >= SURE and row.targets[-1] == harmful


def _count(rows: Iterable[Row], source: str, harmful: float) -> int:
    return sum(_is(row, source, harmful) for row in rows)


def _share(rows: Sequence[Row], flags: FloatArray, source: str, harmful: float) -> float:
    chosen = [flag for row, flag in zip(rows, flags, strict=True) if _is(row, source, harmful)]
    return float(np.mean(chosen)) if chosen else float("nan")
