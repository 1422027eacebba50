"""How several detectors' scores become one."""

import asyncio
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from detectors import combine
from detectors.combine import CombinationError
from detectors.constant import Constant
from detectors.harms import COLUMNS, DEFAULT_THRESHOLDS, THRESHOLD_KEYS
from detectors.load import LoadError, load_combination, shipped_thresholds
from detectors.protocol import Encoded, FloatArray, Passage
from tests.lanes import delta
from worker import detect
from worker.events import Decision
from worker.pipeline import Pipeline
from worker.settings import Settings, TenantPolicy


class Named:
    """A detector's name and digest."""

    def __init__(self, name: str, digest: str) -> None:
        self.name, self.digest = name, digest


PAIR = (Named("toxicity", "aa"), Named("context", "bb"))


def contents(**changes: Any) -> dict[str, Any]:
    """What export writes, with changes."""
    plain: dict[str, Any] = {
        "detectors": {"toxicity": "aa", "context": "bb"},
        "weights": {column: [0.25, 0.5, -1.0] for column in COLUMNS},
        "thresholds": dict.fromkeys(THRESHOLD_KEYS, 0.5),
    }
    return plain | changes


FIRST = np.array([False])  # one segment, the first of its reply
BEFORE = "An opening that holds some thirty letters. "
PLAIN = {column: [0.25, 0.5, -1.0] for column in COLUMNS}


def written(folder: Path, **changes: Any) -> Path:
    (folder / combine.FILE).write_text(json.dumps(contents(**changes)))
    return folder


def test_it_is_the_weighted_sum_of_log_odds(tmp_path: Path) -> None:
    """0.25 * logit(0.8) + 0.5 * logit(0.5) - 1, by hand."""
    found = combine.read(written(tmp_path), PAIR)
    assert found is not None
    combined = found.combined(np.array([[[0.8] * 7], [[0.5] * 7]]), FIRST)
    assert combined.shape == (1, 7)
    assert combined[0, 0] == pytest.approx(1 / (1 + math.exp(1 - 0.25 * math.log(4))), abs=1e-6)


def test_a_later_segment_needs_more_for_the_same_probability(tmp_path: Path) -> None:
    """What a column loses is taken from its log-odds, where there is text before the segment."""
    found = combine.read(
        written(tmp_path, weights=PLAIN | {"violence": [0.25, 0.5, -1.0, -1.5]}), PAIR
    )
    assert found is not None
    scores = np.array([[[0.8] * 7] * 2, [[0.5] * 7] * 2])  # two detectors, two segments
    passages = [Passage("one", "", ()), Passage("two", BEFORE, ())]
    first, later = found.combined(scores, combine.follows(passages))
    plain = 0.25 * odds(0.8) - 1
    assert first == pytest.approx([chance(plain)] * 7, abs=1e-6)
    assert later == pytest.approx([chance(plain - 1.5), *[chance(plain)] * 6], abs=1e-6)


@pytest.mark.parametrize("more", [[0.5], [float("inf")], [float("-inf")], [-1.0, -1.0]])
def test_a_later_segment_never_needs_less(tmp_path: Path, more: list[float]) -> None:
    """A file that says so is refused, at both of its places."""
    of_two = PLAIN | {"hate_speech": [0.25, 0.5, -1.0, *more]}
    of_one = {column: [1.0, -1.0] for column in COLUMNS} | {"hate_speech": [1.0, -1.0, *more]}
    for changes in ({"weights": of_two}, {"stages": [first(weights=of_one)]}):
        text = json.dumps(contents(**changes)).replace("Infinity", "1e999")
        (tmp_path / combine.FILE).write_text(text)
        with pytest.raises(CombinationError, match=r"hate_speech|out of range"):
            combine.read(tmp_path, PAIR)


def test_a_score_that_is_missing_stays_missing(tmp_path: Path) -> None:
    """NaN of one detector is NaN of the whole: doubt never reads as allow."""
    found = combine.read(written(tmp_path), PAIR)
    assert found is not None
    scores = np.full((2, 3, 7), 0.1)
    scores[1, 1, 4] = np.nan
    missing = np.isnan(found.combined(scores, np.zeros(3, dtype=bool)))
    assert missing[1, 4]
    assert missing.sum() == 1


