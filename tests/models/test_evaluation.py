"""What the evaluation says of a reply is what `tidegate moderate --scores-only` says of it."""

import asyncio
import json
import random
from collections.abc import AsyncIterator, Mapping, Sequence

import numpy as np
import pytest

from detectors.combine import Combination, follows
from detectors.constant import Constant
from detectors.harms import COLUMNS, DEFAULT_THRESHOLDS
from detectors.keywords import Keywords
from detectors.load import load_combination, load_detectors, load_second
from detectors.protocol import Encoded, FloatArray, Passage, Turn
from detectors.segments import DEFAULT_LIMITS
from tests.fakes import RowDetector
from training import early, scores, systems, windows
from training.rows import Row
from training.scores import judge
from training.systems import System
from worker import detect
from worker.events import Decision
from worker.offline import Line, Offline, Scores
from worker.pipeline import Pipeline
from worker.settings import HERE, Settings

MODELS = HERE / "models"
PLAIN = "The second exit leads to the lake. Take the path along the shore until the old mill. "
TEXTS = [
    PLAIN * 9,
    "You are all worthless and I hope that somebody hurts you. " * 5 + PLAIN * 4,
    PLAIN * 4 + "I will find out where you live and I will kill you and your whole family. " * 3,
    PLAIN * 3 + "gas the jews, they said. " + PLAIN * 3,  # a keyword blocks
    "word " * 25 + "gas the\njews, " + PLAIN,  # one over a border
    "Hello.",  # too short for the models
    "ok so\n\nthis (a list):\n1. one\n2. two\n" * 12,
]


def row(text: str, number: int = 0) -> Row:
    turns = (Turn("user", "How do I get to the lake?"),)
    known = (0.0,) * 7, (1.0,) * 7
    return Row(f"t/{number}", "t", "reply", turns, text, *known, str(number), True)


def rows() -> list[Row]:
    return [row(text, number) for number, text in enumerate(TEXTS)]


def said_by_moderate(
    some: Sequence[Row], detectors: tuple[str, ...]
) -> dict[str, Mapping[str, object]]:
    """The lines of `--scores-only`, by stream."""
    lines: dict[str, Mapping[str, object]] = {}
    kept = Scores()

    def write(decision: object) -> None:
        line = kept.add(decision)  # type: ignore[arg-type]  # Offline gives decisions
        if line is not None:
            lines[str(line["stream_id"])] = line

    async def chunks() -> AsyncIterator[list[Line]]:
        yield [Line(number, _record(one)) for number, one in enumerate(some, 1)]

    settings = Settings(
        models=MODELS, detectors=detectors, hold_timeout_ms=600_000, logprob_deadline_ms=300_000
    )
    asyncio.run(Offline(settings, write, lambda *_: None).run(chunks()))
    return lines


def _record(one: Row) -> bytes:
    context = [{"role": turn.role, "content": turn.content} for turn in one.conversation]
    fields = {"stream_id": one.id, "seq": 0, "delta": one.text, "final": True, "context": context}
    return json.dumps(fields).encode()


@pytest.mark.parametrize("names", [("toxicity",), ("toxicity", "context"), Settings().detectors])
def test_scores_and_verdicts_are_those_of_moderate(names: tuple[str, ...]) -> None:
    """Models, what they make together, the second look where it is for them, keywords, short
    texts, nothing judged behind a block."""
    some = rows()
    detectors = load_detectors(names, MODELS)
    alone = [
        System(
            detector.name, detector.thresholds,
            {one.id: detector.score(detector.encode(windows.judged(one))) for one in some},
        )
        for detector in detectors
    ]  # fmt: skip
    combination = load_combination(MODELS, detectors)
    whole = systems._together(alone, combination, some)
    second = load_second(systems.SECOND, MODELS, detectors, combination)
    if second is not None:
        whole = systems.with_looks(whole, some, second)
    found = systems._served(whole, some).judged(some)
    lines = said_by_moderate(some, names)
    assert 2 <= sum(found.blocked) < len(some)  # else little is compared
    for one, highest, blocked in zip(some, found.highest, found.blocked, strict=True):
        line = lines[one.id]
        assert line["verdict"] == ("block" if blocked else "allow")
        said = {**dict(line["scores"]), "harmful": line["harmful"]}  # type: ignore[call-overload]
        assert dict(zip(COLUMNS, highest.tolist(), strict=True)) == pytest.approx(said, abs=1e-9)


def test_nothing_behind_a_block_counts() -> None:
    """The third segment would be the highest; the stream ended at the second."""
    segments = np.full((3, 7), 0.1)
    segments[1, 0], segments[2, 6] = 0.71, 1.0
    found = judge([row("x")], [segments], DEFAULT_THRESHOLDS)
    assert found.blocked_at.tolist() == [1]
    assert found.highest[0].tolist() == [0.71, *[0.1] * 6]


def test_a_score_at_its_threshold_does_not_block() -> None:
    """Only one above it does, as in the worker."""
    segments = np.full((1, 7), 0.1)
    segments[0, 0] = 0.70
    assert judge([row("x")], [segments], DEFAULT_THRESHOLDS).blocked_at.tolist() == [-1]


def test_a_column_that_is_not_judged_blocks_nothing() -> None:
    """A baseline's missing columns are NaN, and its others still count."""
    segments = np.full((1, 7), np.nan)
    segments[0, 6] = 0.95
    found = judge([row("x")], [segments], DEFAULT_THRESHOLDS)
    assert found.blocked.tolist() == [1]
    assert np.isnan(found.highest[0, :6]).all()


