"""Whole replies with and without the second look: what its band is worth where it matters."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np

from detectors.combine import Combination
from detectors.harms import THRESHOLD_KEYS
from detectors.protocol import Detector, FloatArray
from detectors.second import Second
from training import scores
from training.measure import SURE
from training.metrics import f1
from training.rows import Row
from training.scores import OfFolder
from training.sets import STAND_INS, Sets
from training.tables import Table
from training.windows import judged

_HEADER: Final = (
    "replies", "harmful", "harmless", "segments", "looks", "found", "found with it",
    "harmless blocked", "with it", "F1", "F1 with it",
)  # fmt: skip
_NOTE: Final = (
    "Rows as the worker judges them, segment by segment until one is blocked; without keywords. "
    "Found: harmful replies that are blocked. Looks: segments inside a band."
)


def replies(
    second: Second, detectors: Sequence[Detector], combination: Combination | None,
    thresholds: Mapping[str, float], chosen: Sets, models: Path, runs: Path,
) -> Table:  # fmt: skip
    """Replies of the evaluation's sets. runs: where scores are kept."""
    folders = [OfFolder(models / detector.name, detector.name) for detector in detectors]
    limits = np.array([thresholds[key] for key in THRESHOLD_KEYS])
    rows: list[tuple[object, ...]] = []
    for name, some in _sets(chosen):
        sure = [row for row in some if row.kind == "reply" and row.weights[-1] >= SURE]
        if not sure:
            continue
        kept = [scores.scored(folder, sure, runs / "scores") for folder in folders]
        together = scores.together(sure, kept, combination)
        looks = Looks(second, limits)
        before = np.array([float((of_row > limits).any()) for of_row in together])
        after = np.array([looks.blocked(*pair) for pair in zip(sure, together, strict=True)])
        harmful = np.array([row.targets[-1] for row in sure]) > 0.5
        rows.append((
            name, int(harmful.sum()), int((~harmful).sum()), sum(map(len, together)), looks.count,
            int(before[harmful].sum()), int(after[harmful].sum()),
            int(before[~harmful].sum()), int(after[~harmful].sum()),
            float(f1(harmful.astype(float), before)), float(f1(harmful.astype(float), after)),
        ))  # fmt: skip
    return Table("Whole replies", _HEADER, rows, _NOTE)


class Looks:
    """Asks, and counts."""

    def __init__(self, second: Second, limits: FloatArray) -> None:
        """limits: (7,) thresholds."""
        self.count = 0
        self._second, self._limits = second, limits

    def scores(self, row: Row, segments: FloatArray) -> FloatArray:
        """(S, 7) with what it says in place of uncertain scores, to the first blocked segment."""
        found = segments.copy()
        for said, passage in zip(found, judged(row), strict=True):  # each a view into `found`
            asked = self._second.uncertain(said.tolist(), self._limits.tolist())
            for column in asked:
                said[column] = self._second.score(passage, column)
            self.count += bool(asked)
            if (said > self._limits).any():
                break
        return found

    def blocked(self, row: Row, segments: FloatArray) -> float:
        """1 where a reply of (S, 7) scores is blocked at any segment."""
        return float((self.scores(row, segments) > self._limits).any())


def _sets(chosen: Sets) -> Iterator[tuple[str, list[Row]]]:
    yield "held-out prompts of known sources", chosen.report
    yield "sources left out", chosen.unseen
    yield "long harmless replies", chosen.long_harmless
    for source in STAND_INS:
        yield f"stand-in: {source}", [row for row in chosen.stand_ins if row.source == source]
