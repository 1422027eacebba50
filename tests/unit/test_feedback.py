"""feedback.py: what labels count, and how often."""

import math
import tracemalloc
from collections.abc import Iterable

import msgspec
import numpy as np
import pytest

from tests.reviews import CLAIM, PICKED, PLAIN, judged, label
from worker import feedback
from worker.certify import Tally, shipped
from worker.events import Label
from worker.feedback import Accepted, Claim, Evidence, Judged, Rejected, outcome
from worker.settings import LearnPolicy

SLOW = LearnPolicy(settle_ms=100, min_picked=PICKED)


def evidence(policy: LearnPolicy = SLOW) -> Evidence:
    return Evidence(lambda _: policy)


def settled(it: Evidence, now_ms: int = 10**6, claim: Claim = CLAIM) -> Tally:
    list(it.settle(now_ms))
    return it.snapshot(claim)


def cells(tally: Tally, world: int = 0) -> dict[tuple[int, int, float], int]:
    """What is counted in a world: (bin, outcome, weight) -> decisions."""
    found = {}
    for at, harmful, column in zip(*np.nonzero(tally.counts[world]), strict=True):
        key = (int(at), int(harmful), float(tally.weights[column]))
        found[key] = int(tally.counts[world, at, harmful, column])
    return found


def tell(it: Evidence, labels: Iterable[Label], now_ms: int = 0) -> list[Accepted | Rejected]:
    return [it.add(one, judged(int(one.decision_id[2:]), one.score), now_ms) for one in labels]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"harm": "spam"}, "harm"),
        ({"score": -0.1}, "score"),
        ({"score": 1.1}, "score"),
        ({"score": math.nan}, "score"),
        ({"score": 0.8}, "score"),
        ({"harm": "hate_speech"}, "score"),
        ({"picked_with": 0.0}, "picked_with"),
        ({"picked_with": 1.5}, "picked_with"),
        ({"picked_with": math.nan}, "picked_with"),
        ({"picked_with": 0.2}, "picked_with"),
        ({"tenant": "other"}, "tenant"),
        ({"stream_id": "other"}, "stream_id"),
        ({"decision_id": "d-1"}, "decision_id"),
    ],
)
def test_malformed_and_forged_labels_are_refused(fields: dict[str, object], field: str) -> None:
    """They name the field, and nothing is counted."""
    it = evidence()
    refused = it.add(msgspec.structs.replace(label(), **fields), judged(), 0)
    assert isinstance(refused, Rejected)
    assert refused.field == field
    assert cells(settled(it)) == {}


def test_a_label_needs_its_decision() -> None:
    """An id that nothing is known of, and a probability where nothing was picked."""
    it = evidence()
    assert it.add(label(), None, 0) == Rejected("no decision has this id", "decision_id")
    refused = it.add(label(), judged(picked_with=None), 0)
    assert isinstance(refused, Rejected)
    assert refused.field == "picked_with"


def test_a_decision_counts_once_it_is_settled() -> None:
    """Not before `settle_ms` after its first label; then in the bin below its score."""
    it = evidence()
    tell(it, [label(score=0.9)], now_ms=1_000)
    assert settled(it, 1_099).labels == 0
    assert cells(settled(it, 1_100)) == {(90, 1, 1.0): 1}
    assert settled(it).settled_ms == 1_100


def test_a_reviewers_second_label_replaces_the_first() -> None:
    """Until the decision is settled; what comes later counts for nothing."""
    it = evidence()
    tell(it, [label(harmful=True)])
    assert tell(it, [label(harmful=False)], 99) == [Accepted(True)]
    assert cells(settled(it, 100)) == {(90, 0, 1.0): 1}
    assert tell(it, [label(harmful=True)], 101) == [Accepted(False, "settled already")]
    assert cells(settled(it)) == {(90, 0, 1.0): 1}


def test_a_repeated_label_counts_once() -> None:
    """At any later time, within the settling or after."""
    it = evidence()
    for now_ms in (0, 1, 50, 99, 200, 10**9):
        tell(it, [label()], now_ms)
        settled(it, now_ms)
    assert cells(settled(it, 10**10)) == {(90, 1, 1.0): 1}


def test_a_majority_decides_and_a_tie_is_harmless() -> None:
    """Of the reviewers asked; without one of them the others decide."""
    assert outcome({"a": True, "b": False, "c": True}) is True
    assert outcome({"a": True, "b": False}) is False
    assert outcome({"a": True, "b": False}, without="b") is True
    assert outcome({"a": True}, without="a") is None


