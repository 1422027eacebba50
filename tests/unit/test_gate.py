"""What a guarded stream shows, holds, sends and closes; decisions are fed by hand."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from worker.decode import decode
from worker.events import Decision, Revision, Timing, Verdict
from worker.gate import _encode, _Head
from worker.guarded import GateClosed, GateTimeout, Guarded, Holding
from worker.settings import load

HOLDING = Holding(
    decision_timeout_s=5.0, due_chars=40, max_unreleased_chars=60, keepalive_s=5.0, linger_s=0.0
)


def decision(
    segment: int, start: int, end: int, verdict: Verdict = "allow", *, final: bool = False,
    released_to: int | None = None, leaked: int = 0, revision: str | None = None,
) -> Decision:  # fmt: skip
    """A decision with what matters to a gate."""
    if released_to is None:
        released_to = end if verdict == "allow" else start
    return Decision(
        decision_id=f"t-0-0-{segment}", stream_id="s", tenant="default", channel="text", seq=0,
        segment=segment, verdict=verdict, start=start, end=end, released_to=released_to,
        leaked=leaked, final=final or verdict == "block", harm=None, scores={}, harmful=None,
        stage="toxicity", reason="", policy="", thresholds_version=0, model="",
        revision=Revision(revision, start, end, "template", None) if revision else None,
        ts_ms=0, timing_ms=Timing(),
    )  # fmt: skip


class Tokens:
    """Tokens that come when the test says so, and what became of their generator."""

    def __init__(self, *tokens: str, endless: str = "", error: Exception | None = None) -> None:
        self.taken = 0
        self.closed = False
        self.go = asyncio.Event()  # between the given tokens and what follows
        self._tokens, self._endless, self._error = tokens, endless, error

    async def __call__(self) -> AsyncIterator[str]:
        try:
            for token in self._tokens:
                self.taken += 1
                yield token
            if self._error is not None:
                raise self._error
            while self._endless:
                self.taken += 1
                yield self._endless
                await asyncio.sleep(0)
            await self.go.wait()
        finally:
            await asyncio.sleep(0)  # clearing up may wait, too
            self.closed = True


class Wire:
    """Where deltas go: kept, and answered by the test."""

    def __init__(self) -> None:
        self.deltas: list[tuple[int, str, bool]] = []
        self.ended = 0

    async def send(self, seq: int, text: str, final: bool) -> None:
        await asyncio.sleep(0)
        self.deltas.append((seq, text, final))

    def end(self) -> None:
        self.ended += 1

    @property
    def text(self) -> str:
        return "".join(text for _, text, _ in self.deltas)

    @property
    def final(self) -> bool:
        return bool(self.deltas) and self.deltas[-1][2]


class Reader:
    """Iterates a guarded stream in a task; what it got so far."""

    def __init__(self, guarded: Guarded) -> None:
        self.pieces: list[str] = []
        self.task = asyncio.create_task(self._read(guarded))

    async def _read(self, guarded: Guarded) -> None:
        async for piece in guarded:
            self.pieces.append(piece)

    @property
    def text(self) -> str:
        return "".join(self.pieces)


def guard(tokens: Tokens, holding: Holding = HOLDING, **options: Any) -> tuple[Guarded, Wire]:
    wire = Wire()
    return Guarded(tokens(), wire.send, "s", holding, on_end=wire.end, **options), wire


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


async def settled() -> None:
    """Let everything that can happen without time happen."""
    for _ in range(50):
        await asyncio.sleep(0)


async def test_shows_released_text_and_nothing_more() -> None:
    """Text comes out up to released_to, as decisions come, and the rest when the last allows it."""
    tokens = Tokens("Hello ", "world. ", "More")
    guarded, wire = guard(tokens)
    reader = Reader(guarded)
    await until(lambda: wire.text == "Hello world. More")
    assert reader.text == ""
    guarded.feed(decision(0, 0, 13))
    await settled()
    assert reader.text == "Hello world. "
    assert (guarded.held, guarded.verdict) == ("More", None)
    tokens.go.set()
    await until(lambda: wire.final)
    guarded.feed(decision(1, 13, 17, final=True))
    await reader.task
    assert reader.text == "Hello world. More"
    assert guarded.verdict == "allow"
    assert [seq for seq, _, _ in wire.deltas] == list(range(len(wire.deltas)))
    assert (tokens.closed, wire.ended) == (True, 1)


async def test_a_block_stops_the_model_though_nobody_is_reading() -> None:
    """A block closes the tokens at once; of the text only what was released before comes out."""
    tokens = Tokens("Fine. ", "Bad. ")
    guarded, wire = guard(tokens)
    pieces = aiter(guarded)
    first = asyncio.ensure_future(anext(pieces))
    await until(lambda: wire.text == "Fine. Bad. ")
    guarded.feed(decision(0, 0, 6))
    assert await first == "Fine. "
    guarded.feed(decision(1, 6, 11, "block"))
    await until(lambda: tokens.closed)  # while the reader does something else
    assert [piece async for piece in pieces] == []
    assert (guarded.verdict, guarded.held) == ("block", "Bad. ")
    assert not wire.final  # the worker has closed the stream by itself


async def test_tokens_are_not_read_far_ahead() -> None:
    """A slow worker slows the model: what is not released is bounded, and what is not taken out."""
    tokens = Tokens(endless="ten chars ")
    guarded, wire = guard(tokens)
    pieces = aiter(guarded)
    waiting = asyncio.ensure_future(anext(pieces))
    await until(lambda: len(wire.text) == 70)
    await settled()
    assert tokens.taken == 7  # one above the bound of 60
    guarded.feed(decision(0, 0, 30))
    assert await waiting == "ten chars " * 3
    await until(lambda: len(wire.text) == 100)
    guarded.feed(decision(1, 30, 60))  # released, but nobody takes it out
    await settled()
    assert tokens.taken == 10
    await guarded.aclose()


async def test_a_reader_that_leaves_closes_tokens_and_stream() -> None:
    """Leaving the loop closes the tokens and tells the worker that the text ends here."""
    tokens = Tokens("Fine. ", "More ")
    guarded, wire = guard(tokens)
    asyncio.get_running_loop().call_later(0.01, lambda: guarded.feed(decision(0, 0, 6)))
    async for _ in guarded:
        break
    await until(lambda: wire.ended == 1)
    assert tokens.closed
    assert wire.text == "Fine. More "
    assert wire.final
    assert guarded.verdict is None


async def test_an_exception_of_the_tokens_ends_the_text_where_it_stands() -> None:
    """The text before an exception is judged and shown as far as it may be, then it is raised."""
    tokens = Tokens("Fine. ", "Cut sh", error=OSError("model gone"))
    guarded, wire = guard(tokens)
    reader = Reader(guarded)
    await until(lambda: wire.final)
    guarded.feed(decision(0, 0, 12, final=True))
    with pytest.raises(OSError, match="model gone"):
        await reader.task
    assert reader.text == "Fine. Cut sh"


async def test_no_decision_in_time() -> None:
    """Without a decision that is due the stream fails, shows nothing, and lets go of everything."""
    tokens = Tokens("Held text")
    guarded, wire = guard(tokens, HOLDING._replace(decision_timeout_s=0.05))
    tokens.go.set()
    reader = Reader(guarded)
    with pytest.raises(GateTimeout, match=r"no decision for 0.05 s; 9 characters"):
        await reader.task
    assert reader.text == ""
    assert (guarded.verdict, tokens.closed, wire.ended) == (None, True, 1)


async def test_a_slow_model_is_no_timeout() -> None:
    """While too little text is there for a segment no decision is due; the stream is kept alive."""
    tokens = Tokens("Let me look that up.")
    guarded, wire = guard(tokens, HOLDING._replace(decision_timeout_s=0.02, keepalive_s=0.03))
    reader = Reader(guarded)
    await until(lambda: len(wire.deltas) > 3)
    assert not reader.task.done()
    assert wire.deltas[1][1:] == ("", False)
    await guarded.aclose()
    await reader.task


async def test_the_worker_ends_the_stream_first() -> None:
    """A last decision before the last token means that later text is judged by nobody: an error."""
    tokens = Tokens("Hello")
    guarded, wire = guard(tokens)
    reader = Reader(guarded)
    await until(lambda: wire.text == "Hello")
    guarded.feed(decision(0, 0, 5, final=True))
    with pytest.raises(GateClosed):
        await reader.task
    assert (reader.text, guarded.verdict, wire.final) == ("Hello", None, False)


async def test_release_ahead_of_text_and_taken_back() -> None:
    """Text released before it came is shown when it comes; what a block takes back is not."""
    tokens = Tokens("One. ", "Two. ")
    guarded, wire = guard(tokens)
    pieces = aiter(guarded)
    first = asyncio.ensure_future(anext(pieces))
    await until(lambda: wire.text == "One. Two. ")
    guarded.feed(decision(0, 0, 5, released_to=8))
    assert await first == "One. Two"
    guarded.feed(decision(1, 5, 10, released_to=13))  # three characters that are not there yet
    guarded.feed(decision(2, 10, 15, "block", released_to=8, leaked=2))
    assert [piece async for piece in pieces] == []


async def test_text_that_comes_after_its_release() -> None:
    """Where release runs ahead, a token is shown as it comes, up to released_to."""
    tokens = Tokens("One. ", endless="ab")
    guarded, _ = guard(tokens, HOLDING._replace(max_unreleased_chars=4))
    pieces = aiter(guarded)
    first = asyncio.ensure_future(anext(pieces))
    await settled()
    guarded.feed(decision(0, 0, 5, released_to=8))
    shown = await first
    while len(shown) < 8:
        shown += await anext(pieces)
    assert shown == "One. aba"
    await guarded.aclose()


async def test_repeated_decisions_change_nothing() -> None:
    """An at-least-once worker's repeats neither show text twice nor move anything back."""
    tokens = Tokens("One. Two. Three")
    guarded, wire = guard(tokens, HOLDING._replace(apply_revisions=True))
    reader = Reader(guarded)
    await until(lambda: wire.text == "One. Two. Three")
    both = decision(0, 0, 5), decision(1, 5, 10, "revise", revision="[2] ")
    for which in (0, 0, 1, 0, 1):
        guarded.feed(both[which])
        await settled()
    assert reader.text == "One. [2] "
    assert guarded.decision is both[1]
    assert len(guarded.revisions) == 1
    await guarded.aclose()
    await reader.task


