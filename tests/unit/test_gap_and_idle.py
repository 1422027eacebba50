"""streams.py: streams that are silent, miss a part, are rebuilt, or are too many."""

from collections.abc import Sequence

import pytest

from tests.lanes import delta, rules, settings
from worker.assemble import Segment
from worker.decide import Judgement
from worker.events import Decision
from worker.settings import Settings
from worker.streams import Lane, Output

SENTENCE = "This one has thirty characters. "  # 32, white space included
PASS = Judgement((0.1,) * 7, "toxicity")


def settle(lane: Lane, segments: Sequence[Segment]) -> None:
    for segment in segments:
        segment.judgement = segment.judgement or PASS
        if lane.holds(segment):
            lane.advance(segment.stream, 0.0, 5)


def feed(lane: Lane, *records: tuple[int, bytes]) -> None:
    """Take records, with their Kafka time, and judge what they complete."""
    for at_ms, value in records:
        settle(lane, lane.feed(lane.position, at_ms, None, value, 0.0, 10**9))


def take(lane: Lane) -> list[Decision]:
    output = lane.take(0.0, drain=True)
    return output.decisions if output is not None else []


def decided(*records: tuple[int, bytes]) -> Output:
    """What a worker publishes that has read these records and is killed then."""
    lane = Lane("in", 0, rules(settings()))
    feed(lane, *records)
    output = lane.take(0.0, drain=True)
    assert output is not None
    return output


def taken_over(output: Output, chosen: Settings) -> Lane:
    """A lane that goes on from there."""
    journal = {key: (at, it) for at, (key, it) in enumerate(output.journal) if it is not None}
    lane = Lane("in", 0, rules(chosen))
    settle(lane, lane.load(output.offset, journal, 0.0, output.buried_to, len(journal)))
    return lane


def test_a_gap_that_goes_idle_is_still_a_gap() -> None:
    """However late the next delta, nothing is released for want of the one that is missing."""
    lane = Lane("in", 0, rules(settings(idle_timeout_ms=1_000)))
    feed(lane, (1_000, delta("s", 0, SENTENCE + "More")), (1_001, delta("s", 2, "late")))
    feed(lane, (2_002, delta("s", 3, "later")))
    allowed, blocked = take(lane)
    assert (allowed.verdict, allowed.released_to) == ("allow", 32)
    assert (blocked.verdict, blocked.reason, blocked.final) == ("block", "gap", True)
    assert (blocked.end, blocked.released_to) == (36, 32)


def test_a_silence_before_a_gap_is_idleness() -> None:
    """The stream had ended when the gap came: it is judged as it stood."""
    lane = Lane("in", 0, rules(settings(idle_timeout_ms=1_000)))
    feed(lane, (1_000, delta("s", 0, "half a")), (2_001, delta("s", 2, "late")))
    (decision,) = take(lane)
    assert (decision.verdict, decision.end, decision.final) == ("allow", 6, True)


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1)])  # with a gap, and without
def test_a_shorter_idle_timeout_decides_nothing_again(order: tuple[int, ...]) -> None:
    """A silence that was none when segments were decided is none when they are read again."""
    parts = ("This is one sentence, which ", "ends only here. ", SENTENCE + "And")
    log = [(1_000 + 30_000 * place, delta("s", seq, parts[seq])) for place, seq in enumerate(order)]
    output = decided(*log)
    assert [(it.start, it.end) for it in output.decisions] == [(0, 44), (44, 76)]
    lane = taken_over(output, settings(idle_timeout_ms=10_000))
    feed(lane, *log)
    assert take(lane) == []
    feed(lane, (61_001, delta("s", 3, " on", True)))
    (rest,) = take(lane)
    assert (rest.segment, rest.start, rest.end, rest.released_to) == (2, 76, 82, 82)


def test_a_shorter_idle_timeout_counts_behind_what_was_decided() -> None:
    """Once a stream is as far as it was, silence ends it as it does any other."""
    log = [(1_000, delta("s", 0, SENTENCE + "And")), (31_000, delta("s", 1, " on"))]
    lane = taken_over(decided(*log), settings(idle_timeout_ms=10_000))
    feed(lane, *log)
    (rest,) = take(lane)
    assert (rest.segment, rest.start, rest.end, rest.final) == (1, 32, 35, True)


def test_what_is_not_rebuilt_ends_behind_its_decisions_under_a_new_id() -> None:
    """Ended while only its first delta is here again, whose id is that of its first decision."""
    log = [(1_000, delta("s", seq, f"{SENTENCE}{seq}")) for seq in range(3)]
    output = decided(*log)
    lane = taken_over(output, settings(max_open_streams=1))
    feed(lane, log[0], (1_000, delta("another", 0, "text")))
    settle(lane, lane.tick(1.0, 5, caught_up=False))
    (lost,) = take(lane)
    before = output.decisions[-1]
    assert (lost.segment, lost.reason, lost.final) == (before.segment + 1, "gap", True)
    assert (lost.start, lost.released_to) == (before.end, before.released_to)
    assert lost.decision_id not in {it.decision_id for it in output.decisions}


def test_one_stream_too_many_ends_one() -> None:
    """Those that have ended and wait for their judgement make room without ending others."""
    lane = Lane("in", 0, rules(settings(max_open_streams=10)))
    for number in range(11):
        lane.feed(number, 1_000, None, delta(f"s{number}", 0, "text"), 0.0, 10**9)
    ended = [lane.tick(0.1 * step, 5, caught_up=False) for step in range(30)]
    assert [len(it) for it in ended] == [1] + [0] * 29


def test_streams_that_have_ended_shield_none() -> None:
    """Of those that go on, as many end at once as are too many, whichever are longest silent."""
    lane = Lane("in", 0, rules(settings(max_open_streams=10)))
    for number in range(27):
        value = delta(f"s{number}", 0, "text", final=number < 15)
        lane.feed(number, 1_000, None, value, 0.0, 10**9)
    ended = lane.tick(0.1, 5, caught_up=False)
    assert [it.stream.stream_id for it in ended] == ["s15", "s16"]