ODD = (
    "a word ", "Dr. Who? ", 'said "No." ', "\n\n", "\n", "... ", "!?) ", "。", "。」", "… ",
    "e\u0301\u0302 ", "\U0001f468\u200d\U0001f469", "\U0001f1e9\U0001f1ea", "  ", "\t", "- item; ",
    "x" * 70, "http://a.example/b.c?d=e ",
)  # fmt: skip


def odd_texts(seed: int) -> list[str]:
    """Texts with every kind of border, some without any."""
    chance = random.Random(seed)
    sizes = [chance.randrange(1, 160) for _ in range(6)]
    texts = ["".join(chance.choices(ODD, k=size)) for size in sizes]
    return [text for text in (*texts, "x" * 900, "word " * 99) if text.strip()]


@pytest.mark.parametrize("seed", range(6))
def test_each_segment_is_what_the_worker_judges(seed: int) -> None:
    """Text, what stands before it, and the conversation, under the default settings."""
    for number, text in enumerate(odd_texts(seed)):
        one = row(text, number)
        lane = Pipeline(Settings(), [Constant()]).lane("t", 0)
        segments = lane.feed(0, 0, None, _record(one), 0.0, 0)
        given = [Passage(s.text, s.before, s.stream.conversation) for s in segments]
        assert windows.judged(one) == given


class Reversed(RowDetector):
    """Another detector: the same rows, columns turned round."""

    def score(self, batch: Sequence[Encoded]) -> FloatArray:
        """(B, 7)"""
        return super().score(batch)[:, ::-1]


@pytest.mark.parametrize("seed", range(3))
def test_what_is_out_when_the_block_comes_is_what_was_released(seed: int) -> None:
    """The share is the last `released_to` of the stream; all of it where nothing was blocked."""
    some = [row(text, number) for number, text in enumerate(odd_texts(seed))]
    detector = RowDetector()
    segments = [detector.score(detector.encode(windows.judged(one))) for one in some]
    keywords = Keywords.load(HERE / "detectors" / "keywords.toml")
    screened = scores.with_keywords(keywords, some, segments)
    found = judge(some, screened, DEFAULT_THRESHOLDS)
    assert 0 < sum(found.blocked) < len(some)
    ends = released_by_worker(some, detector)
    for one, share, seen in zip(some, early.released(found), early.read(found), strict=True):
        assert share * len(one.text) == pytest.approx(ends[one.id].released_to)
        assert seen * len(one.text) == pytest.approx(ends[one.id].end)


def released_by_worker(some: Sequence[Row], detector: RowDetector) -> dict[str, Decision]:
    """The last decision of each stream."""
    last: dict[str, Decision] = {}

    async def chunks() -> AsyncIterator[list[Line]]:
        yield [Line(number, _record(one)) for number, one in enumerate(some, 1)]

    def keep(decision: Decision) -> None:
        last[decision.stream_id] = decision

    offline = Offline(Settings(), keep, lambda *_: None, detectors=[detector])
    asyncio.run(offline.run(chunks()))
    return last


@pytest.mark.parametrize("learnt", [True, False])
def test_two_detectors_are_made_one_as_in_the_worker(learnt: bool) -> None:
    """By the combination beside them, else the highest of each column."""
    chance = np.random.default_rng(5)
    weights = {column: tuple(chance.random(3).tolist()) for column in COLUMNS}
    weights = {column: (*row, -0.7) for column, row in weights.items()}
    combination = Combination({"a": "1", "b": "2"}, weights, {}) if learnt else None
    detectors = [RowDetector(), Reversed()]
    judged = row(TEXTS[0])
    passages = windows.judged(judged)
    alone = [detector.score(detector.encode(passages)) for detector in detectors]
    (found,) = scores.together([judged], [[of_row] for of_row in alone], combination)
    batch = detect.encode(detectors, passages)
    expected = [
        scored.scores for scored in detect.score(detectors, batch, combination, follows(passages))
    ]
    assert found.tolist() == [list(values) for values in expected]
    assert not np.allclose(found, alone[0])


def test_training_knows_the_worker_s_limits() -> None:
    """It cannot import the settings, so the numbers stand there twice."""
    settings = Settings()
    assert (
        settings.min_segment_chars, settings.max_segment_chars, settings.context_segments,
    ) == DEFAULT_LIMITS  # fmt: skip
    assert settings.short_chars == scores.SHORT


def test_early_counts_what_was_never_blocked_as_out() -> None:
    """Of three harmful replies one is stopped at once, one half way, one never."""
    rows_ = [row("A" * 200 + ". " + "B" * 198, n)._replace(targets=(1.0,) * 7) for n in range(3)]
    harmless = row("C" * 50, 3)
    judged = scores.Judged(
        [*rows_, harmless], np.zeros((4, 7)), np.array([0, 1, -1, -1]), np.ones(7)
    )
    found = early.early(judged)
    half = 202 / 400
    assert (found.harmful, found.harmless) == (3, 1)
    assert early.released(judged).tolist() == [0, half, 1, 1]
    assert found.released_median == half
    assert found.never.value == pytest.approx(1 / 3)
    assert found.blocked_released_median == pytest.approx(half / 2)
    assert found.blocked_read == pytest.approx((half + 1) / 2)
    assert found.harmless_blocked.value == 0
    # harmful: 2 of 2 blocked, 1 missed: 0.8; harmless: 1 right, 1 taken for it: 2/3
    assert found.macro_f1 == pytest.approx((0.8 + 2 / 3) / 2)
