"""worker/moderator.py: texts and token streams judged in process."""

import asyncio
import gc
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from detectors.protocol import Encoded, FloatArray, Passage
from tests import oracle
from tests.fakes import RowDetector, row_of
from worker.errors import TidegateError
from worker.events import TurnRecord
from worker.moderator import Moderator, ModeratorClosed, Request, SyncModerator, guard, shown, whole
from worker.pipeline import Pipeline
from worker.settings import Settings, TenantPolicy
from worker.streams import Lane

REVISED = "[removed]"
SETTINGS = Settings(
    min_segment_chars=12, max_segment_chars=60, short_chars=3, cache_entries=0,
    tenants={
        "default": TenantPolicy(actions={"privacy_violation": "revise", "sexual_content": "flag"},
                                revisions={"privacy_violation": REVISED}),
        "strict": TenantPolicy(),
    },
)  # fmt: skip


class Words(RowDetector):
    """BAD is violence, SECRET privacy_violation; ASKED in the conversation makes `ok` violence."""

    def __init__(self, score_s: float = 0.0) -> None:
        super().__init__()
        self.score_s = score_s

    def encode(self, passages: Sequence[Passage]) -> list[Encoded]:
        """A window with the row."""
        encoded = super().encode(passages)
        for passage, it in zip(passages, encoded, strict=True):
            asked = any("ASKED" in turn.content for turn in passage.conversation)
            violence = 900 if "BAD" in passage.text or asked else 20
            private = 950 if "SECRET" in passage.text else 30
            it.windows[0].ids[:7] = [violence, 10, 10, private, 10, 10, max(violence, private)]
        return encoded

    def score(self, batch: Sequence[Encoded]) -> FloatArray:
        """(B, 7)"""
        time.sleep(self.score_s * len(batch))
        return super().score(batch)


def moderator(settings: Settings = SETTINGS, detector: RowDetector | None = None) -> Moderator:
    return Moderator(settings, detectors=[detector or Words()])


CLEAN = "A calm sentence here. "
TEXTS = {
    "allow": CLEAN * 4,
    "block": CLEAN * 2 + "Now BAD things come. " + CLEAN,
    "revise": CLEAN + "The SECRET is out now. " + CLEAN,
    "both": CLEAN + "The SECRET is out now. " + CLEAN + "Now BAD things come. " + CLEAN,
    "empty": "",
}


async def test_one_decision_for_a_text() -> None:
    """The first block settles a text, else the first revise, else all is allowed; scores are the
    highest over its segments, and `released_to` says what may be shown."""
    async with moderator() as it:
        found = {name: await it.moderate(text) for name, text in TEXTS.items()}
    allow, block, revise, both = (found[name] for name in ("allow", "block", "revise", "both"))
    assert {name: decision.verdict for name, decision in found.items()} == {
        "allow": "allow", "block": "block", "revise": "revise", "both": "block", "empty": "allow",
    }  # fmt: skip
    assert all(decision.final and decision.leaked == 0 for decision in found.values())
    assert (allow.start, allow.end, allow.released_to) == (0, 88, 88)
    assert (block.start, block.end, block.released_to, block.harm) == (44, 65, 44, "violence")
    assert (revise.start, revise.released_to, revise.harm) == (22, 22, "privacy_violation")
    assert revise.revision is not None
    assert revise.revision.text == REVISED
    assert (both.start, both.released_to) == (67, 22)
    assert (both.scores["violence"], both.scores["privacy_violation"]) == (0.9, 0.95)


async def test_nothing_is_leaked_by_a_whole_text() -> None:
    """release_ahead_chars concerns those who show text early: here nobody has seen anything."""
    ahead = SETTINGS.model_copy(update={"release_ahead_chars": 8})
    async with moderator(ahead) as it:
        block = await it.moderate(TEXTS["block"])
        allow = await it.moderate(TEXTS["allow"])
    assert (block.released_to, block.leaked) == (44, 0)
    assert allow.released_to == len(TEXTS["allow"])


