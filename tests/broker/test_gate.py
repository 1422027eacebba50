"""The gate on a real broker with a real worker: what is shown, what stops, what is read."""

import asyncio
import random
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import pytest

from tests.broker.harness import Bed, Tail, make_text, until
from tests.fakes import MARKER, utf16_units
from tests.oracle import segment_bounds
from worker.errors import Stop
from worker.gate import Gate
from worker.guarded import GateError, GateTimeout, Guarded
from worker.settings import TEMPLATES

MARKING: dict[str, Any] = {"detectors": ["python:tests.fakes:MarkerDetector"]}
CUTS = (40, 120)  # the bed's min_segment_chars and max_segment_chars


async def stream(pieces: Iterable[str]) -> AsyncIterator[str]:
    for piece in pieces:
        yield piece
        await asyncio.sleep(0)


async def read(guarded: Guarded) -> str:
    """All that is shown."""
    return "".join([piece async for piece in guarded])


def split(rng: random.Random, text: str) -> list[str]:
    """The text in pieces of 1 to 30 UTF-16 units: pairs are torn apart, too."""
    units, pieces = "".join(utf16_units(text)), []
    while units:
        length = rng.randrange(1, 31)
        pieces.append(units[:length])
        units = units[length:]
    return pieces


def harmless_part(text: str) -> str:
    """What may be shown: everything before the first segment with the marker in it."""
    for start, end in segment_bounds(text, *CUTS):
        if MARKER in text[start:end]:
            return text[:start]
    return text


def with_markers(rng: random.Random, text: str) -> str:
    """The text with a marker at up to two places, some of them at a segment's very edge."""
    for _ in range(rng.randrange(3)):
        start, end = rng.choice(segment_bounds(text, *CUTS))
        at = rng.choice((start, max(start, end - 1), rng.randrange(start, end + 1)))
        text = text[:at] + MARKER + text[at:]
    return text


@pytest.fixture
def bed(kafka: str, unique: str, tmp_path: Path) -> Bed:
    return Bed(kafka, unique, tmp_path, **MARKING)


async def test_no_character_of_a_harmful_segment_is_shown(bed: Bed) -> None:
    """Every split of a text shows the same: all before the first harmful segment, nothing of it."""
    rng = random.Random(5)
    texts = [with_markers(rng, make_text(rng, rng.randrange(20, 900)) + "🎈") for _ in range(25)]
    async with bed, Gate(bed.settings) as gate:
        await bed.start_worker().has_loaded(bed.partitions)
        jobs = [(text, gate.guard(stream(split(rng, text)))) for text in texts for _ in range(4)]
        shown = await asyncio.gather(*(read(guarded) for _, guarded in jobs))
    for (text, guarded), seen in zip(jobs, shown, strict=True):
        assert seen == harmless_part(text)
        assert guarded.verdict == ("allow" if seen == text else "block")
        assert guarded.released_to == len(seen)
    assert {guarded.verdict for _, guarded in jobs} == {"allow", "block"}


async def test_many_streams_over_one_gate_and_its_partitions_alone(bed: Bed) -> None:
    """Hundreds of streams at once end as they should; a gate writes to and reads from its pins."""
    rng = random.Random(6)
    texts = [with_markers(rng, make_text(rng, 400)) for _ in range(300)]
    async with bed, Gate(bed.settings, [1, 3]) as gate, Gate(bed.settings, [0, 3]) as other:
        await bed.start_worker().has_loaded(bed.partitions)
        both = [*texts, *texts[:50]]
        guarded = [
            (gate if n < 300 else other).guard(stream(split(rng, text)), stream_id=f"s{n}")
            for n, text in enumerate(both)
        ]
        shown = await asyncio.gather(*map(read, guarded))
        assert shown == [harmless_part(text) for text in both]
        assert (gate.open_streams, other.open_streams) == (0, 0)
        assert (
            {pin.partition for pin in gate._consumer.assignment()} == {1, 3} == {*gate.partitions}
        )
        assert {pin.partition for pin in gate._positions} == {1, 3}
        for topic in (bed.settings.outputs_topic, bed.settings.decisions_topic):
            records = await bed.read(topic)
            own = [r.partition for r in records if int(r.key[1:]) < 300]
            assert set(own) == {1, 3}
            assert min(own.count(1), own.count(3)) > len(own) / 4


