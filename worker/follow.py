"""Whole topics, read without a group: up to the end that they have now, then as they grow.

A worker follows moderation.thresholds; the learner follows what it joins and what it has written.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import structlog
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaConnectionError, KafkaError, KafkaTimeoutError

from worker.errors import PartitionLost, Stop
from worker.publish import client_settings, finish
from worker.settings import Settings

log = structlog.get_logger()

_WAIT_MS = 200
_RETRY_S = 0.2
_MOST_RECORDS = 4_000  # at once
_FETCH_BYTES = 4 << 20  # of a partition
_MAX_FAILURES = 50  # in a row, that waiting will not mend
_START_S = 60.0  # how long brokers may be out of reach when a process starts
_START_AGAIN_S, _BEAT_S = 0.5, 1.0


@contextmanager
def reaching(settings: Settings) -> Iterator[None]:
    """Brokers that do not answer, or refuse, end the command and say which."""
    try:
        yield
    except KafkaError as error:
        raise _unserved(settings, error) from error


async def reach(
    settings: Settings, step: Callable[[], Awaitable[None]], beat: Callable[[], None] = lambda: None
) -> None:
    """Do a step of starting that needs the brokers; again, for a while, where it fails by them.

    beat: called every second meanwhile, as proof that the event loop turns. Raises Stop.
    """
    deadline = time.monotonic() + _START_S
    beating = asyncio.create_task(_keep(beat))
    try:
        while True:
            try:
                return await step()
            except (KafkaError, TimeoutError, OSError) as error:
                if not mends(error) or time.monotonic() > deadline:
                    raise _unserved(settings, error) from error
                log.warning("start.waits", error=type(error).__name__)
            await asyncio.sleep(_START_AGAIN_S)
    finally:
        beating.cancel()


async def _keep(beat: Callable[[], None]) -> None:
    while True:
        beat()
        await asyncio.sleep(_BEAT_S)


def _unserved(settings: Settings, error: Exception) -> Stop:
    return Stop(f"no broker at {settings.bootstrap_servers} serves us: {error!r}")


def mends(error: BaseException) -> bool:
    """Whether the same may work in a moment.

    KafkaTimeoutError: a broker that died under the call; aiokafka does not call that retriable.
    """
    passing = (TimeoutError, OSError, PartitionLost, KafkaTimeoutError)
    return isinstance(error, passing) or bool(getattr(error, "retriable", False))


class Follower:
    """Every partition of some topics, committed records only. Use `open`, then read."""

    def __init__(self, settings: Settings, *topics: str, most_wait_ms: int = 500) -> None:
        """most_wait_ms: how old the broker's word on where a topic ends may be."""
        self._settings = settings
        self._topics = topics
        self._most_wait_ms = most_wait_ms
        self._failures = 0
        self._at: dict[TopicPartition, int] = {}  # behind the last record handed out
        self.partitions: list[TopicPartition] = []

    async def open(self) -> None:
        """Take every partition, at its beginning; may be tried again after an error.

        Raises Stop where a topic is missing, KafkaError.
        """
        self._consumer = AIOKafkaConsumer(
            **client_settings(self._settings), enable_auto_commit=False,
            auto_offset_reset="earliest", isolation_level="read_committed",
            max_poll_records=_MOST_RECORDS, max_partition_fetch_bytes=_FETCH_BYTES,
            fetch_max_wait_ms=self._most_wait_ms,
        )  # fmt: skip
        try:
            await self._open()
        except BaseException:
            await self.close()
            raise

    async def _open(self) -> None:
        await self._consumer.start()
        cluster = await self._cluster()
        self.partitions = []
        for topic in self._topics:
            numbers = cluster.partitions_for_topic(topic)
            if not numbers:
                raise Stop(f"topic {topic} is missing: create the topics with `tidegate topics`")
            self.partitions += [TopicPartition(topic, number) for number in sorted(numbers)]
        self._consumer.assign(self.partitions)
        self.seek(await self.begins())

    async def _cluster(self) -> Any:
        try:  # asking by name may create
            return await self._consumer._client.fetch_all_metadata()  # noqa: SLF001
        except KafkaError as error:
            if type(error) is not KafkaError:
                raise
            raise KafkaConnectionError(str(error)) from error  # aiokafka's word for: none answers

    async def close(self, bound_s: float = 2.0) -> None:
        """Let go; a client that hangs is left behind."""
        if hasattr(self, "_consumer"):
            await finish(self._consumer.stop(), bound_s)

    def of(self, topic: str) -> list[TopicPartition]:
        """The partitions of one of the topics."""
        return [partition for partition in self.partitions if partition.topic == topic]

    async def begins(self) -> dict[TopicPartition, int]:
        """The first offset that each partition still has."""
        return dict(await self._consumer.beginning_offsets(self.partitions))

    async def ends(self) -> dict[TopicPartition, int]:
        """Where each partition ends now, open transactions left out."""
        return dict(await self._consumer.end_offsets(self.partitions))

    def seek(self, offsets: Mapping[TopicPartition, int]) -> None:
        """Go on from there."""
        self._at.update(offsets)
        for partition, offset in offsets.items():
            self._consumer.seek(partition, offset)

    async def seek_to_time(self, at_ms: int) -> None:
        """Go on with the first records whose timestamp is not before that."""
        ends = await self.ends()
        found = await self._consumer.offsets_for_times(dict.fromkeys(self.partitions, at_ms))
        self.seek({it: hit.offset if hit else ends[it] for it, hit in found.items()})

    async def positions(self) -> dict[TopicPartition, int]:
        """The next offset of each; every record below was handed out, or is none."""
        return {it: await self._consumer.position(it) for it in self.partitions}

    async def at_end(self) -> dict[int, int]:
        """Partitions that are read to their end: number, and when the broker said so (ms)."""
        found = {}
        for it in self.partitions:
            end: int | None = self._consumer.last_stable_offset(it)
            polled_ms = self._consumer.last_poll_timestamp(it)
            if end is not None and polled_ms and await self._consumer.position(it) >= end:
                found[it.partition] = polled_ms
        return found

    def pause(self, paused: Iterable[TopicPartition]) -> None:
        """Read on from all partitions but these."""
        paused = set(paused)
        before = self._consumer.paused()
        self._consumer.pause(*(paused - before))
        self._consumer.resume(*(before - paused))

    async def poll(self, most_wait_ms: int = _WAIT_MS) -> list[Any]:
        """What has come, a partition's records in order; empty after a wait or an error.

        Raises Stop after too many errors in a row.
        """
        try:
            records = await self._consumer.getmany(timeout_ms=most_wait_ms)
        except KafkaError as error:
            self._failures += 1
            if self._failures > _MAX_FAILURES:
                raise Stop(f"reading {self._topics[0]} fails: {error!r}") from error
            log.warning("follow.failed", error=type(error).__name__, topics=self._topics)
            self.seek(self._at)  # what the failed call had drained would be lost
            await asyncio.sleep(_RETRY_S)
            return []
        self._failures = 0
        self._at.update((it, batch[-1].offset + 1) for it, batch in records.items())
        return [record for batch in records.values() for record in batch]

    async def to_end(self, of: Iterable[TopicPartition] | None = None) -> AsyncIterator[list[Any]]:
        """What is there now, batch after batch, and then no more.

        of: the partitions that must be at their end; by default all. Positions tell, not records:
        transactions' markers have offsets too.
        """
        ends = await self.ends()
        wanted = set(self.partitions if of is None else of)
        while True:
            positions = await self.positions()
            if all(positions[it] >= ends[it] for it in wanted):
                return
            yield await self.poll()
