"""certify.py and drift.py: what labels prove, and what is published then."""

import math
from itertools import pairwise

import msgspec
import numpy as np
import pytest

from tests.reviews import CLAIM, PICKED, PLAIN, Learner, judged, label
from worker import drift
from worker.certify import (
    GRID,
    STAKES,
    Goal,
    bin_of,
    certified,
    epoch_delta,
    estimated,
    in_force,
    propose,
    recall_interval,
    shipped,
    stake_wealth,
    walk,
)
from worker.settings import LearnPolicy

PRECISION, RECALL = Goal("precision", 0.9, 50.0), Goal("recall", 0.8, 50.0)


def policy(**fields: object) -> LearnPolicy:
    return LearnPolicy.model_validate(PLAIN.model_dump() | fields)


def mostly(harmless_every: int, count: int) -> list[bool]:
    """Outcomes of which each so-many-th is harmless."""
    return [number % harmless_every > 0 for number in range(1, count + 1)]


# -- the bets -------------------------------------------------------------------------------------


@pytest.mark.parametrize("goal", [PRECISION, RECALL])
def test_wealth_is_the_product_of_the_bets(goal: Goal) -> None:
    """Counts give what multiplying decision by decision gives, at every candidate."""
    rng = np.random.default_rng(1)
    weights = np.array([1.0, 0.25, 50.0])
    scores, outcomes, columns = rng.random(300), rng.integers(0, 2, 300), rng.integers(0, 2, 300)
    columns[scores < 0.5] = 2
    counts = np.zeros((len(GRID), 2, 3), np.int32)
    direct = np.zeros((len(GRID), len(STAKES)))
    for score, harmful, column in zip(scores, outcomes, columns, strict=True):
        counts[bin_of(score), harmful, column] += 1
        for at, threshold in enumerate(GRID):
            gain = goal.gain(bool(score > threshold), weights)[harmful, column]
            direct[at] += np.log1p(STAKES * gain)
    for at in range(50, 96):
        found = stake_wealth(counts, weights, goal, at)
        np.testing.assert_allclose(found, direct[at], atol=1e-9)


def test_a_bet_at_the_target_is_fair() -> None:
    """With weights 1/picked_with the mean factor is 1 where precision is exactly the target, though
    strata differ in precision and in how often they are picked."""
    traffic, precision = np.array([0.3, 0.7]), np.array([0.69, 0.99])  # together 0.9
    shares, least = np.array([0.5, 0.1]), 0.1
    gains = PRECISION.gain(True, least / shares)  # (2, strata)
    picked = traffic * shares
    mean = sum(picked * (precision * gains[1] + (1 - precision) * gains[0]))
    assert mean == pytest.approx(0.0, abs=1e-12)


def test_a_bet_on_recall_at_the_floor_is_fair() -> None:
    """Where the share of the harmful above the threshold is exactly the floor."""
    harmful, shares = np.array([0.8, 0.2]), np.array([0.1, 0.002])  # above, below
    picked = harmful * shares
    gains = [
        RECALL.gain(above, np.array([0.1 / share]))[1, 0]
        for above, share in zip((True, False), shares, strict=True)
    ]
    assert picked @ gains == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("goal", [PRECISION, RECALL])
def test_no_bet_loses_more_than_everything(goal: Goal) -> None:
    """At the highest weights that there are."""
    for above, most in ((True, 1.0), (False, goal.ratio)):
        assert goal.gain(above, np.array([most])).min() >= -1.0 - 1e-12
        for harmful in (True, False):
            assert goal.loss(above, harmful, most) >= -1.0 - 1e-12


def test_epochs_share_delta() -> None:
    """All of them together spend no more than delta."""
    parts = [epoch_delta(0.05, epoch) for epoch in range(10_000)]
    assert sum(parts) <= 0.05
    assert parts == sorted(parts, reverse=True)


def test_candidates_go_from_strict_to_loose() -> None:
    """Within the harm's bounds; for a recall floor the other way round."""
    bounds = {"violence": (0.6, 0.63)}
    assert [GRID[at] for at in walk(policy(bounds=bounds), "violence")] == [0.63, 0.62, 0.61, 0.6]
    loose = walk(policy(bounds=bounds, recall_floor=0.8), "violence")
    assert [GRID[at] for at in loose] == [0.6, 0.61, 0.62, 0.63]
    assert (GRID[walk(PLAIN, "other")[0]], GRID[walk(PLAIN, "other")[-1]]) == (0.95, 0.5)


