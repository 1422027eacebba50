"""In process: texts and token streams through the same pipeline, without Kafka.

    async with Moderator(settings) as moderator:
        decision = await moderator.moderate(text, context="What the user asked.")
        async for piece in moderator.guard(tokens):
            print(piece, end="")

Each text and each token stream has a lane of its own, a partition of the topic `local`, and nothing
of it stays when it ends. SyncModerator does the same for code that knows no event loop.
"""

import asyncio
import itertools
import uuid
from collections.abc import (
    AsyncIterable,
    AsyncIterator,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import lru_cache, partial
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, NamedTuple, Self

import msgspec
from anyio.from_thread import BlockingPortal, start_blocking_portal

from detectors.load import SecondSpec, load_combination, load_detectors, load_second
from detectors.protocol import Detector
from detectors.second import Second
from worker import metrics
from worker import settings as settings_module
from worker.errors import TidegateError
from worker.events import MAX_ID_CHARS, Channel, Decision, Delta, Revision, TurnRecord, Verdict
from worker.guarded import Guarded, Holding
from worker.pipeline import Pipeline
from worker.second import spec_of
from worker.settings import Settings
from worker.streams import Lane

Context = str | Iterable[TurnRecord | Mapping[str, str] | tuple[str, str]]  # str: one user turn

_Id = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_ID_CHARS)]
_PIECE_CHARS = 4_000  # of a long text, fed at once
_AT_ONCE = 256  # texts of a batch that are begun
_ROOM_POLL_S = 0.002


class ModeratorClosed(TidegateError):
    """The moderator ended, or was never entered: what was being judged has no verdict."""


class Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One text of a batch, with what it is judged with."""

    text: str
    context: tuple[TurnRecord, ...] = ()
    tenant: _Id = "default"
    channel: Channel = "text"
    stream_id: _Id | None = None  # as decisions carry it; made up where there is none


class Shown(NamedTuple):
    """What may be shown of a text."""

    text: str
    safe: bool  # it is the text that came in, unchanged and whole


class Pace:
    """How many segments may wait at once: as many as are judged in a quarter of the hold deadline.

    Whoever has all the text at once would otherwise queue segments until they are `unavailable`.
    """

    def __init__(self, settings: Settings) -> None:
        self._most = settings.max_waiting_segments
        self._least = min(4 * settings.infer_threads, self._most)
        self._target_ms = settings.hold_timeout_ms / 4
        self.limit = float(self._least)

    def note(self, decision: Decision) -> None:
        """Learn from how long a segment took."""
        if decision.timing_ms.total < self._target_ms:
            self.limit = min(self._most, self.limit + 1)
        else:
            self.limit = max(self._least, self.limit * 0.9)


class Moderator:
    """Judges texts and token streams in this process. Use as an async context manager.

    settings: by default those of tidegate.toml and the environment. Kafka's are not used, Redis
    only where `redis_url` is set. detectors: instead of those that the settings name.
    """

    def __init__(
        self, settings: Settings | None = None, *, detectors: Sequence[Detector] | None = None
    ) -> None:
        self.settings = settings or settings_module.load()
        self._detectors = detectors
        self._pipeline: Pipeline | None = None
        self._runner: asyncio.Task[None] | None = None
        self._open: dict[Lane, _Text] = {}
        self._numbers = itertools.count()
        self._pace = Pace(self.settings)

    # -- life ---------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        if self._runner is not None:
            raise RuntimeError("a moderator is entered once")
        ready = asyncio.get_running_loop().create_future()
        self._stop = asyncio.Event()
        self._turn = asyncio.Lock()
        # A task of its own: if a step of the pipeline dies, it does not cancel the caller.
        self._runner = asyncio.create_task(self._run(ready))
        await ready
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self._stop.set()
        if self._runner is not None:
            await asyncio.shield(self._runner)

    async def _run(self, ready: asyncio.Future[None]) -> None:
        cause: BaseException | None = None
        try:
            detectors = self._detectors or _shared_detectors(
                self.settings.detectors, self.settings.models
            )
            second = _shared_second(spec_of(self.settings), self.settings.models, tuple(detectors))
            async with Pipeline(self.settings, detectors, second=second) as pipeline:
                pipeline.on_output = self._on_output
                self._pipeline = pipeline
                ready.set_result(None)
                await self._stop.wait()
        except BaseException as error:
            cause = error
            if ready.done():
                raise
            ready.set_exception(error)
        finally:
            self._pipeline = None
            for text in list(self._open.values()):
                closed = ModeratorClosed("the moderator was closed while this was being judged")
                closed.__cause__ = cause
                text.fail(closed)

    def _running(self) -> Pipeline:
        if self._pipeline is None:
            raise ModeratorClosed("not open: use it in `async with Moderator(...) as moderator`")
        return self._pipeline

    # -- whole texts --------------------------------------------------------------------------

    async def moderate(
        self, text: str, context: Context = (), *, tenant: str = "default",
        channel: Channel = "text", stream_id: str | None = None,
    ) -> Decision:  # fmt: skip
        """One decision for the whole text; `whole` says how it comes from those of its segments.

        Raises ValueError (msgspec.ValidationError) for wrong types, ModeratorClosed.
        """
        return whole(
            await self.decisions(text, context, tenant=tenant, channel=channel, stream_id=stream_id)
        )

    async def moderate_batch(
        self, texts: Iterable[str | Request | Mapping[str, Any]]
    ) -> list[Decision]:
        """One decision for each text, in their order. All are checked before the first is judged.

        A mapping has the fields of Request.
        """
        requests = [_request(text) for text in texts]
        outcome: list[Decision | None] = [None] * len(requests)
        waiting = iter(enumerate(requests))

        async def work() -> None:
            for index, request in waiting:
                outcome[index] = whole(await self._judge(request))

        tasks = [asyncio.create_task(work()) for _ in range(min(_AT_ONCE, len(requests)))]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        return [decision for decision in outcome if decision is not None]

    async def process_output(
        self, text: str, context: Context = (), *, tenant: str = "default",
        channel: Channel = "text", stream_id: str | None = None,
    ) -> Shown:  # fmt: skip
        """What may be shown of the text, and whether that is all of it, unchanged.

        A revised passage is replaced by its revision. A block ends the text before the blocked
        segment.
        """
        decisions = await self.decisions(
            text, context, tenant=tenant, channel=channel, stream_id=stream_id
        )
        return shown(text, decisions)

    async def decisions(
        self, text: str, context: Context = (), *, tenant: str = "default",
        channel: Channel = "text", stream_id: str | None = None,
    ) -> list[Decision]:  # fmt: skip
        """Every segment's decision, in order; a block is the last."""
        fields = {"text": text, "tenant": tenant, "channel": channel, "stream_id": stream_id}
        return await self._judge(_request({**fields, "context": context}))

    async def _judge(self, request: Request) -> list[Decision]:
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        decisions: list[Decision] = []

        def collect(decision: Decision) -> None:
            decisions.append(decision)
            if decision.final and not ended.done():
                ended.set_result(None)

        def fail(error: Exception) -> None:
            if not ended.done():
                ended.set_exception(error)

        text = self._begin(request, collect, fail)
        try:
            await text.send(request.text, final=True)
            await ended
        finally:
            self._end(text)
            if ended.done() and not ended.cancelled():
                ended.exception()  # it is raised by whatever came first
        return decisions

    # -- token streams ------------------------------------------------------------------------

    def guard(
        self, tokens: AsyncIterable[str] | Iterable[str], context: Context = (), *,
        tenant: str = "default", channel: Channel = "text", stream_id: str | None = None,
        apply_revisions: bool = False,
    ) -> Guarded:  # fmt: skip
        """An async iterator over the released text of the tokens; see Guarded.

        A block closes `tokens`. Afterwards `.verdict` and `.decision` say how it ended. A plain
        iterator is read in a thread of its own.
        """
        stream_id = stream_id or _new_id()
        fields = {"text": "", "tenant": tenant, "channel": channel, "stream_id": stream_id}
        request = _request({**fields, "context": context})
        self._running()
        opened: list[_Text] = []

        async def send(seq: int, piece: str, final: bool) -> None:
            if seq == 0:
                opened.append(self._begin(request, guarded.feed, guarded.fail))
            await opened[0].send(piece, final=final)

        def end() -> None:
            for text in opened:
                self._end(text)

        holding = self._holding(apply_revisions)
        guarded = Guarded(_as_async(tokens), send, stream_id, holding, on_end=end)
        return guarded

    def _holding(self, apply_revisions: bool) -> Holding:
        settings = self.settings
        due = (settings.lookahead_segments + 1) * settings.max_segment_chars
        return Holding.of(
            settings, max_unreleased_chars=max(4_000, 2 * due), apply_revisions=apply_revisions
        )

    # -- the pipeline -------------------------------------------------------------------------

    def _begin(
        self, request: Request, on_decision: Callable[[Decision], None],
        fail: Callable[[Exception], None],
    ) -> "_Text":  # fmt: skip
        pipeline = self._running()
        lane = pipeline.lane("local", next(self._numbers))
        text = _Text(pipeline, lane, request, self._room, on_decision, fail)
        self._open[lane] = text
        return text

    def _end(self, text: "_Text") -> None:
        """Forget it: judgements that are still on their way change nothing."""
        self._open.pop(text.lane, None)
        text.lane.drop()

    async def _room(self) -> None:
        """Wait for one's turn to have more judged."""
        async with self._turn:
            while self._running().waiting >= self._pace.limit:  # noqa: ASYNC110 - one waits at a time
                await asyncio.sleep(_ROOM_POLL_S)

    def _on_output(self, lane: Lane) -> None:
        text = self._open.get(lane)
        if text is None:
            return
        for decision in text.take():
            self._pace.note(decision)
            metrics.DECISIONS.labels(decision.verdict).inc()
            metrics.DECISION_SECONDS.observe(decision.timing_ms.total / 1e3)
            text.on_decision(decision)


