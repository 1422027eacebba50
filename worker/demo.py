"""The whole system on this machine: Kafka, Valkey, workers, a learner, a gate, conversations.

services -> topics -> workers -> gate <- samples, token by token; what happens -> screen.py
review items -> reviewer.py -> learner -> thresholds -> workers
"""

import asyncio
import contextlib
import inspect
import json
import random
import re
import signal
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
from pydantic import SecretStr
from rich.text import Text

from worker.errors import Stop
from worker.events import ThresholdRecord
from worker.gate import Gate
from worker.guarded import GateError
from worker.local import KafkaCluster, LocalServices, _Guard, _tail, local_services, prepare_kafka
from worker.reviewer import TENANT, Reviewer, environment
from worker.screen import Board, Sample, Show, View
from worker.settings import DEFAULT_FILE, HERE, Settings
from worker.topics import create_topics

SAMPLES = Path(__file__).with_name("samples.jsonl")
_WORKERS = 2
_PINS = 4  # of the gate, so that the streams meet both workers
_TOKEN_S = 0.028  # about 200 characters a second
_TICK_S = 0.08
_READY_S = 60.0  # for the workers to take their partitions
_LEAVE_S = 6.0  # for them to drain and leave


def read_samples(file: Path = SAMPLES) -> list[Sample]:
    """The sample conversations, in the order in which they are played."""
    decoder = msgspec.json.Decoder(Sample)
    return [decoder.decode(line) for line in file.read_bytes().splitlines() if line.strip()]


def prepare(settings: Settings, view: View) -> None:
    """Fetch what is fetched once. Before the event loop: Ctrl-C then ends it at once."""
    if _named(settings, "bootstrap_servers") is None:
        prepare_kafka(_throttled(view.progress))


async def play(
    settings: Settings, config: Path | None, board: Board, view: View,
    keep_running: Callable[[str], None] | None = None,
) -> None:  # fmt: skip
    """Start everything, play all samples, stop everything. Raises Stop.

    keep_running: told how to feed the system when the samples are over; it then stays up until
    this is cancelled.
    """
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    for name in (signal.SIGTERM, signal.SIGHUP):  # Ctrl-C does so by itself
        loop.add_signal_handler(name, lambda: task and task.cancel())
    view.progress("starting Valkey and Apache Kafka")
    with _crew() as crew:  # first, so that they load while the servers start
        async with local_services(
            bootstrap_servers=_named(settings, "bootstrap_servers"),
            redis_url=_named(settings, "redis_url"), progress=_throttled(view.progress),
        ) as services:  # fmt: skip
            settings = settings.model_copy(update={"bootstrap_servers": services.bootstrap_servers})
            view.progress("creating topics")
            count = await _create_topics(settings)
            view.progress(f"starting {_WORKERS} workers and a learner")
            crew.start(config, services, environment(settings.tenant("default")))
            try:
                board.workers = await crew.ready(count)
                run = f"demo-{uuid.uuid4().hex[:8]}"
                async with (
                    Gate(settings, partitions=_PINS) as gate,
                    _reviewing(settings, board, view, run),
                ):
                    await _warm_up(gate)
                    view.begin()
                    await _play_all(gate, board, view, run, crew.check)
                view.finish()
                if keep_running is not None:
                    keep_running(services.bootstrap_servers)
                    await crew.watch()
            finally:
                await crew.leave()


_GUIDE = """
The system stays up until Ctrl-C. In another terminal:

  export TIDEGATE_BOOTSTRAP_SERVERS={servers}
  {python} - <<'END'
  import asyncio
  from tidegate import Gate, Settings

  async def tokens():
      for word in "Hello there, how can I help you today?".split(" "):
          yield word + " "

  async def main():
      async with Gate(Settings()) as gate:
          guarded = gate.guard(tokens(), context=[("user", "Hi!")])
          async for piece in guarded:
              print(piece)
          print(guarded.verdict, guarded.decision)

  asyncio.run(main())
  END

Without a broker:

  echo '{{"stream_id": "a", "seq": 0, "delta": "Hello there.", "final": true}}' | tidegate moderate
"""


def guide(bootstrap_servers: str) -> Text:
    """How to feed the system while it stays up."""
    return Text(_GUIDE.format(servers=bootstrap_servers, python=sys.executable))


