"""JSON Lines of deltas -> decisions, without a broker: what `tidegate moderate` does.

    read_lines -> Lane.feed -> the pipeline -> InOrder -> write

The order of the lines is the only time: no stream is idle, and what is still open when the input
ends is judged as it stands. Equal input gives equal output, in the order in which segments were
complete, however fast each was judged.
"""

import asyncio
import heapq
import itertools
import os
import stat
import sys
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

import msgspec
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from detectors.protocol import Detector
from worker.assemble import Segment
from worker.decide import WITHOUT_LOGPROB
from worker.errors import Stop
from worker.events import DeadLetter, Decision
from worker.moderator import Pace, highest, highest_scores
from worker.pipeline import Pipeline
from worker.settings import Settings
from worker.streams import Lane

MAX_LINE_BYTES = 16 * 2**20
_CHUNK_BYTES = 64 * 2**10
_CLOSED_IDS = 100_000  # ended streams whose late repeats are still ignored
_POLL_S = 0.002


class Line(NamedTuple):
    """One line of the input."""

    number: int  # from 1
    value: bytes  # without the line end


class Raw(Protocol):
    """An unbuffered file."""

    def read(self, size: int, /) -> bytes | None:
        """At most `size` bytes, as soon as there are any; none at the end."""
        ...


def read_lines(raw: Raw, on_bytes: Callable[[int], None] = lambda _: None) -> Iterator[list[Line]]:
    """The lines as they come, several at a time; blank ones are left out, too long ones cut off."""
    numbers = itertools.count(1)
    parts: list[bytes] = []  # of the line that has not ended
    length = 0
    while chunk := raw.read(_CHUNK_BYTES):
        on_bytes(len(chunk))
        *whole, rest = chunk.split(b"\n")
        if whole:
            whole[0] = b"".join((*parts, whole[0]))
            parts, length = [], 0
            yield _lines(whole, numbers)
        if length <= MAX_LINE_BYTES:  # a longer line is unreadable, whatever it goes on with
            parts.append(rest)
            length += len(rest)
    yield _lines([b"".join(parts)], numbers)


def _lines(values: Sequence[bytes], numbers: Iterator[int]) -> list[Line]:
    lines = [Line(next(numbers), value) for value in values]
    if lines and lines[0].number == 1:
        lines[0] = Line(1, lines[0].value.removeprefix(b"\xef\xbb\xbf"))
    return [line for line in lines if line.value.strip()]


async def in_thread(chunks: Iterator[list[Line]]) -> AsyncIterator[list[Line]]:
    """The chunks, read in a daemon thread: one that waits for a terminal holds up no exit."""
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[list[Line] | Exception | None] = asyncio.Queue(2)

    def put(it: list[Line] | Exception | None) -> None:
        coming = queue.put(it)
        try:
            asyncio.run_coroutine_threadsafe(coming, loop).result()
        except RuntimeError:  # the loop is closed
            coming.close()
            raise CancelledError from None

    def read() -> None:
        try:
            for chunk in chunks:
                put(chunk)
            put(None)
        except OSError as error:
            put(error)

    def read_while_wanted() -> None:
        with suppress(CancelledError, ValueError):  # ValueError: the file was closed meanwhile
            read()

    threading.Thread(target=read_while_wanted, name="tidegate-lines", daemon=True).start()
    while (chunk := await queue.get()) is not None:
        if isinstance(chunk, Exception):
            raise chunk
        yield chunk


class InOrder:
    """Decisions in the order in which the last segment that each waited for was complete.

    That is a function of the input alone, while detectors may finish in any order.
    """

    def __init__(self, lane: Lane, lookahead: int) -> None:
        self._lane = lane
        self._lookahead = lookahead
        self._numbers = itertools.count()  # of segments
        self._waiting: deque[tuple[int, Segment]] = deque()  # perhaps not judged; oldest first
        self._cut: dict[str, deque[int]] = {}  # of each stream, numbers of undecided segments
        self._made: list[tuple[int, int, Decision]] = []  # a heap

    def __len__(self) -> int:
        return len(self._waiting)

    def cut(self, segments: Iterable[Segment]) -> None:
        """Note segments on their way to the detectors."""
        for segment in segments:
            number = next(self._numbers)
            self._waiting.append((number, segment))
            self._cut.setdefault(segment.stream.stream_id, deque()).append(number)

    def decided(self, decision: Decision) -> None:
        """Note a decision that was made."""
        numbers = self._cut[decision.stream_id]
        due = numbers[min(self._lookahead, len(numbers) - 1)]
        numbers.popleft()
        if decision.final:
            del self._cut[decision.stream_id]
        heapq.heappush(self._made, (due, decision.segment, decision))

    def ready(self) -> Iterator[Decision]:
        """Decisions that no other can come before any more."""
        while self._waiting and self._is_judged(self._waiting[0][1]):
            self._waiting.popleft()
        while self._made and (not self._waiting or self._made[0][0] < self._waiting[0][0]):
            yield heapq.heappop(self._made)[2]

    def _is_judged(self, segment: Segment) -> bool:
        return segment.judgement is not None or not self._lane.holds(segment)


