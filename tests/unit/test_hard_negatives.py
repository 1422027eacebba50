"""Hard negatives: which segments are found, and that training gets those very segments."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detectors.combine import Combination, Stage
from detectors.harms import COLUMNS, THRESHOLD_KEYS
from detectors.protocol import Encoded, FloatArray, Passage, Window
from tests.fakes import HashDetector
from training import hard
from training.rows import Row
from training.windows import judged

WEIGHTS: dict[str, tuple[float, ...]] = dict.fromkeys(COLUMNS, (1.0, 0.0))


class Finds(HashDetector):
    """Finds a word harmful, and counts what it is asked."""

    def __init__(self, name: str, word: str, high: float = 0.9) -> None:
        super().__init__()
        self.name, self._word, self._high, self.asked = name, word, high, 0

    def encode(self, passages: Sequence[Passage]) -> list[Encoded]:
        """One window: whether the word is there."""
        flags = [np.array([self._word in passage.text], np.int64) for passage in passages]
        return [Encoded((Window(flag, flag),), 1, 1) for flag in flags]

    def score(self, batch: Sequence[Encoded]) -> FloatArray:
        """(B, 7) 0.01, and `high` where the word is there."""
        self.asked += len(batch)
        said = np.full((len(batch), len(COLUMNS)), 0.01)
        said[[bool(it.windows[0].ids[0]) for it in batch], -1] = self._high
        return said


def row(number: int, text: str, source: str = "arena_hard", **fields: Any) -> Row:
    known: dict[str, Any] = {
        "id": f"{source}/{number}", "source": source, "kind": "reply", "conversation": (),
        "text": text, "targets": (0.0,) * 7, "weights": (1.0,) * 7, "group": str(number),
        "dev": False,
    }  # fmt: skip
    return Row(**(known | fields))


LONG = " ".join(f"Sentence number {i} is plain." for i in range(60))


def test_only_surely_harmless_rows_of_harmless_sources_are_looked_at() -> None:
    rows = [
        row(1, "a"),
        row(2, "a", "gptfuzz"),  # may be wrong: a judge's 0
        row(3, "a", targets=(0.0,) * 6 + (1.0,)),
        row(4, "a", weights=(1.0,) * 6 + (0.0,)),
    ]
    assert [one.id for one in hard.harmless(rows)] == ["arena_hard/1"]


def test_segments_that_score_too_high_are_found_and_come_back_as_the_worker_cuts_them(
    tmp_path: Path,
) -> None:
    text = LONG + " Then the bomb went off. " + LONG
    rows = [row(1, text), row(2, LONG)]
    detector = Finds("toxicity", "bomb")
    found = [(one.id, at) for one, at in hard._found(rows, [detector], None, threads=2)]
    where = [i for i, passage in enumerate(judged(rows[0])) if "bomb" in passage.text]
    assert found == [("arena_hard/1", where)]
    path = tmp_path / "hard.jsonl"
    path.write_text(json.dumps({"id": "arena_hard/1", "segments": where}) + "\n")
    samples = hard.samples(path, rows)
    assert [sample.passage for sample in samples] == [judged(rows[0])[i] for i in where]
    assert samples[0].passage.before
    assert samples[0].targets == (0.0,) * 7
    assert samples[0].weights == (1.0,) * 7


def test_no_source_fills_the_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hard, "_MOST", 3)
    rows = [row(i, "bomb") for i in range(9)] + [row(1, "bomb", "medquad")]
    path = tmp_path / "hard.jsonl"
    path.write_text("".join(json.dumps({"id": r.id, "segments": [0]}) + "\n" for r in rows))
    assert [s.source for s in hard.samples(path, rows)] == ["arena_hard"] * 3 + ["medquad"]


def test_what_the_first_detectors_settle_asks_no_other() -> None:
    first, then = Finds("toxicity", "bomb"), Finds("context", "bomb", high=0.6)
    stage = Stage(1, WEIGHTS, dict.fromkeys(COLUMNS, 0.2))
    combination = Combination(
        {"toxicity": "0", "context": "0"}, dict.fromkeys(COLUMNS, (0.0, 1.0, 0.0)),
        dict.fromkeys(THRESHOLD_KEYS, 0.5), (stage,),
    )  # fmt: skip
    passages = [Passage(text, "", ()) for text in ("a bomb", "a bun", "a bomb")]
    scores = hard.scored(passages, [first, then], combination)
    assert (first.asked, then.asked) == (3, 2)
    assert scores[:, -1].tolist() == pytest.approx([0.6, 0.01, 0.6])
