"""second.py: whom a language model is asked about, and what happens when it does not answer."""

import asyncio
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from detectors import second as seconds
from detectors.harms import COLUMNS, THRESHOLD_KEYS
from detectors.load import shipped_thresholds
from detectors.logprob import Affine, Helper, HelperError
from detectors.protocol import Encoded, FloatArray, Passage
from detectors.second import Band, Plan, Second
from tests.fakes import AtHalfDetector, SaysHelper, second_plan
from tests.lanes import delta
from worker import metrics
from worker.cache import ScoreCache
from worker.events import Decision
from worker.moderator import Moderator
from worker.offline import Line, Offline
from worker.pipeline import Pipeline
from worker.second import Answer, Question, SecondLook
from worker.settings import HERE, Settings, TenantPolicy

SHIPPED = shipped_thresholds([AtHalfDetector()])
PAD = " Padding that makes of it a segment."


def text(violence: float, second: float, more: str = "") -> str:
    return f"violence={violence:.3f} second={second:.3f}.{PAD}{more}"


class Scripted(SaysHelper):
    """Calls `script` before it answers."""

    def __init__(self, script: Callable[[], object]) -> None:
        super().__init__()
        self.script = script

    def __call__(self, prompts: list[str]) -> list[list[float]]:
        self.asked.append(prompts)
        self.script()
        return [self._row(prompt) for prompt in prompts]


def second_of(
    helper: Helper, plan: Plan | None = None, shipped: Mapping[str, float] = SHIPPED
) -> Second:
    plan = plan or second_plan()
    return Second(plan, helper, plan.digest("helper"), shipped)


@contextmanager
def counted(cause: str) -> Iterator[Callable[[], int]]:
    """How often the cause was counted since."""
    counter = metrics.LOGPROB_UNAVAILABLE.labels(cause)
    before = counter._value.get()
    yield lambda: int(counter._value.get() - before)


async def decide(
    second: Second | None, *texts: str, after: float = 0.0, patient: bool = False, **overrides: Any
) -> list[Decision]:
    """One decision a text, each a stream of its own, in their order; fed `after` seconds apart."""
    # `other` is out of the way: these detectors say the same of it as of violence.
    policy = {"default": TenantPolicy(thresholds={"other": 1.0, "violence": 0.5})}
    fields: dict[str, Any] = {"tenants": policy, "logprob_deadline_ms": 2_000} | overrides
    chosen = Settings(**fields)
    async with Pipeline(
        chosen, [AtHalfDetector()], second=second, patient=patient
    ) as pipeline:  # fmt: skip
        lane = pipeline.lane("in", 0)
        made: dict[str, Decision] = {}
        for number, it in enumerate(texts):
            value = delta(f"s{number}", 0, it, True)
            pipeline.submit(lane, lane.feed(number, 0, None, value, pipeline.clock(), 0))
            await asyncio.sleep(after)
        while lane.open_streams:
            await asyncio.sleep(0.002)
        output = lane.take(pipeline.clock(), drain=True)
        assert output is not None
        made |= {it.stream_id: it for it in output.decisions}
    return [made[f"s{number}"] for number in range(len(texts))]


@pytest.mark.parametrize(
    ("violence", "second", "verdict"),
    [(0.45, 0.9, "block"), (0.55, 0.1, "allow"), (0.4, 0.9, "block"), (0.6, 0.1, "allow")],
)
async def test_inside_the_band_the_second_look_counts(
    violence: float, second: float, verdict: str
) -> None:
    """Both ways, and at the band's ends too; the decision says what settled it."""
    (made,) = await decide(second_of(SaysHelper()), text(violence, second))
    assert (made.verdict, made.stage) == (verdict, "logprob")
    assert made.scores["violence"] == pytest.approx(second)
    assert "unavailable" not in made.reason


@pytest.mark.parametrize(("violence", "verdict"), [(0.39, "allow"), (0.61, "block")])
async def test_outside_the_band_nobody_is_asked(violence: float, verdict: str) -> None:
    """What the encoders are sure of stays theirs."""
    helper = SaysHelper()
    (made,) = await decide(second_of(helper), text(violence, 1 - violence))
    assert (made.verdict, made.stage, helper.asked) == (verdict, "toxicity", [])
    assert made.scores["violence"] == violence