async def test_same_decisions_as_the_stream() -> None:
    """A long text, fed in pieces, has the decisions that the oracle gives the whole of it."""
    text = "".join(f"Sentence {i} of many. " + "z" * (i % 90) for i in range(700)) + "\ud83d\ude00"
    actions = dict.fromkeys(oracle.HARMS, "revise")
    rules = oracle.Rules(12, 60, short_chars=3, actions=actions)
    tenant = TenantPolicy(actions=actions)
    chosen = SETTINGS.model_copy(update={"tenants": {"default": tenant}})
    async with moderator(chosen, RowDetector()) as it:
        decisions = await it.decisions(text, [("user", "hi")])
    expected = oracle.expect(oracle.as_received(text), rules, row_of, [("user", "hi")])
    assert [(d.start, d.end, d.verdict, d.released_to, d.harm) for d in decisions] == [
        (e.start, e.end, e.verdict, e.released_to, e.harm) for e in expected
    ]
    assert len({d.decision_id for d in decisions}) == len(decisions)


ASKED = "What was ASKED"


@pytest.mark.parametrize(
    "context",
    [ASKED, [("user", ASKED)], [{"role": "user", "content": ASKED}], [TurnRecord("user", ASKED)]],
    ids=["str", "pair", "mapping", "turn"],
)  # fmt: skip
async def test_conversation(context: Any) -> None:
    """A string is one user turn, a pair is role and content: all are judged with the text."""
    async with moderator() as it:
        assert (await it.moderate("Fine by me, quite.", context)).verdict == "block"
        assert (await it.moderate("Fine by me, quite.")).verdict == "allow"


async def test_tenant_and_channel() -> None:
    """The tenant's policy holds, and the decision carries tenant, channel and stream id."""
    async with moderator() as it:
        decision = await it.moderate(
            TEXTS["revise"], tenant="strict", channel="tool", stream_id="mine"
        )
    assert (decision.verdict, decision.tenant) == ("block", "strict")
    assert (decision.channel, decision.stream_id) == ("tool", "mine")


async def test_batch() -> None:
    """A batch mixes strings, mappings and Requests; decisions come in its order, and the detector
    sees many texts at once."""
    words = Words()
    texts: list[Any] = [f"{text}{i}" for i in range(40) for text in TEXTS.values()]
    texts += [Request(TEXTS["revise"], tenant="strict"), {"text": "Fine.", "context": "ASKED"}]
    async with moderator(detector=words) as it:
        decisions = await it.moderate_batch(texts)
        assert await it.moderate_batch([]) == []
    verdicts = ["allow", "block", "revise", "block", "allow"] * 40
    assert [decision.verdict for decision in decisions] == [*verdicts, "block", "block"]
    assert max(words.batches) > 3


@pytest.mark.parametrize(
    "wrong",
    [{"text": 7}, {}, 7, {"text": "secret", "channel": "smoke"}, {"text": "x", "tenant": ""},
     Request("x", tenant=""),
     {"text": "x", "context": [{"role": "user"}]}, {"text": "x", "contxt": []}],
)  # fmt: skip
async def test_wrong_types(wrong: Any) -> None:
    """What is no text with context is refused before anything is judged, without a word of it."""
    words = Words()
    async with moderator(detector=words) as it:
        with pytest.raises((ValueError, TypeError)) as raised:
            await it.moderate_batch([TEXTS["allow"], wrong])
    assert "secret" not in str(raised.value)
    assert words.batches == []


async def test_process_output() -> None:
    """Allowed text comes back as it was and safe; a revised passage is replaced, a block ends the
    text before it, and both are not safe."""
    async with moderator() as it:
        found = {name: await it.process_output(text) for name, text in TEXTS.items()}
    assert found["allow"] == (TEXTS["allow"], True)
    assert found["empty"] == ("", True)
    assert found["block"] == (CLEAN * 2, False)
    assert found["revise"] == (CLEAN + REVISED + CLEAN, False)
    assert found["both"] == (CLEAN + REVISED + CLEAN, False)