async def test_a_revision_ends_the_text() -> None:
    """By default nothing is shown from a revised segment on, and the model stops."""
    tokens = Tokens("One. Two. Three. ", endless="Four. ")
    guarded, wire = guard(tokens)
    reader = Reader(guarded)
    await until(lambda: len(wire.text) > 17)
    guarded.feed(decision(0, 0, 5))
    guarded.feed(decision(1, 5, 10, "revise", released_to=5, revision="[2] "))
    await reader.task
    assert reader.text == "One. "
    assert (guarded.verdict, tokens.closed, wire.final) == ("revise", True, True)
    assert [revision.text for revision in guarded.revisions] == ["[2] "]


async def test_revisions_in_place_of_their_segments() -> None:
    """With apply_revisions a proposal stands for its segment, and later segments follow."""
    tokens = Tokens("One. Two. Three. Four. ")
    guarded, wire = guard(tokens, HOLDING._replace(apply_revisions=True))
    reader = Reader(guarded)
    tokens.go.set()
    await until(lambda: wire.final)
    for step in (
        decision(0, 0, 5),
        decision(1, 5, 10, "revise", released_to=5, revision="[2] "),
        decision(2, 10, 17, released_to=5),
        decision(3, 17, 23, "revise", released_to=5, revision="[4] ", final=True),
    ):
        guarded.feed(step)
    await reader.task
    assert reader.text == "One. [2] Three. [4] "
    assert guarded.verdict == "revise"


