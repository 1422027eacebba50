"""Kafka -> records -> the pipeline; partitions that come and go; pause, drain, stop.

Each owned partition has one task (`_own`): take it (fence, read back, load), then publish until it
is lost. Everything that can go wrong while publishing ends in taking the partition again.
"""

import asyncio
import itertools
import time
import uuid
from collections.abc import Awaitable, Coroutine, Iterable, Mapping
from typing import Any, TypeVar

import structlog
from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.coordinator.assignors.sticky.sticky_assignor import StickyPartitionAssignor
from aiokafka.errors import GroupCoordinatorNotAvailableError, KafkaError

from worker import metrics
from worker.errors import PartitionLost, Stop
from worker.follow import mends, reach
from worker.pipeline import Pipeline
from worker.publish import (
    AtLeastOnceOutlet,
    Mark,
    Outlet,
    TransactionalOutlet,
    client_settings,
    finish,
)
from worker.settings import Settings
from worker.streams import Lane
from worker.updates import Updates

log = structlog.get_logger()
T = TypeVar("T")

_TICK_S = 0.1
_FEED_AT_ONCE = 250  # records, then the other tasks have a turn
_TAKE_TIMEOUT_S = 60.0  # to fence, read back and load; then again
_FRESH_S = 2.0  # an answer of the broker this old no longer proves that the log is read
_DELAYED, _MOST_PAUSE_S = 0.25, 0.5  # of the detectors' delay is spent between transactions
_HURRIED_S = 0.1  # detectors this far behind make round trips to the broker unimportant
_PREPARED = 1 / 3  # of transaction_timeout_ms; a transaction that waits longer is given up
_MAX_BACKLOG = 5_000  # decisions of a lane that wait for the broker
_MAX_FAILURES = 20  # in a row, of one partition or of polling, that waiting will not mend
_DRAIN, _LEAVE = 0.4, 0.2  # of shutdown_timeout_ms; closing the outlets takes up to 0.2 of it
_SETTLE_S = 2.0  # a new leader may not yet show all that is in the log


class Owned:
    """A partition that this worker holds, or is taking."""

    def __init__(self, partition: TopicPartition) -> None:
        self.partition = partition
        self.lane: Lane | None = None
        self.last_mark: Mark | None = None  # of the last transaction known to be committed
        self.reading = False  # records may be fed
        self.turn = 0  # of being taken; records fetched in an earlier one are not fed
        self.reached = 0  # every record below was fed, or is none: markers have offsets too
        self.taken = 0.0  # monotonic seconds
        self.prepared = 0.0  # monotonic seconds at which the next transaction was opened; 0: not
        self.wake = asyncio.Event()
        self.idle = asyncio.Event()  # no transaction is under way
        self.idle.set()
        self.task: asyncio.Task[None] | None = None
        self.failures = 0


