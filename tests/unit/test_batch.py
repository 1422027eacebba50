"""batch.py: segments -> batches."""

from typing import NamedTuple

from worker.batch import Batcher


class Entry(NamedTuple):
    rows: int = 1
    longest: int = 10
    alone: bool = False
    born: float = 0.0


def test_batch_is_cut_by_padded_tokens() -> None:
    """Rows times the longest row stay within the budget, whatever the arrival order."""
    batcher: Batcher[Entry] = Batcher(max_tokens=40)
    batcher.add([Entry(longest=10), Entry(longest=20), Entry(longest=15)])
    assert [entry.longest for entry in batcher.cut(0.0)] == [10, 20]
    assert [entry.longest for entry in batcher.cut(0.0)] == [15]
    assert batcher.cut(0.0) == []


def test_an_entry_over_the_budget_goes_alone() -> None:
    """Nothing waits for ever because it is large."""
    batcher: Batcher[Entry] = Batcher(max_tokens=40)
    batcher.add([Entry(longest=500), Entry()])
    assert len(batcher.cut(0.0)) == 1


def test_entries_that_failed_among_others_are_tried_alone() -> None:
    """One poisonous text must not take its neighbours down again and again."""
    batcher: Batcher[Entry] = Batcher(max_tokens=1_000)
    batcher.add([Entry(), Entry(alone=True), Entry(alone=True), Entry(), Entry()])
    assert [len(batcher.cut(0.0)) for _ in range(4)] == [1, 1, 1, 2]


def test_a_batch_may_wait_for_its_deadline_only() -> None:
    """With a deadline an incomplete batch waits that long; a full one does not."""
    batcher: Batcher[Entry] = Batcher(max_tokens=20, deadline_s=0.01)
    batcher.add([Entry(born=1.0)])
    assert batcher.cut(1.005) == []
    assert len(batcher.cut(1.011)) == 1
    batcher.add([Entry(born=2.0)] * 3)
    assert len(batcher.cut(2.0)) == 2


def test_order_is_kept() -> None:
    """First in, first out."""
    batcher: Batcher[Entry] = Batcher(max_tokens=30)
    batcher.add([Entry(longest=n) for n in (9, 8, 7, 6, 5)])
    taken = []
    while batch := batcher.cut(0.0):
        taken += batch
    assert [entry.longest for entry in taken] == [9, 8, 7, 6, 5]