async def test_a_block_after_a_revision() -> None:
    """A block ends a revised text, too, before its own segment."""
    tokens = Tokens("One. Two. Three. ")
    guarded, wire = guard(tokens, HOLDING._replace(apply_revisions=True))
    reader = Reader(guarded)
    await until(lambda: len(wire.text) == 17)
    guarded.feed(decision(0, 0, 5, "revise", revision="[1] "))
    guarded.feed(decision(1, 5, 10, released_to=0))
    guarded.feed(decision(2, 10, 17, "block", released_to=0))
    await reader.task
    assert reader.text == "[1] Two. "
    assert guarded.verdict == "block"


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        (("a\ud83d", "\ude00b"), "a\U0001f600b"),  # a pair over two tokens
        (("a\ud83d\ude00b",), "a\U0001f600b"),  # a pair inside one
        (("a\ud83d", "b"), "a\ud83db"),
        (("a\ud83d",), "a\ud83d"),
        (("\ude00", "\ud83d", "\ud83d", "\ude00"), "\ude00\ud83d\U0001f600"),
    ],
)
async def test_surrogates_count_as_the_worker_counts_them(
    tokens: tuple[str, ...], text: str
) -> None:
    """However a pair is split it is one code point, in what is sent and in what is shown."""
    source = Tokens(*tokens)
    guarded, wire = guard(source)
    source.go.set()
    reader = Reader(guarded)
    await until(lambda: wire.final)
    head = _Head("s", [], "default", "text")
    sent = [decode(_encode(head, *delta)).delta for delta in wire.deltas]
    assert "".join(sent) == text
    guarded.feed(decision(0, 0, len(text), final=True))
    await reader.task
    assert reader.text == text