async def test_a_block_stops_the_model(bed: Bed) -> None:
    """A block closes the generator at once, and it had run ahead by no more than it may."""
    closed, produced = asyncio.Event(), 0

    async def model() -> AsyncIterator[str]:
        nonlocal produced
        try:
            for sentence in (
                "Fine and harmless words, more than enough of them. ",
                f"{MARKER} bad. ",
            ):
                yield sentence
            while True:
                produced += 1
                yield "On and on it goes, word by word. "
                await asyncio.sleep(0.001)
        finally:
            closed.set()

    async with bed, Gate(bed.settings, max_unreleased_chars=500) as gate:
        await bed.start_worker().has_loaded(bed.partitions)
        guarded = gate.guard(model())
        pieces = aiter(guarded)
        assert await anext(pieces) == "Fine and harmless words, more than enough of them. "
        async with asyncio.timeout(30):  # while whoever reads does something else
            await closed.wait()
        assert [piece async for piece in pieces] == []
        assert produced <= 500 / 33 + 1
        assert guarded.verdict == "block"
        assert guarded.decision is not None
        assert guarded.decision.harm == "violence"


async def test_leaving_early_ends_the_stream_for_the_worker(bed: Bed) -> None:
    """Whoever leaves the loop closes the generator, and the worker hears that the text ended."""
    closed = asyncio.Event()

    async def model() -> AsyncIterator[str]:
        try:
            while True:
                yield "On and on it goes, word by word. "
                await asyncio.sleep(0.001)
        finally:
            closed.set()

    async with bed, Tail(bed.bootstrap_servers, bed.settings.decisions_topic) as tail:
        await bed.start_worker().has_loaded(bed.partitions)
        async with Gate(bed.settings) as gate:
            async for _ in gate.guard(model()):
                break
            async with asyncio.timeout(30):
                await closed.wait()
            await tail.has_finals(1, timeout_s=30)
            await until(lambda: gate.open_streams == 0, 30, "the gate forgets the stream")
        assert closed.is_set()
        assert tail.finals == 1  # and no other came for it


async def test_without_a_worker(bed: Bed) -> None:
    """Where nobody decides, nothing is shown and the wait ends; the same gate serves later ones."""
    async with bed, Gate(bed.settings, decision_timeout_s=6.0) as gate:
        unjudged = gate.guard(stream(["Hello there. ", "And more."]))
        with pytest.raises(GateTimeout, match="tidegate run"):
            await anext(aiter(unjudged))
        assert unjudged.verdict is None
        await bed.start_worker().has_loaded(bed.partitions)
        assert await read(gate.guard(stream(["Hello again."]))) == "Hello again."


async def test_revisions_in_place(kafka: str, unique: str, tmp_path: Path) -> None:
    """A revised segment is replaced where the gate applies revisions, else the text ends there."""
    pieces = [
        "A first sentence that is long enough to stand alone. ",
        f"A second one with {MARKER} which will have to be replaced. ",
        "And a third.",
    ]
    tenants = {"default": {"actions": {"violence": "revise"}}}
    async with Bed(kafka, unique, tmp_path, **MARKING, tenants=tenants) as bed:
        await bed.start_worker().has_loaded(bed.partitions)
        async with Gate(bed.settings) as gate, Gate(bed.settings, apply_revisions=True) as editor:
            stopped, revised = gate.guard(stream(pieces)), editor.guard(stream(pieces))
            assert await read(stopped) == pieces[0]
            assert await read(revised) == pieces[0] + TEMPLATES["violence"] + pieces[2]
            assert (stopped.verdict, revised.verdict) == ("revise", "revise")
            assert [(it.start, it.end) for it in revised.revisions] == [(53, 53 + len(pieces[1]))]


async def test_closing_the_gate_ends_its_streams(bed: Bed) -> None:
    """A stream that is still open when its gate is closed fails, and its tokens are closed."""
    closed = asyncio.Event()

    async def model() -> AsyncIterator[str]:
        try:
            yield "Hello"
            await asyncio.Event().wait()
        finally:
            closed.set()

    async with bed:
        async with Gate(bed.settings) as gate:
            reading = asyncio.create_task(read(gate.guard(model(), stream_id="open")))
            await until(lambda: gate.open_streams == 1, 30, "the stream opens")
            with pytest.raises(GateError, match="ids are used once"):
                await read(gate.guard(stream(["x"]), stream_id="open"))
        with pytest.raises(GateError, match="the gate was closed"):
            await reading
        assert closed.is_set()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"outputs_topic": "nowhere"}, "topic nowhere: .*tidegate topics"),
        ({"decisions_topic": "{feedback}"}, "must be equal"),
    ],
)
async def test_topics_that_are_not_as_they_should_be(
    bed: Bed, change: dict[str, Any], message: str
) -> None:
    """A gate that could not be served says at once what to do."""
    change = {k: v.replace("{feedback}", bed.settings.thresholds_topic) for k, v in change.items()}
    async with bed:
        settings = bed.settings.model_copy(update=change | {"request_timeout_ms": 2_000})
        with pytest.raises(Stop, match=message):
            async with Gate(settings):
                pass
