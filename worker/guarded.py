"""Tokens in, released text out: one stream between a model and whoever reads it. Knows no Kafka.

    tokens -> _read -> _text, _unsent -> _send_deltas -> send(seq, text, final)
    feed(decision) -> _ready -> whoever iterates

The gate (gate.py) sends through Kafka, the Moderator (moderator.py) into a lane of its own. What
is yielded is `text[:released_to]` and never more, unless `apply_revisions` puts proposals in.
"""

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from types import TracebackType
from typing import Any, NamedTuple, Self

import structlog

from worker.errors import TidegateError
from worker.events import Decision, Revision, Verdict
from worker.settings import Settings

log = structlog.get_logger()

Send = Callable[[int, str, bool], Awaitable[None]]  # seq, text, final; returns when it is accepted

_SPARE_S = 5.0  # a decision is waited for so much longer than a moved partition needs
_CLOSE_S = 5.0  # an abandoned stream's last delta may take so long


class GateError(TidegateError):
    """A guarded stream cannot go on; nothing was yielded that was not released."""


class GateTimeout(GateError):
    """A decision that was due did not come, or a delta could not be sent."""


class GateClosed(GateError):
    """The worker ended the stream before the tokens did."""


class Holding(NamedTuple):
    """How long and how much a guarded stream holds back."""

    decision_timeout_s: float  # a decision that is due and does not come ends the stream
    due_chars: int  # more undecided text than this is due a decision
    max_unreleased_chars: int  # tokens are not read further ahead of what was yielded
    keepalive_s: float  # a model silent for so long gets an empty delta, or its stream is idle
    linger_s: float = 0.002  # tokens that come meanwhile travel in one delta
    apply_revisions: bool = False

    @classmethod
    def of(
        cls, settings: Settings, *, decision_timeout_s: float | None = None,
        max_unreleased_chars: int = 4_000, linger_ms: float = 2.0, apply_revisions: bool = False,
    ) -> "Holding":  # fmt: skip
        """What fits a worker with these settings. Raises ValueError where nothing could move.

        decision_timeout_s: by default what a killed worker's partition needs to move and be judged.
        """
        needed_ms = settings.hold_timeout_ms + settings.session_timeout_ms
        due = (settings.lookahead_segments + 1) * settings.max_segment_chars + 1
        if max_unreleased_chars <= due:
            msg = (
                f"max_unreleased_chars: must be more than {due}, or the tokens would wait for a "
                "decision that needs more tokens"
            )
            raise ValueError(msg)
        return cls(
            needed_ms / 1e3 + _SPARE_S if decision_timeout_s is None else decision_timeout_s,
            due, max_unreleased_chars, settings.idle_timeout_ms / 3e3, linger_ms / 1e3,
            apply_revisions,
        )  # fmt: skip


