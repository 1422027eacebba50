"""What the first detectors may settle: chosen, written down, read back. Needs the train extra."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detectors import combine
from detectors.harms import COLUMNS, THRESHOLD_KEYS
from detectors.protocol import FloatArray
from training.rows import Row

pytestmark = pytest.mark.train


class Named:
    """A detector's name and digest."""

    def __init__(self, name: str) -> None:
        self.name, self.digest = name, name * 3


SECOND = np.array([False, True])  # of two segments the one that follows another
PAIR = (Named("cheap"), Named("dear"))


def drawn(count: int, blind: float, source: str = "gptfuzz") -> tuple[list[Row], list[FloatArray]]:
    """Rows of two segments, and the log-odds of a cheap and a dear detector, (2, 2, 7) each.

    blind: share of the harmful rows that the cheap one finds clearly harmless.
    """
    chance = np.random.default_rng(count)
    rows, said = [], []
    for i in range(count):
        harmful = i % 2
        center = 3.0 if harmful else -3.0
        cheap = -6.0 if harmful and chance.random() < blind else center
        means = np.array([[-5.0, -5.0], [cheap, center]])[:: -1 if i // 2 % 2 else 1]
        segments = chance.normal(0, 1, (2, 2)) + means
        rows.append(
            Row(f"{source}/{i}", source, "reply", (), "text", (float(harmful),) * 7, (1.0,) * 7,
                str(i), dev=True)
        )  # fmt: skip
        said.append(np.repeat(segments[:, :, None], 7, axis=2))
    return rows, said


def staged(blind: float) -> tuple[Any, Any]:
    """A stage of one detector, and what it was chosen on."""
    from export import combined

    read = {"calibrate": combined.Read(*drawn(400, blind), [SECOND] * 400)}
    for name in ("harmless", "look_alikes", "counter_speech"):
        read[f"calibrate_{name}"] = combined.Read([], [], [])
    return combined.stage(read, combined.learn(read["calibrate"]), 1), read["calibrate"]


def test_what_a_later_segment_loses_is_learnt() -> None:
    """Harmless rows that are taken for harmful in one of eight segments, and harmful ones that show
    it at once: later ones count for less. With harm in any place alike they lose nothing."""
    from export import combined

    draw = np.random.default_rng(11)
    found = {}
    for name in ("at once", "anywhere"):
        rows, said = [], []
        for i in range(600):
            odds = draw.normal(-4, 1, (8, 2))
            at = 0 if name == "at once" and i % 2 else draw.integers(0, 8)
            odds[at] += 7 if i % 2 else (5 if name == "at once" and at else 0)
            rows.append(
                Row(f"gptfuzz/{i}", "gptfuzz", "reply", (), "text", (float(i % 2),) * 7,
                    (1.0,) * 7, str(i), dev=True)
            )  # fmt: skip
            said.append(np.repeat(odds[:, :, None], 7, axis=2))
        found[name] = combined.learn(combined.Read(rows, said, [np.arange(8) > 0] * 600))
    assert (found["at once"].later < -0.5).all()
    assert (found["anywhere"].later > -0.5).all()
    assert (found["anywhere"].later <= 0.0).all()
    first, later = found["at once"].of(np.zeros((2, 2, 7)), SECOND)
    assert later - first == pytest.approx(found["at once"].later)


def test_as_much_is_settled_as_loses_next_to_nothing() -> None:
    """Where the cheap one sees all harm, it settles every harmless row and no harmful one."""
    stage, read = staged(blind=0.0)
    settled = [stage.settled(said, SECOND).all() for said in read.log_odds]
    harmful = [row.targets[0] > 0 for row in read.rows]
    assert not any(done for done, is_harmful in zip(settled, harmful, strict=True) if is_harmful)
    assert stage.shares(read)[0] > 0.6


def test_a_blind_first_look_settles_no_harm() -> None:
    """It finds a third of the harm clearly harmless: then little is clear, and all are asked."""
    stage, read = staged(blind=0.3)
    settled = [stage.settled(said, SECOND).all() for said in read.log_odds]
    harmful = [row.targets[0] > 0 for row in read.rows]
    missed = sum(done and is_harmful for done, is_harmful in zip(settled, harmful, strict=True))
    assert missed <= 0.01 * sum(harmful)


def test_the_worker_computes_what_was_chosen(tmp_path: Path) -> None:
    """combination.json of a stage gives the same scores as the code that chose it."""
    from export import combined

    stage, read = staged(blind=0.0)
    digests = {detector.name: detector.digest for detector in PAIR}
    chosen = dict.fromkeys(THRESHOLD_KEYS, 0.5)
    contents = combined.combination(digests, stage.then, chosen)
    contents |= {"stages": [it.described() for it in stage.stages()]}
    (tmp_path / combine.FILE).write_text(json.dumps(contents))
    found = combine.read(tmp_path, PAIR)
    assert found is not None
    for said in read.log_odds[:40]:
        by_detector = 1 / (1 + np.exp(-said.transpose(1, 0, 2)))  # (D, S, 7)
        expected = 1 / (1 + np.exp(-stage.of(said, SECOND)))
        assert found.combined(by_detector, SECOND) == pytest.approx(expected, abs=2e-4)
        asked = np.where(stage.settled(said, SECOND), 1, 2)
        assert found.asked(by_detector, SECOND).tolist() == asked.tolist()
    assert set(contents["stages"][0]["below"]) == set(COLUMNS)


def test_two_stages_are_computed_as_they_were_chosen(tmp_path: Path) -> None:
    """The second settles some of what the first leaves, and combination.json says both."""
    from export import combined

    rows, said = drawn(400, blind=0.0)
    chance = np.random.default_rng(7)
    trio = []
    for of_row in said:
        dear = of_row[:, 1:]  # (2, 1, 7)
        noise = chance.normal(0, 1, (2, 2, 7))
        trio.append(np.hstack([0.5 * dear + noise[:, :1], dear + noise[:, 1:], dear]))
    read = {"calibrate": combined.Read(rows, trio, [SECOND] * 400)}
    for name in ("harmless", "look_alikes", "counter_speech"):
        read[f"calibrate_{name}"] = combined.Read([], [], [])
    weights = combined.learn(read["calibrate"])
    stage = combined.stage(read, combined.stage(read, weights, 2), 1)
    assert [len(it.first.slopes) for it in stage.stages()] == [1, 2]
    shares = stage.shares(read["calibrate"])
    assert 0.0 <= shares[0] < shares[1] < 1.0
    names = [Named("cheap"), Named("middling"), Named("dear")]
    chosen = dict.fromkeys(THRESHOLD_KEYS, 0.5)
    contents = combined.combination({it.name: it.digest for it in names}, weights, chosen)
    contents["stages"] = [it.described() for it in stage.stages()]
    (tmp_path / combine.FILE).write_text(json.dumps(contents))
    found = combine.read(tmp_path, names)
    assert found is not None
    asked = set()
    for of_row in trio:
        by_detector = 1 / (1 + np.exp(-of_row.transpose(1, 0, 2)))  # (D, S, 7)
        expected = 1 / (1 + np.exp(-stage.of(of_row, SECOND)))
        assert found.combined(by_detector, SECOND) == pytest.approx(expected, abs=2e-4)
        asked |= set(found.asked(by_detector, SECOND).tolist())
    assert asked == {1, 2, 3}
