"""Decisions, review items, dead letters, journal -> topics, in one transaction with the offset.

An Outlet belongs to one lane. Opening it fences whatever published for the partition before.
"""

import asyncio
from collections.abc import Coroutine, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import msgspec
import orjson
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.errors import (
    ClusterAuthorizationFailedError,
    GroupAuthorizationFailedError,
    InvalidProducerEpoch,
    MessageSizeTooLargeError,
    ProducerFenced,
    RecordTooLargeError,
    TopicAuthorizationFailedError,
)
from aiokafka.structs import OffsetAndMetadata

from worker.errors import PartitionLost, Stop
from worker.events import DeadLetter, Decision
from worker.settings import Settings
from worker.streams import Output

_BATCH_BYTES = 1 << 20  # of one produce batch; a single larger record still goes
_STOP = 0.15  # of shutdown_timeout_ms, then a client that cannot reach its broker is left behind
_HOPELESS = (
    MessageSizeTooLargeError, RecordTooLargeError, TopicAuthorizationFailedError,
    GroupAuthorizationFailedError, ClusterAuthorizationFailedError,
)  # fmt: skip

_encoder = msgspec.json.Encoder()


class Record(NamedTuple):
    """What goes into one partition."""

    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes]] = ()

    def into(self, batch: Any) -> bool:
        """Whether there was room for it in the batch."""
        added = batch.append(
            timestamp=None, key=self.key, value=self.value, headers=list(self.headers)
        )
        return added is not None


class Mark(NamedTuple):
    """Metadata of a committed offset: who wrote it, and what a restart needs to know."""

    writer: str  # the lane's own token
    number: int  # of the writer's transaction
    journal_from: int  # lowest journal offset that still matters; 0: all of it
    buried_to: int  # dead letters of input offsets below are published

    def encode(self) -> str:
        """A few dozen bytes; brokers take 4 KiB."""
        return orjson.dumps(tuple(self)).decode()

    @classmethod
    def decode(cls, metadata: str | None) -> "Mark | None":
        """The mark, or None where somebody else committed."""
        try:
            writer, number, journal_from, buried_to = orjson.loads(metadata or "")
            return cls(str(writer), int(number), int(journal_from), int(buried_to))
        except (ValueError, TypeError):
            return None


class Outlet(Protocol):
    """Where a lane's outputs go."""

    async def open(self) -> None:
        """Make sure that nobody else publishes for the partition any more."""
        ...

    async def prepare(self, offset: int, mark: Mark) -> None:
        """Have everything under way that can be before there is something to publish.

        offset, mark: what is committed now. Errors as those of `publish`.
        """
        ...

    async def rest(self) -> None:
        """Undo `prepare`: nothing came for a while. Errors as those of `publish`."""
        ...

    async def publish(self, output: Output, mark: Mark) -> list[int]:
        """Publish all of it; the journal records' offsets. Raises PartitionLost, Stop, KafkaError.

        After any error the outcome may be unknown and the outlet must not be used again.
        """
        ...

    async def close(self) -> None:
        """Let go. Never raises."""
        ...


def client_settings(settings: Settings) -> dict[str, Any]:
    """What every Kafka client of this worker is opened with."""
    from aiokafka.helpers import create_ssl_context

    common: dict[str, Any] = {
        "bootstrap_servers": settings.bootstrap_servers,
        "security_protocol": settings.security_protocol,
        "request_timeout_ms": settings.request_timeout_ms,
        "client_id": "tidegate",
    }
    if settings.security_protocol.startswith("SASL"):
        password = settings.sasl_plain_password
        common |= {
            "sasl_mechanism": settings.sasl_mechanism,
            "sasl_plain_username": settings.sasl_plain_username,
            "sasl_plain_password": password.get_secret_value() if password else None,
        }
    if settings.security_protocol.endswith("SSL"):
        common["ssl_context"] = create_ssl_context(
            cafile=settings.ssl_cafile, certfile=settings.ssl_certfile, keyfile=settings.ssl_keyfile
        )
    return common


async def finish(closing: Coroutine[Any, Any, Any], bound_s: float) -> bool:
    """Whether it ended well within the bound. aiokafka's clients may hang while they close, where
    their broker is gone, or let a CancelledError of their own escape. Never raises."""
    task = asyncio.create_task(closing)
    await asyncio.wait({task}, timeout=bound_s)
    if task.done() and not task.cancelled() and task.exception() is None:
        return True
    task.cancel()
    return False