@pytest.mark.parametrize(
    ("fields", "names"),
    [({"bounds": {"violence": (0.501, 0.509)}}, "bounds of 'violence'.*no multiple"),
     ({"bounds": {"violence": (0.6, 0.5)}}, "bounds of 'violence'.*lowest above highest"),
     ({"reviewers": ["ann", "ann"]}, "max_reviewer_share: 0.6.*1 in reviewers"),
     ({"reviewers": ["ann", "bob"], "max_reviewer_share": 0.4}, "max_reviewer_share: 0.4")],
)  # fmt: skip
def test_a_policy_that_could_certify_nothing_is_refused(
    fields: dict[str, object], names: str
) -> None:
    """Rather than label for months in vain."""
    with pytest.raises(ValueError, match=names):
        policy(**fields)
    one = policy(bounds={"violence": (0.57, 0.57)}, reviewers=["ann", "bob"])
    assert [GRID[at] for at in walk(one, "violence")] == [0.57]


def test_the_walk_stops_at_the_first_failure() -> None:
    """What lies beyond is not looked at; what was certified stays so; all worlds must agree."""
    counts = np.zeros((2, len(GRID), 2, 1), np.int32)
    counts[:, 96, 1] = 100
    counts[:, 94, 0] = 100
    counts[:, 60, 1] = 10_000
    order, one = walk(PLAIN, "violence"), np.ones(1)
    assert certified(counts, one, PRECISION, order, 0.05) == 2
    assert certified(counts * 0, one, PRECISION, order, 0.05, done=2) == 2
    counts[1, 95, 0] = 100
    assert certified(counts, one, PRECISION, order, 0.05) == 1


# -- certificates ---------------------------------------------------------------------------------


def test_a_lower_threshold_is_certified_and_applied() -> None:
    """With enough good labels; the record says what it is and what it rests on."""
    it = Learner()
    it.tell([True] * 100)
    last = it.record
    assert (last.threshold, last.certified, last.status) == (0.5, 0.5, "applied")
    assert (last.method, last.target_precision, last.delta) == ("certified", 0.9, 0.05)
    assert 40 < last.labels <= 100
    assert [record.version for record in it.records] == list(range(1, len(it.records) + 1))


def test_too_few_labels_leave_the_old_threshold_and_say_how_many_are_missing() -> None:
    """As they come, fewer are missing; told anew when half of them are there."""
    it = Learner()
    it.tell([True] * 40)
    assert in_force(it.record) == 0.7
    missing = [record.labels_needed for record in it.records if record.labels_needed]
    assert missing == sorted(missing, reverse=True)
    assert len(missing) < 10
    assert "more labels" in it.record.reason


@pytest.mark.parametrize(("harmless_every", "since"), [(1000, 8), (30, 70)])
def test_as_many_labels_as_the_record_says_are_enough(harmless_every: int, since: int) -> None:
    """Within a factor of two, or ten labels: the rate so far is what there is to go by."""
    it, said = Learner(), {}
    while it.record.certified is None:
        it.tell([(it.now_ms + 1) % harmless_every > 0])
        said[it.record.labels] = it.record.labels_needed
    enough = it.record.labels
    missing = {at: told for at, told in said.items() if since <= at < enough}
    assert len(missing) > 1
    for at, told in missing.items():
        assert told is not None
        assert 0.5 * (enough - at) - 10 < told < 2.0 * (enough - at) + 10


def test_labels_below_the_target_certify_nothing() -> None:
    """However many there are."""
    it = Learner()
    it.tell(mostly(9, 1_500))
    assert (in_force(it.record), it.record.certified) == (0.7, None)


def test_a_dip_in_precision_ends_the_walk() -> None:
    """Good below and above 0.8, bad there: what lies below is out of reach."""
    it = Learner(start=0.95)
    for _ in range(60):
        it.tell([True] * 4, score=0.96)
        it.tell([False] * 2, score=0.8)
        it.tell([True] * 30, score=0.6)
    assert it.record.certified == 0.8
    assert estimated(
        it.evidence.snapshot(CLAIM).counts[0], np.ones(1), "precision", 50
    ) == pytest.approx(34 / 36)


def test_one_reviewer_alone_moves_nothing() -> None:
    """Neither down with good labels nor up with bad ones; a tenant may allow it."""
    for outcomes in ([True] * 300, [False] * 300):
        alone = Learner()
        alone.tell(outcomes, reviewers=1)
        assert {in_force(record) for record in alone.records} == {0.7}
    trusted = Learner(policy(max_reviewer_share=1.0))
    trusted.tell([True] * 60, reviewers=1)
    assert in_force(trusted.record) == 0.5


