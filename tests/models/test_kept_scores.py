"""Scores are kept, and asked for again only where something could have moved them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from detectors.harms import DEFAULT_THRESHOLDS
from detectors.protocol import FloatArray, Passage, Turn
from training import scores, windows
from training.rows import Row

pytestmark = pytest.mark.train

TEXTS = ["One sentence. " * 40, "Another.", "x" * 900]


def rows() -> list[Row]:
    known = (0.0,) * 7, (1.0,) * 7
    turns = (Turn("user", "Well?"),)
    return [
        Row(f"t/{i}", "t", "reply", turns, text, *known, str(i), True)
        for i, text in enumerate(TEXTS)
    ]


class Counting:
    """A scorer that says how many segments it was asked for."""

    name, digest, thresholds = "counting", "c0" * 32, DEFAULT_THRESHOLDS

    def __init__(self) -> None:
        self.asked = 0

    def score(self, passages: Sequence[Passage]) -> FloatArray:
        """(S, 7) that differ from text to text."""
        self.asked += len(passages)
        return np.stack([np.full(7, len(p.text) / 1_000) for p in passages])


def test_known_scores_are_not_asked_for_again(tmp_path: Path) -> None:
    """A second run reads them; a row that was changed, or another digest, is scored anew."""
    first = Counting()
    known = scores.scored(first, rows(), tmp_path, threads=2)
    assert first.asked == sum(len(of_row) for of_row in known) > len(TEXTS)
    for one, of_row in zip(rows(), known, strict=True):
        expected = [len(p.text) / 1_000 for p in windows.judged(one)]
        assert of_row[:, 0].tolist() == pytest.approx(expected)
    again = Counting()
    assert np.allclose(np.vstack(scores.scored(again, rows(), tmp_path)), np.vstack(known))
    assert again.asked == 0
    changed = rows()[0]._replace(text="Something else.")
    scores.scored(again, [changed], tmp_path)
    assert again.asked == 1
    again.digest = "c1" * 32
    scores.scored(again, rows()[:1], tmp_path)
    assert again.asked == 1 + len(known[0])


def test_scores_known_from_elsewhere_are_not_asked_for(tmp_path: Path) -> None:
    """What the export has computed is there for the evaluation, row by row."""
    found = [np.full((len(windows.judged(row)), 7), i / 10) for i, row in enumerate(rows())]
    scores.keep(Counting(), rows()[:2], found[:2], tmp_path)
    later = Counting()
    known = scores.scored(later, rows(), tmp_path)
    assert [of_row.tolist() for of_row in known[:2]] == [of_row.tolist() for of_row in found[:2]]
    assert later.asked == len(windows.judged(rows()[2]))
