"""Kills at any instant change nothing: the lane's half of exactly once."""

import random
from typing import Literal

from hypothesis import HealthCheck, given, note
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tests.lanes import Drive, essence, interleaved, settings
from worker.settings import TenantPolicy

KILL_SHARE = 0.1


@hypothesis_settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 10**6),
    lookahead=st.integers(0, 2),
    context=st.integers(0, 3),
    rewind=st.sampled_from([5, 40, 10_000]),
    action=st.sampled_from(["block", "revise"]),
)
def test_kills_change_no_decision(
    seed: int, lookahead: int, context: int, rewind: int, action: Literal["block", "revise"]
) -> None:
    """With kills before and after commits, every segment has the decision of an undisturbed run,
    once, in order; every unreadable record is one dead letter."""
    log = interleaved(random.Random(seed), streams=8)
    chosen = settings(
        lookahead_segments=lookahead, context_segments=context, rewind_records=rewind,
        commit_interval_ms=100, tenants={"t": TenantPolicy(actions={"violence": action})},
    )  # fmt: skip
    undisturbed = Drive(log, chosen, seed)
    expected = undisturbed.run()
    disturbed = Drive(log, chosen, seed, KILL_SHARE)
    found = disturbed.run()
    note(f"{disturbed.kills} kills, {disturbed.snapshots} snapshots")
    assert sorted(map(essence, found)) == sorted(map(essence, expected))
    assert disturbed.dead_letters == undisturbed.dead_letters
    for stream_id in {decision.stream_id for decision in found}:
        of_stream = [it for it in found if it.stream_id == stream_id]
        assert [it.segment for it in of_stream] == list(range(len(of_stream)))
        assert [it.final for it in of_stream] == [False] * (len(of_stream) - 1) + [True]


def test_kills_and_snapshots_happen() -> None:
    """The property above is about something: its runs are killed, and streams are spilled."""
    kills = snapshots = 0
    for seed in range(10):
        log = interleaved(random.Random(seed), streams=8)
        drive = Drive(log, settings(rewind_records=5, commit_interval_ms=100), seed, KILL_SHARE)
        drive.run()
        kills, snapshots = kills + drive.kills, snapshots + drive.snapshots
    assert kills > 50
    assert snapshots > 50


def test_rewinding_is_bounded() -> None:
    """A slow stream does not hold the committed offset back: its state is spilled."""
    log = interleaved(random.Random(3), streams=60, longest=40)
    slow = interleaved(random.Random(4), streams=1, longest=4_000)
    step = max(1, len(log) // len(slow))
    for index, record in enumerate(slow):
        log.insert(index * step, record.replace(b'"s0"', b'"slow"'))
    drive = Drive(log, settings(rewind_records=100, commit_interval_ms=100), 1, KILL_SHARE)
    drive.run()
    assert drive.kills > 10
    assert drive.reread < 300  # the bound, and what was read since the last transaction