def _named(settings: Settings, name: str) -> str | None:
    """A server's address where somebody has set one, in the file or in the environment."""
    if name not in settings.model_fields_set:
        return None
    value = getattr(settings, name)
    return value.get_secret_value() if isinstance(value, SecretStr) else str(value)


def _throttled(progress: Callable[[str], None]) -> Callable[[str], None]:
    """Of 45 fetched jars every fifteenth is news."""
    fetched = re.compile(r"fetched (\d+) of")

    def tell(what: str) -> None:
        match = fetched.match(what)
        if match is None or int(match[1]) % 15 == 0:
            progress(what)

    return tell


async def _create_topics(settings: Settings) -> int:
    """The number of partitions."""
    return (await create_topics(settings)).partitions


@contextlib.asynccontextmanager
async def _reviewing(settings: Settings, board: Board, view: View, run: str) -> AsyncIterator[None]:
    """A reviewer beside the streams; what is learnt of the labels goes to the view."""
    should = {f"{run}/{show.sample.name}": show.sample.should for show in board.shows}

    def learnt(record: ThresholdRecord) -> None:
        board.learnt.append(record)
        view.learnt(record)

    async with Reviewer(settings, should.get, learnt) as reviewer:
        board.labels = lambda: reviewer.labels
        working = asyncio.create_task(reviewer.work())
        try:
            yield
        finally:
            working.cancel()


# -- workers --------------------------------------------------------------------------------------


def _wait_and_run(order_file: str, code: str, command: str) -> None:
    """Runs in a worker's process, or the learner's: load, wait for the order, become it."""
    import json
    import os
    import sys
    import time

    sys.path.insert(0, code)
    from worker import cli, consume, learn, pipeline  # noqa: F401 - they take a second

    while not os.path.exists(order_file):  # noqa: PTH110 - self-contained
        time.sleep(0.02)
    with open(order_file) as file:  # noqa: PTH123 - as above
        order = json.load(file)
    os.environ.update(order["environment"])
    os.chdir(order["folder"])
    sys.argv = ["tidegate", command, *order["arguments"]]
    cli.main()


class Crew:
    """The demo's workers, each a `tidegate run` of its own, and a `tidegate learn`."""

    def __init__(self, guard: _Guard) -> None:
        self._kafka: KafkaCluster | None = None
        self._order = guard.directory / "order.json"
        self._workers = [guard.directory / f"worker-{n + 1}.log" for n in range(_WORKERS)]
        self._logs = [*self._workers, guard.directory / "learner.log"]
        self._processes = [self._spawn(guard, log) for log in self._logs]

    def _spawn(self, guard: _Guard, log: Path) -> Any:
        command = "run" if log in self._workers else "learn"
        source = inspect.getsource(_wait_and_run)
        source += f"\n_wait_and_run({str(self._order)!r}, {str(HERE)!r}, {command!r})"
        return guard.spawn([sys.executable, "-c", source], log)

    def start(self, config: Path | None, services: LocalServices, more: Mapping[str, str]) -> None:
        """Have them join: same settings as ours, the servers that were started here, and more."""
        self._kafka = services.kafka
        file = config or (DEFAULT_FILE if DEFAULT_FILE.is_file() else None)
        environment = {**more, "TIDEGATE_LOG_LEVEL": "INFO"}  # `ready` reads their logs
        if services.kafka is not None:
            environment["TIDEGATE_BOOTSTRAP_SERVERS"] = services.bootstrap_servers
        if services.valkey is not None:
            environment["TIDEGATE_REDIS_URL"] = services.redis_url
        order = {
            "environment": environment, "folder": str(Path.cwd()),
            "arguments": ["--config", str(file.absolute())] if file else [],
        }  # fmt: skip
        partial = self._order.with_suffix(".partial")
        partial.write_text(json.dumps(order), encoding="utf-8")
        partial.replace(self._order)

    def check(self) -> None:
        """Raise Stop where a worker or our own Kafka has ended."""
        if self._kafka is not None and not self._kafka.running:
            raise Stop(f"Apache Kafka has ended:\n{_tail(self._kafka.log(1))}")
        for process, log in zip(self._processes, self._logs, strict=True):
            if process.poll() is not None:
                raise Stop(f"{log.stem} ended with exit code {process.returncode}:\n{_tail(log)}")

    async def ready(self, count: int) -> list[list[int]]:
        """The partitions of each worker, once all `count` are taken and the learner leads."""
        deadline = time.monotonic() + _READY_S
        while True:
            owned = [_partitions(log) for log in self._workers]
            taken = sum(map(len, owned)) == count and (all(owned) or count < len(owned))
            if taken and any(it.get("event") == "learner.leads" for it in _events(self._logs[-1])):
                return owned
            self.check()
            if time.monotonic() > deadline:
                tails = "\n".join(map(_tail, self._logs))
                raise Stop(f"the workers are not ready after {_READY_S:.0f} s:\n{tails}")
            await asyncio.sleep(0.05)

    async def watch(self) -> None:
        """For ever, until one ends."""
        while True:
            self.check()
            await asyncio.sleep(0.5)

    async def leave(self) -> None:
        """Have them drain and leave their group; who does not is killed with the guard."""
        for process in self._processes:
            process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + _LEAVE_S
        while any(process.poll() is None for process in self._processes):
            if time.monotonic() > deadline:
                return
            await asyncio.sleep(0.02)


