"""The client for a gateway: tokens -> llm.outputs; decisions -> released text.

    async with Gate(settings) as gate:
        guarded = gate.guard(tokens, context=[("user", question)])
        async for piece in guarded:
            await websocket.send(piece)
        if guarded.verdict == "block":
            await websocket.send(f"[withheld: {guarded.decision.harm}]")

A gate pins its streams to a few partitions of its own choice: it produces to these numbers and
reads decisions from the same numbers, without a group, so that ten gateways read ten small shares
of the topic and not ten times all of it. It reads committed records only, from the end that each
partition had before the gate's first delta was sent, so no decision is missed.
"""

import asyncio
import json
import random
import uuid
from collections.abc import AsyncIterable, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from itertools import cycle
from types import TracebackType
from typing import Any, NamedTuple, Self

import msgspec
import orjson
import structlog
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.errors import KafkaError

from worker.errors import Stop
from worker.events import MAX_ID_CHARS, Channel, Decision
from worker.guarded import GateError, Guarded, Holding
from worker.publish import client_settings, finish
from worker.settings import Settings

log = structlog.get_logger()

_STOP_S = 2.0  # a client that cannot reach its broker is left behind after so long
_RETRY_S = 0.2
_CHANNELS = ("text", "tool", "thinking")
_decoder = msgspec.json.Decoder(Decision)

ContextTurn = tuple[str, str] | Mapping[str, str]  # (role, content), or {"role", "content"}


class _Head(NamedTuple):
    """What a stream's first delta carries beside its text."""

    stream_id: str
    context: list[dict[str, str]]
    tenant: str
    channel: Channel