class _KafkaOutlet:
    """What both kinds of delivery share."""

    def __init__(self, settings: Settings, partition: TopicPartition) -> None:
        self._settings = settings
        self._partition = partition
        self._producer = AIOKafkaProducer(**client_settings(settings), **self._options())

    def _options(self) -> dict[str, Any]:
        return {
            "enable_idempotence": True,
            "acks": "all",
            "max_batch_size": _BATCH_BYTES,
            "max_request_size": 32 << 20,
            "retry_backoff_ms": self._settings.retry_backoff_ms,
        }

    async def open(self) -> None:
        """Start the producer; under transactions this fences the last owner."""
        await self._producer.start()

    async def close(self) -> None:
        """Stop the producer, or leave it behind where it hangs."""
        bound_s = self._settings.shutdown_timeout_ms * _STOP * 1e-3
        if not await finish(self._producer.stop(), bound_s):
            # stop() waits for the broker for ever; without connections nothing waits any more.
            await finish(self._producer.client.close(), bound_s / 4)
            await finish(self._producer._sender.close(), bound_s / 4)  # noqa: SLF001

    async def _send(self, output: Output) -> list[int]:
        """Produce everything and wait for every acknowledgement; the journal's offsets."""
        names = self._settings
        journal = (Record(i.encode(), record) for i, record in output.journal)
        sent = [
            await self._produce(names.decisions_topic, map(decision_record, output.decisions)),
            await self._produce(names.review_topic, map(decision_record, output.reviews)),
            await self._produce(names.dead_letters_topic, map(letter_record, output.dead_letters)),
            await self._produce(names.streams_topic, journal),
        ]
        # Every single one: a failed batch does not fail the commit by itself.
        acknowledged = [await asyncio.gather(*futures) for futures, _ in sent]
        firsts = [metadata.offset for metadata in acknowledged[-1]]
        return [
            first + i for first, size in zip(firsts, sent[-1][1], strict=True) for i in range(size)
        ]

    async def _produce(
        self, topic: str, records: Iterable[Record]
    ) -> tuple[list[asyncio.Future[Any]], list[int]]:
        """Queue records for the lane's partition number, in order; futures and sizes of batches."""
        futures: list[asyncio.Future[Any]] = []
        sizes: list[int] = []
        batch = None
        for record in records:
            if batch is None or not record.into(batch):
                if batch is not None:
                    sizes.append(batch.record_count())
                    futures.append(await self._queue(topic, batch))
                batch = self._producer.create_batch()
                if not record.into(batch):
                    raise Stop(f"{topic}: a record does not fit into an empty batch")
        if batch is not None:
            sizes.append(batch.record_count())
            futures.append(await self._queue(topic, batch))
        return futures, sizes

    async def _queue(self, topic: str, batch: Any) -> asyncio.Future[Any]:
        partition = self._partition.partition
        if topic in {self._settings.dead_letters_topic, self._settings.review_topic}:
            partition %= len(await self._producer.partitions_for(topic))
        batch.close()
        future: asyncio.Future[Any] = await self._producer.send_batch(
            batch, topic, partition=partition
        )
        return future


class TransactionalOutlet(_KafkaOutlet):
    """Exactly once: one transaction for everything, one producer for each input partition."""

    def _options(self) -> dict[str, Any]:
        name = f"{self._settings.group_id}-{self._partition.topic}-{self._partition.partition}"
        return super()._options() | {
            "transactional_id": name,
            "transaction_timeout_ms": self._settings.transaction_timeout_ms,
        }

    _open = False  # whether a transaction is

    async def prepare(self, offset: int, mark: Mark) -> None:
        """Open the next transaction: two or three of its five round trips are behind it then.

        Its partitions are registered, but nothing is written to them, so no reader waits for it;
        the offset that it names is the one that is committed already.
        """
        if self._open:
            return
        with _fates(self._partition):
            await self._begin()
            number = self._partition.partition
            for topic in (self._settings.decisions_topic, self._settings.streams_topic):
                self._producer._txn_manager.maybe_add_partition_to_txn(  # noqa: SLF001 - else only by sending
                    TopicPartition(topic, number)
                )
            await self._add_offset(offset, mark)

    async def rest(self) -> None:
        """Commit the empty transaction: left open, it would time out and fence its own producer."""
        if self._open:
            with _fates(self._partition):
                await self._commit()

    async def publish(self, output: Output, mark: Mark) -> list[int]:
        """One transaction. See Outlet."""
        with _fates(self._partition):
            if not self._open:
                await self._begin()
            journal, _ = await asyncio.gather(
                self._send(output), self._add_offset(output.offset, mark)
            )
            await self._commit()
        return journal

    async def close(self) -> None:
        """Abort what is open, so that the next owner need not wait for it; see Outlet."""
        if self._open:
            bound_s = self._settings.shutdown_timeout_ms * _STOP * 1e-3
            await finish(self._producer.abort_transaction(), bound_s / 2)
        await super().close()

    async def _begin(self) -> None:
        await self._producer.begin_transaction()
        self._open = True

    async def _commit(self) -> None:
        await self._producer.commit_transaction()
        self._open = False

    async def _add_offset(self, offset: int, mark: Mark) -> None:
        await self._producer.send_offsets_to_transaction(
            {self._partition: OffsetAndMetadata(offset, mark.encode())}, self._settings.group_id
        )


