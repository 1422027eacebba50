"""Workers as processes of their own, the load they get, and what must come out of it.

Bed            one test's topics, group and settings; starts workers
WorkerProcess  one `tidegate run`, to be killed, stopped, woken
Tail           reads a topic while it grows
make_load      interleaved streams with everything that producers get wrong
reference      the decisions of an undisturbed run, computed in this process without a broker
"""

import asyncio
import contextlib
import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import msgspec
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError

from worker.events import Decision
from worker.pipeline import Pipeline
from worker.settings import HERE, Settings
from worker.streams import Lane
from worker.topics import desired_topics, ensure_topics

# The brokers that tests start let members die sooner than others do.
SESSION_MS = 6_000 if os.environ.get("TIDEGATE_BOOTSTRAP_SERVERS") else 3_000
FOR_EVER_MS = 3_600_000

# It says every half second that a broker which a test has killed cannot be reached.
logging.getLogger("aiokafka").setLevel(logging.CRITICAL)

_TOPICS = (
    "outputs", "decisions", "feedback", "thresholds", "review", "dead_letters", "streams",
    "evidence",
)  # fmt: skip
_DEFAULTS: dict[str, Any] = {
    "detectors": ["python:tests.fakes:HashDetector"],
    "tenants": {"default": {"actions": {"misinformation": "revise", "privacy_violation": "flag"}}},
    "min_segment_chars": 40,  # short ones: many segments of few deltas
    "max_segment_chars": 120,
    "session_timeout_ms": SESSION_MS,
    "heartbeat_interval_ms": 500,
    "commit_interval_ms": 1_000,
    "hold_timeout_ms": 120_000,  # two busy cores must not look like a dead detector
    "gap_timeout_ms": FOR_EVER_MS,
    "idle_timeout_ms": FOR_EVER_MS,
    "closed_for_ms": FOR_EVER_MS,
    "watchdog_ms": 0,
}


class Input(NamedTuple):
    """A record for a topic. partition: None leaves it to the key; at_ms: None is now."""

    key: bytes | None
    value: bytes | None
    partition: int | None = None
    at_ms: int | None = None


class WorkerProcess:
    """One worker, or learner. Its log is kept in a file, and read to see how far it is."""

    def __init__(self, environment: Mapping[str, str], log: Path, command: str = "run") -> None:
        self.log = log
        self.killed = False
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "worker.cli", command],
                env=dict(environment), cwd=log.parent, stdin=subprocess.DEVNULL,
                stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        """SIGKILL, and gone when this returns."""
        self.killed = True
        self._process.kill()
        self._process.wait()

    @property
    def died(self) -> bool:
        """Whether it ended by itself."""
        return not self.running and not self.killed

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    async def exit_code(self, timeout_s: float) -> int:
        """The exit code, as soon as there is one. Raises TimeoutError."""
        await until(lambda: not self.running, timeout_s, "the worker ends")
        return int(self._process.wait())

    def events(self, name: str) -> list[dict[str, Any]]:
        """The logged events of that name."""
        lines = self.log.read_text("utf-8", "replace").splitlines()
        found = [json.loads(line) for line in lines if line.startswith("{") and f'"{name}"' in line]
        return [event for event in found if event["event"] == name]

    async def has_led(self, times: int = 1, timeout_s: float = 60.0) -> None:
        """Return when it, a learner, has taken the lead so often since its start."""

        def done() -> bool:
            return len(self.events("learner.leads")) >= times or not self.running

        await until(done, timeout_s, f"{self.log.name} leads")
        assert self.running, f"the learner ended:\n{self.tail()}"

    async def has_loaded(self, partitions: int, timeout_s: float = 60.0) -> None:
        """Return when it has taken that many partitions since its start."""

        def done() -> bool:
            loaded = {event["partition"] for event in self.events("lane.loaded")}
            return len(loaded) >= partitions or not self.running

        await until(done, timeout_s, f"{self.log.name} takes {partitions} partitions")
        assert self.running, f"the worker ended:\n{self.tail()}"

    def tail(self, lines: int = 30) -> str:
        """The end of its log."""
        return "\n".join(self.log.read_text("utf-8", "replace").splitlines()[-lines:])


