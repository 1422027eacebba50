"""streams.py: one partition's streams, driven by hand."""

import gc
import tracemalloc

import pytest

from detectors.protocol import Turn
from tests.lanes import delta, judge, rules, settings
from worker.assemble import Segment
from worker.decide import Judgement
from worker.errors import Stop
from worker.events import Decision
from worker.settings import Settings, TenantPolicy
from worker.streams import Lane, latest_turns

SENTENCE = "This one has thirty characters. "  # 32, white space included
PASS = Judgement((0.1,) * 7, "toxicity")
FAIL = Judgement((0.99, *[0.1] * 6), "toxicity")


class Hand:
    """A lane, its next offset, and clocks that the test moves."""

    def __init__(self, chosen: Settings | None = None) -> None:
        self.lane = Lane("in", 0, rules(chosen or settings()))
        self.now = 100.0
        self.wall_ms = 1_000_000
        self.judged = PASS

    def feed(self, value: bytes, at_ms: int | None = None) -> list[Segment]:
        stamp = self.wall_ms if at_ms is None else at_ms
        return self.lane.feed(self.lane.position, stamp, b"k", value, self.now, self.wall_ms)

    def settle(self, segments: list[Segment], judgement: Judgement | None = None) -> None:
        for segment in segments:
            if segment.judgement is None:
                segment.judgement = judgement or self.judged
            if self.lane.holds(segment):
                self.lane.advance(segment.stream, self.now, self.wall_ms)

    def decisions(self) -> list[Decision]:
        output = self.lane.take(self.now, drain=True)
        if output is None:
            return []
        self.lane.done(output, range(len(output.journal)))
        return output.decisions

    def say(self, *values: bytes) -> list[Decision]:
        for value in values:
            self.settle(self.feed(value))
        return self.decisions()

    def tick(self, caught_up: bool = True) -> list[Decision]:
        self.settle(self.lane.tick(self.now, self.wall_ms, caught_up))
        return self.decisions()


def test_complete_output_is_one_delta() -> None:
    """seq 0 and final: decided at once, released to its end, final."""
    (decision,) = Hand().say(delta("s", 0, "A whole answer.", True))
    assert (decision.verdict, decision.released_to, decision.final) == ("allow", 15, True)
    assert decision.decision_id == "in-0-0-0"


def test_empty_stream_has_its_decision() -> None:
    """Nothing said is decided too, so that nobody waits for ever."""
    (decision,) = Hand().say(delta("s", 0, "", True))
    assert (decision.start, decision.end, decision.final) == (0, 0, True)


def test_final_delta_that_adds_nothing_makes_no_extra_decision() -> None:
    """The last segment waits for the end, so it is the one that is final."""
    decisions = Hand().say(delta("s", 0, SENTENCE), delta("s", 1, "", True))
    assert [(it.segment, it.final) for it in decisions] == [(0, True)]


def test_repeated_seq_is_ignored() -> None:
    """The first delta of a seq counts, whatever a repeat says."""
    decisions = Hand().say(delta("s", 0, "one "), delta("s", 0, "ONE "), delta("s", 1, "two", True))
    assert decisions[-1].end == len("one two")


def test_block_is_the_last_decision_and_closes() -> None:
    """Later segments are not decided, later deltas ignored."""
    hand = Hand()
    first = hand.feed(delta("s", 0, SENTENCE * 3))
    assert len(first) == 2
    hand.settle(first[1:])
    hand.settle(first[:1], FAIL)
    (decision,) = hand.decisions()
    assert (decision.verdict, decision.final, decision.released_to) == ("block", True, 0)
    assert hand.say(delta("s", 1, SENTENCE, True)) == []
    assert hand.lane.open_streams == 0


def test_decisions_come_in_order_whatever_the_judging_order() -> None:
    """A segment judged early waits for those before it."""
    hand = Hand()
    segments = hand.feed(delta("s", 0, SENTENCE * 4, True))
    hand.settle(segments[::-1])
    assert [it.segment for it in hand.decisions()] == [0, 1, 2, 3]


def test_revise_freezes_the_boundary_and_goes_on_judging() -> None:
    """Nothing behind the revised segment is released, not by a later allow either."""
    policy = TenantPolicy(actions={"violence": "revise"}, revisions={"violence": "[cut]"})
    hand = Hand(settings(tenants={"default": policy}))
    segments = hand.feed(delta("s", 0, SENTENCE * 3, True))
    for segment, judgement in zip(segments, (PASS, FAIL, PASS), strict=True):
        hand.settle([segment], judgement)
    decisions = hand.decisions()
    assert [it.verdict for it in decisions] == ["allow", "revise", "allow"]
    assert [it.released_to for it in decisions] == [32, 32, 32]
    revision = decisions[1].revision
    assert revision is not None
    assert (revision.text, revision.start, revision.end) == ("[cut]", 32, 64)