@pytest.mark.parametrize(
    ("threshold", "asked"),
    [
        (0.05, ()), (0.2, (0.25,)), (0.36, (0.25, 0.35, 0.45)),
        (0.5, (0.25, 0.35, 0.45, 0.55, 0.59)), (0.6, (0.35, 0.45, 0.55, 0.59)), (0.86, (0.59,)),
        (0.95, ()), (1.0, ()),
    ],
)  # fmt: skip
def test_the_band_is_where_the_shipped_and_the_tenants_bands_overlap(
    threshold: float, asked: tuple[float, ...]
) -> None:
    """Elsewhere an answer was never calibrated: it must not block at 0.2, nor clear at 0.9."""
    second = second_of(SaysHelper(), second_plan(band={"violence": Band(0.3, 0.1)}))
    scores = (0.05, 0.25, 0.35, 0.45, 0.55, 0.59, 0.61, 0.95, 1.0)
    thresholds = [threshold, *[1.0] * 6]
    found = [it for it in scores if second.uncertain([it, *[0.0] * 6], thresholds)]
    assert tuple(found) == asked


def test_at_a_threshold_of_1_nobody_is_asked() -> None:
    """No answer exceeds it. Just below it somebody is."""
    shipped = dict.fromkeys(THRESHOLD_KEYS, 0.9)
    second = second_of(SaysHelper(), second_plan(band={"violence": Band(0.3, 0.05)}), shipped)
    scores = [0.8, *[0.0] * 6]
    assert second.uncertain(scores, [1.0, *[0.9] * 6]) == ()
    assert second.uncertain(scores, [0.99, *[0.9] * 6]) == (0,)


async def test_a_tenants_low_threshold_has_nobody_asked_about_harmless_text() -> None:
    """What the encoders find harmless stays so, however low the tenant's threshold."""
    policy = TenantPolicy(thresholds={"other": 1.0, "violence": 0.05})
    helper = SaysHelper()
    (made,) = await decide(second_of(helper), text(0.02, 0.9), tenants={"default": policy})
    assert (made.verdict, made.stage, helper.asked) == ("allow", "toxicity", [])


async def test_only_the_uncertain_harms_scores_are_replaced() -> None:
    """Of two with a band the one inside it; a harm without one keeps its score, wherever it is."""
    lines = {"violence": Affine(1.0, 0.0), "hate_speech": Affine(1.0, 0.0)}
    bands = {"violence": Band(0.1, 0.1), "hate_speech": Band(0.1, 0.1), "harmful": Band(0.0, 0.0)}
    helper = SaysHelper()
    (made,) = await decide(
        second_of(helper, second_plan(calibration=lines, band=bands)), text(0.5, 0.2)
    )
    assert made.scores["violence"] == pytest.approx(0.2)
    assert (made.scores["hate_speech"], made.harmful) == (0.0, 0.5)
    assert len(helper.asked) == 1


@pytest.mark.parametrize(
    ("violence", "hate", "asked"),
    [
        (0.0, 0.0, ("harmful",)),
        (0.5, 0.0, ("violence", "harmful")),  # it may turn out to be nothing
        (0.0, 0.5, ("harmful",)),  # a score equal to its threshold does not count
        (0.0, 0.51, ()),
        (0.5, 0.51, ("violence",)),
        (0.61, 0.0, ()),
    ],
)
def test_harmful_is_not_asked_about_where_a_harm_explains_the_verdict(
    violence: float, hate: float, asked: tuple[str, ...]
) -> None:
    """No answer could change what is decided; a harm that is uncertain itself explains nothing."""
    lines = {"violence": Affine(1.0, 0.0), "harmful": Affine(1.0, 0.0)}
    bands = {"violence": Band(0.1, 0.1), "harmful": Band(0.1, 0.1)}
    plan = second_plan(calibration=lines, band=bands)
    second = second_of(SaysHelper(), plan, dict.fromkeys(THRESHOLD_KEYS, 0.5))
    scores = {"violence": violence, "hate_speech": hate, "harmful": 0.5}
    columns = second.uncertain([scores.get(name, 0.0) for name in COLUMNS], [0.5] * len(COLUMNS))
    assert tuple(COLUMNS[column] for column in columns) == asked


