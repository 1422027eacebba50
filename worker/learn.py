"""Feedback -> thresholds: what `tidegate learn` does. The order of things is in docs/learn.md.

Learner     a member of the group of learners; at most one of them leads
Term        one time of leading: fence, read back, then read, take, test, publish
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any, Self

import msgspec
import structlog
from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition
from aiokafka.coordinator.assignors.sticky.sticky_assignor import StickyPartitionAssignor
from aiokafka.errors import KafkaError

from worker import metrics
from worker.decode import decode_threshold, threshold_key
from worker.errors import PartitionLost, Stop, Unreadable
from worker.events import Verdict
from worker.feedback import Judged
from worker.follow import Follower, mends, reach
from worker.ledger import Entry, Ledger, Output
from worker.merge import Merge
from worker.publish import Pen, Record, client_settings, finish, letter_record
from worker.settings import Settings

log = structlog.get_logger()

_AT_ONCE = 2_000  # labels of one transaction
_TURN = 100  # labels, then the other tasks have a turn
_MOST_WAITING = 2_000  # labels of a partition that wait for their turn; more pause it
_LABELS_WAIT_MS = 100
_TICK_S = 0.05
_MAX_FAILURES = 20  # in a row, that waiting will not mend
_LEAVE = 0.2  # of shutdown_timeout_ms
_entries = msgspec.json.Decoder(Entry)
_encoder = msgspec.json.Encoder()


class _Seen(msgspec.Struct, frozen=True):
    """What is read of a decision or a review item: no text."""

    decision_id: str
    stream_id: str
    tenant: str
    model: str
    stage: str
    verdict: Verdict
    harm: str | None
    scores: dict[str, float]
    harmful: float | None
    ts_ms: int
    picked_with: float | None = None
    least: float | None = None

    @property
    def judged(self) -> Judged:
        """What a label is held against."""
        return Judged(
            self.decision_id, self.stream_id, self.tenant, self.model, self.stage, self.harm,
            self.scores, self.harmful, self.ts_ms, self.picked_with, self.least,
        )  # fmt: skip


_seen = msgspec.json.Decoder(_Seen)


class Learner(ConsumerRebalanceListener):
    """Runs until `stop`, leading whenever the group says so."""

    def __init__(self, settings: Settings, shipped: Mapping[str, float], model: str) -> None:
        """shipped, model: thresholds and name of the detectors that the workers run."""
        self._settings = settings
        self._shipped = shipped
        self._model = model
        self._leads = asyncio.Event()
        self._rests = asyncio.Event()  # no term is under way
        self._rests.set()
        self._stopping = asyncio.Event()
        self._failures = 0
        self.beat = time.monotonic()  # the watchdog's proof that the event loop turns

    def stop(self) -> None:
        """Ask for an orderly end."""
        self._stopping.set()

    def _beats(self) -> None:
        self.beat = time.monotonic()

    async def run(self) -> None:
        """Learn until `stop`. Raises Stop, and whatever a step could not handle."""
        settings = self._settings
        rebalance_ms = settings.session_timeout_ms * 3 // 2
        request_ms = max(settings.request_timeout_ms, rebalance_ms + 5_000)
        self._group = AIOKafkaConsumer(
            **(client_settings(settings) | {"request_timeout_ms": request_ms}),
            group_id=f"{settings.group_id}-learn",
            group_instance_id=settings.group_instance_id, enable_auto_commit=False,
            auto_offset_reset="latest", session_timeout_ms=settings.session_timeout_ms,
            heartbeat_interval_ms=settings.heartbeat_interval_ms,
            max_poll_interval_ms=settings.max_poll_interval_ms, rebalance_timeout_ms=rebalance_ms,
            partition_assignment_strategy=(StickyPartitionAssignor,),
        )  # fmt: skip
        try:
            async with asyncio.TaskGroup() as tasks:
                steps = [tasks.create_task(it) for it in (self._attend(), self._serve())]
                await self._stopping.wait()
                self._leads.clear()
                await self._rest(settings.shutdown_timeout_ms * 1e-3 * (1 - 2 * _LEAVE))
                for step in steps:
                    step.cancel()
        finally:
            await finish(self._group.stop(), settings.shutdown_timeout_ms * 1e-3 * _LEAVE)

    # -- who leads ----------------------------------------------------------------------------

    async def _attend(self) -> None:
        """Be a member of the group. Nothing is read through it; polling proves that we live."""
        await reach(self._settings, self._check_topics, self._beats)
        self._group.subscribe([self._settings.thresholds_topic], listener=self)
        await reach(self._settings, self._group.start, self._beats)
        while True:
            self.beat = time.monotonic()
            try:
                await self._group.getmany(timeout_ms=200)
            except KafkaError as error:  # whether we are still a member shows in our transactions
                log.warning("group.failed", error=type(error).__name__)
            await asyncio.sleep(_TICK_S)

    async def _check_topics(self) -> None:
        """Raises Stop where one is missing."""
        names = self._settings
        probe = Follower(
            names, names.thresholds_topic, names.evidence_topic, names.feedback_topic,
            names.review_topic, names.decisions_topic, names.dead_letters_topic,
        )  # fmt: skip
        await probe.open()
        await probe.close()

    async def on_partitions_revoked(self, _: Iterable[TopicPartition]) -> None:
        """Somebody joins or leaves: end the term; perhaps to begin another one."""
        self._leads.clear()
        await self._rest(self._settings.session_timeout_ms * 0.5e-3)

    def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        """Whoever has partition 0 leads."""
        assigned = set(assigned)
        self._group.pause(*assigned)
        if any(it.partition == 0 for it in assigned) and not self._stopping.is_set():
            self._leads.set()
        log.info("learner.assigned", leads=self._leads.is_set())

    async def _rest(self, bound_s: float) -> None:
        try:
            async with asyncio.timeout(bound_s):
                await self._rests.wait()
        except TimeoutError:
            log.warning("learner.hangs")

    async def _serve(self) -> None:
        """Term after term, for as long as we lead."""
        while True:
            await self._leads.wait()
            self._rests.clear()
            try:
                term = Term(self._settings, Ledger(self._settings, self._shipped, self._model))
                async with term:
                    await term.run(self._leads.is_set)
                    self._failures = 0
            except (KafkaError, PartitionLost, TimeoutError, AssertionError, OSError) as error:
                # aiokafka asserts on a producer that has failed
                await self._lost(error)
            finally:
                self._rests.set()

    async def _lost(self, error: Exception) -> None:
        """One that was fenced waits until the group has had time to say whether it still leads."""
        fenced = isinstance(error, PartitionLost)
        self._failures += 1
        log.warning("learner.lost", cause="fenced" if fenced else type(error).__name__)
        if self._failures > _MAX_FAILURES and not mends(error):
            raise Stop(f"{self._failures} failures in a row, last: {error!r}")
        self._rests.set()
        wait_s = self._settings.session_timeout_ms / 1e3 if fenced else 0.1 * self._failures
        await asyncio.sleep(min(wait_s, 10.0))


class Term:
    """One time of leading. Use as an async context manager, then `run`."""

    def __init__(self, settings: Settings, ledger: Ledger) -> None:
        self._settings = settings
        self._ledger = ledger
        self._pen = Pen(settings)
        self._labels = Follower(settings, settings.feedback_topic, most_wait_ms=_LABELS_WAIT_MS)
        self._decisions = Follower(settings, settings.review_topic, settings.decisions_topic)
        self._exit = AsyncExitStack()
        self._registered: dict[TopicPartition, int] = {}  # read up to here

    # -- taking the lead ----------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        """Fence, read back what was done, and the decisions that labels may be about."""
        try:
            await self._open()
        except BaseException:
            await self._exit.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        await self._exit.aclose()

    async def _open(self) -> None:
        start = time.monotonic()
        self._exit.push_async_callback(self._pen.close)
        await self._pen.open()
        labels = await self._read_ledger()
        await self._read_thresholds()
        for follower in (self._decisions, self._labels):
            self._exit.push_async_callback(follower.close)
            await follower.open()
        await self._find_labels()
        await self._find_decisions()
        latest = {it: place.at_ms for it, place in self._ledger.feedback.items()}
        self._merge = Merge(len(self._labels.partitions), latest)
        log.info(
            "learner.leads", labels=labels, picked=len(self._ledger.picked),
            blocked=len(self._ledger.blocked), seconds=round(time.monotonic() - start, 2),
        )  # fmt: skip

    async def _read_ledger(self) -> int:
        count = 0
        async for record in self._whole(self._settings.evidence_topic):
            try:
                self._ledger.replay(_entries.decode(record.value))
            except msgspec.DecodeError as error:
                raise Stop(f"{self._settings.evidence_topic}, {record.offset}: {error}") from None
            count += 1
        self._ledger.replayed()
        return count

    async def _read_thresholds(self) -> None:
        async for record in self._whole(self._settings.thresholds_topic):
            try:
                found = decode_threshold(record.key, record.value or b"")
            except Unreadable as error:
                log.warning("threshold.unreadable", reason=error.reason, offset=record.offset)
                continue
            if not self._ledger.is_known(found):
                log.warning("ledger.lacks", tenant=found.tenant, version=found.version)

    async def _whole(self, topic: str) -> AsyncIterator[Any]:
        follower = Follower(self._settings, topic)
        await follower.open()
        try:
            async for records in follower.to_end():
                for record in records:
                    yield record
                await asyncio.sleep(0)
        finally:
            await follower.close()

    async def _find_labels(self) -> None:
        places = self._ledger.feedback
        begins = await self._labels.begins()
        for it, begin in begins.items():
            if it.partition in places:
                begins[it] = max(begin, places[it.partition].offset)
        self._labels.seek(begins)

    async def _find_decisions(self) -> None:
        """Read the latest of both kinds; decisions from where they were not counted, at least."""
        begins, ends = await self._decisions.begins(), await self._decisions.ends()
        share = self._settings.learn_register // max(1, len(begins) // 2) + 1
        starts = {}
        for it, begin in begins.items():
            back = ends[it] - 2 * share  # transactions' markers take offsets as well
            if it.topic == self._settings.decisions_topic:
                back = min(back, self._ledger.decisions.get(it.partition, back))
            starts[it] = max(begin, back)
        self._decisions.seek(starts)
        async for records in self._decisions.to_end():
            self._register(records)
            await asyncio.sleep(0)

    # -- leading ------------------------------------------------------------------------------

    async def run(self, leads: Callable[[], bool]) -> None:
        """Work while we lead; then publish what is done."""
        self._reading = asyncio.create_task(self._follow_decisions())
        self._exit.callback(self._reading.cancel)
        while leads():
            await self._step()
        await self._publish(self._ledger.take(drain=True))

    async def _follow_decisions(self) -> None:
        while True:
            self._register(await self._decisions.poll())
            self._registered = await self._decisions.positions()

    def _check(self) -> None:
        """Raise what has ended the reading of decisions."""
        if self._reading.done():
            self._reading.result()

    def _register(self, records: Iterable[Any]) -> None:
        for record in records:
            try:
                seen = _seen.decode(record.value)
            except (msgspec.DecodeError, UnicodeDecodeError, TypeError):
                log.warning("decision.unreadable", topic=record.topic, offset=record.offset)
                continue
            if record.topic == self._settings.review_topic:
                self._ledger.see_review(seen.judged)
            else:
                judged = seen.judged if seen.harm is not None else None
                self._ledger.see_decision(record.partition, record.offset, judged)

    async def _step(self) -> None:
        """Read labels, take those whose turn it is, test, publish."""
        self._check()
        records = await self._labels.poll()
        wall_ms = time.time_ns() // 1_000_000  # now, not before: what has just come is not early
        for record in records:
            self._merge.feed(
                record.partition, record.offset, record.timestamp, record.key, record.value,
                wall_ms,
            )  # fmt: skip
        self._labels.pause(
            it for it in self._labels.partitions
            if self._merge.waiting(it.partition) >= _MOST_WAITING
        )  # fmt: skip
        grace_ms = self._settings.learn_grace_ms
        quiet = {it: at - grace_ms for it, at in (await self._labels.at_end()).items()}
        horizon_ms = self._merge.horizon(quiet)
        if await self._take(horizon_ms) < _AT_ONCE:
            self._ledger.settle(horizon_ms)
        await self._publish(self._ledger.take())

    async def _take(self, horizon_ms: int) -> int:
        """Take labels up to the horizon, at most _AT_ONCE; how many."""
        count, caught_up = 0, False
        for raw in self._merge.ready(horizon_ms, _AT_ONCE):
            if not self._ledger.hear(raw, is_last_try=caught_up):
                await self._catch_up()
                caught_up = True  # it holds for all these labels: they were there before
                self._ledger.hear(raw, is_last_try=True)
            count += 1
            if count % _TURN == 0:
                await asyncio.sleep(0)
        metrics.LABELS.inc(count)
        return count

    async def _catch_up(self) -> None:
        """Return when every decision is registered that was there at the call."""
        ends = await self._decisions.ends()
        while any(self._registered.get(it, 0) < end for it, end in ends.items()):
            self._check()
            await asyncio.sleep(_TICK_S / 10)

    async def _publish(self, output: Output | None) -> None:
        if output is None:
            return
        letters = await self._pen.partitions_of(self._settings.dead_letters_topic)
        await self._pen.write(records_of(self._settings, output, letters))
        metrics.DEAD_LETTERS.inc(len(output.dead_letters))
        for record in output.thresholds:
            metrics.THRESHOLDS.labels("published").inc()
            log.info(
                "threshold.published", tenant=record.tenant, harm=record.harm,
                threshold=record.threshold, version=record.version, status=record.status,
                labels=record.labels,
            )  # fmt: skip


def records_of(
    settings: Settings, output: Output, letter_partitions: int
) -> Iterator[tuple[str, int | None, Record]]:
    """Everything that one transaction of the learner writes."""
    for entry in output.entries:
        yield settings.evidence_topic, 0, Record(None, _encoder.encode(entry))
    for threshold in output.thresholds:
        key = threshold_key(threshold.tenant, threshold.harm)
        yield settings.thresholds_topic, None, Record(key, _encoder.encode(threshold))
    for letter in output.dead_letters:
        partition = letter.partition % letter_partitions
        yield settings.dead_letters_topic, partition, letter_record(letter)