def test_certain_scores_stay_finite(tmp_path: Path) -> None:
    """0 and 1 have no finite log-odds, and still combine."""
    found = combine.read(written(tmp_path), PAIR)
    assert found is not None
    combined = found.combined(np.stack([np.zeros((1, 7)), np.ones((1, 7))]), FIRST)
    assert ((combined >= 0) & (combined <= 1)).all()


@pytest.mark.parametrize(
    "detectors", [PAIR[:1], PAIR[::-1], (PAIR[0], Named("other", "bb")), (*PAIR, Named("x", "y"))]
)
def test_it_is_for_these_detectors_in_this_order_alone(
    tmp_path: Path, detectors: tuple[Named, ...]
) -> None:
    """With any others the highest score counts."""
    assert combine.read(written(tmp_path), detectors) is None


def test_each_choice_of_detectors_may_have_its_own(tmp_path: Path) -> None:
    """A user who names some of the detectors gets what was learnt of these."""
    written(tmp_path)
    three = (*PAIR, Named("words", "cc"))
    more = contents(
        detectors={"toxicity": "aa", "context": "bb", "words": "cc"},
        weights={column: [0.1, 0.2, 0.3, 0.4] for column in COLUMNS},
    )
    (tmp_path / "combination-all.json").write_text(json.dumps(more))
    found = [combine.read(tmp_path, detectors) for detectors in (PAIR, three)]
    assert [len(it.weights["violence"]) for it in found if it is not None] == [3, 4]
    assert combine.read(tmp_path, three[1:]) is None


def test_two_for_the_same_detectors_are_refused(tmp_path: Path) -> None:
    """Which of them counts must not depend on their names."""
    written(tmp_path)
    (tmp_path / "combination-more.json").write_text(json.dumps(contents()))
    with pytest.raises(CombinationError, match="two combinations of toxicity, context"):
        combine.read(tmp_path, PAIR)


def test_three_detectors_count_as_they_were_weighed(tmp_path: Path) -> None:
    """0.1 * logit(0.8) + 0.2 * logit(0.5) + 0.3 * logit(0.2) + 0.4, by hand."""
    names = {"toxicity": "aa", "context": "bb", "words": "cc"}
    weights = {column: [0.1, 0.2, 0.3, 0.4] for column in COLUMNS}
    folder = written(tmp_path, detectors=names, weights=weights)
    found = combine.read(folder, [Named(*it) for it in names.items()])
    assert found is not None
    combined = found.combined(np.array([[[0.8] * 7], [[0.5] * 7], [[0.2] * 7]]), FIRST)
    assert combined[0, 0] == pytest.approx(1 / (1 + math.exp(0.2 * math.log(4) - 0.4)), abs=1e-6)


def test_it_is_for_a_folder_whichever_of_its_graphs_is_run(tmp_path: Path) -> None:
    """On a GPU a detector runs another graph and says so; what is learnt again is another one."""
    on_gpu = Named("toxicity", combine.with_graph("aa", "model.fp16.onnx"))
    assert on_gpu.digest != "aa"
    assert combine.read(written(tmp_path), (on_gpu, PAIR[1])) is not None
    other = Named("toxicity", combine.with_graph("cc", "model.fp16.onnx"))
    with pytest.raises(CombinationError, match="another toxicity"):
        combine.read(tmp_path, (other, PAIR[1]))


def test_without_a_file_there_is_none(tmp_path: Path) -> None:
    """A folder of models need not have one."""
    assert combine.read(tmp_path, PAIR) is None