def test_a_reviewer_with_too_large_a_share_holds_certificates_back() -> None:
    """Nine labels in ten are one's."""
    it = Learner()
    for _ in range(60):
        it.tell([True] * 9, reviewers=1)
        it.now_ms += 1
        it.evidence.add(
            label(it.now_ms, score=0.99, reviewer="other"), judged(it.now_ms, 0.99), it.now_ms
        )
        it.test()
    assert it.record.certified is None
    assert "90% of the labels" in it.record.reason


def hostile(says: bool, fields: dict[str, object], rounds: int = 400) -> Learner:
    """One of three reviewers says the same of everything; precision is 0.84 in truth."""
    rng = np.random.default_rng(3)
    it = Learner(policy(**fields))
    for _ in range(3 * rounds):
        it.now_ms += 1
        who = it.now_ms % 3
        harmful = says if who == 0 else bool(rng.random() < 0.84)
        it.evidence.add(
            label(it.now_ms, harmful, f"r{who}", 0.99), judged(it.now_ms, 0.99), it.now_ms
        )
        it.test()
    return it


def test_a_hostile_reviewer_certifies_nothing() -> None:
    """The labels' precision is 0.89 with theirs and 0.84 without; unprotected it would do."""
    fields: dict[str, object] = {"target_precision": 0.87}
    assert hostile(True, fields).record.certified is None
    unprotected = hostile(True, fields | {"max_reviewer_share": 1.0})
    assert unprotected.record.certified is not None


def test_a_hostile_reviewer_does_not_switch_moderation_off() -> None:
    """Who calls everything harmless rings no alarm: the others see precision 0.84."""
    assert not any(record.alarm for record in hostile(False, {"target_precision": 0.75}).records)
    alone = hostile(False, {"target_precision": 0.75, "max_reviewer_share": 1.0})
    assert any(record.alarm for record in alone.records)


def test_reviewers_mistakes_are_allowed_for() -> None:
    """With 5 % of the harmless called harmful, 0.905 has to be seen for 0.9 to be there."""
    assert Goal.of(policy(reviewer_error=0.05)).level == pytest.approx(0.905)


def test_records_without_news_are_few() -> None:
    """While precision hovers about the target, a record comes with a fifth more labels at most."""
    it = Learner()
    it.tell([number % 10 > 0 for number in range(3_000)])
    assert len(it.records) < 40
    gaps = pairwise(record.labels for record in it.records[1:])
    assert all(after >= 1.2 * before for before, after in gaps)


def test_picked_too_rarely_certifies_nothing() -> None:
    """No weight would be right, so the record says what to change."""
    it = Learner()
    it.evidence.add(label(0, picked_with=0.05), judged(0, picked_with=0.05), 0)
    it.tell([True] * 100)
    assert it.record.certified is None
    assert "picked with less than 0.1" in it.record.reason


def test_a_stricter_threshold_is_applied_only_when_the_walk_is_stuck() -> None:
    """0.9 is certified soon; 0.7 stays until it is clear that it is out of reach."""
    it = Learner()
    for _ in range(300):
        it.tell([True] * 3, score=0.97)
        it.tell([True, False], score=0.8)
    moves = [record for record in it.records if record.threshold != record.previous]
    assert moves[0].threshold >= 0.8
    assert moves[0].labels > 50
    assert all(after.threshold < before.threshold for before, after in pairwise(moves))
    assert in_force(it.record) == it.record.certified == 0.8


def test_another_target_begins_the_walk_anew() -> None:
    """Certificates for 0.9 are none for 0.97; the evidence is the same."""
    it = Learner()
    it.tell([True] * 100)
    tally = it.evidence.snapshot(CLAIM)
    stricter = propose(tally, policy(target_precision=0.97), it.record, 100)
    assert stricter is not None
    assert (stricter.certified, stricter.threshold) == (None, 0.5)


def test_a_walk_from_elsewhere_begins_anew() -> None:
    """Who raises the highest bound has not tested what lies above the old one."""
    it = Learner(policy(bounds={"violence": (0.5, 0.8)}))
    it.tell([True] * 80, score=0.85)
    assert it.record.certified == 0.5
    raised = propose(it.evidence.snapshot(CLAIM), PLAIN, it.record, 100)
    assert raised is not None
    assert raised.certified is None
    assert in_force(raised) == 0.5


