"""An operator's word on thresholds: what `tidegate thresholds` does.

A word takes the learner's producer for a moment, so that it and the learner cannot speak at once:
docs/learn.md. It goes to moderation.thresholds and, as history, into the ledger.
"""

import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec
import structlog
from rich.box import SIMPLE_HEAD
from rich.table import Table

from detectors.harms import DEFAULT_THRESHOLDS, THRESHOLD_KEYS
from worker.certify import in_force, shipped
from worker.decode import decode_threshold, threshold_key
from worker.errors import PartitionLost, Stop, Unreadable
from worker.events import ThresholdRecord
from worker.follow import Follower
from worker.ledger import Entry, Heard, Mark, Published
from worker.publish import Pen, Record
from worker.settings import Settings

log = structlog.get_logger()

_TRIES = 5  # a learner that takes the lead at the same moment fences us
_entries = msgspec.json.Decoder(Entry)
_encoder = msgspec.json.Encoder()

Word = Callable[[ThresholdRecord, int], ThresholdRecord]  # the last record, the ledger's clock


# -- words ----------------------------------------------------------------------------------------


def approve(current: ThresholdRecord, clock_ms: int) -> ThresholdRecord:
    """The proposed threshold, in force. Raises Stop where none is proposed."""
    _must_be_proposed(current)
    return msgspec.structs.replace(
        current, status="applied", since_ms=clock_ms, declined=None,
        reason=f"approved: {current.reason}",
    )  # fmt: skip


def reject(current: ThresholdRecord, clock_ms: int) -> ThresholdRecord:
    """What was in force stays, and the same threshold is not proposed again. Raises Stop."""
    del clock_ms  # the threshold in force does not change, so it is watched on
    _must_be_proposed(current)
    return msgspec.structs.replace(
        current, status="applied", threshold=current.previous, declined=current.threshold,
        reason=f"rejected: {current.reason}",
    )  # fmt: skip


def fix(value: float) -> Word:
    """The word that puts `value` in force, for every model, until `hand_back`."""
    if not 0.0 <= value <= 1.0:
        raise Stop(f"threshold {value}: must lie in 0..1")

    def word(current: ThresholdRecord, clock_ms: int) -> ThresholdRecord:
        return msgspec.structs.replace(
            current, status="applied", threshold=value, previous=in_force(current), model="",
            method="operator", since_ms=clock_ms, declined=None, labels_needed=None, alarm=False,
            reason="set by an operator",
        )  # fmt: skip

    return word


def hand_back(model: str) -> Word:
    """The word after which labels move it again; until they do, what is in force stays.

    model: that serves now; the next one starts from what it ships. Raises Stop where labels move
    it already.
    """

    def word(current: ThresholdRecord, clock_ms: int) -> ThresholdRecord:
        if current.method != "operator":
            raise Stop(f"{current.tenant}/{current.harm}: is not set by an operator, so it learns")
        return msgspec.structs.replace(
            current, method="learn", threshold=in_force(current), previous=in_force(current),
            status="applied", since_ms=clock_ms, model=model, reason="handed back by an operator",
        )  # fmt: skip

    return word


def _must_be_proposed(current: ThresholdRecord) -> None:
    if current.status != "proposed":
        raise Stop(
            f"{current.tenant}/{current.harm}: nothing is proposed; `tidegate thresholds list` "
            "shows what is"
        )


# -- Kafka ----------------------------------------------------------------------------------------


async def read_latest(settings: Settings) -> dict[tuple[str, str], ThresholdRecord]:
    """The last record of each tenant and harm."""
    found: dict[bytes | None, ThresholdRecord] = {}
    async for record in _whole(settings, settings.thresholds_topic):
        if record.value is None:  # deleted: workers have forgotten it, the topic not yet
            found.pop(record.key, None)
            continue
        try:
            found[record.key] = decode_threshold(record.key, record.value)
        except Unreadable as error:
            log.warning("threshold.unreadable", reason=error.reason, offset=record.offset)
    return {(it.tenant, it.harm): it for it in found.values()}


async def read_history(settings: Settings) -> list[ThresholdRecord]:
    """Every record that was ever published, oldest first."""
    return [
        entry.record
        async for record in _whole(settings, settings.evidence_topic)
        if isinstance(entry := _entries.decode(record.value), Published)
    ]


async def _whole(settings: Settings, topic: str) -> AsyncIterator[Any]:
    follower = Follower(settings, topic)
    await follower.open()
    try:
        async for records in follower.to_end():
            for record in records:
                yield record
    finally:
        await follower.close()