class Offline:
    """One run over one input."""

    def __init__(
        self, settings: Settings, write: Callable[[Decision], None],
        report: Callable[[int, str, str], None], flush: Callable[[], None] = lambda: None,
        detectors: Sequence[Detector] | None = None,
    ) -> None:  # fmt: skip
        """write: in order. report: line number, reason and field of a line that is no delta.

        flush: called when all that could be written by now is.
        """
        self._settings = settings.model_copy(update={"redis_url": None})
        self._write = write
        self._report = report
        self._flush = flush
        self._detectors = detectors
        self._pace = Pace(settings)
        self._too_long: set[int] = set()  # line numbers
        self.lines = self.streams = self.blocked = self.unreadable = self.unasked = 0

    async def run(self, chunks: AsyncIterator[list[Line]]) -> None:
        """Judge everything. Raises Stop where too many lines in a row are unreadable; what was
        complete before is decided and written all the same."""
        async with Pipeline(self._settings, self._detectors, patient=True) as pipeline:
            self._pipeline = pipeline
            self._lane = pipeline.lane(self._settings.outputs_topic, 0)
            self._order = InOrder(self._lane, self._settings.lookahead_segments)
            pipeline.on_output = lambda _: self._take()
            try:
                while (lines := await self._next(chunks)) is not None:
                    await self._feed(lines)
                await self._end_streams()
            except Stop:
                await self._room(1)
                raise
            await self._room(1)

    async def _next(self, chunks: AsyncIterator[list[Line]]) -> list[Line] | None:
        """The next lines, None at the end. Decisions are written while they are awaited."""
        coming = asyncio.ensure_future(anext(chunks, None))
        try:
            while not coming.done():
                await asyncio.wait({coming}, timeout=_POLL_S if self._order else None)
                self._pipeline.check()
                self._emit()
            return coming.result()
        finally:
            coming.cancel()

    async def _feed(self, lines: Sequence[Line]) -> None:
        for line in lines:
            await self._room(self._pace.limit)
            self.lines += 1
            if len(line.value) > MAX_LINE_BYTES:
                self._too_long.add(line.number)
            self._submit(self._fed(line))
            await self._make_room_for_streams()
        await asyncio.sleep(0)
        self._take()
        self._emit()

    def _fed(self, line: Line) -> list[Segment]:
        try:
            return self._lane.feed(line.number - 1, 0, None, line.value, self._pipeline.clock(), 0)
        except Stop:
            self._take()
            raise Stop(
                f"{self._settings.max_dead_letters_in_row + 1} unreadable lines in a row up to "
                f"line {line.number}: is this a file of deltas, one JSON object a line? "
                "Or raise max_dead_letters_in_row."
            ) from None

    async def _end_streams(self) -> None:
        """Judge what is open as it stands; what misses a part is blocked."""
        for _ in range(self._lane.open_streams):
            await self._room(self._pace.limit)
            if self._lane.open_streams:
                self._submit(self._lane.end_silent(self._pipeline.clock()))

    async def _make_room_for_streams(self) -> None:
        while self._lane.open_streams > self._settings.max_open_streams:
            self._submit(self._lane.end_silent(self._pipeline.clock()))
            await self._room(1)

    def _submit(self, segments: Sequence[Segment]) -> None:
        if segments:
            self._order.cut(segments)
            self._pipeline.submit(self._lane, segments)

    async def _room(self, limit: float) -> None:
        """Wait until fewer segments than that wait."""
        while len(self._order) >= limit:
            self._emit()
            if len(self._order) >= limit:
                self._pipeline.check()
                await asyncio.sleep(_POLL_S)
        if limit <= 1:
            self._take()
            self._emit()

    def _take(self) -> None:
        """Take what the lane has for its owner. It keeps no journal, so nothing is ever `done`."""
        output = self._lane.take(self._pipeline.clock(), drain=True)
        if output is None:
            return
        self._lane.forget_closed(_CLOSED_IDS)
        for letter in output.dead_letters:
            self._unreadable(letter)
        for decision in output.decisions:
            self._pace.note(decision)
            self._order.decided(decision)

    def _unreadable(self, letter: DeadLetter) -> None:
        self.unreadable += 1
        number = letter.offset + 1
        if number in self._too_long:
            self._too_long.discard(number)
            self._report(number, f"longer than {MAX_LINE_BYTES} bytes", "")
        else:
            self._report(number, letter.reason, letter.field)

    def _emit(self) -> None:
        for decision in self._order.ready():
            if decision.final:
                self.streams += 1
                self.blocked += decision.verdict == "block"
            self.unasked += decision.reason.endswith(WITHOUT_LOGPROB)
            self._write(decision)
        if not self._order:
            self._flush()