def test_lost_labels_begin_a_new_epoch() -> None:
    """Evidence that is found again from a shorter log must not try the same test once more."""
    it = Learner()
    it.tell([True] * 30)
    shorter = Learner()
    shorter.tell([True] * 20)
    more = msgspec.structs.replace(it.record, labels=30)
    renewed = propose(shorter.evidence.snapshot(CLAIM), PLAIN, more, 99)
    assert renewed is not None
    assert (renewed.epoch, renewed.labels, renewed.certified) == (1, 0, None)
    assert "lost" in renewed.reason


# -- publication ----------------------------------------------------------------------------------


def test_a_tenant_that_wants_approval_is_asked() -> None:
    """Nothing moves by it, it is asked once, and not again for what it declined."""
    it = Learner(policy(approval=True))
    it.tell([True] * 200)
    asked = it.record
    assert (asked.status, asked.threshold, in_force(asked)) == ("proposed", 0.5, 0.7)
    assert [record.status for record in it.records].count("proposed") == 1
    it.publish(msgspec.structs.replace(asked, status="applied", threshold=0.7, declined=0.5))
    it.tell([True] * 200)
    assert it.record.status == "applied"
    assert in_force(it.record) == 0.7


def test_a_pending_proposal_is_not_buried() -> None:
    """Compaction keeps the last record alone: one that moves nothing must not take its place."""
    it = Learner(policy(bounds={"violence": (0.5, 0.8)}), start=0.95)
    it.tell([False] * 20, score=0.75)
    it.tell([True] * 90, score=0.801)
    assert (it.record.status, it.record.threshold) == ("applied", 0.75)
    complain(it, range(1_000, 1_100), score=0.79)
    it.test()
    proposed, it.now_ms = it.records[-1], 2_000
    assert proposed.status == "proposed"
    it.tell([True] * 200, score=0.75)
    assert it.records[-1] is proposed


def complain(it: Learner, numbers: range, score: float) -> None:
    """About every other one of so many blocked decisions."""
    for number in numbers:
        blocked = judged(number, score, picked_with=None, harm="violence")
        it.evidence.blocked(blocked)
        if number % 2:
            one = label(number, False, f"u{number}", score, picked_with=None)
            it.evidence.add(one, blocked, number)


def test_an_operators_threshold_stays() -> None:
    """Until an operator hands it back; an alarm is told once."""
    it = Learner()
    it.publish(msgspec.structs.replace(it.record, method="operator", threshold=0.6, model=""))
    it.tell([True] * 200)
    assert in_force(it.record) == 0.6
    it.tell([False] * 300)
    told = [record for record in it.records if record.alarm]
    assert len(told) == 1
    assert (told[0].method, told[0].threshold, told[0].model) == ("operator", 0.6, "")


def test_another_model_starts_from_what_it_ships() -> None:
    """Its claim knows nothing of the other's labels, nor takes its record."""
    it = Learner()
    it.tell([True] * 100)
    other = CLAIM._replace(model="m2")
    tally = it.evidence.snapshot(other)
    assert tally.labels == 0
    with pytest.raises(ValueError, match="not what the evidence is about"):
        propose(tally, PLAIN, it.record, 100)
    first = propose(tally, PLAIN, shipped(*other, 0.64, it.record.version), 100)
    assert first is not None
    assert (in_force(first), first.model, first.version) == (0.64, "m2", it.record.version + 1)
    assert it.record.certified == 0.5
    set_once = msgspec.structs.replace(it.record, model="", epoch=3, epoch_ms=50, declined=0.6)
    after = propose(tally, PLAIN, set_once, 100)
    assert after is not None
    assert (after.certified, after.labels, after.epoch, after.epoch_ms) == (None, 0, 0, 0)
    assert (after.declined, after.learnt_from, in_force(after)) == (None, "m2", 0.5)


def test_an_epoch_of_another_model_drops_no_label_of_ours() -> None:
    """An operator's record is for every model, and tells of the one that had labels then."""
    it = Learner()
    later = msgspec.structs.replace(
        it.record, method="operator", model="", learnt_from="m2", epoch=1, epoch_ms=500
    )
    it.publish(later)
    it.tell([True] * 60)
    assert it.evidence.snapshot(CLAIM).labels == 60
    it.publish(msgspec.structs.replace(later, learnt_from="m"))
    assert it.evidence.snapshot(CLAIM).labels == 0