class Bed:
    """Topics, group and settings of one test; the workers it started die with it."""

    def __init__(
        self, bootstrap_servers: str, unique: str, folder: Path, *, partitions: int = 4,
        replication_factor: int = 1, score_ms: float = 1.0, **settings: Any,
    ) -> None:  # fmt: skip
        self.bootstrap_servers = bootstrap_servers
        self.folder = folder
        self.partitions = partitions
        self._score_ms = score_ms
        self._values = (
            _DEFAULTS
            | {f"{name}_topic": f"{unique}.{name}" for name in _TOPICS}
            | {
                "bootstrap_servers": bootstrap_servers,
                "group_id": unique,
                "partitions": partitions,
                "replication_factor": replication_factor,
            }
            | settings
        )
        self.settings = Settings(**self._values)
        self.workers: list[WorkerProcess] = []

    async def __aenter__(self) -> Self:
        await ensure_topics(
            self.bootstrap_servers, desired_topics(self.settings), self.partitions,
            self.settings.replication_factor,
        )  # fmt: skip
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for worker in self.workers:
            if worker.running:
                worker.kill()
            if kind is not None and kind is not asyncio.CancelledError:
                sys.stderr.write(f"--- {worker.log.name}\n{worker.tail(15)}\n")

    def start_learner(self, **settings: Any) -> WorkerProcess:
        """Start a `tidegate learn`; these settings replace the bed's own."""
        return self.start_worker("learn", **settings)

    def start_worker(self, command: str = "run", **settings: Any) -> WorkerProcess:
        """Start one more; these settings replace the bed's own."""
        log = self.folder / f"worker-{len(self.workers)}.log"
        worker = WorkerProcess(self._environment(settings), log, command)
        self.workers.append(worker)
        return worker

    def command(self, *arguments: str, code: int = 0) -> str:
        """Run `tidegate ...` to its end; what it prints. It must exit with `code`."""
        ended = subprocess.run(
            [sys.executable, "-m", "worker.cli", *arguments], env=self._environment({}),
            cwd=self.folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, check=False, timeout=180,
        )  # fmt: skip
        assert ended.returncode == code, ended.stdout
        return ended.stdout

    def _environment(self, settings: Mapping[str, Any]) -> dict[str, str]:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("TIDEGATE_")}
        environment |= {
            f"TIDEGATE_{name.upper()}": value if isinstance(value, str) else json.dumps(value)
            for name, value in (self._values | dict(settings)).items()
        }
        return environment | {
            "PYTHONPATH": str(HERE),
            "TIDEGATE_TEST_SCORE_MS": str(self._score_ms),
        }

    async def produce(
        self, records: Iterable[Input], per_second: float = 0.0, topic: str | None = None
    ) -> None:
        """Write to the input topic or another one, at a steady rate or at once; all acknowledged
        at return."""
        producer = AIOKafkaProducer(
            bootstrap_servers=self.bootstrap_servers, acks="all", enable_idempotence=True,
            linger_ms=5, request_timeout_ms=20_000, max_request_size=8 << 20,
        )  # fmt: skip
        await producer.start()
        start, futures = time.monotonic(), []
        try:
            for number, record in enumerate(records):
                futures.append(await self._send(producer, record, topic))
                if per_second and (ahead := start + number / per_second - time.monotonic()) > 0.01:
                    await asyncio.sleep(ahead)
            await asyncio.gather(*futures)
        finally:
            await producer.stop()

    async def _send(
        self, producer: AIOKafkaProducer, record: Input, topic: str | None
    ) -> asyncio.Future[Any]:
        topic = topic or self.settings.outputs_topic
        if record.key is not None or record.value is not None:
            sent: asyncio.Future[Any] = await producer.send(
                topic, key=record.key, value=record.value, partition=record.partition,
                timestamp_ms=record.at_ms,
            )  # fmt: skip
            return sent
        batch = producer.create_batch()  # `send` refuses a record without key and value
        batch.append(timestamp=None, key=None, value=None)
        batch.close()
        sent = await producer.send_batch(batch, topic, partition=record.partition or 0)
        return sent  # noqa: RET504 - typed by its first use

    async def read(self, topic: str, isolation_level: str = "read_committed") -> list[Any]:
        """Everything that is on a topic now: by partition, in the order of offsets."""
        async with Tail(self.bootstrap_servers, topic, isolation_level) as tail:
            ends = await tail.ends()
            await until(lambda: tail.has_read(ends), 60.0, f"{topic} is read")
            return sorted(tail.records, key=lambda record: (record.partition, record.offset))

    async def read_decisions(self, isolation_level: str = "read_committed") -> list[Any]:
        return await self.read(self.settings.decisions_topic, isolation_level)

    async def committed(self) -> dict[int, int]:
        """The group's offsets by partition."""
        admin = AIOKafkaAdminClient(bootstrap_servers=self.bootstrap_servers)
        await admin.start()
        try:
            found = await admin.list_consumer_group_offsets(self.settings.group_id)
            return {tp.partition: meta.offset for tp, meta in found.items()}
        finally:
            await admin.close()


