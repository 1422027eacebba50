"""pipeline.py: what a failing detector, a slow one, or a wrong score does to a segment."""

import asyncio
import functools
import json
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from detectors.constant import Constant
from detectors.harms import COLUMNS, THRESHOLD_KEYS
from detectors.protocol import Encoded, FloatArray, Passage, Window
from tests.lanes import delta
from worker.events import Decision
from worker.pipeline import Pipeline, Work
from worker.settings import Settings, TenantPolicy

TEXT = "A harmless sentence that is long enough to be judged by a model."
HOLD_MS = 600


class Scripted(Constant):
    """Calls `script` with the batch; what it returns, or raises, is the score."""

    def __init__(self, script: Callable[[Sequence[Encoded]], FloatArray]) -> None:
        super().__init__()
        self.script = script
        self.batches: list[int] = []

    def score(self, batch: Sequence[Encoded]) -> FloatArray:
        self.batches.append(len(batch))
        return self.script(batch)


def fine(batch: Sequence[Encoded]) -> FloatArray:
    return np.full((len(batch), 7), 0.01)


def returning(scores: FloatArray, batch: Sequence[Encoded]) -> FloatArray:
    return scores


async def decide(
    detector: Constant, *values: bytes, policy: TenantPolicy | None = None, **overrides: object
) -> list[Decision]:
    """The decisions on these records, when all their streams have ended."""
    chosen = Settings(
        **{"hold_timeout_ms": HOLD_MS, "tenants": {"default": policy or TenantPolicy()}}
        | overrides,  # type: ignore[arg-type]  # checked by pydantic
    )
    async with Pipeline(chosen, [detector]) as pipeline:
        await asyncio.sleep(0.01)  # its steps have begun
        lane = pipeline.lane("in", 0)
        decisions: list[Decision] = []
        for offset, value in enumerate(values):
            pipeline.submit(lane, lane.feed(offset, 0, None, value, pipeline.clock(), 0))
        while lane.open_streams or pipeline.waiting:
            await asyncio.sleep(0.005)
        output = lane.take(pipeline.clock(), drain=True)
        if output is not None:
            decisions += output.decisions
        return decisions


async def test_a_detector_that_raises_blocks_as_unavailable_at_the_deadline() -> None:
    """The text stays held while it is tried again; doubt never reads as allow."""

    def broken(batch: Sequence[Encoded]) -> FloatArray:
        raise RuntimeError("no")

    detector = Scripted(broken)
    start = time.monotonic()
    (decision,) = await decide(detector, delta("s", 0, TEXT, True))
    assert (decision.verdict, decision.reason, decision.released_to) == ("block", "unavailable", 0)
    assert time.monotonic() - start >= HOLD_MS / 1e3
    assert len(detector.batches) > 1


@pytest.mark.parametrize("bad", [float("nan"), -0.5, 1.5, float("inf")])
async def test_a_wrong_score_blocks_as_unavailable(bad: float) -> None:
    """NaN is below every threshold, and must not pass for that."""

    def wrong(batch: Sequence[Encoded]) -> FloatArray:
        scores = fine(batch)
        scores[:, 2] = bad
        return scores

    detector = Scripted(wrong)
    (decision,) = await decide(detector, delta("s", 0, TEXT, True))
    assert (decision.verdict, decision.reason) == ("block", "unavailable")
    assert len(detector.batches) > 1  # tried again before it gave up


async def test_a_matrix_of_the_wrong_shape_blocks() -> None:
    """A detector that returns fewer rows or columns has failed."""
    for wrong in (np.zeros((0, 7)), np.zeros((1, 6))):
        (decision,) = await decide(
            Scripted(functools.partial(returning, wrong)), delta("s", 0, TEXT, True)
        )
        assert (decision.verdict, decision.reason) == ("block", "unavailable")


async def test_a_detector_that_hangs_blocks_at_the_deadline() -> None:
    """A timeout is a failure; a later answer changes nothing."""
    release = threading.Event()

    def hanging(batch: Sequence[Encoded]) -> FloatArray:
        release.wait(5)
        return fine(batch)

    try:
        (decision,) = await decide(Scripted(hanging), delta("s", 0, TEXT, True))
    finally:
        release.set()
    assert (decision.verdict, decision.reason) == ("block", "unavailable")