@contextlib.contextmanager
def _crew() -> Iterator[Crew]:
    """The workers, in a guard: they end with us, in whatever way we do."""
    guard = _Guard("workers", None)
    try:
        yield Crew(guard)
    finally:
        guard.close()


def _partitions(log: Path) -> list[int]:
    """The partitions that a worker was assigned last, if it has loaded all of them; else none."""
    assigned: list[int] = []
    loaded: set[int] = set()
    for event in _events(log):
        if event.get("event") == "partitions.assigned":
            assigned = event["partitions"]
        elif event.get("event") == "lane.loaded":
            loaded.add(event["partition"])
    return assigned if loaded.issuperset(assigned) else []


def _events(log: Path) -> Iterator[dict[str, Any]]:
    if not log.exists():
        return
    for line in log.read_text("utf-8", "replace").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            if line.startswith("{"):
                yield json.loads(line)


# -- streams --------------------------------------------------------------------------------------


async def _play_all(
    gate: Gate, board: Board, view: View, run: str, check: Callable[[], None]
) -> None:
    """All samples, as many at once as the view has room for. Raises what `check` does."""
    waiting = iter(board.shows)

    async def lane() -> None:
        for show in waiting:
            await _play_one(gate, show, view, run)

    async def look() -> None:
        while True:
            check()
            view.tick()
            await asyncio.sleep(_TICK_S)

    async with asyncio.TaskGroup() as tasks:
        looking = tasks.create_task(look())
        lanes = [tasks.create_task(lane()) for _ in range(view.panels)]
        await asyncio.gather(*lanes)
        looking.cancel()


async def _warm_up(gate: Gate) -> None:
    """A stream through each partition: a first transaction and a first batch take longer."""

    async def greeting() -> AsyncIterator[str]:
        yield "Hello, how can I help you?"

    async def play() -> None:
        async for _ in gate.guard(greeting()):
            pass

    await asyncio.gather(*(play() for _ in gate.partitions))


async def _play_one(gate: Gate, show: Show, view: View, run: str) -> None:
    """One sample through the gate; what can be seen of it goes to the view."""
    sample = show.sample

    def decided(decision: Any) -> None:
        show.decided(decision)
        view.decided(show)

    show.guarded = gate.guard(
        _model(show), context=[(turn.role, turn.content) for turn in sample.context],
        stream_id=f"{run}/{sample.name}", tenant=TENANT, on_decision=decided,
    )  # fmt: skip
    view.opened(show)
    try:
        async for piece in show.guarded:
            show.shown += piece
            view.released(show, piece)
    except GateError as error:
        show.error = str(error)
    show.done = True
    await asyncio.sleep(view.linger_s)
    view.ended(show)


async def _model(show: Show) -> AsyncIterator[str]:
    """The sample's text as a model would send it: word by word, not quite evenly."""
    pace, length = random.Random(show.sample.name), 0  # noqa: S311 - the same each time
    for token in re.findall(r"\s*\S+|\s+$", show.sample.text):
        length += len(token)
        show.generated(length)
        yield token
        await asyncio.sleep(_TOKEN_S * pace.uniform(0.4, 1.6))
    show.generated(length)