async def test_off_nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No second look, and the model's id is that of the encoders alone."""

    def refuse(*_: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr("worker.pipeline.load_second", refuse)
    (made,) = await decide(None, text(0.5, 0.9), logprob="")
    assert (made.verdict, made.stage, made.model) == ("allow", "toxicity", "toxicity@5a155a")


async def test_its_digest_is_part_of_the_models_name() -> None:
    """And another plan is another model."""
    wider = second_plan(band={"violence": Band(0.2, 0.1)})
    plans = (second_plan(), wider)
    names = [(await decide(second_of(SaysHelper(), it), text(0.1, 0.1)))[0].model for it in plans]
    assert names == [f"toxicity@5a155a+logprob@{it.digest('helper')[:6]}" for it in plans]
    assert len(set(names)) == 2


# -- without an answer ------------------------------------------------------------------------


def down() -> None:
    raise HelperError("status 500")


def wrong() -> None:
    raise ValueError("whatever")


@pytest.mark.parametrize("script", [down, wrong])
async def test_a_helper_that_fails_leaves_the_encoders_verdict(script: Callable[[], None]) -> None:
    """On both sides of the threshold, at once, and the reason says so; the next is asked again."""
    helper = Scripted(script)
    with counted("down") as count:
        begun = time.monotonic()
        made = await decide(second_of(helper), text(0.45, 0.9), text(0.55, 0.1))
        assert time.monotonic() - begun < 1.5
        assert count() == 2
    assert [it.verdict for it in made] == ["allow", "block"]
    assert {it.stage for it in made} == {"toxicity"}
    assert all(it.reason.endswith("; logprob unavailable") for it in made)
    assert made[0].scores["violence"] == 0.45
    assert len(helper.asked) == 2


async def test_a_score_that_is_no_number_is_no_answer() -> None:
    """NaN must not get past a threshold."""

    class NaN(SaysHelper):
        def _row(self, prompt: str) -> list[float]:
            return [float("nan")] * len(prompt)

    (made,) = await decide(second_of(NaN()), text(0.55, 0.1))
    assert (made.verdict, made.scores["violence"]) == ("block", 0.55)
    assert made.reason.endswith("; logprob unavailable")


async def test_a_slow_helper_is_not_waited_for_and_others_wait_not_at_all() -> None:
    """At the deadline the encoders' verdict stands; certain segments are decided meanwhile."""
    release = threading.Event()
    helper = Scripted(lambda: release.wait(10))
    try:
        with counted("late") as count:
            made = await decide(
                second_of(helper), text(0.45, 0.9), text(0.1, 0.1), text(0.9, 0.9),
                logprob_deadline_ms=3_000,
            )  # fmt: skip
            assert count() == 1
    finally:
        release.set()
    assert made[0].verdict == "allow"
    assert made[0].reason.endswith("; logprob unavailable")
    assert made[0].timing_ms.total >= 3_000
    assert [it.verdict for it in made[1:]] == ["allow", "block"]
    assert max(it.timing_ms.total for it in made[1:]) < 2_700


async def test_the_hold_deadline_bounds_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoders that were slow leave it what is left of hold_timeout_ms."""
    score = AtHalfDetector.score

    def slowly(self: AtHalfDetector, batch: Sequence[Encoded]) -> FloatArray:
        time.sleep(1.2)
        return score(self, batch)

    monkeypatch.setattr(AtHalfDetector, "score", slowly)
    release = threading.Event()
    helper = Scripted(lambda: release.wait(10))
    try:
        (made,) = await decide(
            second_of(helper), text(0.55, 0.1), hold_timeout_ms=2_000, logprob_deadline_ms=1_900
        )
    finally:
        release.set()
    assert made.verdict == "block"
    assert made.reason.endswith("; logprob unavailable")
    assert 1_900 <= made.timing_ms.total < 3_000


async def test_a_full_queue_refuses() -> None:
    """One is asked, one waits until that one hangs, the third has its verdict at once."""
    release = threading.Event()
    helper = Scripted(lambda: release.wait(10))
    try:
        with counted("refused") as count:
            made = await decide(
                second_of(helper), *(text(0.45, 0.9, str(n)) for n in range(3)),
                logprob_queue=1, logprob_deadline_ms=2_000, after=0.4,
            )  # fmt: skip
            assert count() == 2
    finally:
        release.set()
    assert {it.verdict for it in made} == {"allow"}
    assert all(it.reason.endswith("; logprob unavailable") for it in made)
    assert made[2].timing_ms.total < 1_000 < made[1].timing_ms.total


@pytest.mark.parametrize("after", [0.0, 0.02])
async def test_after_failures_in_a_row_it_is_left_alone_for_a_while(after: float) -> None:
    """Five failures; what comes then, or waits already, is decided without a call."""
    helper = Scripted(down)
    texts = [text(0.45, 0.9, str(n)) for n in range(9)]
    with counted("refused") as count:
        made = await decide(second_of(helper), *texts, after=after)
        assert count() == 4
    assert len(helper.asked) == 5
    assert {it.verdict for it in made} == {"allow"}


async def test_a_file_does_not_wait_behind_a_helper_that_hangs() -> None:
    """A patient question has no deadline of its own: once every thread hangs, all are told."""
    release = threading.Event()
    helper = Scripted(lambda: release.wait(30))
    try:
        async with asyncio.timeout(10):
            made = await decide(
                second_of(helper), *(text(0.45, 0.9, str(n)) for n in range(3)), patient=True,
                logprob_deadline_ms=200,
            )  # fmt: skip
    finally:
        release.set()
    assert all(it.reason.endswith("; logprob unavailable") for it in made)


async def test_what_a_keyword_has_settled_is_not_asked_about(tmp_path: Path) -> None:
    """A keyword's harm counts as certain, though the tenant only flags it: no look changes it."""
    words = tmp_path / "keywords.toml"
    words.write_text('[violence]\nblock = ["grumblefex"]\n')
    policy = TenantPolicy(thresholds={"other": 1.0, "violence": 0.5}, actions={"violence": "flag"})
    helper = SaysHelper()
    (made,) = await decide(
        second_of(helper), text(0.45, 0.1, " You grumblefex, I say."), tenants={"default": policy},
        keywords_file=words,
    )  # fmt: skip
    assert (made.scores["violence"], made.stage, helper.asked) == (1.0, "toxicity", [])


async def test_failures_with_an_answer_between_are_not_in_a_row() -> None:
    """Four, an answer, four: it was asked each time."""
    helper = SaysHelper()
    said = ["down"] * 4 + ["0.900"] + ["down"] * 4 + ["0.900"]
    texts = [f"violence=0.450 second={it}.{PAD}{n}" for n, it in enumerate(said)]
    made = await decide(second_of(helper), *texts, after=0.02)
    assert [it.stage == "logprob" for it in made] == [it != "down" for it in said]
    assert len(helper.asked) == len(said)


async def test_it_comes_back_after_a_while() -> None:
    """The first that is asked again answers, and then all are asked."""
    failing = [True]
    helper = Scripted(lambda: down() if failing[0] else None)

    async def mend() -> None:
        while len(helper.asked) < 5:
            await asyncio.sleep(0.01)
        failing[0] = False

    mending = asyncio.create_task(mend())
    texts = [text(0.45, 0.9, str(n)) for n in range(20)]
    made = await decide(second_of(helper), *texts, after=0.15)
    await mending
    assert [it.stage for it in made[:5]] == ["toxicity"] * 5
    assert [it.stage for it in made[-3:]] == ["logprob"] * 3


async def test_behind_a_helper_that_hangs_nobody_queues() -> None:
    """Once every thread has hung for a deadline, what is uncertain is decided at once."""
    release = threading.Event()
    helper = Scripted(lambda: release.wait(10))
    try:
        made = await decide(
            second_of(helper), text(0.45, 0.9), text(0.45, 0.9, "later"),
            logprob_deadline_ms=1_000, after=2.0,
        )  # fmt: skip
    finally:
        release.set()
    assert made[1].timing_ms.total < 900
    assert made[1].reason.endswith("; logprob unavailable")


# -- what is remembered -----------------------------------------------------------------------


async def test_an_answer_is_remembered_and_a_fall_back_is_not() -> None:
    """The same text again: no call, stage `cache`, the same scores. After a failure: asked anew."""
    helper = SaysHelper()
    first, again = await decide(second_of(helper), *[text(0.45, 0.9)] * 2, after=0.6)
    assert (first.stage, again.stage, again.scores) == ("logprob", "cache", first.scores)
    assert again.verdict == "block"
    assert len(helper.asked) == 1

    scripts = [down]
    failing = Scripted(lambda: scripts.pop()() if scripts else None)
    first, again = await decide(second_of(failing), *[text(0.45, 0.9)] * 2, after=0.6)
    assert (first.verdict, again.verdict, again.stage) == ("allow", "block", "logprob")


async def test_a_learnt_threshold_moves_no_band() -> None:
    """What is learnt from scores does not change them: only what they are held against."""
    helper = SaysHelper()
    chosen = Settings(tenants={"default": TenantPolicy(thresholds={"other": 1.0})})
    decisions: list[Decision] = []
    async with Pipeline(chosen, [AtHalfDetector()], second=second_of(helper)) as pipeline:
        lane = pipeline.lane("in", 0)
        for number, threshold in enumerate((0.5, 0.3, 0.5)):  # 0.5 is the shipped one
            pipeline.thresholds.update("default", "violence", threshold, number + 1)
            value = delta(f"s{number}", 0, text(0.55, 0.4), True)
            pipeline.submit(lane, lane.feed(number, 0, None, value, pipeline.clock(), 0))
            while lane.open_streams:
                await asyncio.sleep(0.002)
            output = lane.take(pipeline.clock(), drain=True)
            assert output is not None
            decisions += output.decisions
    assert [round(it.scores["violence"], 3) for it in decisions] == [0.4, 0.4, 0.4]
    assert [it.verdict for it in decisions] == ["allow", "block", "allow"]


async def test_two_models_do_not_share_answers() -> None:
    """One cache, one text, two plans: each asks for itself."""
    cache = ScoreCache()
    helper = SaysHelper()
    for intercept in (0.0, 1.0):
        plan = second_plan(calibration={"violence": Affine(1.0, intercept)})
        look = SecondLook(second_of(helper, plan), Settings(), cache, time.monotonic)
        told: list[Answer] = []
        question = Question(
            Passage(text(0.5, 0.5), "", ()), (0,), time.monotonic() + 5, told.append, lambda: True
        )
        running = asyncio.gather(*look.runs())
        look.ask(question, b"key")
        while not told:
            await asyncio.sleep(0.002)
        running.cancel()
        look.close()
        assert told[0].stage == "logprob"
    assert len(helper.asked) == 2


# -- what it costs others ---------------------------------------------------------------------


async def test_what_would_come_too_late_is_not_begun() -> None:
    """A look takes as long as the deadline nearly: of several at once the first is in time, and
    behind it none is begun for nothing."""
    helper = Scripted(lambda: time.sleep(1.2))
    second = second_of(helper)
    first = text(0.45, 0.9, "first")
    texts = [text(0.45, 0.9, str(n)) for n in range(4)]
    made = await decide(second, first, *texts, logprob_deadline_ms=2_000)
    assert [it.stage for it in made] == ["logprob", *["toxicity"] * 4]
    assert len(helper.asked) == 1


async def test_what_was_given_up_is_not_gone_on_with() -> None:
    """Of two uncertain harms the second is not asked about once the deadline is over."""
    lines = {"violence": Affine(1.0, 0.0), "harmful": Affine(1.0, 0.0)}
    bands = {"violence": Band(0.1, 0.1), "harmful": Band(0.5, 0.5)}
    helper = Scripted(lambda: time.sleep(0.4))
    plan = second_plan(calibration=lines, band=bands)
    (made,) = await decide(second_of(helper, plan), text(0.5, 0.9), logprob_deadline_ms=200)
    assert made.reason.endswith("; logprob unavailable")
    await asyncio.sleep(0.5)
    assert len(helper.asked) == 1


async def test_no_text_can_have_the_helper_left_alone() -> None:
    """A prompt that the model cannot read is no failure of the helper's."""
    helper = Scripted(wrong)
    await decide(second_of(helper), *(text(0.45, 0.9, str(n)) for n in range(8)), after=0.02)
    assert len(helper.asked) == 8


async def test_a_late_answer_is_still_remembered() -> None:
    """It is true, only not in time: the same text again is settled by it."""
    delays = [0.4]
    helper = Scripted(lambda: time.sleep(delays.pop() if delays else 0.0))
    first, again = await decide(
        second_of(helper), *[text(0.45, 0.9)] * 2, logprob_deadline_ms=200, after=2.0
    )
    assert (first.stage, again.stage) == ("toxicity", "cache")
    assert again.scores["violence"] == pytest.approx(0.9)


TWO = text(0.45, 0.9) + " " + text(0.45, 0.1) + " " + PAD * 3  # the first of its segments blocks


async def test_a_segment_of_a_blocked_stream_is_not_asked_about() -> None:
    """Its first segment is blocked by a second look: nobody waits for the next one any more."""
    helper = Scripted(lambda: time.sleep(0.2))
    with counted("late") as late:
        (made,) = await decide(second_of(helper), TWO, min_segment_chars=30)
        assert late() == 0
    assert (made.verdict, made.stage) == ("block", "logprob")
    await asyncio.sleep(0.3)
    assert len(helper.asked) == 1


async def test_what_nobody_waits_for_is_not_counted() -> None:
    """Its first segment is blocked while the next is being asked about, too slowly."""
    delays = iter((0.1, 2.5))
    helper = Scripted(lambda: time.sleep(next(delays)))
    other = text(0.1, 0.1)
    with counted("late") as late:
        made = await decide(
            second_of(helper), TWO, other, other, min_segment_chars=30, logprob_threads=2,
            logprob_deadline_ms=1_500, after=1.0,
        )  # fmt: skip
        assert len(helper.asked) == 2
        assert late() == 0
    assert made[0].verdict == "block"


@pytest.mark.parametrize("seed", range(4))
async def test_whatever_the_helper_does_each_segment_is_decided_once(seed: int) -> None:
    """Answers, failures, delays around the deadline, in any order: nothing is left or doubled."""
    chance = random.Random(seed)

    def moody() -> None:
        time.sleep(chance.choice([0.0, 0.0, 0.02, 0.09, 0.11, 0.2]))
        failing = chance.random()
        if failing < 0.25:
            (down if failing < 0.12 else wrong)()

    chosen = Settings(
        logprob_deadline_ms=100, logprob_queue=4, logprob_threads=3, min_segment_chars=40,
        tenants={"default": TenantPolicy(
            thresholds={"other": 1.0, "violence": 0.5}, actions={"violence": "flag"}
        )},
    )  # fmt: skip
    made: list[Decision] = []
    fed = 0
    second = second_of(Scripted(moody))
    async with Pipeline(chosen, [AtHalfDetector()], second=second) as pipeline:
        lane = pipeline.lane("in", 0)
        for number in range(60):
            whole = " ".join(text(chance.choice([0.1, 0.45, 0.55, 0.9]), 0.2) for _ in range(3))
            value = delta(f"s{number}", 0, whole + str(number), True)
            segments = lane.feed(number, 0, None, value, pipeline.clock(), 0)
            fed += len(segments)
            pipeline.submit(lane, segments)
            await asyncio.sleep(chance.choice([0.0, 0.02]))
        while lane.open_streams:
            await asyncio.sleep(0.01)
        assert pipeline._second is not None
        assert (pipeline.waiting, pipeline._second._open) == (0, set())
        output = lane.take(pipeline.clock(), drain=True)
        assert output is not None
        made = output.decisions
        await asyncio.sleep(0.3)
        assert not lane.has_output
    assert len({it.decision_id for it in made}) == len(made) == fed
    for it in made:
        asked = it.stage in {"logprob", "cache"} and it.scores["violence"] == pytest.approx(0.2)
        fell_back = it.reason.endswith("; logprob unavailable")
        assert (asked or fell_back) is (it.scores["violence"] not in {0.1, 0.9})


async def test_where_nobody_reads_along_each_waits_for_its_turn() -> None:
    """Together they take longer than the deadline, which is each one's own; one alone too long."""
    helper = Scripted(lambda: time.sleep(0.8))
    texts = [text(0.45, 0.9, str(n)) for n in range(4)]
    made = await decide(
        second_of(helper), *texts, patient=True, logprob_queue=1,
        hold_timeout_ms=2_000, logprob_deadline_ms=1_900,
    )  # fmt: skip
    assert {it.stage for it in made} == {"logprob"}

    release = threading.Event()
    hanging = Scripted(lambda: release.wait(10))
    try:
        begun = time.monotonic()
        (only,) = await decide(
            second_of(hanging), texts[0], patient=True, logprob_deadline_ms=200
        )  # fmt: skip
        assert time.monotonic() - begun < 5
    finally:
        release.set()
    assert only.reason.endswith("; logprob unavailable")


async def test_a_pipeline_ends_while_a_helper_hangs() -> None:
    """It waits for nobody's answer."""
    release = threading.Event()
    helper = Scripted(lambda: release.wait(10))
    chosen = Settings(logprob_deadline_ms=4_000)
    pipeline = Pipeline(chosen, [AtHalfDetector()], second=second_of(helper))
    try:
        begun = time.monotonic()
        async with pipeline:
            lane = pipeline.lane("in", 0)
            value = delta("s", 0, text(0.55, 0.1), True)
            pipeline.submit(lane, lane.feed(0, 0, None, value, pipeline.clock(), 0))
            while not helper.asked:
                await asyncio.sleep(0.005)
            await asyncio.sleep(0.1)
            assert pipeline.delay_s == 0.0  # what waits for it slows no transaction down
        assert time.monotonic() - begun < 3.5
        await asyncio.sleep(4.1)
        assert not lane.has_output
    finally:
        release.set()


# -- the same everywhere ----------------------------------------------------------------------


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """What names a second look."""
    seconds.write(tmp_path / seconds.FILE, second_plan())
    return Settings(
        detectors=("python:tests.fakes:AtHalfDetector",), logprob="python:tests.fakes:SaysHelper",
        logprob_plan=tmp_path / seconds.FILE, logprob_queue=1,
        tenants={"default": TenantPolicy(thresholds={"other": 1.0, "violence": 0.5})},
    )  # fmt: skip


async def test_a_moderator_looks_twice_too(settings: Settings) -> None:
    """From settings alone; a second moderator asks the same helper: the first has not ended it."""
    before = SaysHelper.made, SaysHelper.ended
    for _ in range(2):
        async with Moderator(settings) as moderator:
            made = await moderator.moderate(text(0.45, 0.9))
            assert (made.verdict, made.stage) == ("block", "logprob")
            assert "+logprob@" in made.model
    assert (SaysHelper.made, SaysHelper.ended) == (before[0] + 1, before[1])


async def test_a_worker_ends_the_helper_that_it_made(settings: Settings) -> None:
    """Its threads and connections; one that was handed in is its owner's."""
    before = SaysHelper.ended
    async with Pipeline(settings):
        assert SaysHelper.ended == before
    assert SaysHelper.ended == before + 1
    async with Pipeline(settings, second=second_of(SaysHelper())):
        pass
    assert SaysHelper.ended == before + 1


def test_a_file_waits_for_every_second_look(settings: Settings) -> None:
    """Nobody reads along: no queue is too long, so equal input gives equal output."""
    made: list[Decision] = []
    count = 40
    lines = [
        Line(n + 1, delta(f"s{n}", 0, text(0.45, 0.9 if n % 2 else 0.1, str(n)), True))
        for n in range(count)
    ]

    async def chunks() -> AsyncIterator[list[Line]]:
        yield lines

    run = Offline(settings, made.append, lambda *_: None)
    asyncio.run(run.run(chunks()))
    assert [it.verdict for it in made] == ["allow", "block"] * (count // 2)
    assert {it.stage for it in made} == {"logprob"}
    assert run.unasked == 0


def test_a_file_says_how_many_second_looks_are_missing(settings: Settings, tmp_path: Path) -> None:
    """On stderr, beside what is in each decision."""
    lines = [
        delta(f"s{n}", 0, f"violence=0.450 second={said}.{PAD}", True)
        for n, said in enumerate(("down", "0.900"))
    ]
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))
    fields = settings.model_dump(include={"detectors", "logprob", "logprob_plan"}, mode="json")
    environment = {
        f"TIDEGATE_{name.upper()}": value if isinstance(value, str) else json.dumps(value)
        for name, value in fields.items()
    }
    environment["TIDEGATE_TENANTS"] = '{"default": {"thresholds": {"violence": 0.5, "other": 1}}}'
    ended = subprocess.run(
        [sys.executable, "-m", "worker.cli", "moderate", "--input", str(tmp_path / "in.jsonl")],
        env=os.environ | environment, cwd=HERE, capture_output=True, check=True,
    )  # fmt: skip
    made = [json.loads(line) for line in ended.stdout.splitlines()]
    assert [(it["verdict"], it["stage"]) for it in made] == [
        ("allow", "toxicity"),
        ("block", "logprob"),
    ]
    assert b'{"logprob_unavailable":1}' in ended.stderr