def test_release_ahead_counts_what_leaked() -> None:
    """A block after an early release says how many of its characters were inside."""
    hand = Hand(settings(release_ahead_chars=20))
    segments = hand.feed(delta("s", 0, SENTENCE * 3, True))
    hand.settle(segments[:1])
    hand.settle(segments[1:2], FAIL)
    allowed, blocked = hand.decisions()
    assert (allowed.released_to, allowed.leaked) == (32 + 20, 0)
    assert (blocked.released_to, blocked.leaked) == (32, 20)


def test_lookahead_blocks_the_segment_before_the_harm() -> None:
    """A segment is released only when the next is judged with it, and as harmful as that."""
    hand = Hand(settings(lookahead_segments=1))
    segments = hand.feed(delta("s", 0, SENTENCE * 3))
    hand.settle(segments[:1])
    assert hand.decisions() == []
    hand.settle(segments[1:], FAIL)
    (decision,) = hand.decisions()
    assert (decision.segment, decision.verdict, decision.released_to) == (0, "block", 0)


def test_gap_holds_and_then_blocks() -> None:
    """After a gap nothing further is released; once the time is over the stream is closed."""
    hand = Hand(settings(gap_timeout_ms=1_000))
    assert len(hand.say(delta("s", 0, SENTENCE + "More"))) == 1
    assert hand.say(delta("s", 2, SENTENCE * 3)) == []
    hand.now += 0.9
    assert hand.tick() == []
    hand.now += 0.2
    (decision,) = hand.tick()
    assert (decision.verdict, decision.reason, decision.final) == ("block", "gap", True)
    assert (decision.start, decision.end, decision.released_to) == (32, 36, 32)
    assert hand.say(delta("s", 1, "late", True)) == []


def test_gap_that_is_filled_in_time_is_none() -> None:
    """Deltas out of order are put in order."""
    hand = Hand()
    decisions = hand.say(delta("s", 2, "three", True), delta("s", 0, "one "), delta("s", 1, "two "))
    assert [(it.end, it.verdict, it.final) for it in decisions] == [(13, "allow", True)]


def test_too_many_early_deltas_are_a_gap_at_once() -> None:
    """What waits for a missing delta is bounded."""
    hand = Hand(settings(max_early_deltas=3))
    decisions = hand.say(*(delta("s", seq, "x") for seq in range(1, 6)))
    assert [(it.verdict, it.reason) for it in decisions] == [("block", "gap")]


def test_idle_stream_is_judged_as_it_stands() -> None:
    """Silent for too long while the log is read to its end: decided and closed."""
    hand = Hand(settings(idle_timeout_ms=1_000))
    assert hand.say(delta("s", 0, "half a")) == []
    hand.now += 1.1
    assert hand.tick(caught_up=False) == []
    (decision,) = hand.tick()
    assert (decision.verdict, decision.end, decision.final) == ("allow", 6, True)


def test_silence_in_the_log_closes_too() -> None:
    """A delta long after the one before, by Kafka's clock, belongs to a stream that had ended."""
    hand = Hand(settings(idle_timeout_ms=1_000))
    hand.feed(delta("s", 0, "half a"), at_ms=1_000)
    hand.settle(hand.feed(delta("s", 1, " sentence", True), at_ms=2_001))
    (decision,) = hand.decisions()
    assert (decision.end, decision.final) == (6, True)


def test_closed_ids_are_remembered_by_the_logs_clock() -> None:
    """Late deltas are ignored for closed_for_ms; after that nothing of the stream is kept."""
    hand = Hand(settings(closed_for_ms=5_000))
    assert len(hand.say(delta("s", 0, "done", True))) == 1
    assert hand.say(delta("s", 0, "done", True)) == []
    assert hand.lane.closed_streams == 1
    hand.wall_ms += 5_001
    hand.tick()  # writes a tombstone, with nothing else to publish
    assert hand.lane.closed_streams == 0


def test_closed_ids_outlive_the_time_while_the_log_is_behind() -> None:
    """A worker that was down for an hour must not judge late repeats that it never read."""
    hand = Hand(settings(closed_for_ms=5_000))
    hand.say(delta("s", 0, "done", True))
    at_ms = hand.wall_ms + 100
    hand.wall_ms += 3_600_000
    hand.tick(caught_up=False)
    hand.settle(hand.feed(delta("s", 0, "done", True), at_ms=at_ms))
    assert hand.decisions() == []