async def test_a_queue_alone_blocks_nothing() -> None:
    """Behind a detector that is slow, but works, text is held for as long as it takes."""

    def slow(batch: Sequence[Encoded]) -> FloatArray:
        time.sleep(0.06)
        return fine(batch)

    values = (delta(f"s{n}", 0, f"{TEXT} {n}", True) for n in range(60))
    start = time.monotonic()
    decisions = await decide(
        Scripted(slow), *values, infer_threads=1, max_batch_tokens=1, hold_timeout_ms=1_500
    )
    assert time.monotonic() - start > 2 * 1.5
    assert {it.verdict for it in decisions} == {"allow"}


async def test_fail_mode_open_lets_doubt_pass_and_says_so() -> None:
    """Only where the tenant chose it, and the decision names it."""

    def broken(batch: Sequence[Encoded]) -> FloatArray:
        raise RuntimeError("no")

    policy = TenantPolicy(fail_mode=dict.fromkeys(THRESHOLD_KEYS, "open"))
    (decision,) = await decide(Scripted(broken), delta("s", 0, TEXT, True), policy=policy)
    assert decision.verdict == "allow"
    assert "fail_mode open" in decision.reason


async def test_a_short_failure_costs_time_only() -> None:
    """Retry is the fate of transient failures."""
    failures = iter([True, True])

    def flaky(batch: Sequence[Encoded]) -> FloatArray:
        if next(failures, False):
            raise RuntimeError("not yet")
        return fine(batch)

    (decision,) = await decide(Scripted(flaky), delta("s", 0, TEXT, True), hold_timeout_ms=20_000)
    assert (decision.verdict, decision.stage) == ("allow", "toxicity")


async def test_one_poisonous_text_does_not_take_others_down() -> None:
    """A text on which a detector raises is tried alone; its neighbours pass."""
    poison = "x" * 4_000

    def picky(batch: Sequence[Encoded]) -> FloatArray:
        if any(row.tokens > 90 for row in batch):
            raise RuntimeError("too long for me")
        return fine(batch)

    decisions = await decide(
        Scripted(picky),
        *(delta(f"s{n}", 0, f"{TEXT} {n}", True) for n in range(8)),
        delta("poison", 0, poison, True),
        max_segment_chars=400, hold_timeout_ms=3_000,
    )  # fmt: skip
    verdicts = {it.stream_id: it.verdict for it in decisions}
    assert verdicts.pop("poison") == "block"
    assert set(verdicts.values()) == {"allow"}


async def test_nor_one_that_cannot_be_encoded() -> None:
    """As above, of a detector that raises when it reads."""

    class Picky(Scripted):
        def encode(self, passages: Sequence[Passage]) -> list[Encoded]:
            if any("poison" in passage.text for passage in passages):
                raise ValueError("not this one")
            return super().encode(passages)

    decisions = await decide(
        Picky(fine),
        *(delta(f"s{n}", 0, f"{TEXT} {n}", True) for n in range(8)),
        delta("poison", 0, f"{TEXT} poison", True),
        hold_timeout_ms=2_000,
    )  # fmt: skip
    verdicts = {it.stream_id: it.verdict for it in decisions}
    assert verdicts.pop("poison") == "block"
    assert set(verdicts.values()) == {"allow"}


@pytest.mark.parametrize(
    "read", [lambda rows: rows[:-1], lambda rows: [row._replace(windows=()) for row in rows]]
)
async def test_a_detector_that_reads_less_than_there_is_blocks_as_unavailable(
    read: Callable[[list[Encoded]], list[Encoded]],
) -> None:
    """A detector of one's own may be wrong; the worker goes on."""

    class Short(Scripted):
        def encode(self, passages: Sequence[Passage]) -> list[Encoded]:
            return read(super().encode(passages))

    decisions = await decide(
        Short(fine), *(delta(f"s{n}", 0, f"{TEXT} {n}", True) for n in range(3))
    )
    assert {(it.verdict, it.reason) for it in decisions} == {("block", "unavailable")}


class Threads(Constant):
    """Notes the threads that it is called from; scores slowly, so that others queue."""

    def __init__(self) -> None:
        super().__init__()
        self.encoded: list[str] = []

    def encode(self, passages: Sequence[Passage]) -> list[Encoded]:
        self.encoded.append(threading.current_thread().name.rpartition("_")[0])
        return super().encode(passages)

    def score(self, batch: Sequence[Encoded]) -> FloatArray:
        time.sleep(0.01)
        return super().score(batch)


