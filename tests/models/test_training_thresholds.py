"""Calibration and thresholds from scored rows. Needs the train extra."""

import numpy as np
import pytest

from detectors.calibrate import Calibration, sigmoid
from detectors.harms import COLUMNS
from training.measure import Scored, blocked
from training.rows import Row

pytestmark = pytest.mark.train

PLAIN = Calibration(np.ones(len(COLUMNS)), np.zeros(len(COLUMNS)))
KNOWN, UNKNOWN = "gptfuzz", "jailjudge_mini"


def scored(targets: list[int], logits: list[float], source: str = KNOWN) -> Scored:
    rows = [
        Row(str(i), source, "reply", (), "text", (float(t),) * 7, (1.0,) * 7, str(i), dev=False)
        for i, t in enumerate(targets)
    ]
    return Scored(rows, np.repeat(np.array(logits, dtype=float)[:, None], 7, axis=1))


def both(one: Scored, other: Scored) -> Scored:
    return Scored([*one.rows, *other.rows], np.vstack([one.logits, other.logits]))


def drawn(count: int, shift: float, source: str, seed: int) -> Scored:
    """Rows whose logits are right, but for a shift."""
    chance = np.random.default_rng(seed)
    true = chance.normal(0, 2, count)
    targets = (chance.random(count) < sigmoid(true)).astype(int)
    return scored(targets.tolist(), (true - shift).tolist(), source)


def test_unknown_sources_weigh_as_much_as_the_known_ones() -> None:
    """Where thresholds are chosen, however few rows they have; but no row more than ten times a
    known one."""
    from training.thresholds import evened

    found = evened(both(scored([0, 1] * 10, [0.0] * 20), scored([1, 0], [0.0] * 2, UNKNOWN)), 0)
    assert found.weights.tolist() == [1.0] * 20 + [10.0] * 2
    found = evened(both(scored([0, 1] * 10, [0.0] * 20), scored([1], [0.0], UNKNOWN)), 0)
    assert found.weights.tolist() == [1.0] * 20 + [10.0]
    found = evened(scored([0, 1], [0.0, 0.0]), 0)
    assert found.weights.tolist() == [1.0, 1.0]


def test_calibration_is_that_of_known_sources() -> None:
    """Unknown ones whose logits are too low by 2 do not move it."""
    from training.thresholds import calibrate

    known, unknown = drawn(4_000, 0.0, KNOWN, 1), drawn(500, 2.0, UNKNOWN, 2)
    alone, together = calibrate(known), calibrate(both(known, unknown))
    assert alone.intercepts[0] == pytest.approx(0.0, abs=0.15)
    assert together.slopes == pytest.approx(alone.slopes)
    assert together.intercepts == pytest.approx(alone.intercepts)


def test_a_threshold_keeps_the_least_precision() -> None:
    """The best F1 would take in every second harmless row; too many blocks would be wrong."""
    from training import thresholds

    # 40 sure hits at 2.5, then 80 at 0.5 of which half are harmless.
    some = scored([1] * 40 + [1, 0] * 40, [2.5] * 40 + [0.5] * 80)
    found = thresholds.choose(some, PLAIN, [])
    precise = 80 / 120
    assert precise < thresholds.LEAST_PRECISION
    assert found["violence"] > sigmoid(np.array(0.5))
    assert found["violence"] < sigmoid(np.array(2.5))


def test_where_nothing_is_precise_the_threshold_is_the_highest() -> None:
    """A column that cannot be trusted hardly ever decides."""
    from training import thresholds

    found = thresholds.choose(scored([0] * 50 + [1] * 10, [3.0] * 60), PLAIN, [])
    assert found["misinformation"] == 0.99


def test_thresholds_rise_until_enough_harmless_rows_pass() -> None:
    """For every set of them, one after the other."""
    from training import thresholds

    some = scored([1] * 50 + [0] * 50, [2.0] * 50 + [-2.0] * 50)
    plain = thresholds.choose(some, PLAIN, [])
    long = scored([0] * 100, [-4.0] * 95 + [1.0, 1.2, 1.4, 1.6, 1.8])
    answers = scored([0] * 100, [-4.0] * 70 + [3.0] * 30)
    passing = [thresholds.Passing(long, 0.02), thresholds.Passing(answers, 0.3)]
    found = thresholds.choose(some, PLAIN, passing)
    assert found["other"] > plain["other"]
    for one in passing:
        assert blocked(one.scored, PLAIN, found).mean() <= one.most
    assert blocked(some, PLAIN, found).mean() == 0.5  # and no further


def test_the_column_that_loses_least_is_raised() -> None:
    """One of two harmless rows may be blocked: the one that stands in the way of no harm passes."""
    from training import thresholds

    some = scored([1] * 50 + [0] * 50, [2.0] * 50 + [-4.0] * 50)
    some.logits[:50, 0] = 5.0  # violence is far above all else, hate_speech is not
    harmless = scored([0, 0], [-4.0, -4.0])
    harmless.logits[0, 0], harmless.logits[1, 1] = 3.0, 3.0
    found = thresholds.choose(some, PLAIN, [thresholds.Passing(harmless, 0.5)])
    assert found["violence"] > sigmoid(np.array(3.0))
    assert found["hate_speech"] < sigmoid(np.array(2.0))


def test_a_rare_harm_is_raised_before_one_that_finds_more_rows() -> None:
    """Though its F1 falls further: 5 of 10 right findings go, not 20 of 90."""
    from training import thresholds

    some = scored([1] * 90 + [0] * 50, [2.0] * 20 + [5.0] * 70 + [-4.0] * 50)
    some.logits[:, 0] = -4.0
    some.logits[:10, 0] = [2.0] * 5 + [5.0] * 5  # of violence ten rows alone are known
    rows = [
        row._replace(weights=(float(i < 10 or i >= 90), *row.weights[1:]))
        for i, row in enumerate(some.rows)
    ]
    harmless = scored([0, 0], [-4.0, -4.0])
    harmless.logits[0, 0], harmless.logits[1, -1] = 3.0, 3.0
    passing = [thresholds.Passing(harmless, 0.5)]
    found = thresholds.choose(Scored(rows, some.logits), PLAIN, passing)
    assert found["violence"] > sigmoid(np.array(3.0))
    assert found["other"] < sigmoid(np.array(2.0))