# -- alarms ---------------------------------------------------------------------------------------


def drifted(after: int, harmless_every: int = 2, **fields: object) -> Learner:
    """Certified at 0.5, then precision is lost below 0.8."""
    it = Learner(policy(**fields))
    it.tell([True] * 100, score=0.99)
    assert in_force(it.record) == 0.5
    for number in range(after):
        it.tell([True], score=0.99)
        it.tell([number % harmless_every > 0], score=0.7)
    return it


def test_lost_precision_rings_the_alarm_and_falls_back() -> None:
    """To a certified threshold above what went wrong; the evidence before it is of the past."""
    it = drifted(100)
    (rang, *_) = [record for record in it.records if record.alarm]
    assert rang.previous == 0.5
    assert 0.7 <= rang.threshold < 0.95
    assert (rang.epoch, rang.certified, rang.labels) == (1, None, 0)
    assert rang.certified_before == rang.threshold
    assert rang.labels_needed is None


def test_after_an_alarm_the_smaller_delta_counts() -> None:
    """And the next certificates rest on labels after it alone."""
    it = drifted(100)
    at = next(number for number, record in enumerate(it.records) if record.alarm)
    it.tell([True] * 120, score=0.99)
    again = next(record for record in it.records[at + 1 :] if record.certified is not None)
    first = next(record for record in it.records if record.certified is not None)
    assert again.epoch == 1
    assert again.labels > first.labels


def test_a_second_alarm_goes_further_back() -> None:
    """To what earlier epochs have certified, if this one has nothing yet."""
    it = drifted(100)
    there = in_force(it.record)
    it.tell([False] * 80, score=there + 0.05)
    last = [record for record in it.records if record.alarm][-1]
    assert last.threshold > last.previous
    assert last.epoch == 1


def test_an_alarm_without_a_certificate_tells_and_moves_nothing() -> None:
    """Once; the walk goes on, and what it certifies is applied at once."""
    it = Learner()
    it.tell([False] * 60, score=0.75)
    assert [record.alarm for record in it.records].count(True) == 1
    assert in_force(it.record) == 0.7
    it.tell([True] * 80, score=0.99)
    assert in_force(it.record) >= 0.75
    assert it.record.epoch == 0


def test_no_alarm_while_precision_is_at_the_target() -> None:
    """In at most delta of all cases, ever."""
    rng = np.random.default_rng(5)
    rang, cases = 0, 300
    for _ in range(cases):
        wealth = drift.begin(1)
        for number in range(1, 401):
            loss = PRECISION.loss(True, bool(rng.random() < 0.9), 1.0)
            wealth = drift.advance(wealth, number, loss)
            if drift.rings(wealth, 0.05):
                rang += 1
                break
    assert rang <= 0.05 * cases + 2 * math.sqrt(0.05 * 0.95 * cases)


def test_the_alarms_prior_sums_to_one() -> None:
    """What all beginnings together are worth, where nothing is won or lost."""
    wealth = drift.begin(1)
    for number in range(1, 5_001):
        wealth = drift.advance(wealth, number, 0.0)
    assert wealth == pytest.approx(1.0 - 1.0 / 501.0)


def test_complaints_only_ask() -> None:
    """They can come from anybody, so nothing moves without a person's word."""
    it = Learner()
    it.tell([True] * 100)
    complain(it, range(1_000, 1_100), score=0.8)
    it.test()
    assert (it.record.status, in_force(it.record), it.record.alarm) == ("proposed", 0.5, True)
    assert it.record.threshold > 0.5
    it.publish(
        msgspec.structs.replace(
            it.record, status="applied", threshold=0.5, declined=it.record.threshold
        )
    )
    it.tell([True] * 20)
    assert it.record.status == "applied"


# -- step -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "harmful", "ends"),
    [
        (0.7, 39, 0.75),  # of 50: 0.78
        (0.7, 40, 0.7),
        (0.7, 47, 0.7),  # 0.94
        (0.7, 48, 0.65),
        (0.93, 30, 0.95),
        (0.95, 30, 0.95),
        (0.52, 50, 0.5),
        (0.5, 50, 0.5),
        (0.97, 30, 0.97),  # set above the bounds: up is no way
        (0.4, 50, 0.4),
    ],
)
def test_step(start: float, harmful: int, ends: float) -> None:
    """Below 0.8 up by 0.05 to 0.95 at most, above 0.95 down to 0.5 at least, else nothing."""
    it = Learner(policy(method="step"), start)
    outcomes = np.random.default_rng(0).permutation([True] * harmful + [False] * (50 - harmful))
    it.tell(outcomes.tolist())
    assert in_force(it.record) == ends
    assert it.record.method == "step"