@pytest.mark.parametrize(("streams", "queue"), [(1, False), (40, True)])
async def test_a_segment_goes_to_a_free_thread_at_once_and_queues_else(
    streams: int, queue: bool
) -> None:
    """One hop where a thread is free; where none is, what waits is encoded to be batched."""
    detector = Threads()
    values = [delta(f"s{n}", 0, f"{n} {TEXT}", True) for n in range(streams)]
    decisions = await decide(detector, *values, hold_timeout_ms=30_000)
    assert [decision.verdict for decision in decisions] == ["allow"] * streams
    assert ("tidegate-encode" in detector.encoded) is queue
    assert queue or set(detector.encoded) == {"tidegate-infer"}


async def test_an_encoder_that_raises_blocks_too() -> None:
    """The tokenizer is a detector's part: its failure is no pass either."""

    class Unreadable(Constant):
        def encode(self, passages: Sequence[Passage]) -> list[Encoded]:
            raise ValueError("cannot")

    (decision,) = await decide(Unreadable(), delta("s", 0, TEXT, True))
    assert (decision.verdict, decision.reason) == ("block", "unavailable")


async def test_very_short_text_is_judged_by_keywords_alone() -> None:
    """Stage `short`, scores 0, no model."""
    detector = Scripted(fine)
    (decision,) = await decide(detector, delta("s", 0, "Sure.", True))
    assert (decision.stage, decision.verdict, decision.harmful) == ("short", "allow", 0.0)
    assert set(decision.scores.values()) == {0.0}
    assert detector.batches == []


async def test_a_short_end_of_a_long_text_is_judged_by_the_models() -> None:
    """It is short on its own, but is read with what stands before it."""
    decisions = await decide(
        Scripted(fine), delta("s", 0, "A first sentence of some length here. " * 4 + "Yes", True)
    )
    assert decisions[-1].end - decisions[-1].start < 10 or len(decisions) == 1
    assert {it.stage for it in decisions} == {"toxicity"}


async def test_scores_are_reused_for_equal_text_in_equal_context_only() -> None:
    """Stage `cache`: same text, tenant and conversation; another conversation is judged anew."""
    detector = Scripted(fine)
    hello = [{"role": "user", "content": "hello"}]
    decisions = []
    async with Pipeline(Settings(), [detector]) as pipeline:
        lane = pipeline.lane("in", 0)
        for offset, context in enumerate(([], [], hello, hello)):
            value = delta(f"s{offset}", 0, TEXT, True, context=context)
            pipeline.submit(lane, lane.feed(offset, 0, None, value, pipeline.clock(), 0))
            while lane.open_streams:
                await asyncio.sleep(0.005)
            output = lane.take(pipeline.clock(), drain=True)
            assert output is not None
            decisions += output.decisions
    assert [it.stage for it in decisions] == ["toxicity", "cache", "toxicity", "cache"]
    assert decisions[0].scores == decisions[1].scores


