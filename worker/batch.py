"""Segments -> batches, cut by padded tokens and a deadline. Pure.

There is no fixed wait: while one batch runs, the next one forms.
"""

from collections import deque
from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar


class Sized(Protocol):
    """What a batch is made of."""

    @property
    def rows(self) -> int:
        """Rows of model input."""
        ...

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        ...

    @property
    def alone(self) -> bool:
        """Whether it must not share a batch: one that failed among others is tried by itself."""
        ...

    @property
    def born(self) -> float:
        """Monotonic seconds."""
        ...


T = TypeVar("T", bound=Sized)


class Batcher(Generic[T]):
    """First in, first out."""

    def __init__(self, max_tokens: int, deadline_s: float = 0.0) -> None:
        self._max_tokens = max_tokens  # padded tokens of a batch
        self._deadline_s = deadline_s  # how long a batch may wait to fill up
        self._waiting: deque[T] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, entries: Sequence[T]) -> None:
        """Queue entries in their order."""
        self._waiting.extend(entries)

    def cut(self, now: float) -> list[T]:
        """The next batch; empty while nothing is due. One entry over the budget goes alone."""
        batch: list[T] = []
        rows = longest = 0
        for entry in self._waiting:
            rows, longest = rows + entry.rows, max(longest, entry.longest)
            full = rows * longest > self._max_tokens
            if batch and (full or entry.alone or batch[0].alone):
                break
            batch.append(entry)
        else:
            if not batch or (now - batch[0].born < self._deadline_s and not batch[0].alone):
                return []
        for _ in batch:
            self._waiting.popleft()
        return batch