def test_unreadable_record_becomes_a_dead_letter_once() -> None:
    """Whole value, key, offset and reason; published when a good record follows."""
    hand = Hand()
    hand.feed(b"{nonsense")
    assert hand.lane.take(hand.now) is None  # it may be the first of a long run
    hand.feed(delta("s", 0, "", True))
    output = hand.lane.take(hand.now)
    assert output is not None
    (letter,) = output.dead_letters
    assert (letter.offset, letter.value, letter.key, letter.reason) == (
        0, b"{nonsense", b"k", "not JSON",
    )  # fmt: skip


def test_nothing_is_committed_past_a_run_of_unreadable_records() -> None:
    """While the run lasts the offset stays before it; at the limit the worker stops."""
    hand = Hand(settings(max_dead_letters_in_row=5, commit_interval_ms=100))
    hand.say(delta("s", 0, "fine", True))
    for _ in range(5):
        hand.feed(b"?")
        output = hand.lane.take(hand.now)
        assert output is None or output.offset == 1
        hand.now += 0.2
    with pytest.raises(Stop, match="unreadable records in a row"):
        hand.feed(b"?")


def test_a_single_unreadable_record_does_not_wait_for_ever() -> None:
    """After a quiet moment the run is over."""
    hand = Hand()
    hand.feed(b"?")
    hand.now += 0.6
    output = hand.lane.take(hand.now)
    assert output is not None
    assert (len(output.dead_letters), output.offset) == (1, 1)


def test_too_many_open_streams_end_the_longest_silent() -> None:
    """Stream ids without end cannot fill the memory: the longest silent are judged and closed."""
    hand = Hand(settings(max_open_streams=10))
    for number in range(15):
        hand.feed(delta(f"s{number}", 0, "text"))
    decisions = hand.tick()
    assert [it.stream_id for it in decisions] == [f"s{number}" for number in range(5)]
    assert hand.lane.open_streams == 10


def test_context_tenant_and_channel_are_those_of_the_first_delta() -> None:
    """Later deltas cannot move a stream to another tenant."""
    hand = Hand()
    hand.feed(delta("s", 1, "b", True, tenant="evil"))
    turns = [{"role": "user", "content": "hi"}]
    segments = hand.feed(delta("s", 0, "a", tenant="good", channel="tool", context=turns))
    assert segments[0].stream.conversation == (Turn("user", "hi"),)
    hand.settle(segments)
    (decision,) = hand.decisions()
    assert (decision.tenant, decision.channel) == ("good", "tool")


def test_long_conversations_keep_their_end() -> None:
    """The latest turns count most; the rest is bounded."""
    turns = [Turn("user", "a" * 10), Turn("assistant", "b" * 10), Turn("user", "c" * 10)]
    assert latest_turns(turns, 15) == (Turn("assistant", "b" * 5), Turn("user", "c" * 10))
    assert latest_turns(turns, 0) == ()


def test_dropped_lane_takes_no_late_results() -> None:
    """Judgements on their way when the partition moved change nothing."""
    hand = Hand()
    segments = hand.feed(delta("s", 0, SENTENCE * 2, True))
    hand.lane.drop()
    hand.settle(segments)
    assert not hand.lane.has_output


def test_ids_and_cuts_do_not_depend_on_judging() -> None:
    """A decision's id is the offset of the delta that completed it, and its number there."""
    hand = Hand()
    segments = hand.feed(delta("x", 0, "pad"))
    segments += hand.feed(delta("s", 0, SENTENCE * 3))
    segments += hand.feed(delta("s", 1, SENTENCE, True))
    hand.settle(segments, judge(segments[0]))
    ids = [it.decision_id for it in hand.decisions() if it.stream_id == "s"]
    assert ids == ["in-0-1-0", "in-0-1-1", "in-0-2-0", "in-0-2-1"]


def test_nothing_of_ended_streams_stays_in_memory() -> None:
    """What 2,000 streams allocated is gone when they have ended and been forgotten."""
    hand = Hand(settings(closed_for_ms=1_000))

    def wave(number: int) -> None:
        for stream in range(2_000):
            hand.settle(hand.feed(delta(f"{number}/{stream}", 0, SENTENCE * 5)))
        hand.decisions()
        for stream in range(2_000):
            hand.settle(hand.feed(delta(f"{number}/{stream}", 1, "", True)))
        hand.decisions()
        for _ in range(5):  # 500 tombstones a transaction
            hand.wall_ms += 1_001
            hand.tick()

    tracemalloc.start()
    wave(0)
    gc.collect()
    before = tracemalloc.get_traced_memory()[0]
    wave(1)
    gc.collect()
    kept = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert (hand.lane.open_streams, hand.lane.closed_streams) == (0, 0)
    assert before < 400_000  # bytes: the tables that held them; a stream takes some 4,000
    assert kept < 20_000