async def test_a_keyword_blocks_without_a_model(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Stage `keyword`: 1 for its harm and for `harmful`, over a segment border too."""
    path = tmp_path_factory.mktemp("lists") / "keywords.toml"
    path.write_text('[violence]\nblock = ["grumblefex"]\n')
    detector = Scripted(fine)
    (decision,) = await decide(
        detector, delta("s", 0, "You GRU\u200bMBLEF3X, you.", True), keywords_file=path
    )
    assert (decision.verdict, decision.stage, decision.harm) == ("block", "keyword", "violence")
    assert (decision.scores["violence"], decision.harmful) == (1.0, 1.0)
    assert detector.batches == []
    endless = "x" * 396 + " " + "grumblefex " * 2
    decisions = await decide(detector, delta("s", 0, endless, True), keywords_file=path)
    assert decisions[-1].verdict == "block"


async def test_a_keyword_that_does_not_block_leaves_the_models_the_last_word(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Flagged by keyword, blocked by the model: the graver counts."""
    path = tmp_path_factory.mktemp("lists") / "keywords.toml"
    path.write_text('[violence]\nblock = ["grumblefex"]\n')

    def hateful(batch: Sequence[Encoded]) -> FloatArray:
        scores = fine(batch)
        scores[:, 1] = 0.99
        return scores

    policy = TenantPolicy(actions={"violence": "flag"})
    (decision,) = await decide(
        Scripted(hateful), delta("s", 0, "You grumblefex, I say to you.", True),
        policy=policy, keywords_file=path,
    )  # fmt: skip
    assert (decision.verdict, decision.harm) == ("block", "hate_speech")
    assert decision.scores["violence"] == 1.0


async def test_segments_of_a_blocked_stream_are_not_scored_any_more() -> None:
    """Inference is not spent on what nobody waits for."""

    def first_is_bad(batch: Sequence[Encoded]) -> FloatArray:
        scores = fine(batch)
        scores[:, 0] = 0.99
        return scores

    detector = Scripted(first_is_bad)
    text = "A sentence of some thirty letters. " * 200
    decisions = await decide(
        detector, delta("s", 0, text, True), infer_threads=1, max_batch_tokens=1
    )
    assert [it.verdict for it in decisions] == ["block"]
    assert sum(detector.batches) < 10


class Tokenless(Constant):
    """Reads much, and none of it goes through an encoder."""

    name = "words"

    def encode(self, passages: Sequence[Passage]) -> list[Encoded]:
        window = Window(np.zeros(5_000, np.int64), np.zeros(5_000, np.int64))
        return [Encoded((window, window), tokens=0, text_tokens=0) for _ in passages]


async def test_what_costs_no_tokens_neither_fills_a_batch_nor_is_counted() -> None:
    """An encoder's batches and its share of tokens are the same with and without it beside."""
    count = 12
    values = [delta(f"s{i}", 0, TEXT, True) for i in range(count)]
    sizes, counted = [], []
    for others in ([], [Tokenless()]):
        scripted = Scripted(fine)
        chosen = Settings(infer_threads=1, batch_deadline_ms=20.0, max_batch_tokens=200)
        async with Pipeline(chosen, [*others, scripted]) as pipeline:
            await asyncio.sleep(0.01)
            lane = pipeline.lane("in", 0)
            now = pipeline.clock()
            works = [lane.feed(i, 0, None, value, now, 0) for i, value in enumerate(values)]
            pipeline.submit(lane, [work for some in works for work in some])
            while lane.open_streams or pipeline.waiting:
                await asyncio.sleep(0.005)
            counted.append((pipeline.tokens_in, pipeline.tokens_of_text))
        sizes.append(max(scripted.batches))
    assert counted[0] == counted[1]
    assert counted[0][1] > 0
    assert sizes[0] == sizes[1] > 1


def test_what_costs_no_tokens_is_batched_by_its_size_where_it_is_alone() -> None:
    """A batch of everything that waits would hold all of it for the last."""
    passage = Passage(TEXT, "", ())
    (free,), (encoded,) = Tokenless().encode([passage]), Constant().encode([passage])
    work = Work(None, None)  # type: ignore[arg-type]  # neither is looked at
    work.read_as((free,), 0.0)
    assert (work.rows, work.longest) == (2, 5_000)
    work.read_as((free, encoded), 0.0)
    assert (work.rows, work.longest) == (1, encoded.tokens)


class Half(Constant):
    """0.5 of everything, under a name of its own."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = self.digest = name

    def score(self, batch: Sequence[Encoded]) -> FloatArray:
        """(B, 7)."""
        return np.full((len(batch), 7), 0.5)


@pytest.mark.parametrize("at_once", [True, False])
async def test_a_later_segment_loses_what_was_learnt(tmp_path: Path, at_once: bool) -> None:
    """On both ways to the models: by batches, and one segment at once."""
    weights = {column: [0.5, 0.5, 0.0, -2.0] for column in COLUMNS}
    contents = {
        "detectors": {"one": "one", "two": "two"}, "weights": weights,
        "thresholds": dict.fromkeys(THRESHOLD_KEYS, 0.9),
    }  # fmt: skip
    (tmp_path / "combination.json").write_text(json.dumps(contents))
    settings = Settings(models=tmp_path, context_segments=2)
    streams = 1 if at_once else 40
    texts = " ".join(f"Sentence {i} is here to be judged by the models." for i in range(30))
    found: set[float] = set()
    async with Pipeline(settings, [Half("one"), Half("two")]) as pipeline:
        await asyncio.sleep(0.01)
        lane = pipeline.lane("in", 0)
        for number in range(streams):
            value = delta(f"s{number}", 0, texts, True)
            pipeline.submit(lane, lane.feed(number, 0, None, value, pipeline.clock(), 0))
        while lane.open_streams or pipeline.waiting:
            await asyncio.sleep(0.005)
            output = lane.take(pipeline.clock(), drain=True)
            found |= {it.scores["violence"] for it in output.decisions} if output else set()
    assert found == {0.5, 0.119203}  # sigmoid(-2)