async def test_batch_invariance_with_the_shipped_model() -> None:
    """Guarantee 4: alone or among others, with any batch size, scores differ by at most 1e-4 and
    the verdict never."""
    texts = [f"{i} loaves of bread, " + "and some butter " * (i % 23) for i in range(24)]
    texts += ["I will find you and hurt you badly, you worthless idiot.", "日本語の文です。" * 9]
    single = Settings(cache_entries=0, max_batch_tokens=1, infer_threads=1)
    async with Moderator(single) as it:
        alone = [await it.moderate(text) for text in texts]
    for tokens in (700, 8_192):
        chosen = Settings(cache_entries=0, max_batch_tokens=tokens, hold_timeout_ms=60_000)
        async with Moderator(chosen) as it:
            together = await it.moderate_batch(texts)
        for a, b in zip(alone, together, strict=True):
            assert (a.verdict, a.harm) == (b.verdict, b.harm)
            rows = [[*it.scores.values(), it.harmful or 0.0] for it in (a, b)]
            np.testing.assert_allclose(rows[0], rows[1], atol=1e-4)


# -- token streams --------------------------------------------------------------------------------


class Tokens:
    """Words of a text; remembers how many were taken and whether it was closed."""

    def __init__(self, text: str) -> None:
        self.taken = 0
        self.closed = False
        self._words = [word + " " for word in text.split(" ")]

    async def __aiter__(self) -> AsyncIterator[str]:
        for piece in self:
            yield piece
            await asyncio.sleep(0)

    def __iter__(self) -> Iterator[str]:
        try:
            for word in self._words:
                self.taken += 1
                yield word
        finally:
            self.closed = True


async def test_guard() -> None:
    """Only released text is yielded, a block closes the tokens, and the verdict is there after."""
    async with moderator() as it:
        for text, expected in [("allow", TEXTS["allow"] + " "), ("block", CLEAN * 2)]:
            tokens = Tokens(TEXTS[text] + CLEAN * 200 * (text == "block"))
            guarded = it.guard(tokens.__aiter__(), "hi", stream_id=text)
            assert "".join([piece async for piece in guarded]) == expected
            assert guarded.verdict == text
            assert guarded.decision is not None
            assert (guarded.decision.stream_id, guarded.decision.final) == (text, True)
            assert tokens.closed
        assert tokens.taken < 800
        assert not it._open


async def test_guard_with_revisions() -> None:
    """With apply_revisions the proposal stands where the passage was."""
    async with moderator() as it:
        guarded = it.guard(Tokens(TEXTS["revise"]).__aiter__(), apply_revisions=True)
        assert "".join([p async for p in guarded]) == CLEAN + REVISED + CLEAN + " "
        assert guarded.verdict == "revise"


async def test_guard_over_a_plain_iterator() -> None:
    """A plain iterator is read in a thread: one that blocks does not stop the event loop."""
    turning = 0

    def slowly() -> Iterator[str]:
        for word in TEXTS["allow"].split():
            time.sleep(0.01)
            yield word + " "

    async with moderator() as it:
        guarded = it.guard(slowly())
        reading = asyncio.ensure_future(_join(guarded))
        while not reading.done():
            turning += 1
            await asyncio.sleep(0.002)
        assert reading.result() == " ".join(TEXTS["allow"].split()) + " "
    assert turning > 5


async def _join(pieces: Any) -> str:
    return "".join([piece async for piece in pieces])


async def test_guard_left_early_leaves_nothing() -> None:
    """A loop that is left closes the tokens, and nothing of the stream stays."""
    tokens = Tokens(CLEAN * 500)
    async with moderator() as it:
        async with it.guard(tokens.__aiter__()) as guarded:
            async for _ in guarded:
                break
        assert tokens.closed
        assert not it._open