def first(**changes: Any) -> dict[str, Any]:
    """A first look by one detector: its own log-odds less 1, settled below 0.2."""
    plain: dict[str, Any] = {
        "detectors": 1,
        "weights": {column: [1.0, -1.0] for column in COLUMNS},
        "below": dict.fromkeys(COLUMNS, 0.2),
    }
    return plain | changes


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"detectors": {"toxicity": "aa", "context": "cc"}}, "another context"),
        ({"stages": [first(detectors=2)]}, "stages: detectors"),
        ({"stages": [first(detectors=0)]}, "stages: detectors"),
        ({"stages": [first(), first()]}, "stages: detectors"),
        (
            {"stages": [first(weights={c: [1.0, 1.0, 0.0, 0.0] for c in COLUMNS})]},
            "stages: weights: v",
        ),
        ({"stages": [first(below={"violence": 0.2})]}, "stages: below: need violence"),
        ({"stages": [first(below=dict.fromkeys(COLUMNS, 1.2))]}, "stages: below: violence"),
        ({"stages": [first(below=dict.fromkeys(COLUMNS, 0.6))]}, "0 to its threshold, 0.5"),
        ({"weights": {column: [1.0, 0.0] for column in COLUMNS}}, "one a detector"),
        ({"weights": {column: [-0.1, 1.0, 0.0] for column in COLUMNS}}, "count for more"),
        ({"weights": {column: [0.0, 0.0, 0.0] for column in COLUMNS}}, "count for more"),
        ({"weights": {"violence": [1.0, 1.0, 0.0]}}, "need violence"),
        ({"thresholds": {"greed": 0.5}}, "greed"),
        ({"thresholds": {"other": 1.5}}, "outside 0..1"),
        ({"thresholds": "high"}, "thresholds"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    """A worker does not start on it, and says why."""
    with pytest.raises(CombinationError, match=says):
        combine.read(written(tmp_path, **changes), PAIR)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    """Whatever stands there under its name."""
    (tmp_path / "combination-old.json").mkdir()
    with pytest.raises(LoadError, match=r"combination-old\.json: Is a directory"):
        load_combination(tmp_path, [Same("toxicity", 0.5), Same("context", 0.5)])


class Same:
    """Gives every passage the same scores."""

    thresholds: ClassVar[dict[str, float]] = {"violence": 0.9}

    def __init__(self, name: str, score: float) -> None:
        self.name, self.digest, self._score = name, name[:2] * 8, score

    def encode(self, passages: Sequence[Passage]) -> list[Encoded]:
        """As the constant does."""
        return Constant().encode(passages)

    def score(self, batch: Sequence[Encoded]) -> FloatArray:
        """(B, 7)."""
        return np.full((len(batch), len(COLUMNS)), self._score)


def test_the_worker_scores_with_it_and_says_so(tmp_path: Path) -> None:
    """Scores, thresholds and the model's id are those of the combination."""
    pair = (Same("toxicity", 0.8), Same("context", 0.5))
    digests = {detector.name: detector.digest for detector in pair}
    found = combine.read(written(tmp_path, detectors=digests), pair)
    assert found is not None
    rows = detect.encode(pair, [Passage("text", "", ())])
    ((scores, stage, _),) = detect.score(pair, rows, found, FIRST)
    assert scores == pytest.approx([1 / (1 + math.exp(1 - 0.25 * math.log(4)))] * 7, abs=1e-6)
    assert stage == "toxicity"
    assert detect.score(pair, rows, None, FIRST)[0][0] == (0.8,) * 7
    assert (
        detect.model_id(pair, found)
        == f"toxicity@tototo+context@cococo+combined@{found.digest[:6]}"
    )
    assert shipped_thresholds(pair, found) == DEFAULT_THRESHOLDS | dict.fromkeys(
        THRESHOLD_KEYS, 0.5
    )


def odds(p: float) -> float:
    """log(p / (1 - p))."""
    return math.log(p / (1 - p))


def chance(log_odds: float) -> float:
    """The other way round."""
    return 1 / (1 + math.exp(-log_odds))


class Counting(Same):
    """Scores by the text's length, and keeps what it was asked for."""

    def __init__(self, name: str, known: dict[str, float]) -> None:
        super().__init__(name, 0.0)
        self._known, self.asked = known, 0

    def encode(self, passages: Sequence[Passage]) -> list[Encoded]:
        """Two tokens each; the text itself is kept where nothing reads it."""
        plain = Constant().encode(passages)
        return [row._replace(tokens=2, text_tokens=i) for i, row in enumerate(plain)]

    def score(self, batch: Sequence[Encoded]) -> FloatArray:
        """(B, 7), by the place at which a passage was encoded."""
        self.asked += len(batch)
        values = list(self._known.values())
        return np.array([[values[row.text_tokens]] * len(COLUMNS) for row in batch])


def staged(folder: Path, cheap: Counting, dear: Counting) -> combine.Combination:
    """A combination in which the cheap one settles what it finds harmless."""
    digests = {"toxicity": cheap.digest, "context": dear.digest}
    found = combine.read(written(folder, detectors=digests, stages=[first()]), (cheap, dear))
    assert found is not None
    return found


def test_what_the_first_detectors_settle_goes_to_no_other(tmp_path: Path) -> None:
    """0.3 less 1 is 0.136, below 0.2; 0.5 less 1 is 0.27, which is not: there all count."""
    cheap = Counting("toxicity", {"calm": 0.3, "loud": 0.5})
    dear = Counting("context", {"calm": 0.9, "loud": 0.8})
    found = staged(tmp_path, cheap, dear)
    rows = detect.encode((cheap, dear), [Passage("calm", "", ()), Passage("loud", "", ())])
    calm, loud = detect.score((cheap, dear), rows, found, [False] * len(rows))
    assert calm.scores == pytest.approx([chance(odds(0.3) - 1)] * 7, abs=1e-6)
    assert loud.scores == pytest.approx([chance(0.5 * odds(0.8) - 1)] * 7, abs=1e-6)
    assert (cheap.asked, dear.asked) == (2, 1)
    assert (calm.tokens, loud.tokens) == (2, 4)
    assert (calm.stage, loud.stage) == ("toxicity", "context")


@pytest.mark.parametrize(
    "before", ["", "\n" * 200, " .\u200b" * 99, "\u2800" * 120, "Well, then: "]
)
def test_blanks_before_a_segment_make_it_no_later_one(before: str) -> None:
    """Who puts invisible characters in front must not have the rest judged more mildly."""
    passages = [Passage("text", before, ()), Passage("text", BEFORE, ())]
    assert combine.follows(passages).tolist() == [False, True]


def test_a_first_look_settles_a_later_segment_sooner(tmp_path: Path) -> None:
    """0.5 less 1 is 0.27, above 0.2; less another 1 it is 0.12, and no other is asked."""
    cheap = Counting("toxicity", {"opening": 0.5, "later": 0.5})
    dear = Counting("context", {"opening": 0.8, "later": 0.8})
    digests = {"toxicity": cheap.digest, "context": dear.digest}
    less = {column: [1.0, -1.0, -1.0] for column in COLUMNS}
    path = written(tmp_path, detectors=digests, stages=[first(weights=less)])
    found = combine.read(path, (cheap, dear))
    assert found is not None
    passages = [Passage("opening", "", ()), Passage("later", BEFORE, ())]
    rows = detect.encode((cheap, dear), passages)
    opening, later = detect.score((cheap, dear), rows, found, combine.follows(passages))
    assert later.scores == pytest.approx([chance(odds(0.5) - 2)] * 7, abs=1e-6)
    assert opening.scores == pytest.approx([chance(0.5 * odds(0.8) - 1)] * 7, abs=1e-6)
    assert (later.tokens, opening.tokens, dear.asked) == (2, 4, 1)
    for passage, expected in zip(passages, (opening, later), strict=True):
        encoded, alone, _ = detect.judge((cheap, dear), passage, found)
        assert len(encoded) == 2
        assert alone.stage == expected.stage


def test_a_segment_goes_its_way_whatever_it_is_batched_with(tmp_path: Path) -> None:
    """Alone, together and all at once through every detector: the same scores."""
    cheap = Counting("toxicity", {"calm": 0.3, "loud": 0.5})
    dear = Counting("context", {"calm": 0.9, "loud": 0.8})
    found = staged(tmp_path, cheap, dear)
    rows = detect.encode((cheap, dear), [Passage("calm", "", ()), Passage("loud", "", ())])
    together = [
        scored.scores for scored in detect.score((cheap, dear), rows, found, [False] * len(rows))
    ]
    alone = [detect.score((cheap, dear), [row], found, FIRST)[0].scores for row in rows]
    whole = np.stack([cheap.score([row[0] for row in rows]), dear.score([row[1] for row in rows])])
    assert alone == together
    assert found.combined(whole, np.zeros(2, dtype=bool)).tolist() == [
        list(scores) for scores in together
    ]


def test_a_first_look_without_a_score_settles_nothing(tmp_path: Path) -> None:
    """NaN is below every limit for who compares carelessly; here the segment stays unscored."""
    cheap = Counting("toxicity", {"calm": float("nan")})
    dear = Counting("context", {"calm": 0.1})
    found = staged(tmp_path, cheap, dear)
    rows = detect.encode((cheap, dear), [Passage("calm", "", ())])
    ((scores, _, _),) = detect.score((cheap, dear), rows, found, [False] * len(rows))
    assert np.isnan(scores).all()
    assert dear.asked == 1


def test_each_stage_may_settle_what_the_one_before_left(tmp_path: Path) -> None:
    """Three detectors, two stages: each segment goes as far as it must, batched or alone."""
    texts = ("calm", "loud", "wild", "odd")
    known = {
        "toxicity": (0.3, 0.5, 0.5, 0.9), "words": (0.9, 0.2, 0.6, 0.4),
        "context": (0.9, 0.9, 0.8, float("nan")),
    }  # fmt: skip
    trio = [Counting(name, dict(zip(texts, said, strict=True))) for name, said in known.items()]
    second = first(
        detectors=2, weights={c: [0.0, 1.0, -0.5] for c in COLUMNS},
        below=dict.fromkeys(COLUMNS, 0.25),
    )  # fmt: skip
    path = written(
        tmp_path, detectors={it.name: it.digest for it in trio}, stages=[first(), second],
        weights={column: [0.25, 0.5, 0.5, -1.0] for column in COLUMNS},
    )  # fmt: skip
    found = combine.read(path, trio)
    assert found is not None
    rows = detect.encode(trio, [Passage(text, "", ()) for text in texts])
    scored = detect.score(trio, rows, found, [False] * len(rows))
    wild = 0.25 * odds(0.5) + 0.5 * odds(0.6) + 0.5 * odds(0.8) - 1
    expected = [chance(odds(0.3) - 1), chance(odds(0.2) - 0.5), chance(wild)]
    assert [it.scores[0] for it in scored[:3]] == pytest.approx(expected, abs=1e-6)
    assert np.isnan(scored[3].scores).all()
    assert [it.asked for it in trio] == [4, 3, 2]
    assert [it.tokens for it in scored] == [2, 4, 6, 6]
    assert [it.stage for it in scored] == ["toxicity", "toxicity", "context", "context"]
    for one, row in zip(scored[:3], rows, strict=False):
        assert detect.score(trio, [row], found, FIRST) == [one]
    everything = np.stack([it.score([row[0] for row in rows]) for it in trio])
    opening = np.zeros(len(rows), dtype=bool)
    assert found.asked(everything, opening).tolist() == [1, 2, 3, 3]
    assert found.combined(everything, opening)[:3].tolist() == [
        list(it.scores) for it in scored[:3]
    ]
    (whole,) = detect.score(trio, [rows[0]], found, FIRST, [True])
    assert whole.scores[0] == pytest.approx(
        chance(0.25 * odds(0.3) + 0.5 * odds(0.9) + 0.5 * odds(0.9) - 1), abs=1e-6
    )


@pytest.mark.parametrize("alone", [True, False])
async def test_a_tenant_below_the_shipped_thresholds_has_every_detector_asked(
    tmp_path: Path, alone: bool
) -> None:
    """What is harmless by the shipped thresholds need not be by the tenant's own."""
    chosen = Settings(
        models=tmp_path,
        tenants={
            "strict": TenantPolicy(thresholds={"violence": 0.4}),
            "lenient": TenantPolicy(thresholds={"violence": 0.9}),
        },
    )
    calm = dict.fromkeys(map(str, range(20)), 0.3)
    cheap, dear = Counting("toxicity", calm), Counting("context", dict.fromkeys(calm, 0.8))
    staged(tmp_path, cheap, dear)
    made: dict[str, Decision] = {}
    async with Pipeline(chosen, [cheap, dear]) as pipeline:
        lane = pipeline.lane("in", 0)
        for number, tenant in enumerate(["strict", "lenient", "default"] * (1 if alone else 6)):
            value = delta(f"{tenant}{number}", 0, f"{number} is a calm text.", True, tenant=tenant)
            pipeline.submit(lane, lane.feed(number, 0, None, value, pipeline.clock(), 0))
            while alone and lane.open_streams:
                await asyncio.sleep(0.002)
        while lane.open_streams:
            await asyncio.sleep(0.002)
        output = lane.take(pipeline.clock(), drain=True)
        assert output is not None
        made |= {it.stream_id: it for it in output.decisions}
    for name, decision in made.items():
        asked_all = name.startswith("strict")
        assert decision.stage == ("context" if asked_all else "toxicity")
        together = 0.25 * odds(0.3) + 0.5 * odds(0.8) - 1
        expected = together if asked_all else odds(0.3) - 1
        assert decision.harmful == pytest.approx(chance(expected), abs=1e-6)
    assert len(made) == (3 if alone else 18)