def test_worlds_without_a_reviewer_are_settled_anew() -> None:
    """One decision that r0 alone labelled, one on which r0 is outvoted, one that r0 turns."""
    it = evidence()
    tell(it, [label(0, True, "r0")])
    tell(
        it, [label(1, harmful, who) for who, harmful in (("r0", False), ("r1", True), ("r2", True))]
    )
    tell(it, [label(2, harmful, who) for who, harmful in (("r0", False), ("r1", True))])
    tally = settled(it)
    assert cells(tally) == {(90, 1, 1.0): 2, (90, 0, 1.0): 1}
    assert cells(tally, 1) == {(90, 1, 1.0): 2}
    assert cells(tally, 2) == {(90, 1, 1.0): 1, (90, 0, 1.0): 2}
    assert cells(tally, 3) == {(90, 1, 1.0): 1, (90, 0, 1.0): 2}
    assert tally.largest_share == 0.5


def test_scores_at_a_threshold_are_not_above_it() -> None:
    """As when deciding: 0.9 itself is above 0.89 alone."""
    it = evidence()
    tell(
        it,
        [label(0, score=0.9), label(1, score=0.9000001), label(2, score=0.0), label(3, score=1.0)],
    )
    assert sorted(at for at, *_ in cells(settled(it))) == [0, 90, 91, 100]


def test_weights_undo_the_sampling() -> None:
    """A decision picked half as often counts twice; `least` scales all alike."""
    it = evidence(LearnPolicy(settle_ms=0, min_picked=0.05, min_picked_below=0.001))
    for number, (share, least, score) in enumerate(
        [(0.1, None, 0.9), (0.05, None, 0.9), (0.1, 0.1, 0.9), (0.001, None, 0.2)]
    ):
        one = label(number, score=score, picked_with=share)
        it.add(one, judged(number, score, picked_with=share, least=least), 0)
    found = cells(settled(it))
    assert found == {(90, 1, 0.5): 1, (90, 1, 1.0): 2, (20, 1, 50.0): 1}


def test_many_weights_are_rounded_fairly() -> None:
    """Only so many are told apart; the others' mean is still right, and none is above 1."""
    it = evidence(LearnPolicy(settle_ms=0, min_picked=0.05))
    shares = np.linspace(0.05, 0.9, 4_000)
    for number, share in enumerate(shares.tolist()):
        one = label(number, score=0.9, picked_with=share)
        it.add(one, judged(number, picked_with=share), 0)
    tally = settled(it)
    assert len(tally.weights) <= 2 * feedback.MAX_WEIGHTS
    counted = tally.counts[0, 90, 1]
    assert counted.sum() == 4_000
    assert counted @ tally.weights == pytest.approx((0.05 / shares).sum(), rel=0.02)
    assert tally.weights[counted > 0].max() <= 1.0


def test_too_rare_picks_are_told() -> None:
    """A decision above a candidate that was picked too rarely counts nothing, and is told of."""
    it = evidence(LearnPolicy(settle_ms=0, min_picked=0.05))
    found = it.add(label(picked_with=0.04), judged(picked_with=0.04), 0)
    assert found == Accepted(False, "picked with less than min_picked")
    tell(it, [label(1)])
    assert settled(it).too_rare == 1
    assert cells(settled(it)) == {(90, 1, 0.5): 1}


def test_what_no_threshold_decided_counts_nothing() -> None:
    """Keywords block whatever the threshold; `other` is for what no type explains."""
    it = evidence()
    assert it.add(label(), judged(stage="keyword"), 0) == Accepted(False, "no threshold decided it")
    other = label(1, harm="other")
    assert it.add(other, judged(1, harm="violence"), 0) == Accepted(
        False, "a harm type explains it"
    )
    assert it.add(other, judged(1, harm="other"), 0) == Accepted(True)
    assert settled(it).labels == 0
    assert settled(it, claim=CLAIM._replace(harm="other")).labels == 1


def test_claims_are_apart() -> None:
    """By tenant, harm and model."""
    it = evidence()
    tell(it, [label(0)])
    it.add(label(1), judged(1, model="m2"), 0)
    it.add(label(2, tenant="u"), judged(2, tenant="u"), 0)
    settled(it)
    for claim in (CLAIM, CLAIM._replace(model="m2"), CLAIM._replace(tenant="u")):
        assert it.snapshot(claim).labels == 1
    assert it.snapshot(CLAIM._replace(harm="hate_speech")).labels == 0


def test_a_new_epoch_counts_anew() -> None:
    """Decisions settled up to its beginning count no more, nor can they be told again."""
    it = evidence(PLAIN)
    tell(it, [label(0)], now_ms=5)
    settled(it, 5)
    record = shipped(*CLAIM, 0.7, 1)
    it.in_force(msgspec.structs.replace(record, epoch=1, epoch_ms=5, since_ms=5))
    assert it.snapshot(CLAIM).labels == 0
    tell(it, [label(0), label(1)], now_ms=6)
    assert cells(settled(it)) == {(90, 1, 1.0): 1}