# -- life -----------------------------------------------------------------------------------------


async def test_nothing_stays() -> None:
    """After 1,500 texts, some of them cancelled, no lane and no segment of them is left."""
    async with moderator() as it:
        await it.moderate_batch([f"{text}{i}" for i in range(300) for text in TEXTS.values()])
        tasks = [asyncio.create_task(it.moderate(f"{TEXTS['allow']}{i}")) for i in range(50)]
        await asyncio.sleep(0.001)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await it.moderate("The last one, quite calm.")
        await asyncio.sleep(0.1)  # the hold deadline's watch lets go
        del tasks
        gc.collect()
        assert not it._open
        assert it._pipeline is not None
        assert it._pipeline.waiting == 0
        lanes = [obj for obj in gc.get_objects() if isinstance(obj, Lane) and obj.topic == "local"]
        assert len(lanes) <= 5  # which the steps' local variables may still name


async def test_many_texts_wait_outside() -> None:
    """A batch that takes many times the hold deadline is judged all the same: its texts wait
    before they are fed, where no deadline runs."""
    chosen = SETTINGS.model_copy(update={"hold_timeout_ms": 1_000, "max_batch_tokens": 200})
    async with moderator(chosen, Words(score_s=0.01)) as it:
        decisions = await it.moderate_batch([f"{CLEAN}{i}" for i in range(400)])
    assert {decision.reason for decision in decisions} == {"below thresholds"}


async def test_doubt_is_no_allow() -> None:
    """A detector that fails until the deadline blocks the text as unavailable."""

    class Broken(RowDetector):
        def score(self, batch: Sequence[Encoded]) -> FloatArray:
            raise RuntimeError(len(batch))

    chosen = SETTINGS.model_copy(update={"hold_timeout_ms": 80})
    async with moderator(chosen, Broken()) as it:
        decision = await it.moderate(TEXTS["allow"])
        assert await it.process_output(TEXTS["allow"]) == ("", False)
    assert (decision.verdict, decision.reason, decision.harmful) == ("block", "unavailable", None)


async def test_outside_of_the_block() -> None:
    """Before and after its `async with` a moderator refuses; what is under way when it ends fails
    instead of waiting for ever."""
    it = moderator(detector=Words(score_s=0.2))
    with pytest.raises(ModeratorClosed, match="async with"):
        await it.moderate("x")
    async with it:
        judging = asyncio.create_task(it.moderate(TEXTS["allow"]))
        guarding = asyncio.create_task(_join(it.guard(Tokens(TEXTS["allow"]).__aiter__())))
        await asyncio.sleep(0.05)
    for task in (judging, guarding):
        with pytest.raises(ModeratorClosed):
            await asyncio.wait_for(task, 2)
    with pytest.raises(ModeratorClosed):
        await it.moderate_batch(["x"])


async def test_a_dead_pipeline_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """If a step of the pipeline dies, callers get an error, their tasks are not cancelled."""

    async def die(self: Pipeline, works: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Pipeline, "_encode", die)
    it = moderator()
    await it.__aenter__()
    for _ in range(2):
        with pytest.raises(ModeratorClosed):
            await asyncio.wait_for(it.moderate(TEXTS["allow"]), 2)
    with pytest.raises(BaseExceptionGroup, match="unhandled"):
        await it.__aexit__(None, None, None)


async def test_unknown_detector() -> None:
    """A model that is not there is said when the moderator is entered."""
    with pytest.raises(Exception, match=r"no manifest\.json"):
        async with Moderator(SETTINGS.model_copy(update={"detectors": ("nothing",)})):
            raise AssertionError


# -- without an event loop ------------------------------------------------------------------------