async def test_a_broken_wire_is_raised() -> None:
    """What sending raises comes out where the stream is read, and the tokens are closed."""

    async def refuse(_seq: int, _text: str, _final: bool) -> None:
        raise ConnectionError("no broker")

    tokens = Tokens("Hello")
    guarded = Guarded(tokens(), refuse, "s", HOLDING)
    with pytest.raises(ConnectionError, match="no broker"):
        await Reader(guarded).task
    assert tokens.closed


async def test_a_wire_that_hangs() -> None:
    """Sending that takes for ever, as a client does whose broker is gone, ends the stream."""

    async def hang(_seq: int, _text: str, _final: bool) -> None:
        await asyncio.Event().wait()

    tokens = Tokens("Hello")
    guarded = Guarded(tokens(), hang, "s", HOLDING._replace(decision_timeout_s=0.05))
    with pytest.raises(GateTimeout, match="nobody took delta 0"):
        await Reader(guarded).task
    assert tokens.closed


async def test_streams_of_clients_that_only_have_close() -> None:
    """A client's stream without aclose is closed with its own `close`."""

    class Stream:
        closed = False

        async def __aiter__(self) -> AsyncIterator[str]:
            while True:
                yield "token "
                await asyncio.sleep(0)

        async def close(self) -> None:
            self.closed = True

    stream, wire = Stream(), Wire()
    guarded = Guarded(stream, wire.send, "s", HOLDING)
    reader = Reader(guarded)
    await until(lambda: len(wire.text) > 40)
    guarded.feed(decision(0, 0, 40, "block"))
    await reader.task
    assert stream.closed


def test_bounds_that_could_not_work_are_refused() -> None:
    """Holding back less than a segment would wait for a decision that needs more text."""
    with pytest.raises(ValueError, match="max_unreleased_chars: must be more than 401"):
        Holding.of(load(), max_unreleased_chars=400)


def test_a_first_delta_carries_the_conversation() -> None:
    """Context, tenant and channel are in the first delta alone, and decode to what was given."""
    head = _Head("s", [{"role": "user", "content": "half \ud83d"}], "acme", "tool")
    first = decode(_encode(head, 0, "text", False))
    assert [(turn.role, turn.content) for turn in first.context] == [("user", "half \ud83d")]
    assert (first.tenant, first.channel, first.delta) == ("acme", "tool", "text")
    assert set(json.loads(_encode(head, 1, "", True))) == {"stream_id", "seq", "delta", "final"}
