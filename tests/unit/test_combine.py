"""How several detectors' scores become one."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from detectors import combine
from detectors.combine import CombinationError
from detectors.constant import Constant
from detectors.harms import COLUMNS, THRESHOLD_KEYS
from detectors.protocol import Encoded, FloatArray, Passage
from worker import detect
from worker.thresholds import shipped_thresholds


class Named:
    """A detector's name and digest."""

    def __init__(self, name: str, digest: str) -> None:
        self.name, self.digest = name, digest


PAIR = (Named("toxicity", "aa"), Named("context", "bb"))


def contents(**changes: Any) -> dict[str, Any]:
    """What export writes, with changes."""
    plain: dict[str, Any] = {
        "detectors": {"toxicity": "aa", "context": "bb"},
        "weights": {column: [0.25, 0.5, -1.0] for column in COLUMNS},
        "thresholds": dict.fromkeys(THRESHOLD_KEYS, 0.5),
    }
    return plain | changes


def written(folder: Path, **changes: Any) -> Path:
    (folder / combine.FILE).write_text(json.dumps(contents(**changes)))
    return folder


def test_it_is_the_weighted_sum_of_log_odds(tmp_path: Path) -> None:
    """0.25 * logit(0.8) + 0.5 * logit(0.5) - 1, by hand."""
    found = combine.read(written(tmp_path), PAIR)
    assert found is not None
    combined = found.combined(np.array([[[0.8] * 7], [[0.5] * 7]]))
    assert combined.shape == (1, 7)
    assert combined[0, 0] == pytest.approx(1 / (1 + math.exp(1 - 0.25 * math.log(4))), abs=1e-6)


def test_a_score_that_is_missing_stays_missing(tmp_path: Path) -> None:
    """NaN of one detector is NaN of the whole: doubt never reads as allow."""
    found = combine.read(written(tmp_path), PAIR)
    assert found is not None
    scores = np.full((2, 3, 7), 0.1)
    scores[1, 1, 4] = np.nan
    missing = np.isnan(found.combined(scores))
    assert missing[1, 4]
    assert missing.sum() == 1


def test_certain_scores_stay_finite(tmp_path: Path) -> None:
    """0 and 1 have no finite log-odds, and still combine."""
    found = combine.read(written(tmp_path), PAIR)
    assert found is not None
    combined = found.combined(np.stack([np.zeros((1, 7)), np.ones((1, 7))]))
    assert ((combined >= 0) & (combined <= 1)).all()


@pytest.mark.parametrize(
    "detectors", [PAIR[:1], PAIR[::-1], (PAIR[0], Named("other", "bb")), (*PAIR, Named("x", "y"))]
)
def test_it_is_for_these_detectors_in_this_order_alone(
    tmp_path: Path, detectors: tuple[Named, ...]
) -> None:
    """With any others the highest score counts."""
    assert combine.read(written(tmp_path), detectors) is None


def test_each_choice_of_detectors_may_have_its_own(tmp_path: Path) -> None:
    """A user who names some of the detectors gets what was learnt of these."""
    written(tmp_path)
    three = (*PAIR, Named("words", "cc"))
    more = contents(
        detectors={"toxicity": "aa", "context": "bb", "words": "cc"},
        weights={column: [0.1, 0.2, 0.3, 0.4] for column in COLUMNS},
    )
    (tmp_path / "combination-all.json").write_text(json.dumps(more))
    found = [combine.read(tmp_path, detectors) for detectors in (PAIR, three)]
    assert [len(it.weights["violence"]) for it in found if it is not None] == [3, 4]
    assert combine.read(tmp_path, three[1:]) is None


def test_two_for_the_same_detectors_are_refused(tmp_path: Path) -> None:
    """Which of them counts must not depend on their names."""
    written(tmp_path)
    (tmp_path / "combination-more.json").write_text(json.dumps(contents()))
    with pytest.raises(CombinationError, match="two combinations of toxicity, context"):
        combine.read(tmp_path, PAIR)


def test_three_detectors_count_as_they_were_weighed(tmp_path: Path) -> None:
    """0.1 * logit(0.8) + 0.2 * logit(0.5) + 0.3 * logit(0.2) + 0.4, by hand."""
    names = {"toxicity": "aa", "context": "bb", "words": "cc"}
    weights = {column: [0.1, 0.2, 0.3, 0.4] for column in COLUMNS}
    folder = written(tmp_path, detectors=names, weights=weights)
    found = combine.read(folder, [Named(*it) for it in names.items()])
    assert found is not None
    combined = found.combined(np.array([[[0.8] * 7], [[0.5] * 7], [[0.2] * 7]]))
    assert combined[0, 0] == pytest.approx(1 / (1 + math.exp(0.2 * math.log(4) - 0.4)), abs=1e-6)


def test_without_a_file_there_is_none(tmp_path: Path) -> None:
    """A folder of models need not have one."""
    assert combine.read(tmp_path, PAIR) is None


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"detectors": {"toxicity": "aa", "context": "cc"}}, "another context"),
        ({"weights": {column: [1.0, 0.0] for column in COLUMNS}}, "one a detector"),
        ({"weights": {column: [-0.1, 1.0, 0.0] for column in COLUMNS}}, "count for more"),
        ({"weights": {column: [0.0, 0.0, 0.0] for column in COLUMNS}}, "count for more"),
        ({"weights": {"violence": [1.0, 1.0, 0.0]}}, "need violence"),
        ({"thresholds": {"greed": 0.5}}, "greed"),
        ({"thresholds": {"other": 1.5}}, "outside 0..1"),
        ({"thresholds": "high"}, "thresholds"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    """A worker does not start on it, and says why."""
    with pytest.raises(CombinationError, match=says):
        combine.read(written(tmp_path, **changes), PAIR)


class Same:
    """Gives every passage the same scores."""

    thresholds: ClassVar[dict[str, float]] = {"violence": 0.9}

    def __init__(self, name: str, score: float) -> None:
        self.name, self.digest, self._score = name, name[:2] * 8, score

    def encode(self, passages: Sequence[Passage]) -> list[Encoded]:
        """As the constant does."""
        return Constant().encode(passages)

    def score(self, batch: Sequence[Encoded]) -> FloatArray:
        """(B, 7)."""
        return np.full((len(batch), len(COLUMNS)), self._score)


def test_the_worker_scores_with_it_and_says_so(tmp_path: Path) -> None:
    """Scores, thresholds and the model's id are those of the combination."""
    pair = (Same("toxicity", 0.8), Same("context", 0.5))
    digests = {detector.name: detector.digest for detector in pair}
    found = combine.read(written(tmp_path, detectors=digests), pair)
    assert found is not None
    rows = detect.encode(pair, [Passage("text", "", ())])
    ((scores, stage),) = detect.score(pair, rows, found)
    assert scores == pytest.approx([1 / (1 + math.exp(1 - 0.25 * math.log(4)))] * 7, abs=1e-6)
    assert stage == "toxicity"
    assert detect.score(pair, rows)[0][0] == (0.8,) * 7
    assert (
        detect.model_id(pair, found)
        == f"toxicity@tototo+context@cococo+combined@{found.digest[:6]}"
    )
    assert shipped_thresholds(pair, found) == dict.fromkeys(THRESHOLD_KEYS, 0.5)