def test_sync_moderator() -> None:
    """The same methods without an event loop, from many threads at once."""
    with SyncModerator(SETTINGS, detectors=[Words()]) as it:
        assert it.moderate(TEXTS["block"], "hi").verdict == "block"
        assert it.process_output(TEXTS["revise"]) == (CLEAN + REVISED + CLEAN, False)
        assert [d.verdict for d in it.moderate_batch(iter(TEXTS.values()))][:2] == [
            "allow",
            "block",
        ]
        assert len(it.decisions(TEXTS["allow"])) > 1
        with ThreadPoolExecutor(8) as threads:
            found = list(threads.map(it.moderate, [TEXTS["block"], TEXTS["allow"]] * 20))
    assert [decision.verdict for decision in found] == ["block", "allow"] * 20
    with pytest.raises(ModeratorClosed, match="with SyncModerator"):
        it.moderate("x")


def test_sync_guard() -> None:
    """A plain `for` over a plain iterator: released text alone, tokens closed at a block or when
    the loop is left, and no thread of it left."""
    before = threading.active_count()
    with SyncModerator(SETTINGS, detectors=[Words()]) as it:
        tokens = Tokens(TEXTS["block"] + CLEAN * 200)
        guarded = it.guard(iter(tokens), "hi")
        assert "".join(guarded) == CLEAN * 2
        assert guarded.verdict == "block"
        left = Tokens(CLEAN * 500)
        for _ in it.guard(iter(left)):
            break
        gc.collect()
    _wait_for(lambda: tokens.closed and left.closed and threading.active_count() <= before)
    assert tokens.taken < 800


def test_an_error_of_the_tokens_comes_through() -> None:
    """What the tokens raise is raised where the text is read, after what is released."""

    def tokens() -> Iterator[str]:
        yield CLEAN
        raise ConnectionError("model gone")

    with SyncModerator(SETTINGS, detectors=[Words()]) as it:
        pieces = []
        with pytest.raises(ConnectionError, match="model gone"):
            pieces += list(it.guard(tokens()))


async def test_guard_of_its_own() -> None:
    """`guard` needs no moderator: over tokens that come asynchronously, and over plain ones."""
    own = guard(Tokens(TEXTS["block"]).__aiter__(), settings=SETTINGS, detectors=[Words()])
    assert await _join(own) == CLEAN * 2
    assert own.verdict == "block"
    plain = guard(iter(Tokens(TEXTS["block"])), settings=SETTINGS, detectors=[Words()])
    assert await asyncio.to_thread("".join, plain) == CLEAN * 2
    assert (plain.verdict, plain.decision and plain.decision.verdict) == ("block", "block")
    with pytest.raises(TypeError, match="async for"):
        list(guard(Tokens("x").__aiter__(), settings=SETTINGS))


def _wait_for(holds: Any) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# -- the public face ------------------------------------------------------------------------------


def test_import_tidegate_loads_nothing_heavy() -> None:
    """`import tidegate` loads neither Kafka's client nor onnxruntime nor the pipeline; every public
    name is there when asked for, and Moderator works without aiokafka."""
    code = (
        "import sys, tidegate\n"
        "heavy = {'aiokafka', 'onnxruntime', 'numpy', 'worker', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "tidegate.Moderator, tidegate.SyncModerator, tidegate.guard, tidegate.Decision\n"
        "assert 'aiokafka' not in sys.modules\n"
        "assert all(getattr(tidegate, name) for name in tidegate.__all__)\n"
        "assert set(tidegate.__all__) <= set(dir(tidegate))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_errors_are_tidegates() -> None:
    """ModeratorClosed is caught with everything else that Tidegate raises."""
    assert issubclass(ModeratorClosed, TidegateError)


async def test_whole_and_shown_of_one_segment() -> None:
    """Of a text with one segment the decision is that segment's, and all of it may be shown."""
    async with moderator() as it:
        decisions = await it.decisions("Fine, all of it.")
    assert len(decisions) == 1
    assert whole(decisions) == decisions[0]
    assert shown("Fine, all of it.", decisions) == ("Fine, all of it.", True)
