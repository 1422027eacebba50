"""Finished work -> the offset to commit: the lowest one that a restart must read again. Pure."""

import heapq


class OpenOffsets:
    """For each open stream the first input offset that it still needs."""

    def __init__(self) -> None:
        self._needed: dict[str, int] = {}
        self._heap: list[tuple[int, str]] = []  # may hold entries that no longer count

    def __len__(self) -> int:
        return len(self._needed)

    def need(self, stream_id: str, offset: int) -> None:
        """The stream needs the input from `offset` on, and nothing before it any more."""
        self._needed[stream_id] = offset
        heapq.heappush(self._heap, (offset, stream_id))

    def release(self, stream_id: str) -> None:
        """The stream is closed and needs nothing any more."""
        self._needed.pop(stream_id, None)

    def lowest(self, position: int) -> int:
        """The offset to commit: the lowest needed one, or `position` where nothing is open."""
        first = self._first()
        return position if first is None else first[0]

    def oldest(self) -> str | None:
        """The stream that holds the lowest offset."""
        first = self._first()
        return None if first is None else first[1]

    def _first(self) -> tuple[int, str] | None:
        heap = self._heap
        while heap and self._needed.get(heap[0][1]) != heap[0][0]:
            heapq.heappop(heap)
        return heap[0] if heap else None
