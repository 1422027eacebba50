"""Records of several partitions in one order: by timestamp, partition, offset. Pure.

The order is a function of the log: whoever reads it again, at whatever pace, gets the same.
"""

import heapq
from collections import deque
from collections.abc import Iterator, Mapping
from typing import NamedTuple


class Raw(NamedTuple):
    """One record as it came. Tuples compare by time, partition, offset."""

    at_ms: int  # its timestamp; never before that of an earlier record of its partition
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None


class Merge:
    """Holds records back until no earlier one can come."""

    def __init__(self, partitions: int, latest_ms: Mapping[int, int] | None = None) -> None:
        """latest_ms: of partitions that were read before, the time of the last record taken."""
        self._queues: list[deque[Raw]] = [deque() for _ in range(partitions)]
        self._latest = [(latest_ms or {}).get(it, 0) for it in range(partitions)]

    def feed(
        self, partition: int, offset: int, timestamp_ms: int, key: bytes | None,
        value: bytes | None, wall_ms: int,
    ) -> None:  # fmt: skip
        """Take the partition's next record. A clock that runs ahead counts as ours."""
        at_ms = max(self._latest[partition], min(timestamp_ms, wall_ms))
        self._latest[partition] = at_ms
        self._queues[partition].append(Raw(at_ms, partition, offset, key, value))

    def waiting(self, partition: int) -> int:
        """Records of the partition that are held back."""
        return len(self._queues[partition])

    def horizon(self, quiet_ms: Mapping[int, int]) -> int:
        """Up to when, in milliseconds, no more records will come.

        quiet_ms: of partitions that were read to their end, a time such that all earlier ones
        were there. A partition may still have more records of its latest millisecond.
        """
        return min(
            max(latest, quiet_ms.get(partition, 0)) - 1
            for partition, latest in enumerate(self._latest)
        )

    def ready(self, horizon_ms: int, most: int) -> Iterator[Raw]:
        """Take the records up to the horizon out, in order, at most so many."""
        heads = [(queue[0], queue) for queue in self._queues if queue]
        heapq.heapify(heads)
        while heads and heads[0][0].at_ms <= horizon_ms and most:
            record, queue = heads[0]
            queue.popleft()
            most -= 1
            if queue:
                heapq.heapreplace(heads, (queue[0], queue))
            else:
                heapq.heappop(heads)
            yield record