class Worker(ConsumerRebalanceListener):
    """One member of the group: runs until `stop`, or until something cannot go on."""

    def __init__(self, settings: Settings, pipeline: Pipeline) -> None:
        self._settings = settings
        self._pipeline = pipeline
        pipeline.on_output = self._on_output
        self._writer = uuid.uuid4().hex[:12]
        self._owned: dict[TopicPartition, Owned] = {}
        self._by_lane: dict[int, Owned] = {}
        self._numbers = itertools.count(1)  # of transactions
        self._epoch = 0
        self._paused = False
        self._stopping = asyncio.Event()
        self._ticked = 0.0
        self.beat = time.monotonic()  # the watchdog's proof that the event loop turns

    # -- life ---------------------------------------------------------------------------------

    def stop(self) -> None:
        """Ask for an orderly end: drain, commit, leave."""
        self._stopping.set()

    async def run(self) -> None:
        """Work until `stop`. Raises Stop, and whatever a step could not handle."""
        settings = self._settings
        log.info("models.loaded", **self._pipeline.loaded)
        rebalance_ms = settings.session_timeout_ms * 3 // 2
        # Joining takes until the dead have lost their sessions. Who gives up before that leaves one
        # more dead member behind.
        request_ms = max(settings.request_timeout_ms, rebalance_ms + 5_000)
        self._consumer = AIOKafkaConsumer(
            **(client_settings(settings) | {"request_timeout_ms": request_ms}),
            group_id=settings.group_id, group_instance_id=settings.group_instance_id,
            enable_auto_commit=False,
            auto_offset_reset="earliest",  # the first offset of a new group is sought in _start_at
            isolation_level="read_committed", max_poll_records=settings.max_poll_records,
            fetch_min_bytes=settings.fetch_min_bytes,
            fetch_max_wait_ms=settings.fetch_max_wait_ms,
            session_timeout_ms=settings.session_timeout_ms,
            heartbeat_interval_ms=settings.heartbeat_interval_ms,
            max_poll_interval_ms=settings.max_poll_interval_ms,
            rebalance_timeout_ms=rebalance_ms,
            partition_assignment_strategy=(StickyPartitionAssignor,),
        )  # fmt: skip
        self._admin = AIOKafkaAdminClient(**client_settings(settings))
        self._updates = Updates(settings, self._pipeline.thresholds)
        try:
            async with asyncio.TaskGroup() as self._tasks:  # before the group assigns anything
                starting = self._tasks.create_task(self._start())
                stopping = self._tasks.create_task(self._stopping.wait())
                await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
                starting.cancel()  # joining a group may take longer than we may take to stop
                steps: list[asyncio.Task[None]] = []
                if not stopping.done():
                    steps = [self._tasks.create_task(it) for it in self._steps()]
                await stopping
                log.info("worker.draining")
                for step in steps[:1]:
                    step.cancel()
                await self._drain(list(self._owned), settings.shutdown_timeout_ms * _DRAIN * 1e-3)
                for step in steps[1:]:
                    step.cancel()
                self._release(list(self._owned))
        finally:
            await self._leave()

    def _steps(self) -> tuple[Coroutine[Any, Any, None], ...]:
        return self._poll(), self._tick(), self._updates.follow()

    async def _start(self) -> None:
        await reach(self._settings, self._admin.start, self._beats)
        await reach(self._settings, self._check_topics, self._beats)
        await reach(self._settings, self._updates.open, self._beats)  # before anything is judged
        self._consumer.subscribe([self._settings.outputs_topic], listener=self)
        await reach(self._settings, self._consumer.start, self._beats)

    def _beats(self) -> None:
        self.beat = time.monotonic()

    async def _leave(self) -> None:
        """Leave the group within the time that is left; aiokafka may hang here."""
        bound_s = self._settings.shutdown_timeout_ms * 1e-3
        if not await finish(self._consumer.stop(), bound_s * _LEAVE):
            log.warning("worker.left_behind", client="consumer")
        await self._updates.close(bound_s * _LEAVE / 4)
        if not await finish(self._admin.close(), bound_s * _LEAVE / 4):
            log.warning("worker.left_behind", client="admin")

    async def _check_topics(self) -> None:
        """Co-partitioning is what gateways and recovery rest on: refuse to run without."""
        counts: dict[str, int] = {}
        topics = (
            self._settings.outputs_topic, self._settings.decisions_topic,
            self._settings.streams_topic, self._settings.dead_letters_topic,
            self._settings.review_topic, self._settings.thresholds_topic,
        )  # fmt: skip
        for described in await self._admin.describe_topics(list(topics)):
            if not described["error_code"]:
                counts[described["topic"]] = len(described["partitions"])
        missing = [topic for topic in topics if not counts.get(topic)]
        if missing:
            raise Stop(f"topic {missing[0]} is missing: create the topics with `tidegate topics`")
        for topic in topics[1:3]:
            if counts[topic] != counts[topics[0]]:
                raise Stop(
                    f"{topic} has {counts[topic]} partitions, {topics[0]} has {counts[topics[0]]}: "
                    "they must be equal; `tidegate topics` says how to mend it"
                )
        self._pipeline.review(counts[topics[0]])

    # -- records in ---------------------------------------------------------------------------

    async def _poll(self) -> None:
        """Read and feed for ever. Polling never waits for judging: back-pressure pauses."""
        failures = 0
        while True:
            self._press_back()
            self._note_reached()
            try:
                records = await self._consumer.getmany(timeout_ms=200)
            except KafkaError as error:
                failures += 1
                if failures > _MAX_FAILURES:
                    raise Stop(f"polling fails: {error!r}") from error
                log.warning("poll.failed", error=type(error).__name__)
                self._seek_back()  # what the failed call had drained would be lost
                await asyncio.sleep(0.2)
                continue
            failures = 0
            # Nothing was awaited since aiokafka handed these out: they belong to these turns.
            turns = [(owned, owned.turn) for owned in map(self._owned.get, records) if owned]
            for owned, turn in turns:
                await self._feed(owned, turn, records[owned.partition])

    async def _feed(self, owned: Owned, turn: int, batch: list[Any]) -> None:
        for begin in range(0, len(batch), _FEED_AT_ONCE):
            if self._owned.get(owned.partition) is not owned or owned.turn != turn:
                return  # taken again meanwhile: `_take` has sought to where it goes on
            if owned.lane is None or not owned.reading:
                return  # `_take` will seek before it lets records in
            lane, now, wall_ms = owned.lane, time.monotonic(), _wall_ms()
            segments = []
            chunk = batch[begin : begin + _FEED_AT_ONCE]
            for record in chunk:
                if record.offset >= lane.position:
                    segments += lane.feed(
                        record.offset, record.timestamp, record.key, record.value, now, wall_ms
                    )
            metrics.DELTAS.inc(len(chunk))
            self._pipeline.submit(lane, segments)
            if not owned.prepared:
                owned.wake.set()
            await asyncio.sleep(0)

    def _press_back(self) -> None:
        """Pause reading while too much waits for the detectors or for the broker."""
        most = self._settings.max_waiting_segments
        waiting = self._pipeline.waiting
        backlog = max((o.lane.backlog for o in self._owned.values() if o.lane), default=0)
        if not self._paused and (waiting > most or backlog > _MAX_BACKLOG):
            self._paused = True
            self._consumer.pause(*self._readable())
        elif self._paused and waiting <= most / 2 and backlog <= _MAX_BACKLOG / 2:
            self._paused = False
            self._consumer.resume(*self._readable())

    def _note_reached(self) -> None:
        """Everything that was handed out is fed: what aiokafka calls its position is reached."""
        for partition in self._readable():
            state = self._consumer._subscription.subscription.assignment.state_value(partition)  # noqa: SLF001
            if state.has_valid_position:
                self._owned[partition].reached = state.position

    def _readable(self) -> list[TopicPartition]:
        mine = self._consumer.assignment()
        return [p for p, owned in self._owned.items() if owned.reading and p in mine]

    def _seek_back(self) -> None:
        for partition in self._readable():
            owned = self._owned[partition]
            if owned.lane is not None:
                self._consumer.seek(partition, owned.lane.position)

    # -- time ---------------------------------------------------------------------------------

    async def _tick(self) -> None:
        while True:
            now = time.monotonic()
            late = now - self._ticked > 1.0  # this process was stopped: what it knows is old
            self._ticked = self.beat = now
            for owned in list(self._owned.values()):
                lane = owned.lane
                if lane is None or not owned.reading:
                    continue
                caught_up = not late and self._caught_up(owned, lane, now)
                self._pipeline.submit(lane, lane.tick(now, _wall_ms(), caught_up))
                if lane.due:
                    owned.wake.set()
            metrics.WAITING.set(self._pipeline.waiting)
            metrics.PAUSED.set(self._paused)
            metrics.OPEN_STREAMS.set(
                sum(o.lane.open_streams for o in self._owned.values() if o.lane)
            )
            self._pipeline.check()
            await asyncio.sleep(_TICK_S)

    def _caught_up(self, owned: Owned, lane: Lane, now: float) -> bool:
        """Whether the broker has said just now that nothing is unread."""
        partition = owned.partition
        if self._paused or now - owned.taken < _SETTLE_S:
            return False
        if partition not in self._consumer.assignment():
            return False
        end: int | None = self._consumer.last_stable_offset(partition)
        polled_ms = self._consumer.last_poll_timestamp(partition)
        if end is None or not polled_ms or _wall_ms() - polled_ms > _FRESH_S * 1e3:
            return False
        # An end before our position is a new leader's that does not know better yet. The log may
        # end in transactions' markers: then what is reached is past the lane's position.
        return lane.position <= end <= max(lane.position, owned.reached)

    # -- partitions that come and go ----------------------------------------------------------

    async def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> None:
        """Before a rebalance every partition is revoked, most of them to come back."""
        await self._drain(list(revoked), self._settings.session_timeout_ms * 0.5e-3)
        for partition in revoked:
            owned = self._owned.get(partition)
            if owned is not None:
                owned.reading = False

    def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        """Only pause and start tasks here: nothing heartbeats meanwhile."""
        assigned = set(assigned)
        self._consumer.pause(*assigned)
        self._release([partition for partition in self._owned if partition not in assigned])
        for partition in assigned:
            kept = self._owned.get(partition)
            if kept is not None and kept.task is not None:
                kept.task.cancel()
            owned = Owned(partition)
            if kept is not None:
                owned.lane, owned.last_mark = kept.lane, kept.last_mark
            self._owned[partition] = owned
            owned.task = self._tasks.create_task(self._own(owned))
        log.info("partitions.assigned", partitions=sorted(p.partition for p in assigned))

    def _release(self, partitions: Iterable[TopicPartition]) -> None:
        for partition in partitions:
            owned = self._owned.pop(partition)
            self._drop_lane(owned)
            if owned.task is not None:
                owned.task.cancel()

    def _drop_lane(self, owned: Owned) -> None:
        owned.reading = False
        if owned.lane is not None:
            self._by_lane.pop(id(owned.lane), None)
            owned.lane.drop()
        owned.lane = owned.last_mark = None

    async def _drain(self, partitions: Iterable[TopicPartition], bound_s: float) -> None:
        """Stop reading; publish what is being judged, within the bound."""
        owned = [it for p in partitions if (it := self._owned.get(p)) is not None and it.reading]
        for it in owned:
            it.reading = False
        deadline = time.monotonic() + bound_s
        while time.monotonic() < deadline:
            lanes = [it for it in owned if it.lane is not None]
            if not any(it.lane and (it.lane.judging or it.lane.due) for it in lanes) and all(
                it.idle.is_set() for it in lanes
            ):
                return
            for it in lanes:
                it.wake.set()
            await asyncio.sleep(0.01)
        log.warning("drain.incomplete", partitions=len(owned))

    async def _own(self, owned: Owned) -> None:
        """Take the partition and publish for it; again and again, until it moves away."""
        while True:
            outlet = self._outlet(owned.partition)
            try:
                async with asyncio.timeout(_TAKE_TIMEOUT_S):
                    await self._take(owned, outlet)
                await self._publish(owned, outlet)
            except Stop:
                raise
            except (KafkaError, PartitionLost, TimeoutError, AssertionError, OSError) as error:
                # aiokafka asserts on a producer that has failed
                await self._lost(owned, error)
            finally:
                await asyncio.shield(outlet.close())

    async def _lost(self, owned: Owned, error: Exception) -> None:
        """Drop the lane. One that was fenced is not taken again before the group has had time to
        say whose it is: a worker that lost its partition must not throw out the new owner."""
        fenced = isinstance(error, PartitionLost)
        self._drop_lane(owned)
        owned.failures += 1
        cause = "fenced" if fenced else type(error).__name__
        metrics.LANES_LOST.labels(cause).inc()
        log.warning("lane.lost", partition=owned.partition.partition, cause=cause)
        if owned.failures > _MAX_FAILURES and not mends(error):
            raise Stop(f"{owned.partition}: {owned.failures} failures in a row, last: {error!r}")
        if not fenced:
            await asyncio.sleep(min(0.1 * owned.failures, 2.0))
            return
        await asyncio.sleep(self._settings.session_timeout_ms / 1e3)
        while self._consumer._subscription.reassignment_in_progress:  # noqa: ASYNC110, SLF001 - no event
            await asyncio.sleep(_TICK_S)

    def _outlet(self, partition: TopicPartition) -> Outlet:
        if self._settings.delivery == "at_least_once":
            return AtLeastOnceOutlet(self._settings, partition, self._consumer)
        return TransactionalOutlet(self._settings, partition)

    async def _take(self, owned: Owned, outlet: Outlet) -> None:
        """Fence, then read back what is committed, then let records in. In this order."""
        await outlet.open()
        committed, mark = await self._committed(owned.partition)
        if owned.lane is None or mark is None or mark != owned.last_mark:
            self._drop_lane(owned)
            await self._load(owned, committed, mark)
        lane = owned.lane
        if lane is None or self._owned.get(owned.partition) is not owned:
            raise asyncio.CancelledError
        self._by_lane[id(lane)] = owned
        self._consumer.seek(owned.partition, lane.position)
        owned.turn += 1
        owned.reached, owned.taken = lane.position, time.monotonic()
        owned.reading = True
        if not self._paused:
            self._consumer.resume(owned.partition)
        owned.wake.set()

    async def _load(self, owned: Owned, committed: int | None, mark: Mark | None) -> None:
        partition = owned.partition
        journal_tp = TopicPartition(self._settings.streams_topic, partition.partition)
        end = (await self._consumer.end_offsets([journal_tp]))[journal_tp]
        begin = mark.journal_from if mark else 0
        if committed is None:  # a new group has decided nothing, whatever another one journalled
            committed, begin = await self._start_at(partition), end
        journal = await self._read_journal(journal_tp, begin, end) if begin < end else {}
        self._epoch += 1
        lane = self._pipeline.lane(partition.topic, partition.partition, self._epoch)
        owned.lane = lane
        buried_to = mark.buried_to if mark else 0
        segments = lane.load(committed, journal, time.monotonic(), buried_to, end)
        self._by_lane[id(lane)] = owned
        self._pipeline.submit(lane, segments)
        log.info(
            "lane.loaded", partition=partition.partition, offset=committed, journal=len(journal),
            open_segments=len(segments),
        )  # fmt: skip

    async def _committed(self, partition: TopicPartition) -> tuple[int | None, Mark | None]:
        """The group's offset and our mark on it; (None, None) in a new group."""
        found = await self._admin.list_consumer_group_offsets(
            self._settings.group_id, partitions=[partition]
        )
        if partition not in found:  # the coordinator was moving: not the same as "no offset"
            raise GroupCoordinatorNotAvailableError(f"{partition}: no offsets just now")
        offset, metadata = found[partition]
        return (None, None) if offset < 0 else (offset, Mark.decode(metadata))

    async def _start_at(self, partition: TopicPartition) -> int:
        if self._settings.auto_offset_reset == "latest":
            ends: Mapping[TopicPartition, int] = await self._consumer.end_offsets([partition])
            return ends[partition]
        begins: Mapping[TopicPartition, int] = await self._consumer.beginning_offsets([partition])
        return begins[partition]

    async def _read_journal(
        self, partition: TopicPartition, begin: int, end: int
    ) -> dict[str, tuple[int, bytes]]:
        """The latest record of each stream from `begin` up to `end`."""
        reader = AIOKafkaConsumer(
            **client_settings(self._settings), enable_auto_commit=False,
            auto_offset_reset="earliest", isolation_level="read_committed",
        )  # fmt: skip
        entries: dict[str, tuple[int, bytes]] = {}
        await reader.start()
        try:
            reader.assign([partition])
            first = (await reader.beginning_offsets([partition]))[partition]
            reader.seek(partition, max(first, begin))
            # Position, not the last record, tells the end: markers and holes have offsets too.
            while await reader.position(partition) < end:
                for record in (await reader.getmany(timeout_ms=500)).get(partition, ()):
                    stream_id = (record.key or b"").decode()
                    entries.pop(stream_id, None)
                    if record.value is not None:
                        entries[stream_id] = (record.offset, record.value)
        finally:
            async with asyncio.timeout(5):
                await reader.stop()
        return entries

    # -- decisions out ------------------------------------------------------------------------

    def _on_output(self, lane: Lane) -> None:
        owned = self._by_lane.get(id(lane))
        if owned is not None:
            owned.wake.set()

    async def _publish(self, owned: Owned, outlet: Outlet) -> None:
        """One transaction after the other, with a pause between; never an empty one."""
        owned.prepared = 0.0
        while True:
            if not await self._woken(owned):
                await self._within(outlet.rest())
                owned.prepared = 0.0
                continue
            lane = owned.lane
            if lane is None:
                raise PartitionLost(f"{owned.partition}: dropped")
            output = lane.take(time.monotonic(), drain=not owned.reading)
            if output is None:
                await self._prepare(owned, lane, outlet)
                continue
            mark = Mark(self._writer, next(self._numbers), output.journal_from, output.buried_to)
            start = time.monotonic()
            owned.idle.clear()
            owned.last_mark = None  # unless this succeeds, the lane is ahead of what is committed
            try:
                journal = await self._within(outlet.publish(output, mark))
            finally:
                owned.idle.set()
            lane.done(output, journal)
            owned.last_mark, owned.failures, owned.prepared = mark, 0, 0.0
            metrics.PUBLISH_SECONDS.observe(time.monotonic() - start)
            metrics.DEAD_LETTERS.inc(len(output.dead_letters))
            metrics.REVIEWS.inc(len(output.reviews))
            for decision in output.decisions:
                metrics.DECISIONS.labels(decision.verdict).inc()
                metrics.DECISION_SECONDS.observe(decision.timing_ms.total / 1e3)
            await asyncio.sleep(self._pause_s())
            owned.wake.set()

    def _pause_s(self) -> float:
        """Between two transactions of a lane. Where text waits for the detectors longer than that,
        more decisions a transaction leave them more of the cores."""
        delayed = min(self._pipeline.delay_s * _DELAYED, _MOST_PAUSE_S)
        return max(self._settings.transaction_interval_ms / 1e3, delayed)

    async def _woken(self, owned: Owned) -> bool:
        """Whether something happened, before a prepared transaction gets too old."""
        if not owned.prepared:
            await owned.wake.wait()
        else:
            most_s = self._settings.transaction_timeout_ms / 1e3 * _PREPARED
            left_s = owned.prepared + most_s - time.monotonic()
            try:
                async with asyncio.timeout(left_s):
                    await owned.wake.wait()
            except TimeoutError:
                return False
        owned.wake.clear()
        return True

    async def _prepare(self, owned: Owned, lane: Lane, outlet: Outlet) -> None:
        """Open the next transaction while streams are open: a decision will come."""
        if owned.prepared or not owned.reading or not lane.open_streams or not owned.last_mark:
            return
        if self._pipeline.delay_s > _HURRIED_S:
            return
        await self._within(outlet.prepare(lane.committed, owned.last_mark))
        owned.prepared = time.monotonic()

    async def _within(self, step: Awaitable[T]) -> T:
        """A step of a transaction; TimeoutError where the broker takes longer than it may."""
        async with asyncio.timeout(self._settings.transaction_timeout_ms / 1e3):
            return await step


def _wall_ms() -> int:
    return time.time_ns() // 1_000_000