class _Text:
    """One text on its way through a lane of its own."""

    def __init__(
        self, pipeline: Pipeline, lane: Lane, request: Request,
        room: Callable[[], Any], on_decision: Callable[[Decision], None],
        fail: Callable[[Exception], None],
    ) -> None:  # fmt: skip
        self.lane = lane
        self.on_decision = on_decision
        self.fail = fail
        self._pipeline = pipeline
        self._request = request
        self._stream_id = request.stream_id or _new_id()
        self._room = room
        self._seq = 0
        self._ended = False

    async def send(self, text: str, final: bool) -> None:
        """Have more of the text judged, no faster than there is room; nothing once it ended."""
        text = joined(text)
        for begin in range(0, max(1, len(text)), _PIECE_CHARS):
            await self._room()
            if self._ended:
                return
            end = begin + _PIECE_CHARS
            self._feed(text[begin:end], final and end >= len(text))

    def _feed(self, piece: str, final: bool) -> None:
        it = self._request
        delta = Delta(self._stream_id, self._seq, piece, final, it.context, it.tenant, it.channel)
        # No time stamps: nothing is idle here, the caller knows when the text ends.
        segments = self.lane.feed_delta(delta, self._seq, 0, self._pipeline.clock(), 0)
        self._seq += 1
        self._pipeline.submit(self.lane, segments)

    def take(self) -> list[Decision]:
        """The decisions made since the last call."""
        output = self.lane.take(self._pipeline.clock())
        if output is None:
            return []
        self.lane.done(output, range(len(output.journal)))
        self._ended = self._ended or any(it.final for it in output.decisions)
        return output.decisions


# -- decisions of a whole text --------------------------------------------------------------------


def whole(decisions: Sequence[Decision]) -> Decision:
    """One decision for a whole text: the one that settles it, with what holds for all of it.

    The first block settles it, else the first revise, else the last allow; harm, reason, stage,
    segment and revision are that one's, and so are start and end unless all is allowed. `scores`
    and `harmful` are the highest over the segments, released_to is the stream's in the end,
    timing_ms.total the longest. `leaked` is 0: nothing was shown meanwhile.
    """
    settling = next(
        (it for verdict in ("block", "revise") for it in decisions if it.verdict == verdict),
        decisions[-1],
    )
    last = decisions[-1]
    total = max(it.timing_ms.total for it in decisions)
    return msgspec.structs.replace(
        settling,
        start=0 if settling.verdict == "allow" else settling.start,
        released_to=min(last.released_to, last.end), leaked=0, final=True,
        scores=highest_scores(it.scores for it in decisions),
        harmful=highest(it.harmful for it in decisions),
        timing_ms=msgspec.structs.replace(settling.timing_ms, total=total),
    )  # fmt: skip


