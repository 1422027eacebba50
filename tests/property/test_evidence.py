"""Evidence is a function of the labels: order, repeats and rebuilding change nothing."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reviews import CLAIM, PICKED, Learner, judged, label
from worker.events import ThresholdRecord
from worker.feedback import Evidence
from worker.settings import LearnPolicy

SHARES = (PICKED, 0.3, 1.0)
POLICY = LearnPolicy(settle_ms=50, test_every=5, min_picked=PICKED, target_precision=0.8)


def told(seed: int, count: int) -> list[tuple[int, bool, str, float, float]]:
    """Labels: decision, harmful, reviewer, score, share; the last two are the decision's."""
    rng = random.Random(seed)
    decisions = [(rng.random(), rng.choice(SHARES)) for _ in range(count)]
    return [
        (number, rng.random() < score, reviewer, score, share)
        for number, (score, share) in enumerate(decisions)
        for reviewer in rng.sample("abcd", rng.choice([1, 1, 1, 2, 3]))
    ]


def add(it: Evidence, one: tuple[int, bool, str, float, float], now_ms: int) -> None:
    number, harmful, reviewer, score, share = one
    it.add(
        label(number, harmful, reviewer, score, picked_with=share),
        judged(number, score, picked_with=share), now_ms,
    )  # fmt: skip


def counted(labels: list[tuple[int, bool, str, float, float]]) -> Evidence:
    it = Evidence(lambda _: POLICY)
    for one in labels:
        add(it, one, 0)
    list(it.settle(50))
    return it


def worlds(it: Evidence) -> tuple[int, dict[tuple[int, int, float], int], list[list[str]]]:
    """What a tally says, without the order in which weights and reviewers came."""
    tally = it.snapshot(CLAIM)
    tables = [
        {
            (at, harmful, float(tally.weights[column])): int(table[at, harmful, column])
            for at, harmful, column in zip(*table.nonzero(), strict=True)
        }
        for table in tally.counts
    ]
    return tally.labels, tables[0], sorted(sorted(map(repr, table.items())) for table in tables[1:])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.randoms(use_true_random=False))
def test_order_and_repeats_change_nothing(seed: int, count: int, rng: random.Random) -> None:
    """Whatever comes again, whenever within the settling or after it."""
    labels = told(seed, count)
    again = labels + rng.choices(labels, k=count)
    rng.shuffle(again)
    other = counted(again)
    assert worlds(other) == worlds(counted(labels))
    for one in again:
        add(other, one, 60)
    list(other.settle(10**6))
    assert worlds(other) == worlds(counted(labels))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40))
def test_each_world_is_one_without_a_reviewer(seed: int, count: int) -> None:
    """As if they had never labelled anything."""
    labels = told(seed, count)
    _, _, without = worlds(counted(labels))
    reviewers = {reviewer for _, _, reviewer, *_ in labels}
    alone = [worlds(counted([it for it in labels if it[2] != name]))[1] for name in reviewers]
    assert without == sorted(sorted(map(repr, table.items())) for table in alone)


def drifting(seed: int, count: int = 320) -> list[tuple[int, bool, str, float, float]]:
    """Nearly all is harmful; after 160 labels, what scores below 0.9 mostly is not."""
    rng = random.Random(seed)
    found = []
    for number in range(count):
        score, late = 1.0 - 0.5 * rng.random() ** 3, number >= count // 2
        harmful = rng.random() < (0.02 if late and score < 0.9 else 0.99)
        share = PICKED if rng.random() < 0.9 else 2 * PICKED
        found.append((number, harmful, rng.choice("abcd"), score, share))
    return found


def tell(it: Learner, one: tuple[int, bool, str, float, float]) -> None:
    it.now_ms = one[0]
    add(it.evidence, one, it.now_ms)
    it.test()


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(0, 320), min_size=1, max_size=4))
def test_a_rebuild_goes_on_as_if_nothing_had_been(seed: int, kills: list[int]) -> None:
    """Killed anywhere: the last record is put in force, labels are read again from the first one,
    and from there on the same records are published, alarms and new epochs included."""
    labels = drifting(seed)
    undisturbed, disturbed = Learner(POLICY), Learner(POLICY)
    for number, one in enumerate(labels):
        if number in kills:
            rebuild(disturbed, labels[:number])
        tell(undisturbed, one)
        tell(disturbed, one)
    assert disturbed.records == undisturbed.records


def rebuild(it: Learner, labels: list[tuple[int, bool, str, float, float]]) -> None:
    it.evidence = Evidence(lambda _: POLICY)
    it.evidence.in_force(it.record)
    for one in labels:
        add(it.evidence, one, one[0])
        list(it.evidence.settle(one[0]))


def test_the_rebuilt_histories_have_moves_alarms_and_epochs() -> None:
    """The property above is about something."""
    records: list[ThresholdRecord] = []
    for seed in range(8):
        it = Learner(POLICY)
        for one in drifting(seed):
            tell(it, one)
        records += it.records
        assert any(record.threshold < record.previous for record in it.records)
    assert sum(record.alarm for record in records) > 3
    assert max(record.epoch for record in records) == 1
