"""One checkpoint, two detectors: toxicity reads a segment alone, context all that came before too.

Both run the same graph. How their scores become one is learnt here, on rows that neither trained
the weights nor are reported.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, NamedTuple

import numpy as np
from sklearn.linear_model import LogisticRegression
from tqdm import tqdm

from detectors.calibrate import Calibration
from detectors.harms import COLUMNS
from detectors.protocol import FloatArray, Passage
from detectors.session import View
from detectors.tokens import PairTokens
from export.parity import LogitsOf
from training import thresholds
from training.measure import Scored
from training.rows import Row
from training.windows import judged

VIEWS: Final[Mapping[str, View]] = {"toxicity": "segment", "context": "whole"}
PLAIN: Final = Calibration(np.ones(len(COLUMNS)), np.zeros(len(COLUMNS)))  # log-odds already
_FEW: Final = 12  # rows of the rarer class; fewer teach no weights, and both count alike


class Read(NamedTuple):
    """Rows and the logits of their segments, (S, 2, 7) each, views in the order of VIEWS."""

    rows: list[Row]
    logits: list[FloatArray]

    def by(self, view: int) -> Scored:
        """The highest logits of one view over each row's segments."""
        return Scored(self.rows, np.stack([of_row[:, view].max(axis=0) for of_row in self.logits]))

    def together(self, calibrations: Sequence[Calibration], weights: "Weights") -> Scored:
        """The highest combined log-odds over each row's segments."""
        return Scored(
            self.rows,
            np.stack([
                weights.of(log_odds(of_row, calibrations)).max(axis=0) for of_row in self.logits
            ]),
        )  # fmt: skip


class Weights(NamedTuple):
    """Combined log-odds = slopes[0] * toxicity's + slopes[1] * context's + intercepts."""

    slopes: FloatArray  # (2, 7)
    intercepts: FloatArray  # (7,)

    def of(self, views: FloatArray) -> FloatArray:
        """(S, 7) of (S, 2, 7) calibrated log-odds."""
        combined: FloatArray = (views * self.slopes).sum(axis=1) + self.intercepts
        return combined

    def by_column(self) -> dict[str, list[float]]:
        """As combination.json has them."""
        table = np.vstack([self.slopes, self.intercepts]).T  # (7, 3)
        return {c: [round(float(w), 5) for w in row] for c, row in zip(COLUMNS, table, strict=True)}


def read(rows: Sequence[Row], tokens: PairTokens, logits_of: LogitsOf, threads: int) -> Read:
    """Every segment of every row through the graph, in both views."""

    def of_passage(passage: Passage) -> FloatArray:
        windows = [logits_of(window) for window in tokens.encode(passage).windows]
        return np.stack(windows).max(axis=0)  # (7,)

    def of_row(row: Row) -> FloatArray:
        return np.stack([
            np.stack([of_passage(Passage(whole.text, "", ())), of_passage(whole)])
            for whole in judged(row)
        ])  # (S, 2, 7)  # fmt: skip

    with ThreadPoolExecutor(threads) as pool:
        found = list(tqdm(pool.map(of_row, rows), total=len(rows), mininterval=10))
    return Read(list(rows), found)


def log_odds(logits: FloatArray, calibrations: Sequence[Calibration]) -> FloatArray:
    """(S, 2, 7) calibrated log-odds of (S, 2, 7) logits."""
    slopes = np.stack([calibration.slopes for calibration in calibrations])  # (2, 7)
    intercepts = np.stack([calibration.intercepts for calibration in calibrations])
    return logits * slopes + intercepts


def learn(some: Read, calibrations: Sequence[Calibration]) -> Weights:
    """Weights by logistic regression a column, then a calibration of what comes out of them."""
    views = [some.by(view) for view in range(len(VIEWS))]
    slopes = np.stack([
        _slopes(_column(views, calibrations, column), *_labels(views[0], column))
        for column in range(len(COLUMNS))
    ], axis=1)  # (2, 7)  # fmt: skip
    raw = Weights(slopes, np.zeros(len(COLUMNS)))
    outer = thresholds.calibrate(some.together(calibrations, raw))
    return Weights(slopes * outer.slopes, outer.intercepts)


def _labels(scored: Scored, column: int) -> tuple[FloatArray, FloatArray]:
    """(N,) targets and weights."""
    return (
        np.array([row.targets[column] for row in scored.rows]),
        np.array([row.weights[column] for row in scored.rows]),
    )


def _column(
    views: Sequence[Scored], calibrations: Sequence[Calibration], column: int
) -> FloatArray:
    """(N, 2) calibrated log-odds of each row in both views."""
    return np.stack([
        scored.logits[:, column] * calibration.slopes[column] + calibration.intercepts[column]
        for scored, calibration in zip(views, calibrations, strict=True)
    ], axis=1)  # fmt: skip


def _slopes(features: FloatArray, targets: FloatArray, weights: FloatArray) -> FloatArray:
    """(2,) non-negative: a higher score of one detector must not lower the whole."""
    known = weights > 0
    rarer = min(targets[known].sum(), (1 - targets[known]).sum())
    if rarer < _FEW:
        return np.full(2, 0.5)
    fitted = LogisticRegression().fit(features[known], targets[known], sample_weight=weights[known])
    slopes: FloatArray = np.maximum(fitted.coef_[0], 0.0)
    return slopes if slopes.max() > 0 else np.full(2, 0.5)


def combination(
    digests: Mapping[str, str], weights: Weights, chosen: Mapping[str, float]
) -> dict[str, Any]:
    """combination.json. digests: name of each detector to its own, in the order of VIEWS."""
    return {
        "detectors": dict(digests),
        "weights": weights.by_column(),
        "thresholds": dict(chosen),
    }