class Scores:
    """One line a stream: the highest score of each harm, the last verdict."""

    def __init__(self) -> None:
        self._open: dict[str, dict[str, Any]] = {}

    def add(self, decision: Decision) -> dict[str, Any] | None:
        """The stream's line, once it has ended."""
        line = self._open.setdefault(
            decision.stream_id,
            {"stream_id": decision.stream_id, "scores": {}, "harmful": None, "verdict": ""},
        )
        line["scores"] = highest_scores((line["scores"], decision.scores))
        line["harmful"] = highest((line["harmful"], decision.harmful))
        line["verdict"] = decision.verdict
        return self._open.pop(decision.stream_id) if decision.final else None


# -- files ----------------------------------------------------------------------------------------


def moderate_files(
    settings: Settings, source: Path | None, target: Path | None, scores_only: bool
) -> Coroutine[Any, Any, None]:
    """Judge the deltas in `source`, or stdin, into `target`, or stdout. Raises Stop, OSError."""
    if source is not None and target is not None and target.exists() and source.samefile(target):
        raise Stop(f"{target}: is the input too; name another output")
    return _moderate_files(settings, source, target, scores_only)


async def _moderate_files(
    settings: Settings, source: Path | None, target: Path | None, scores_only: bool
) -> None:
    with ExitStack() as stack:
        raw = stack.enter_context(open(source or 0, "rb", buffering=0, closefd=source is not None))  # noqa: ASYNC230 - read in a thread
        out = stack.enter_context(target.open("wb")) if target else sys.stdout.buffer
        scores = Scores()

        def write(decision: Decision) -> None:
            line = scores.add(decision) if scores_only else decision
            if line is not None:
                out.write(_ENCODER.encode(line) + b"\n")

        bar = stack.enter_context(_bar(raw))
        run = Offline(settings, write, bar.report, out.flush)
        chunks = in_thread(read_lines(raw, lambda size: bar.step(size, run)))
        try:
            await run.run(chunks)
        finally:
            out.flush()
            if run.unreadable:
                bar.say({"lines": run.lines, "unreadable": run.unreadable})
            if run.unasked:
                bar.say({"logprob_unavailable": run.unasked})


class _Bar:
    """A progress bar on stderr, and what is said above it."""

    def __init__(self, progress: Progress | None, task: TaskID) -> None:
        self._progress = progress
        self._task = task

    def step(self, size: int, run: Offline) -> None:
        """Show that `size` more bytes were read."""
        if self._progress is not None:
            told = f"{run.lines:,} lines, {run.streams:,} streams, {run.blocked:,} blocked"
            self._progress.update(self._task, advance=size, description=told)

    def report(self, line: int, reason: str, field: str) -> None:
        """Say that a line could not be read."""
        self.say({"line": line, "reason": reason, **({"field": field} if field else {})})

    def say(self, fields: dict[str, Any]) -> None:
        """One line of JSON."""
        line = _ENCODER.encode(fields).decode()
        if self._progress is None:
            sys.stderr.write(line + "\n")
        else:
            self._progress.console.out(line, highlight=False)


@contextmanager
def _bar(raw: IO[bytes]) -> Iterator[_Bar]:
    """A bar where somebody looks at it and the input's length is known."""
    status = os.fstat(raw.fileno())
    if not (stat.S_ISREG(status.st_mode) and sys.stderr.isatty()):
        yield _Bar(None, TaskID(0))
        return
    columns = (
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield _Bar(progress, progress.add_task("", total=status.st_size or None))


_ENCODER = msgspec.json.Encoder()
