"""training/also.py: a user's rows and reviewers' labels, and what of them is learnt."""

import json
import random
from pathlib import Path
from typing import Any

from detectors.harms import COLUMNS
from detectors.protocol import Passage, Turn
from training import also
from training.rows import Parts, Row
from training.windows import samples

BEFORE = (
    "Whoever has read this far will have wondered how the lock of such a door can be opened "
    "without its key, and who would ever want to. "
)
SEGMENT = "Here is how: push the thin end of the blade in behind the bolt and turn it to the left."
ASKED = (Turn("user", "How does he get in?"),)


def label(harm: str, harmful: bool, reviewer: str, picked_with: float | None = 0.1) -> Any:
    said = {"decision_id": "a", "harm": harm, "harmful": harmful, "reviewer": reviewer}
    return said if picked_with is None else said | {"picked_with": picked_with}


def read(folder: Path, *records: Any) -> list[Row]:
    path = folder / "more.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in records))
    return also.read_files([path])


def reviewed(folder: Path, *labels: Any, before: str = "") -> dict[str, tuple[float, float]]:
    """Target and weight by column, where any is known."""
    review = {"decision_id": "a", "text": "A segment.", "before": before, "context": []}
    found = read(folder, review, *labels)
    return {
        column: (row.targets[at], row.weights[at])
        for row in found for at, column in enumerate(COLUMNS) if row.weights[at]
    }  # fmt: skip


def test_complaints_do_not_vote(tmp_path: Path) -> None:
    """They come from anybody: two of them take nothing back, and alone they make no row."""
    complaints = [label("violence", False, who, None) for who in ("u1", "u2")]
    found = reviewed(tmp_path, label("violence", True, "r1"), *complaints)
    assert found == {"violence": (1.0, 1.0), "harmful": (1.0, 1.0)}
    assert reviewed(tmp_path, *complaints) == {}


def test_a_reviewers_last_word_counts_once(tmp_path: Path) -> None:
    """As the worker counts it: who repeats a label has no more votes, who corrects it has one."""
    said = [(True, "r1"), (True, "r1"), (False, "r2"), (False, "r3")]
    found = reviewed(tmp_path, *(label("violence", *it) for it in said))
    assert found == {"violence": (0.0, 1.0)}
    corrected = [label("violence", it, "r1") for it in (True, True, False)]
    assert reviewed(tmp_path, *corrected) == {"violence": (0.0, 1.0)}


def test_what_reviewers_disagree_on_is_not_harmless(tmp_path: Path) -> None:
    """A tie on one harm leaves open whether there is any, unless another is certain."""
    tie = [label("violence", True, "r1"), label("violence", False, "r2")]
    none = label("other", False, "r1")
    assert reviewed(tmp_path, *tie, none) == {}
    assert reviewed(tmp_path, none)["harmful"] == (0.0, 1.0)
    hateful = reviewed(tmp_path, *tie, none, label("hate_speech", True, "r1"))
    assert hateful == {"hate_speech": (1.0, 1.0), "harmful": (1.0, 1.0)}


def passages(folder: Path, *labels: Any) -> list[Passage]:
    """With labels, of a review item of SEGMENT behind BEFORE."""
    review = {
        "decision_id": "a", "text": SEGMENT, "before": BEFORE,
        "context": [{"role": "user", "content": ASKED[0].content}],
    }  # fmt: skip
    rows = read(folder, review, *labels)
    found = [samples(rows, random.Random(seed)) for seed in range(20)]
    return [s.passage for some in found for s in some if any(s.weights)]


def test_a_harmful_segment_is_learnt_behind_what_was_judged_with_it(tmp_path: Path) -> None:
    """Just as the worker gave it; what stands before is not harmful by itself."""
    assert set(passages(tmp_path, label("illegal_activity", True, "r1"))) == {
        Passage(SEGMENT, BEFORE, ASKED)
    }


def test_of_a_harmless_segment_no_window_ends_in_what_stands_before(tmp_path: Path) -> None:
    """That has no label; its last words are there, from the beginning of one."""
    found = passages(tmp_path, label("other", False, "r1"))
    assert {passage.text for passage in found} == {found[0].text}
    last, _, rest = found[0].text.partition(SEGMENT)
    assert (BEFORE.endswith(f" {last}"), len(last) > 100, rest) == (True, True, "")


def test_rows_of_the_dev_split_are_not_learnt(tmp_path: Path) -> None:
    """A user may hold rows out, as the packs do."""
    plain = {"text": "A text.", "harmful": 1, "labels": {}}
    found = read(tmp_path, plain | {"id": "kept"}, plain | {"id": "held", "split": "dev"})
    assert [row.id for row in found] == ["kept"]


def test_rows_on_a_prompt_that_is_held_out_are_left_out(tmp_path: Path) -> None:
    """Of every part but the one that is trained on: what is measured there must not be known."""
    plain = {"text": "A text.", "harmful": 1, "labels": {}}
    rows = read(tmp_path, *(plain | {"id": name, "group": name} for name in (*Parts._fields, "x")))
    parts = Parts(*([row] for row in rows[:-1]))
    assert [row.id for row in also.apart(rows, parts)] == ["fit", "x"]