def test_step_looks_at_each_label_once() -> None:
    """After every look it begins anew; allowed items are none of its business."""
    it = Learner(policy(method="step"))
    it.tell([False] * 500, score=0.6)
    assert in_force(it.record) == 0.7
    it.tell([True] * 49)
    assert in_force(it.record) == 0.7
    it.tell([True])
    assert in_force(it.record) == pytest.approx(0.65)
    it.tell([True] * 49)
    assert in_force(it.record) == pytest.approx(0.65)


def test_step_needs_more_than_one_reviewer() -> None:
    """One alone moves nothing, whatever they say."""
    it = Learner(policy(method="step"))
    it.tell([False] * 200, reviewers=1)
    assert in_force(it.record) == 0.7
    assert "one reviewer" in it.record.reason


# -- recall ---------------------------------------------------------------------------------------


def counted(above: int, below: int, weight: int) -> np.ndarray[tuple[int, ...], np.dtype[np.int32]]:
    counts = np.zeros((len(GRID), 2, 2), np.int32)
    counts[90, 1, 0], counts[20, 1, weight] = above, below
    return counts


def test_recall_weighs_what_was_missed() -> None:
    """One missed of 50 that were not looked at counts as 50."""
    weights = np.array([1.0, 50.0])
    assert estimated(counted(150, 1, 1), weights, "recall", 70) == pytest.approx(0.75)
    low, high = recall_interval(counted(150, 1, 1), weights, 70, 0.05, 1.0, 50.0)
    assert low < 0.75 < high
    assert recall_interval(counted(0, 0, 1), weights, 70, 0.05, 1.0, 50.0) == (0.0, 1.0)
    low, high = recall_interval(counted(800, 200, 0), np.ones(2), 70, 0.05, 1.0, 1.0)
    assert 0.7 < low < 0.8 < high < 0.9


def test_the_recall_interval_holds_at_all_times() -> None:
    """The truth leaves it in at most delta of all histories, looked at after every tenth label."""
    rng = np.random.default_rng(7)
    missed, cases = 0, 150
    weights = np.array([1.0, 10.0])
    for _ in range(cases):
        above = rng.random(400) < 0.8 / (
            0.8 + 0.2 / 10.0
        )  # recall 0.8, misses picked 1/10 as often
        for seen in range(10, 401, 30):
            found = int(above[:seen].sum())
            low, high = recall_interval(
                counted(found, seen - found, 1), weights, 70, 0.05, 1.0, 10.0
            )
            if not low <= 0.8 <= high:
                missed += 1
                break
    assert missed <= 0.05 * cases + 2 * math.sqrt(0.05 * 0.95 * cases)


def test_a_recall_floor_raises_the_threshold_as_far_as_it_holds() -> None:
    """From the loosest candidate up: all harm scores 0.8 or more."""
    it = Learner(policy(recall_floor=0.8, min_picked_below=PICKED), start=0.6)
    for _ in range(150):
        it.tell([True], score=0.801)
        it.tell([False], score=0.6)
    assert in_force(it.record) == 0.8
    assert it.record.recall_floor == 0.8
    assert it.record.recall_low is not None
    assert it.record.recall_low > 0.8


def test_records_tell_recall() -> None:
    """With its interval, from allowed traffic too."""
    it = Learner(policy(min_picked_below=PICKED))
    for _ in range(40):
        it.tell([True, True, True], score=0.99)
        it.tell([True], score=0.3)
    assert it.record.recall == pytest.approx(0.75, abs=0.05)
    assert it.record.recall_low is not None
    assert it.record.recall_high is not None
    assert 0.4 < it.record.recall_low < 0.75 < it.record.recall_high < 0.95


def test_estimates_are_told_anew_when_labels_have_doubled() -> None:
    """Even where every candidate is certified, so that nothing else is ever news."""
    it = Learner(policy(min_picked_below=PICKED))
    it.tell([True] * 100)
    assert (it.record.certified, it.record.recall) == (0.5, 1.0)
    for _ in range(300):
        it.tell([True], score=0.3)
        it.tell([True], score=0.99)
    assert it.record.labels > 350
    assert it.record.recall == pytest.approx(0.6, abs=0.1)
    assert len(it.records) < 15