async def read_clock(settings: Settings) -> int:
    """The ledger's clock, from its last entry that tells; 0 where it is empty."""
    follower = Follower(settings, settings.evidence_topic)
    await follower.open()
    try:
        (at,) = follower.partitions
        begin, end = (await follower.begins())[at], (await follower.ends())[at]
        back, clock_ms = 64, 0
        while True:
            start = max(begin, end - back)
            follower.seek({at: start})
            async for records in follower.to_end():
                told = (_told_ms(_entries.decode(record.value)) for record in records)
                clock_ms = max(clock_ms, *told, 0)
            if clock_ms or start == begin:
                return clock_ms
            back *= 4
    finally:
        await follower.close()


def _told_ms(entry: Entry) -> int:
    if isinstance(entry, Mark):
        return entry.clock_ms
    return entry.at_ms if isinstance(entry, Heard) else 0


async def say(
    settings: Settings, tenant: str, harm: str, word: Word,
    started_with: Callable[[], Mapping[str, float]],
) -> ThresholdRecord:  # fmt: skip
    """Publish an operator's word on one threshold; the record. Raises Stop, KafkaError.

    started_with: the model's own thresholds, asked for where nothing is published yet.
    """
    _must_be_learnt(settings, tenant, harm)
    for tries in range(_TRIES):
        pen = Pen(settings)
        try:
            await pen.open()  # from here on nobody else publishes
            latest = await read_latest(settings)
            version = max((it.version for it in latest.values() if it.tenant == tenant), default=0)
            current = latest.get((tenant, harm))
            if current is None:
                start = {**DEFAULT_THRESHOLDS, **started_with()}[harm]
                current = shipped(tenant, harm, "", start, 0)
            now_ms = time.time_ns() // 1_000_000
            said = word(current, await read_clock(settings))
            said = msgspec.structs.replace(said, version=version + 1, ts_ms=now_ms)
            await pen.write(_records(settings, said))
        except PartitionLost:
            if tries == _TRIES - 1:
                raise Stop("a learner keeps taking over: try again in a moment") from None
        else:
            return said
        finally:
            await pen.close()
    raise AssertionError


def _must_be_learnt(settings: Settings, tenant: str, harm: str) -> None:
    if harm not in THRESHOLD_KEYS:
        raise Stop(f"unknown harm {harm!r}; there are: {', '.join(THRESHOLD_KEYS)}")
    if harm in settings.tenant(tenant).thresholds:
        raise Stop(
            f"{tenant}/{harm}: the settings fix it, so no record would count; remove it from "
            "`tenants.NAME.thresholds` of workers and learners first"
        )


def _records(settings: Settings, said: ThresholdRecord) -> Iterable[tuple[str, int | None, Record]]:
    key = threshold_key(said.tenant, said.harm)
    return (
        (settings.thresholds_topic, None, Record(key, _encoder.encode(said))),
        (settings.evidence_topic, 0, Record(None, _encoder.encode(Published(said)))),
    )


# -- tables ---------------------------------------------------------------------------------------


def table(records: Sequence[ThresholdRecord], title: str) -> Table:
    """One row a record; 80 characters hold it."""
    made = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    made.add_column("threshold", overflow="fold")
    for name in ("in force", "proposed"):
        made.add_column(name, justify="right", no_wrap=True)
    for name in ("version", "method"):
        made.add_column(name, no_wrap=True)
    for name in ("labels", "needed"):
        made.add_column(name, justify="right", no_wrap=True)
    for it in records:
        proposed = f"{it.threshold:.2f}" if it.status == "proposed" else ""
        needed = "" if it.labels_needed is None else str(it.labels_needed)
        made.add_row(
            f"{it.tenant} {it.harm}", f"{in_force(it):.2f}", proposed, str(it.version), it.method,
            str(it.labels), needed,
        )  # fmt: skip
    return made


def reasons(records: Sequence[ThresholdRecord]) -> Table:
    """When and why, and what is missed with it (recall, its interval), a row a record."""
    made = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("at (UTC)", "threshold", "why"):
        made.add_column(name, overflow="fold")
    made.add_column("recall", no_wrap=True)
    for it in records:
        at = datetime.fromtimestamp(it.ts_ms / 1e3, UTC).strftime("%Y-%m-%d %H:%M:%S")
        made.add_row(at, f"{it.tenant} {it.harm}", it.reason, _recall(it))
    return made


def _recall(record: ThresholdRecord) -> str:
    if record.recall is None:
        return ""
    low, high = record.recall_low or 0.0, 1.0 if record.recall_high is None else record.recall_high
    return f"{record.recall:.2f} ({low:.2f}..{high:.2f})"