class Guarded:
    """An async iterator over the released text of one stream; iterate it once.

    It ends when the stream is decided to its end, or blocked, or revised (with `apply_revisions`
    it goes on behind the revision). A block closes `tokens` at once, whether or not anybody is
    reading. Leaving the loop early closes them too and tells the worker that the text ends here;
    `async with` or `aclose` do so at a definite moment.

    An exception of `tokens` ends the text where it stands: what is released of it is yielded, then
    the exception comes. GateTimeout and GateClosed come at once.
    """

    def __init__(
        self, tokens: AsyncIterable[str], send: Send, stream_id: str, holding: Holding,
        on_start: Callable[[], None] = lambda: None, on_end: Callable[[], None] = lambda: None,
        on_decision: Callable[[Decision], None] = lambda _: None,
    ) -> None:  # fmt: skip
        """send: called once at a time, seq from 0. on_start: decisions can be fed from now on; what
        it raises comes out of the iteration. on_end: nothing more will be fed or sent."""
        self.stream_id = stream_id
        self.decision: Decision | None = None  # the last one
        self.revisions: list[Revision] = []  # proposed so far
        self._tokens = tokens
        self._iterator: AsyncIterator[str] | None = None
        self._send = send
        self._holding = holding
        self._on_start, self._on_end = on_start, on_end
        self._on_decision = on_decision

        self._text = ""  # of the stream, from _position on
        self._position = 0  # code points that were released or replaced
        self._ready = ""  # released, not yielded
        self._carry = ""  # a high surrogate that waits for its low half
        self._unsent = ""
        self._seq = 0  # of the next delta
        self._sent_to = 0  # code points
        self._decided_to = 0
        self._segments = 0  # decided
        self._released_to = 0
        self._frozen = False  # a segment was revised: released_to stays
        self._due_since: float | None = None  # the loop's clock

        self._tokens_ended = self._sent_final = self._abandoned = False
        self._ended = False  # the worker's side has ended: nothing more is sent or decided
        self._done = False  # nothing more will be released
        self._error: Exception | None = None  # of the way there and back
        self._tokens_error: Exception | None = None
        self._stopping = self._source_closed = self._started = False
        self._news, self._room, self._work = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._reader: asyncio.Task[None] | None = None
        self._sender: asyncio.Task[None] | None = None
        self._closed: asyncio.Task[None] | None = None

    # -- what came out ------------------------------------------------------------------------

    @property
    def verdict(self) -> Verdict | None:
        """The stream's: block, else revise where a segment was revised, else allow.

        None until the stream was decided to its end, so for good where it was left or has failed:
        doubt never reads as allow.
        """
        if not self._done:
            return None
        if self.decision is not None and self.decision.verdict == "block":
            return "block"
        return "revise" if self._frozen else "allow"

    @property
    def released_to(self) -> int:
        """Code points of the stream's text that may be shown, as the last decision has it."""
        return self._released_to

    @property
    def held(self) -> str:
        """The text that came and was not released; after a block, what nobody gets to see."""
        return self._text

    # -- for whoever reads it -----------------------------------------------------------------

    def __aiter__(self) -> AsyncIterator[str]:
        if self._started:
            raise RuntimeError("a guarded stream is iterated once")
        self._started = True
        return self._pieces()

    async def _pieces(self) -> AsyncIterator[str]:
        # An async generator: a loop that is left early drops it, and the event loop closes it.
        try:
            self._on_start()
            self._reader = asyncio.create_task(self._read())
            self._sender = asyncio.create_task(self._send_deltas())
            while True:
                if self._ready:
                    piece, self._ready = self._ready, ""
                    self._room.set()
                    yield piece
                elif self._done or self._error is not None or self._closed is not None:
                    break
                else:
                    await self._wait_for_news()
        finally:
            await self.aclose()
        if self._error is not None:
            raise self._error from self._tokens_error
        if self._tokens_error is not None:
            raise self._tokens_error

    async def _wait_for_news(self) -> None:
        self._news.clear()
        timeout_s, since = self._holding.decision_timeout_s, self._due_since
        try:
            async with asyncio.timeout_at(None if since is None else since + timeout_s):
                await self._news.wait()
        except TimeoutError:
            msg = (
                f"{self.stream_id}: no decision for {timeout_s:g} s; {len(self._text)} characters "
                "behind the last released one were not shown. Is a worker running (`tidegate run`)?"
            )
            self.fail(GateTimeout(msg))

    async def aclose(self) -> None:
        """Close the tokens, end the stream, let go. May be called again, and by several."""
        if self._closed is None:
            self._closed = asyncio.create_task(self._close())
        await asyncio.shield(self._closed)

    async def _close(self) -> None:
        self._started = True
        self._news.set()
        self._abandoned = True
        self._stop_tokens()
        if self._reader is not None:
            await asyncio.gather(self._reader, return_exceptions=True)
        await self._close_tokens()
        self._end_tokens()
        if self._sender is not None:
            await asyncio.wait([self._sender], timeout=_CLOSE_S)
            self._sender.cancel()
            await asyncio.gather(self._sender, return_exceptions=True)
        self._ended = True
        self._on_end()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        await self.aclose()

    # -- tokens in ----------------------------------------------------------------------------

    async def _read(self) -> None:
        """Take tokens while there is room; in the end close them, whatever ended it."""
        try:
            self._iterator = aiter(self._tokens)
            async for token in self._iterator:
                if self._stopping:
                    break
                self._append(token)
                await self._wait_for_room()
        except Exception as error:  # noqa: BLE001 - it is raised where the stream is read
            if not self._stopping:
                self._tokens_error = error
        finally:
            self._end_tokens()
            await self._close_tokens()

    async def _wait_for_room(self) -> None:
        while len(self._text) + len(self._ready) > self._holding.max_unreleased_chars:
            self._room.clear()
            await self._room.wait()

    def _append(self, token: str) -> None:
        """Take a token as the worker will count it: a surrogate pair is one code point."""
        text = _join_pairs(self._carry + token)
        self._carry = text[-1] if text and "\ud800" <= text[-1] <= "\udbff" else ""
        self._add(text[: len(text) - len(self._carry)])

    def _add(self, text: str) -> None:
        if text:
            self._text += text
            self._unsent += text
            self._work.set()
            if not self._frozen:
                self._release(self._released_to)  # it may be ahead of the text

    def _end_tokens(self) -> None:
        if not self._tokens_ended:
            self._tokens_ended = True
            self._add(self._carry)
            self._carry = ""
            self._work.set()

    def _stop_tokens(self) -> None:
        """Read no more: cancel what waits for the next token. Once: a second time would cancel
        the tokens' own clearing up."""
        if not self._stopping:
            self._stopping = True
            if self._reader is not None:
                self._reader.cancel()

    async def _close_tokens(self) -> None:
        """`aclose` of the iterator, else `close` as LLM clients' streams have it."""
        if self._source_closed:
            return
        self._source_closed = True
        sources = [self._iterator, self._tokens]
        for source in sources[1:] if self._iterator is self._tokens else sources:
            close: Any = getattr(source, "aclose", None) or getattr(source, "close", None)
            if close is None:
                continue
            try:
                outcome = close()
                if hasattr(outcome, "__await__"):
                    await outcome
            except Exception as error:  # noqa: BLE001 - the verdict stands all the same
                log.warning("tokens.close_failed", error=type(error).__name__)

    # -- deltas out ---------------------------------------------------------------------------

    async def _send_deltas(self) -> None:
        """One delta at a time; what comes meanwhile is the next one."""
        try:
            while not (self._ended or self._sent_final):
                await self._wait_for_work()
                if self._ended or (self._abandoned and not self._seq):
                    return  # the worker has closed it, or never heard of it
                text, self._unsent = self._unsent, ""
                self._sent_final = final = self._tokens_ended
                seq, self._seq = self._seq, self._seq + 1
                await self._send_in_time(seq, text, final)
                self._sent_to += len(text)
                self._note_due()
        except Exception as error:  # noqa: BLE001 - it is raised where the stream is read
            self.fail(error)

    async def _send_in_time(self, seq: int, text: str, final: bool) -> None:
        """Send a delta. Raises GateTimeout: a client may try to reach its broker for ever."""
        timeout_s = self._holding.decision_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                await self._send(seq, text, final)
        except TimeoutError as error:
            msg = f"{self.stream_id}: nobody took delta {seq} for {timeout_s:g} s"
            raise GateTimeout(msg) from error

    async def _wait_for_work(self) -> None:
        """Return when there is text or the end to send, or it is time for a sign of life."""
        try:
            async with asyncio.timeout(self._holding.keepalive_s if self._seq else None):
                await self._work.wait()
        except TimeoutError:
            return
        if not self._tokens_ended:
            await asyncio.sleep(self._holding.linger_s)
        self._work.clear()

    def _note_due(self) -> None:
        """Start the clock when a decision becomes due; stop it when none is."""
        due = self._sent_to - self._decided_to > self._holding.due_chars
        if not (self._sent_final or due):
            self._due_since = None
        elif self._due_since is None:
            self._due_since = asyncio.get_running_loop().time()
            self._news.set()  # whoever waits now waits with a limit

    # -- decisions in -------------------------------------------------------------------------

    def feed(self, decision: Decision) -> None:
        """Take the stream's next decision. Repeats, and what follows its end, are nothing."""
        if self._done or self._error is not None or decision.segment < self._segments:
            return
        self._segments = decision.segment + 1
        self._decided_to = decision.end
        self.decision = decision
        if decision.verdict == "allow":
            self._allow(decision)
        else:
            self._withhold(decision)
        self._due_since = None
        self._note_due()
        try:
            self._on_decision(decision)
        except Exception as error:  # noqa: BLE001 - it concerns this stream alone
            self.fail(error)
        self._end_where_due(decision)

    def _end_where_due(self, decision: Decision) -> None:
        self._ended = decision.final or decision.verdict == "block"
        stopped = self._frozen and not self._holding.apply_revisions
        if decision.verdict != "block" and decision.final and not self._sent_final and not stopped:
            msg = f"{self.stream_id}: the worker ended the stream while tokens were still coming"
            self.fail(GateClosed(msg))
        elif self._ended or stopped:
            self._done = True
            self._stop_tokens()
        self._work.set()
        self._news.set()

    def _allow(self, decision: Decision) -> None:
        if self._frozen:
            self._release(decision.end)
        else:
            self._released_to = decision.released_to
            self._release(decision.released_to)

    def _withhold(self, decision: Decision) -> None:
        """Show nothing of the segment: neither what was released too early and is still here, nor
        the rest. A revision stands for the whole of it."""
        if not self._frozen:
            early = max(0, self._position - decision.released_to)
            self._ready = self._ready[: max(0, len(self._ready) - early)]
            self._released_to = decision.released_to
            self._release(decision.released_to)
        if decision.verdict != "revise":
            return
        self._frozen = True
        if decision.revision is not None:
            self.revisions.append(decision.revision)
        if self._holding.apply_revisions:
            self._take(decision.end)
            if decision.revision is not None:
                self._ready += decision.revision.text

    def _release(self, to: int) -> None:
        self._ready += self._take(to)
        if self._ready:
            self._news.set()

    def _take(self, to: int) -> str:
        """The text up to code point `to`, as far as it came and is still held; held no longer."""
        length = max(0, to - self._position)
        taken, self._text = self._text[:length], self._text[length:]
        self._position += len(taken)
        self._room.set()
        return taken

    def fail(self, error: Exception) -> None:
        """End the stream with an error: nothing more can be decided."""
        if self._error is None and not self._done:
            self._error = error
            self._stop_tokens()
            self._news.set()


def _join_pairs(text: str) -> str:
    """The text with every surrogate pair as one code point; halves stay as they are."""
    if text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