class Pen:
    """The one producer of thresholds and evidence. Whoever opens it last is the only one left."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._producer = AIOKafkaProducer(
            **client_settings(settings), enable_idempotence=True, acks="all",
            max_batch_size=_BATCH_BYTES, retry_backoff_ms=settings.retry_backoff_ms,
            transactional_id=f"{settings.group_id}-learn",
            transaction_timeout_ms=settings.transaction_timeout_ms,
        )  # fmt: skip

    async def open(self) -> None:
        """Fence every other one, and end or abort what it had begun."""
        await self._producer.start()

    async def write(self, records: Iterable[tuple[str, int | None, Record]]) -> None:
        """One transaction: topic, partition (None: by key), record. Errors as Outlet.publish."""
        with _fates("thresholds"):
            async with asyncio.timeout(self._settings.transaction_timeout_ms / 1e3):
                await self._producer.begin_transaction()
                sent = [await self._send(*record) for record in records]
                await asyncio.gather(*sent)  # a failed batch does not fail the commit by itself
                await self._producer.commit_transaction()

    async def _send(self, topic: str, partition: int | None, record: Record) -> asyncio.Future[Any]:
        if record.key is None and record.value is None:  # which `send` refuses
            batch = self._producer.create_batch()
            record.into(batch)
            batch.close()
            future: asyncio.Future[Any] = await self._producer.send_batch(
                batch, topic, partition=partition or 0
            )
        else:
            future = await self._producer.send(
                topic, key=record.key, value=record.value, headers=list(record.headers),
                partition=partition,
            )  # fmt: skip
        return future

    async def partitions_of(self, topic: str) -> int:
        """How many the topic has."""
        return len(await self._producer.partitions_for(topic))

    async def close(self) -> None:
        """Let go. Never raises."""
        await finish(self._producer.stop(), self._settings.shutdown_timeout_ms * _STOP * 1e-3)


@contextmanager
def _fates(what: object) -> Iterator[None]:
    """What a failed transaction means."""
    try:
        yield
    except (ProducerFenced, InvalidProducerEpoch) as error:
        raise PartitionLost(f"{what}: fenced") from error
    except _HOPELESS as error:
        raise Stop(f"{what}: cannot publish: {error!r}") from error


class AtLeastOnceOutlet(_KafkaOutlet):
    """For brokers without transactions: produce, then commit. A kill between repeats decisions."""

    def __init__(
        self, settings: Settings, partition: TopicPartition, consumer: AIOKafkaConsumer
    ) -> None:
        super().__init__(settings, partition)
        self._consumer = consumer

    async def prepare(self, offset: int, mark: Mark) -> None:
        """Nothing to prepare."""

    async def rest(self) -> None:
        """Nothing to undo."""

    async def publish(self, output: Output, mark: Mark) -> list[int]:
        """Produce, wait, commit. See Outlet."""
        try:
            journal = await self._send(output)
            await self._consumer.commit(
                {self._partition: OffsetAndMetadata(output.offset, mark.encode())}
            )
        except _HOPELESS as error:
            raise Stop(f"{self._partition}: cannot publish: {error!r}") from error
        return journal


def decision_record(decision: Decision) -> Record:
    """Key: the stream's id, so that the topic keeps the input's partitioning for everyone."""
    return Record(decision.stream_id.encode(), _encoder.encode(decision))


def letter_record(letter: DeadLetter) -> Record:
    """The record as it came, and in headers where from and why."""
    headers = (
        ("reason", letter.reason.encode()),
        ("field", letter.field.encode()),
        ("topic", letter.topic.encode()),
        ("partition", str(letter.partition).encode()),
        ("offset", str(letter.offset).encode()),
    )
    return Record(letter.key, letter.value, headers)
