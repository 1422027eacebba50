"""The toxicity detector over its model folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detectors.calibrate import sigmoid
from detectors.harms import THRESHOLD_KEYS
from detectors.protocol import Encoded, FloatArray, Passage, Window
from detectors.toxicity import Toxicity

SHIPPED = Path(__file__).parents[2] / "models" / "toxicity"


@pytest.fixture
def toxicity() -> Toxicity:
    return Toxicity(SHIPPED)


def encoded(*lengths: int) -> Encoded:
    """A passage whose windows have these lengths."""
    windows = tuple(Window(np.ones(n, np.int64), np.ones(n, np.int64)) for n in lengths)
    return Encoded(windows, tokens=sum(lengths), text_tokens=sum(lengths))


class Scripted:
    """A session that gives one logit to all columns, by the window's length."""

    def __init__(self, logits: dict[int, float]) -> None:
        self._logits = logits

    def all_logits(self, windows: Sequence[Window]) -> FloatArray:
        return np.array([[self._logits[len(window.ids)]] * 7 for window in windows])


def scripted(toxicity: Toxicity, logits: dict[int, float], monkeypatch: Any) -> None:
    monkeypatch.setattr(toxicity, "_session", Scripted(logits))


def test_it_brings_its_name_digest_and_thresholds(toxicity: Toxicity) -> None:
    """A decision can say which model settled it, and what it was held against."""
    assert toxicity.name == "toxicity"
    assert len(toxicity.digest) == 64
    assert set(toxicity.thresholds) == set(THRESHOLD_KEYS)


def test_thresholds_are_a_copy(toxicity: Toxicity) -> None:
    """Nobody moves the model's own thresholds by writing into what he was given."""
    toxicity.thresholds["violence"] = 0.0
    assert toxicity.thresholds["violence"] > 0


def test_a_passage_scores_the_highest_of_its_windows(
    toxicity: Toxicity, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Harm in any window is harm, and it does not spread to the next passage."""
    scripted(toxicity, {3: -2.0, 4: 5.0, 5: -9.0}, monkeypatch)
    found = toxicity.score([encoded(3, 4, 5), encoded(3, 5)])
    alone = toxicity.score([encoded(4)])
    assert np.array_equal(found[0], alone[0])
    assert (found[0] > found[1]).all()


def test_a_logit_that_is_no_number_is_refused(
    toxicity: Toxicity, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One NaN among many windows is an error, not a low score."""
    scripted(toxicity, {3: 1.0, 4: float("nan")}, monkeypatch)
    with pytest.raises(ValueError, match="not finite"):
        toxicity.score([encoded(3), encoded(3, 4, 3)])


def test_scores_have_six_decimals_in_float64(toxicity: Toxicity) -> None:
    """The number that a decision shows is the number that was compared."""
    found = toxicity.score(toxicity.encode([Passage("some text", "", ())]))
    assert found.dtype == np.float64
    assert np.array_equal(found, found.round(6))


def test_scores_are_the_calibrated_logits(
    toxicity: Toxicity, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each column goes through its own slope and intercept."""
    scripted(toxicity, {3: 0.7}, monkeypatch)
    slopes, intercepts = toxicity._calibration
    expected = sigmoid(0.7 * slopes + intercepts)
    assert toxicity.score([encoded(3)])[0] == pytest.approx(expected, abs=1e-6)


def test_no_passages_are_no_rows(toxicity: Toxicity) -> None:
    """An empty batch has the shape of a batch."""
    assert toxicity.encode([]) == []
    assert toxicity.score([]).shape == (0, 7)
