"""Kills at any instant: the same labels count, in the same order, for the same thresholds."""

import random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, note
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tests.learning import Drive, History, done, settings

KILL_SHARE = 0.15
POLICIES: dict[str, dict[str, Any]] = {
    "certified": {},
    "one reviewer will do": {"max_reviewer_share": 1.0, "target_precision": 0.8},
    "approval": {"approval": True},
    "step": {"method": "step", "labels_per_step": 20, "max_reviewer_share": 1.0},
    "at once": {"test_every": 7, "settle_ms": 0},
    "recall": {"recall_floor": 0.2, "max_reviewer_share": 1.0},
}


@hypothesis_settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 10**6), policy=st.sampled_from(sorted(POLICIES)))
def test_kills_change_no_threshold(seed: int, policy: str) -> None:
    """Every label is counted once, refused ones are dead letters once, and whatever is published
    is what an undisturbed learner publishes, record by record."""
    rng = random.Random(seed)
    history = History(rng, 200, rng.choice((0.6, 0.99)), rng.choice((None, 0.2)))
    chosen = settings(**POLICIES[policy])
    undisturbed = Drive(history, chosen, seed)
    undisturbed.run()
    disturbed = Drive(history, chosen, seed + 1, KILL_SHARE)
    disturbed.run()
    note(f"{disturbed.kills} kills, {len(disturbed.thresholds)} thresholds")
    assert done(disturbed.entries) == done(undisturbed.entries)
    assert disturbed.thresholds == undisturbed.thresholds
    assert disturbed.dead_letters == undisturbed.dead_letters


@pytest.mark.parametrize("policy", POLICIES)
def test_thresholds_move_and_kills_happen(policy: str) -> None:
    """The property above is about something, under each policy."""
    kills = moves = letters = alarms = 0
    for seed in range(4):
        history = History(random.Random(seed), 300, 0.99, 0.2)
        drive = Drive(history, settings(**POLICIES[policy]), seed, KILL_SHARE)
        drive.run()
        kills, letters = kills + drive.kills, letters + len(drive.dead_letters)
        moves += sum(it.threshold != it.previous for it in drive.thresholds)
        alarms += sum(it.alarm for it in drive.thresholds)
    assert kills > 20
    assert letters > 20
    assert moves > 0
    assert alarms > 0 or policy in {"step", "recall"}