def highest_scores(scores: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The highest score of each harm, of those that were judged."""
    found: dict[str, float] = {}
    for row in scores:
        for harm, score in row.items():
            found[harm] = max(score, found.get(harm, 0.0))
    return found


def highest(scores: Iterable[float | None]) -> float | None:
    """The highest; None where nothing was judged."""
    return max((score for score in scores if score is not None), default=None)


def shown(text: str, decisions: Sequence[Decision]) -> Shown:
    """What may be shown of the text: allowed segments as they are, revised ones as revised."""
    text = joined(text)
    parts = []
    for decision in decisions:
        if decision.verdict == "allow":
            parts.append(text[decision.start : decision.end])
        elif decision.revision is not None:
            parts.append(decision.revision.text)
    return Shown("".join(parts), all(decision.verdict == "allow" for decision in decisions))


# -- what comes in --------------------------------------------------------------------------------


def joined(text: str) -> str:
    """The text as decisions count it: a surrogate pair is one code point."""
    if text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")


def _request(given: str | Request | Mapping[str, Any]) -> Request:
    """The request, its types checked; messages name fields and hold no text."""
    if isinstance(given, str):
        return Request(given)
    if isinstance(given, Request):
        given = msgspec.structs.asdict(given)
    if not isinstance(given, Mapping):
        raise TypeError(f"a text is a str, a mapping or a Request, not {type(given).__name__}")
    fields = {**given, "context": _turns(given.get("context", ()))}
    return msgspec.convert(fields, Request, from_attributes=True)


def _turns(context: Context) -> list[Any]:
    """Turns, ready to be checked by msgspec."""
    if isinstance(context, str):
        return [TurnRecord("user", context)]
    return [
        dict(zip(("role", "content"), turn, strict=True)) if isinstance(turn, tuple) else turn
        for turn in context
    ]


def _new_id() -> str:
    return f"local/{uuid.uuid4().hex}"


@lru_cache(maxsize=1)
def _shared_detectors(specs: tuple[str, ...], models: Path) -> tuple[Detector, ...]:
    """Loaded once a process: they hold no state, and take a second to load."""
    return load_detectors(specs, models)


@lru_cache(maxsize=1)
def _shared_second(
    spec: SecondSpec | None, models: Path, detectors: tuple[Detector, ...]
) -> Second | None:
    """As _shared_detectors, and never ended: the next moderator asks it too."""
    if spec is None:
        return None
    return load_second(spec, models, detectors, load_combination(models, detectors))


class _Pulled:
    """A plain iterator as an async one, read in a thread of its own."""

    def __init__(self, tokens: Iterable[str]) -> None:
        self._tokens = iter(tokens)
        self._thread = ThreadPoolExecutor(1, "tidegate-tokens")

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        token = await asyncio.get_running_loop().run_in_executor(
            self._thread, next, self._tokens, None
        )
        if token is None:
            raise StopAsyncIteration
        return token

    async def aclose(self) -> None:
        """Close the iterator once it has given what it is about to give."""
        close = getattr(self._tokens, "close", None)
        if close is not None:
            self._thread.submit(close)
        self._thread.shutdown(wait=False)


def _as_async(tokens: AsyncIterable[str] | Iterable[str]) -> AsyncIterable[str]:
    return tokens if isinstance(tokens, AsyncIterable) else _Pulled(tokens)


# -- without an event loop ------------------------------------------------------------------------


class SyncModerator:
    """A Moderator for code without an event loop; it runs in a thread. Any thread may call it."""

    def __init__(
        self, settings: Settings | None = None, *, detectors: Sequence[Detector] | None = None
    ) -> None:
        self._moderator = Moderator(settings, detectors=detectors)
        self._exit = ExitStack()
        self._portal: BlockingPortal | None = None

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._portal = stack.enter_context(
                start_blocking_portal("asyncio", backend_options={"use_uvloop": True})
            )
            stack.enter_context(self._portal.wrap_async_context_manager(self._moderator))
            self._exit = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self._portal = None
        self._exit.__exit__(kind, error, trace)

    @property
    def _running(self) -> BlockingPortal:
        if self._portal is None:
            raise ModeratorClosed("not open: use it inside `with SyncModerator(...) as moderator`")
        return self._portal

    def moderate(self, text: str, context: Context = (), **more: Any) -> Decision:
        """As Moderator.moderate."""
        return self._running.call(partial(self._moderator.moderate, text, context, **more))

    def moderate_batch(self, texts: Iterable[str | Request | Mapping[str, Any]]) -> list[Decision]:
        """As Moderator.moderate_batch."""
        return self._running.call(self._moderator.moderate_batch, list(texts))

    def process_output(self, text: str, context: Context = (), **more: Any) -> Shown:
        """As Moderator.process_output."""
        return self._running.call(partial(self._moderator.process_output, text, context, **more))

    def decisions(self, text: str, context: Context = (), **more: Any) -> list[Decision]:
        """As Moderator.decisions."""
        return self._running.call(partial(self._moderator.decisions, text, context, **more))

    def guard(self, tokens: Iterable[str], context: Context = (), **more: Any) -> "SyncGuarded":
        """As Moderator.guard, for a plain `for` over a plain iterator."""
        portal = self._running
        make = partial(self._moderator.guard, tokens, context, **more)
        return SyncGuarded(portal, portal.call(make))


class SyncGuarded:
    """A Guarded for a plain `for`: an iterator over the released text."""

    def __init__(self, portal: BlockingPortal, guarded: Guarded) -> None:
        self._portal = portal
        self._guarded = guarded

    def __iter__(self) -> Iterator[str]:
        pieces = aiter(self._guarded)
        try:
            while (piece := self._portal.call(anext, pieces, None)) is not None:
                yield piece
        finally:
            self._portal.call(self._guarded.aclose)

    @property
    def decision(self) -> Decision | None:
        """The last decision."""
        return self._guarded.decision

    @property
    def verdict(self) -> Verdict | None:
        """The stream's verdict, as Guarded.verdict."""
        return self._guarded.verdict

    @property
    def revisions(self) -> list[Revision]:
        """Proposed so far."""
        return self._guarded.revisions


class guard:  # noqa: N801 - used as a function, as `open` is
    """Released text of one token stream, with a moderator of its own: for scripts.

        async for piece in guard(tokens, context="..."): ...
        for piece in guard(plain_iterator): ...

    Afterwards `.verdict` and `.decision` say how it ended. Services keep one Moderator, whose
    batches and cached scores all streams share.
    """

    def __init__(
        self, tokens: AsyncIterable[str] | Iterable[str], context: Context = (), *,
        settings: Settings | None = None, detectors: Sequence[Detector] | None = None, **more: Any,
    ) -> None:  # fmt: skip
        """more: tenant, channel, stream_id, apply_revisions, as Moderator.guard takes them."""
        self._tokens = tokens
        self._context = context
        self._settings = settings
        self._detectors = detectors
        self._more = more
        self._guarded: Guarded | SyncGuarded | None = None

    async def __aiter__(self) -> AsyncIterator[str]:
        async with Moderator(self._settings, detectors=self._detectors) as moderator:
            self._guarded = moderator.guard(self._tokens, self._context, **self._more)
            async with self._guarded:
                async for piece in self._guarded:
                    yield piece

    def __iter__(self) -> Iterator[str]:
        if not isinstance(self._tokens, Iterable):
            raise TypeError("these tokens come asynchronously: use `async for`")
        with SyncModerator(self._settings, detectors=self._detectors) as moderator:
            self._guarded = moderator.guard(self._tokens, self._context, **self._more)
            yield from self._guarded

    @property
    def decision(self) -> Decision | None:
        """The last decision."""
        return self._guarded.decision if self._guarded else None

    @property
    def verdict(self) -> Verdict | None:
        """The stream's verdict, as Guarded.verdict."""
        return self._guarded.verdict if self._guarded else None