def test_an_old_record_before_the_labels_leads_to_the_same() -> None:
    """A rebuild puts in force first and reads labels after; live it is the other way round."""
    live, rebuilt = evidence(PLAIN), evidence(PLAIN)
    record = msgspec.structs.replace(shipped(*CLAIM, 0.7, 1), epoch=1, epoch_ms=50, since_ms=50)
    rebuilt.in_force(record)
    for number in range(100):
        one = label(number, number % 3 > 0, f"r{number % 4}")
        for it in (live, rebuilt):
            tell(it, [one], now_ms=number)
            list(it.settle(number))
        if number == 50:
            live.in_force(record)
    ours, theirs = live.snapshot(CLAIM), rebuilt.snapshot(CLAIM)
    assert ours.labels == theirs.labels == 49
    assert (ours.counts == theirs.counts).all()
    assert ours.since == theirs.since


def test_publishing_without_a_change_keeps_the_watch() -> None:
    """A record that moves nothing does not make the learner forget what it has seen."""
    it = evidence(PLAIN)
    it.in_force(shipped(*CLAIM, 0.7, 0))
    tell(it, [label(0)], now_ms=1)
    settled(it, 1)
    it.in_force(shipped(*CLAIM, 0.7, 1))
    assert it.snapshot(CLAIM).since.decisions == 1
    it.in_force(shipped(*CLAIM, 0.71, 2))
    assert it.snapshot(CLAIM).since.decisions == 0


def test_complaints_are_no_evidence() -> None:
    """A label without `picked_with` counts for no threshold."""
    it = evidence()
    found = it.add(label(picked_with=None), judged(picked_with=None), 0)
    assert found == Accepted(False, "complaint")
    assert cells(settled(it)) == {}


def complained(complaints: int, blocks: int, users: int = 50, times: int = 1) -> bool:
    """Whether so many complaints about so many blocked decisions ring the alarm."""
    it = evidence(PLAIN)
    it.in_force(shipped(*CLAIM, 0.7, 0))
    for number in range(1, blocks + 1):
        it.blocked(judged(number, picked_with=None, harm="violence"))
    for number in range(1, complaints + 1):
        one = label(number, False, f"u{number % users}", picked_with=None)
        for _ in range(times):
            it.add(one, judged(number, picked_with=None, harm="violence"), number)
    return settled(it).complaints


def test_complaints_ring_the_alarm_where_they_are_too_many() -> None:
    """More confirmed complaints than a tenth of all blocks; repeated ones count once, and the
    most frequent complainer's do not count at all."""
    assert complained(40, 100)
    assert not complained(8, 100)
    assert not complained(8, 100, times=10)
    assert not complained(40, 100, users=1)
    assert not complained(40, 1_000)


def test_reviewers_without_end_are_bounded() -> None:
    """Beyond a number they share places, and every label still counts once."""
    it = evidence(PLAIN)
    for number in range(500):
        tell(it, [label(number, reviewer=f"r{number}")], now_ms=number)
    tally = settled(it)
    assert tally.counts.shape[0] == 1 + feedback.MAX_REVIEWERS
    assert tally.labels == 500
    assert cells(tally)[90, 1, 1.0] == 500
    assert sum(500 - cells(tally, row)[90, 1, 1.0] for row in range(1, len(tally.counts))) == 500


def test_memory_of_settled_decisions_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest ids are forgotten, and labels of decisions as old as they are refused."""
    monkeypatch.setattr(feedback, "MAX_SETTLED", 10)
    it = evidence(PLAIN)
    for number in range(100):
        tell(it, [label(number)], now_ms=number)
        settled(it, number)
    assert settled(it).labels == 100
    found = tell(it, [label(number) for number in range(100)], now_ms=200)
    assert set(found) == {Accepted(False, "settled already")}
    assert tell(it, [label(100)], now_ms=200) == [Accepted(True)]
    tracemalloc.start()
    for number in range(1_000, 21_000):
        tell(it, [label(number)], now_ms=number)
        settled(it, number)
    assert tracemalloc.get_traced_memory()[0] < 200_000  # bytes; all their ids would be 2 million
    tracemalloc.stop()


def test_open_decisions_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than fit are settled early, in their order, not dropped."""
    monkeypatch.setattr(feedback, "MAX_OPEN", 5)
    it = evidence()
    for number in range(20):
        tell(it, [label(number)], now_ms=number)
    assert it.snapshot(CLAIM).labels == 15
    assert settled(it).labels == 20


def test_a_test_is_due_after_so_many_decisions() -> None:
    """Counted per claim, in the order in which they are settled."""
    it = evidence(LearnPolicy(settle_ms=0, test_every=10, min_picked=PICKED))
    due = []
    for number in range(35):
        tell(it, [label(number)], now_ms=number)
        due += [number for _ in it.settle(number)]
    assert due == [9, 19, 29]


def test_judged_takes_the_score_that_decides() -> None:
    """`other` is held against `harmful`."""
    it = Judged("d", "s", "t", "m", "toxicity", None, {"violence": 0.2}, 0.7, 0)
    assert it.score_of("violence") == 0.2
    assert it.score_of("other") == 0.7
    assert it.score_of("hate_speech") is None