class Gate:
    """Guards any number of streams at once. Use as an async context manager.

    partitions: how many to pin streams to (chosen at random, all where there are fewer), or their
    numbers. decision_timeout_s: a decision that is due and does not come within it ends the stream
    with GateTimeout. max_unreleased_chars: tokens are read no further ahead of what was taken out.
    apply_revisions: put a proposed revision in the place of its segment and go on; otherwise a
    revised stream ends where the segment starts. The settings about segments must be the worker's.
    Raises Stop on entering where the topics are not as they should be.
    """

    def __init__(
        self, settings: Settings, partitions: int | Sequence[int] = 2, *,
        decision_timeout_s: float | None = None, max_unreleased_chars: int = 4_000,
        linger_ms: float = 2.0, apply_revisions: bool = False,
    ) -> None:  # fmt: skip
        self._settings = settings
        self._wanted = partitions
        self._holding = Holding.of(
            settings, decision_timeout_s=decision_timeout_s, linger_ms=linger_ms,
            max_unreleased_chars=max_unreleased_chars, apply_revisions=apply_revisions,
        )  # fmt: skip
        self._pins: tuple[int, ...] = ()
        self._streams: dict[bytes, Guarded] = {}  # by the key of their decisions
        self._failed: Exception | None = None  # what ended the reading of decisions
        self._exit = AsyncExitStack()

    @property
    def partitions(self) -> tuple[int, ...]:
        """The partition numbers that this gate writes to and reads from."""
        return self._pins

    @property
    def open_streams(self) -> int:
        """Streams that are being guarded now."""
        return len(self._streams)

    def guard(
        self, tokens: AsyncIterable[str], *, context: str | Iterable[ContextTurn] = (),
        tenant: str = "default", channel: Channel = "text", stream_id: str | None = None,
        on_decision: Callable[[Decision], None] = lambda _: None,
    ) -> Guarded:  # fmt: skip
        """The released text of `tokens`, to be iterated once; then `.verdict` and `.decision`.

        context: the conversation before it, oldest turn first, or the user's question.
        stream_id: never used before; a random one by default.
        on_decision: called with each decision as it comes.
        Raises ValueError for what the worker could not read.
        """
        name = stream_id or uuid.uuid4().hex
        given: Iterable[ContextTurn] = context if not isinstance(context, str) else ()
        if isinstance(context, str) and context:
            given = [("user", context)]
        head = _Head(_checked(name), [_turn(turn) for turn in given], _checked(tenant), channel)
        if channel not in _CHANNELS:
            raise ValueError(f"channel: {channel!r} is none of {', '.join(_CHANNELS)}")
        key, partition = name.encode(), next(self._next_pin)

        async def send(seq: int, text: str, final: bool) -> None:
            value = _encode(head, seq, text, final)
            await self._producer.send_and_wait(
                self._settings.outputs_topic, value, key=key, partition=partition
            )

        def remember() -> None:
            if self._failed is not None:
                raise GateError(f"{name}: the gate reads no decisions any more") from self._failed
            if key in self._streams:
                raise GateError(f"{name}: a stream with this id is open; ids are used once")
            self._streams[key] = guarded

        def forget() -> None:
            if self._streams.get(key) is guarded:
                del self._streams[key]

        guarded = Guarded(tokens, send, name, self._holding, remember, forget, on_decision)
        return guarded

    # -- life ---------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:
            await self._exit.aclose()
            raise
        return self

    async def _start(self) -> None:
        common = client_settings(self._settings) | {"client_id": "tidegate-gate"}
        self._producer = AIOKafkaProducer(**common, enable_idempotence=True, acks="all")
        self._exit.push_async_callback(_stop, self._producer)
        await self._producer.start()
        self._pins = self._choose(await self._count_partitions())
        self._next_pin = cycle(self._pins)
        self._consumer = AIOKafkaConsumer(
            **common, group_id=None, enable_auto_commit=False, isolation_level="read_committed",
            auto_offset_reset="earliest",  # should the end be gone one day, miss nothing
        )  # fmt: skip
        self._exit.push_async_callback(_stop, self._consumer)
        await self._consumer.start()
        self._positions = await self._seek_to_end()
        reader = asyncio.create_task(self._read())
        self._exit.push_async_callback(_end, reader)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        for guarded in list(self._streams.values()):
            guarded.fail(GateError(f"{guarded.stream_id}: the gate was closed"))
        await asyncio.gather(*(guarded.aclose() for guarded in list(self._streams.values())))
        await self._exit.aclose()

    async def _count_partitions(self) -> int:
        """Of the outputs topic. Decisions come back on the same number: it must be there too."""
        counts = []
        for topic in (self._settings.outputs_topic, self._settings.decisions_topic):
            try:
                counts.append(len(await self._producer.partitions_for(topic)))
            except KafkaError as error:
                message = f"topic {topic}: {type(error).__name__}; `tidegate topics` creates topics"
                raise Stop(message) from error
        if counts[0] != counts[1]:
            raise Stop(
                f"{self._settings.decisions_topic} has {counts[1]} partitions, "
                f"{self._settings.outputs_topic} has {counts[0]}: they must be equal; "
                "`tidegate topics` says how to mend it"
            )
        return counts[0]

    def _choose(self, count: int) -> tuple[int, ...]:
        if isinstance(self._wanted, int):
            return tuple(sorted(random.sample(range(count), min(self._wanted, count))))
        unknown = [number for number in self._wanted if not 0 <= number < count]
        if unknown or not self._wanted:
            raise Stop(f"partitions {list(self._wanted)}: choose from 0 to {count - 1}")
        return tuple(dict.fromkeys(self._wanted))

    async def _seek_to_end(self) -> dict[TopicPartition, int]:
        """Assign the pins; where reading starts, which is settled before anything is sent."""
        pins = [TopicPartition(self._settings.decisions_topic, number) for number in self._pins]
        ends: dict[TopicPartition, int] = await self._consumer.end_offsets(pins)
        self._consumer.assign(pins)
        for pin, end in ends.items():  # no await since: no position but this was ever in force
            self._consumer.seek(pin, end)
        return ends

    # -- decisions in -------------------------------------------------------------------------

    async def _read(self) -> None:
        """Read decisions for ever; an error that is not the broker's ends every stream."""
        try:
            while True:
                try:
                    records = await self._consumer.getmany(timeout_ms=1_000)
                except KafkaError as error:
                    log.warning("gate.poll_failed", error=type(error).__name__)
                    for pin, position in self._positions.items():  # what it had drained is lost
                        self._consumer.seek(pin, position)
                    await asyncio.sleep(_RETRY_S)
                    continue
                for pin, batch in records.items():
                    self._positions[pin] = batch[-1].offset + 1
                    self._feed(batch)
        except Exception as error:  # noqa: BLE001 - every stream says so, and later ones too
            self._failed = error
            log.error("gate.failed", error=type(error).__name__)  # noqa: TRY400 - no text in logs
            for guarded in list(self._streams.values()):
                guarded.fail(GateError(f"{guarded.stream_id}: decisions cannot be read: {error!r}"))

    def _feed(self, batch: Iterable[Any]) -> None:
        for record in batch:
            guarded = self._streams.get(record.key)
            if guarded is None:
                continue  # of another gate on this partition, or ended
            try:
                guarded.feed(_decoder.decode(record.value))
            except msgspec.DecodeError as error:
                guarded.fail(GateError(f"{guarded.stream_id}: a decision is unreadable: {error}"))


async def _end(reader: "asyncio.Task[None]") -> None:
    reader.cancel()
    await asyncio.wait([reader])


async def _stop(client: Any) -> None:
    if not await finish(client.stop(), _STOP_S):
        log.warning("gate.left_behind", client=type(client).__name__)


def _checked(name: str) -> str:
    """An id as the worker takes it. Raises ValueError."""
    if not 1 <= len(name) <= MAX_ID_CHARS:
        raise ValueError(f"an id has 1 to {MAX_ID_CHARS} characters")
    name.encode()  # half a surrogate pair raises UnicodeEncodeError, a ValueError
    return name


def _turn(turn: ContextTurn) -> dict[str, str]:
    role, content = (turn["role"], turn["content"]) if isinstance(turn, Mapping) else turn
    return {"role": role, "content": content}


def _encode(head: _Head, seq: int, text: str, final: bool) -> bytes:
    """The delta's record; the first one carries what holds for the stream."""
    delta: dict[str, Any] = {
        "stream_id": head.stream_id, "seq": seq, "delta": text, "final": final
    }  # fmt: skip
    if seq == 0:
        delta |= {"context": head.context, "tenant": head.tenant, "channel": head.channel}
    try:
        return orjson.dumps(delta)
    except TypeError:  # half a surrogate pair: this one escapes it
        return json.dumps(delta).encode()
