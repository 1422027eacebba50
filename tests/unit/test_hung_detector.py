"""pipeline.py: a call to the detectors that does not come back, while the other threads work."""

import asyncio
import threading
import time
from collections.abc import Sequence

import numpy as np
import pytest

from detectors.protocol import Encoded, FloatArray
from tests.fakes import HashDetector, KnifeDetector
from tests.lanes import delta
from worker.events import Decision
from worker.pipeline import Pipeline
from worker.settings import Settings
from worker.streams import Lane

HOLD_MS = 400
KNIFE = "A text with a knife in it, which the detector never comes back from."


class Hanging(KnifeDetector):
    """Does not come back from a knife before it is released; all else is harmless."""

    def __init__(self) -> None:
        super().__init__()
        self.release = threading.Event()
        self.calls = 0

    def score(self, batch: Sequence[Encoded]) -> FloatArray:
        """(B, 7) 0.01; late where a knife is."""
        self.calls += 1
        if any(row.windows[0].ids[0] for row in batch):
            self.release.wait(10)
        return np.full((len(batch), 7), 0.01)


class Slow(HashDetector):
    """Takes a while for every call, much less than the deadline; all is harmless."""

    def score(self, batch: Sequence[Encoded]) -> FloatArray:
        """(B, 7) 0.01."""
        time.sleep(0.06)
        return np.full((len(batch), 7), 0.01)


class Feed:
    """Complete outputs of one lane, and the decisions on them."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self.lane: Lane = pipeline.lane("in", 0)
        self.decisions: dict[str, Decision] = {}
        self._offset = 0

    def feed(self, *texts: str) -> None:
        """Have the texts judged together; streams are called by their offsets."""
        now, segments = self.pipeline.clock(), []
        for text in texts:
            value = delta(f"s{self._offset}", 0, text, True)
            segments += self.lane.feed(self._offset, 0, None, value, now, 0)
            self._offset += 1
        self.pipeline.submit(self.lane, segments)

    async def traffic(self, until_s: float) -> None:
        """One harmless text after the other for so long."""
        ends = time.monotonic() + until_s
        while time.monotonic() < ends:
            self.feed(f"A harmless text that has the number {self._offset}.")
            await asyncio.sleep(0.01)
            self.take()

    def take(self) -> None:
        """Note what was decided; each stream has one decision."""
        output = self.lane.take(self.pipeline.clock(), drain=True)
        for decision in output.decisions if output else ():
            assert decision.stream_id not in self.decisions
            self.decisions[decision.stream_id] = decision


@pytest.mark.parametrize("together", [1, 6])
async def test_a_call_that_hangs_blocks_its_segments_though_others_are_judged(
    together: int,
) -> None:
    """The other thread's scores are no sign of life from this one; a late answer changes
    nothing. together: 1 is encoded and scored in one go, 6 are batched."""
    detector = Hanging()
    chosen = Settings(
        logprob="", infer_threads=2, hold_timeout_ms=HOLD_MS, cache_entries=0, max_batch_tokens=1
    )
    async with Pipeline(chosen, [detector]) as pipeline:
        await asyncio.sleep(0.05)  # its threads wait
        it = Feed(pipeline)
        try:
            it.feed(KNIFE, *(f"A harmless text beside it, {n}." for n in range(together - 1)))
            await it.traffic(5 * HOLD_MS / 1e3)
            decision = it.decisions.pop("s0")
            assert (decision.verdict, decision.reason) == ("block", "unavailable")
            assert decision.released_to == 0
            assert decision.timing_ms.total >= HOLD_MS  # held so long
            assert len(it.decisions) > together
            assert {other.verdict for other in it.decisions.values()} == {"allow"}
            assert pipeline.delay_s < HOLD_MS / 1e3  # nothing of it is left behind
        finally:
            detector.release.set()
        calls, known = detector.calls, len(it.decisions)
        await it.traffic(0.3)
        assert "s0" not in it.decisions
        assert detector.calls > calls
        assert len(it.decisions) > known
        while pipeline.waiting:
            await asyncio.sleep(0.005)
        assert not it.lane.judging


async def test_what_was_judged_does_not_pile_up_behind_a_call_that_hangs() -> None:
    """Segments that are done are let go before the deadline of the one in front of them."""
    detector = Hanging()
    chosen = Settings(logprob="", infer_threads=2, hold_timeout_ms=60_000, cache_entries=0)
    async with Pipeline(chosen, [detector]) as pipeline:
        await asyncio.sleep(0.05)
        it = Feed(pipeline)
        try:
            it.feed(KNIFE)
            await it.traffic(1.0)
            assert len(it.decisions) > 20
            await asyncio.sleep(0.1)
            assert len(pipeline._outstanding) <= 2 * max(1, pipeline.waiting)
            assert pipeline.delay_s >= 1.0  # and that one is still waited for
        finally:
            detector.release.set()


async def test_a_queue_for_several_threads_blocks_nothing() -> None:
    """What waits for a call is not in one: only the call's own time counts."""
    chosen = Settings(
        logprob="", infer_threads=2, hold_timeout_ms=1_000, cache_entries=0, max_batch_tokens=1
    )
    async with Pipeline(chosen, [Slow()]) as pipeline:
        it = Feed(pipeline)
        start = time.monotonic()
        it.feed(*(f"A harmless text that has the number {n}." for n in range(60)))
        while pipeline.waiting:
            await asyncio.sleep(0.01)
        it.take()
        assert time.monotonic() - start > 1.5 * 1.0
        assert [decision.verdict for decision in it.decisions.values()] == ["allow"] * 60