class Tail:
    """Reads a topic from its beginning for as long as the block runs."""

    def __init__(
        self, bootstrap_servers: str, topic: str, isolation_level: str = "read_committed"
    ) -> None:
        self._topic = topic
        self._consumer = AIOKafkaConsumer(
            bootstrap_servers=bootstrap_servers, enable_auto_commit=False,
            auto_offset_reset="earliest", isolation_level=isolation_level,
            fetch_max_wait_ms=100, request_timeout_ms=20_000,
        )  # fmt: skip
        self.records: list[Any] = []
        self.arrived: list[float] = []  # monotonic seconds, one for each record
        self._positions: dict[TopicPartition, int] = {}

    async def __aenter__(self) -> Self:
        await self._consumer.start()
        numbers = self._consumer.partitions_for_topic(self._topic)
        async with asyncio.timeout(60.0):
            while not numbers:
                await asyncio.sleep(0.1)
                await self._consumer._client.force_metadata_update()
                with contextlib.suppress(KafkaError):  # a broker too busy to answer is asked again
                    await self._consumer.topics()
                numbers = self._consumer.partitions_for_topic(self._topic)
        self._partitions = [TopicPartition(self._topic, number) for number in numbers]
        self._consumer.assign(self._partitions)
        self._reading = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._reading.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reading
        await self._consumer.stop()

    async def _read(self) -> None:
        while True:
            with contextlib.suppress(KafkaError):
                for records in (await self._consumer.getmany(timeout_ms=200)).values():
                    self.records += records
                    self.arrived += [time.monotonic()] * len(records)
                for partition in self._partitions:
                    self._positions[partition] = await self._consumer.position(partition)

    async def ends(self) -> dict[TopicPartition, int]:
        """Where each partition ends now, for this reader."""
        return dict(await self._consumer.end_offsets(self._partitions))

    def has_read(self, ends: Mapping[TopicPartition, int]) -> bool:
        return all(self._positions.get(partition, 0) >= end for partition, end in ends.items())

    @property
    def finals(self) -> int:
        """Streams whose last decision has come."""
        return sum(b'"final":true' in record.value for record in self.records)

    async def has_finals(self, count: int, timeout_s: float = 60.0) -> None:
        """Return when so many streams are decided to their end. Raises TimeoutError."""
        await until(lambda: self.finals >= count, timeout_s, f"{count} streams end", self._says)

    async def has_records(self, count: int, timeout_s: float = 60.0) -> None:
        """Return when so many records have come. Raises TimeoutError."""
        what = f"{count} records on {self._topic}"
        await until(lambda: len(self.records) >= count, timeout_s, what, self._says)

    def _says(self) -> str:
        return f"{len(self.records)} records, {self.finals} final"


async def until(
    holds: Callable[[], bool], timeout_s: float, what: str, says: Callable[[], str] = lambda: ""
) -> None:
    """Return when `holds`. Raises TimeoutError saying what did not come."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout_s} s until {what}: {says()}")
        await asyncio.sleep(0.05)


async def eventually(holds: Callable[[], Awaitable[bool]], timeout_s: float, what: str) -> None:
    """As `until`, of something that is asked for."""
    deadline = time.monotonic() + timeout_s
    while not await holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout_s} s until {what}")
        await asyncio.sleep(0.2)


# --- the load ------------------------------------------------------------------------------------

_WORDS = (
    *("the", "a", "of", "and", "river", "stone", "carries", "under", "light", "seldom", "because"),
    *("nine", "folders", "garden", "where", "quiet", "engine", "turns", "paper", "across"),
    *("winter", "someone", "reads", "naïve", "café", "über", "東京", "данные", "window", "before"),
)


class Load(NamedTuple):
    """What is produced, and what was meant by it."""

    records: list[Input]
    texts: dict[str, str]  # of each stream
    unreadable: int


def delta(stream_id: str, seq: int, text: str, final: bool = False, **more: Any) -> Input:
    """One delta as a record."""
    fields = {"stream_id": stream_id, "seq": seq, "delta": text, "final": final, **more}
    return Input(stream_id.encode(), json.dumps(fields, ensure_ascii=False).encode())


def make_text(rng: random.Random, chars: int) -> str:
    """Sentences of about so many characters."""
    words: list[str] = []
    length = 0
    while length < chars:
        word = rng.choice(_WORDS) + rng.choice(("", "", "", "", ",", ". ", "? ", ".\n"))
        words.append(word)
        length += len(word) + 1
    return " ".join(words) + "."


def make_deltas(rng: random.Random, stream_id: str, text: str, pieces: int) -> list[Input]:
    """The stream as producers with troubles send it: repeated, disordered, late, after its end."""
    cuts = sorted(rng.randrange(len(text) + 1) for _ in range(pieces - 1))
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    first = {"context": [{"role": "user", "content": f"about {rng.choice(_WORDS)}?"}]}
    deltas = [
        delta(stream_id, seq, part, seq == pieces - 1, **(first if seq == 0 else {}))
        for seq, part in enumerate(parts)
    ]
    trouble = rng.random()
    if trouble < 0.10:  # wrong order
        at = rng.randrange(pieces - 1)
        deltas[at], deltas[at + 1] = deltas[at + 1], deltas[at]
    elif trouble < 0.20:  # one comes late
        late = deltas.pop(rng.randrange(pieces))
        deltas.insert(rng.randrange(len(deltas) + 1), late)
    elif trouble < 0.35:  # repeats
        for _ in range(rng.randrange(1, 4)):
            deltas.insert(rng.randrange(len(deltas) + 1), rng.choice(deltas))
    elif trouble < 0.45:  # after the end
        deltas += rng.choices(deltas, k=2)
        deltas.append(delta(stream_id, pieces, "more after the end. " * 9, True))
    return deltas


_UNREADABLE: tuple[bytes | None, ...] = (
    b"{nope", b"", None, b"\xff\xfe", b'{"stream_id":"x","seq":-1,"delta":"","final":true}',
    b'{"stream_id":"x","seq":0,"delta":7,"final":false}', b"[" * 5_000, b"NaN",
    b'{"stream_id":"","seq":0,"delta":"a","final":true}',
)  # fmt: skip


def make_load(
    rng: random.Random, streams: int, *, open_at_once: int = 100, pieces: int = 10,
    chars: int = 300, unreadable_share: float = 0.005, prefix: str = "s",
) -> Load:  # fmt: skip
    """Interleaved streams, and some records that nobody can read."""
    texts = {f"{prefix}{n}": make_text(rng, rng.randrange(20, 2 * chars)) for n in range(streams)}
    waiting = iter(texts.items())
    open_streams: list[list[Input]] = []
    records: list[Input] = []
    unreadable = 0
    while True:
        while len(open_streams) < open_at_once and (entry := next(waiting, None)) is not None:
            count = rng.randrange(2, 2 * pieces)
            open_streams.append(make_deltas(rng, *entry, count)[::-1])
        if not open_streams:
            return Load(records, texts, unreadable)
        at = rng.randrange(len(open_streams))
        records.append(open_streams[at].pop())
        if not open_streams[at]:
            open_streams[at] = open_streams[-1]
            open_streams.pop()
        if rng.random() < unreadable_share:
            key = rng.choice((None, b"x", rng.randbytes(3)))
            value = rng.choice(_UNREADABLE)
            records.append(Input(key or b"k" if value is None else key, value))
            unreadable += 1


# --- what must come out --------------------------------------------------------------------------


class Outcome(NamedTuple):
    """Decisions by stream, in order; and dead letters."""

    decisions: dict[str, list[dict[str, Any]]]
    dead_letters: list[tuple[int, int]]  # input partition and offset, sorted

    @property
    def segments(self) -> int:
        return sum(map(len, self.decisions.values()))


async def reference(settings: Settings, log: Sequence[Any]) -> Outcome:
    """What an undisturbed run makes of the input: the same steps, no broker, nothing that fails."""
    alone = settings.model_copy(update={"redis_url": None})
    decisions: dict[str, list[dict[str, Any]]] = defaultdict(list)
    dead: list[tuple[int, int]] = []
    lanes: dict[int, Lane] = {}
    async with Pipeline(alone) as pipeline:
        for record in log:
            lane = lanes.get(record.partition)
            if lane is None:
                lane = lanes[record.partition] = pipeline.lane(record.topic, record.partition)
            segments = lane.feed(
                record.offset, record.timestamp, record.key, record.value, time.monotonic(),
                time.time_ns() // 1_000_000,
            )  # fmt: skip
            pipeline.submit(lane, segments)
            while pipeline.waiting > 500:
                await asyncio.sleep(0.001)
        await until(lambda: pipeline.waiting == 0, 120.0, "the reference is judged")
        for lane in lanes.values():
            output = lane.take(time.monotonic(), drain=True)
            if output is None:
                continue
            for decision in output.decisions:
                decisions[decision.stream_id].append(comparable(msgspec.to_builtins(decision)))
            dead += [(letter.partition, letter.offset) for letter in output.dead_letters]
    return Outcome(dict(decisions), sorted(dead))


def comparable(decision: Mapping[str, Any]) -> dict[str, Any]:
    """A decision without what may differ between two runs: when, how fast, from which cache."""
    kept = {k: v for k, v in decision.items() if k not in {"ts_ms", "timing_ms"}}
    kept["stage"] = "toxicity" if kept["stage"] == "cache" else kept["stage"]
    return kept


async def outcome(bed: Bed) -> Outcome:
    """What a read_committed reader finds; asserts what holds for any input."""
    decisions: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in await bed.read_decisions():
        msgspec.json.decode(record.value, type=Decision, strict=True)
        decision = json.loads(record.value)
        assert record.key == decision["stream_id"].encode()
        source = f"{bed.settings.outputs_topic}-{record.partition}-"
        assert decision["decision_id"].startswith(source), "not in the partition of its deltas"
        decisions[decision["stream_id"]].append(comparable(decision))
    for stream_id, made in decisions.items():
        _check_chain(stream_id, made)
    letters = []
    for letter in await bed.read(bed.settings.dead_letters_topic):
        headers = dict(letter.headers)
        assert headers["topic"] == bed.settings.outputs_topic.encode()
        letters.append((int(headers["partition"]), int(headers["offset"])))
    return Outcome(dict(decisions), sorted(letters))


def _check_chain(stream_id: str, made: Sequence[Mapping[str, Any]]) -> None:
    """Each segment once, in order, end to start, and nothing after the last."""
    assert [d["segment"] for d in made] == list(range(len(made))), (
        f"{stream_id}: segments {[d['segment'] for d in made]}"
    )
    assert [d["start"] for d in made] == [0, *(d["end"] for d in made)][:-1], stream_id
    assert not any(d["final"] for d in made[:-1]), stream_id
    released = [d["released_to"] for d in made if d["verdict"] != "block"]
    assert released == sorted(released), stream_id


def assert_equal(found: Outcome, expected: Outcome) -> None:
    """The same decisions and dead letters, each once."""
    lost = sorted(set(expected.decisions) - set(found.decisions))
    assert not lost, f"{len(lost)} streams without a decision, such as {lost[:5]}"
    assert set(found.decisions) == set(expected.decisions)
    differing = [i for i, made in expected.decisions.items() if found.decisions[i] != made]
    assert not differing, "\n".join(
        [f"{len(differing)} streams are decided differently:"]
        + [_difference(found.decisions[i], expected.decisions[i]) for i in differing[:3]]
    )
    assert found.dead_letters == expected.dead_letters


def _difference(found: Sequence[Mapping[str, Any]], expected: Sequence[Mapping[str, Any]]) -> str:
    """The first decision that differs, field by field."""
    for a, b in zip(found, expected, strict=False):
        fields = [f"{k}: {a[k]!r}, expected {b[k]!r}" for k in b if a[k] != b[k]]
        if fields:
            return f"{b['stream_id']} segment {b['segment']}: {'; '.join(fields)}"
    return f"{expected[0]['stream_id']}: {len(found)} decisions, expected {len(expected)}"


@contextlib.asynccontextmanager
async def in_background(work: Awaitable[None]) -> AsyncIterator[asyncio.Future[None]]:
    """The work as a task beside the block; it must be done when the block ends, or is awaited."""
    task = asyncio.ensure_future(work)
    try:
        yield task
        await task
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
