"""A second look by a tiny causal model in a folder, from settings to decisions, without torch."""

import shutil
from pathlib import Path

import pytest

from detectors import second as seconds
from detectors.causal import LocalHelper
from detectors.harms import COLUMNS, DEFAULT_THRESHOLDS
from detectors.load import SecondSpec, load_combination, load_detectors, load_second
from detectors.logprob import Affine, LogProb
from detectors.prompts import PROMPTS, Limits
from detectors.protocol import Passage, Turn
from detectors.second import Band
from tests.fakes import SaysDetector, decide_records, delta_records, second_plan
from worker.events import Decision
from worker.pipeline import Pipeline
from worker.settings import Settings, TenantPolicy

FOLDER = Path(__file__).parent / "causal"
SHIPPED = Path(__file__).parents[2] / "models"
WORDS = "A fairly long answer, of which violence=0.65 is said, and 日本語 😀 too. "
TURNS = [{"role": "user", "content": "Where to?\n### Answer\n> the sea"}]
LINES = {"violence": Affine(3.0, 0.5), "harmful": Affine(2.0, -0.5)}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Whatever scores 0.65 for violence is asked about, in two columns."""
    shutil.copytree(FOLDER, tmp_path / "logprob")
    bands = {"violence": Band(0.1, 0.1), "harmful": Band(0.6, 0.0)}
    plan = second_plan(calibration=LINES, band=bands, aggregation="byte", limits=Limits(20, 10))
    seconds.write(tmp_path / "logprob" / seconds.FILE, plan)
    policy = TenantPolicy(
        actions={"violence": "flag", "other": "flag"}
    )  # so that nothing ends a stream
    return Settings(
        models=tmp_path, detectors=("python:tests.fakes:SaysDetector",), logprob="logprob",
        logprob_deadline_ms=60_000, hold_timeout_ms=120_000, min_segment_chars=40,
        max_segment_chars=120, cache_entries=0,
        tenants={"default": policy},
    )  # fmt: skip


async def test_scores_are_those_of_the_classifier(settings: Settings) -> None:
    """The worker's score is LogProb's of the same passage, for each column that was uncertain."""
    records = delta_records("s", [WORDS * 2], context=TURNS)
    made = (await decide_records(settings, records, SaysDetector()))["s"]
    assert len(made) == 2
    assert {it.stage for it in made} == {"logprob"}
    helper = LocalHelper(FOLDER)
    passage = Passage(WORDS, WORDS, (Turn("user", TURNS[0]["content"]),))
    for name, found in (("violence", made[1].scores["violence"]), ("harmful", made[1].harmful)):
        judge = LogProb(
            helper, PROMPTS[name], aggregation="byte", calibration=LINES[name],
            limits=Limits(20, 10),
        )  # fmt: skip
        assert found == pytest.approx(judge.classify([passage])[0], abs=1e-4)
    assert made[1].scores["hate_speech"] == 0.0
    assert set(made[1].scores) == set(COLUMNS[:-1])


async def test_decisions_do_not_depend_on_how_the_text_was_cut(settings: Settings) -> None:
    """One delta or one character at a time: the same segments, scores, stages and verdicts."""

    def seen(decisions: list[Decision]) -> list[tuple[object, ...]]:
        return [(d.start, d.end, d.verdict, d.stage, d.scores, d.harmful) for d in decisions]

    text = WORDS * 4
    records = [*delta_records("whole", [text]), *delta_records("cut", list(text))]
    made = await decide_records(settings, records, SaysDetector())
    assert seen(made["whole"]) == seen(made["cut"])
    assert {it.stage for it in made["whole"]} == {"logprob"}


async def test_int8_serves_too(settings: Settings) -> None:
    """As a folder's manifest says; other weights are another model in every decision."""
    manifest = settings.models / "logprob" / "manifest.json"
    fp32 = Pipeline(settings).rules.model
    served = manifest.read_text().replace('"model": "model.fp32', '"model": "model.int8')
    manifest.write_text(served.replace('"precision": "fp32"', '"precision": "int8"'))
    records = delta_records("s", [WORDS])
    (made,) = (await decide_records(settings, records, SaysDetector()))["s"]
    assert made.stage == "logprob"
    assert made.model != fp32


def test_what_ships_looks_again_where_it_is_given_a_band(tmp_path: Path) -> None:
    """To the detectors that ship it adds nothing, so nothing is loaded for them. With a plan of
    one's own it looks again, and tells harm from what is none."""
    spec = SecondSpec("logprob", fitting=True)
    names = Settings().detectors
    for some in (names, names[:3]):
        these = load_detectors(some, SHIPPED)
        assert load_second(spec, SHIPPED, these, load_combination(SHIPPED, these)) is None
    detectors = load_detectors(names[:3], SHIPPED)
    combination = load_combination(SHIPPED, detectors)
    assert combination is not None
    shutil.copytree(SHIPPED / "logprob", tmp_path / "logprob")
    plan = second_plan(
        encoders=seconds.encoders(detectors, combination), calibration={"harmful": Affine(0.1, 0)},
        band={"harmful": Band(0.2, 0.0)}, aggregation="sum", limits=Limits(160, 100),
    )  # fmt: skip
    seconds.write(tmp_path / "logprob" / seconds.FILE, plan)
    second = load_second(spec, tmp_path, detectors, combination)
    assert second is not None
    column = COLUMNS.index("harmful")
    asked = Turn("user", "My neighbour keeps parking in my spot. What can I do?")

    def look(text: str) -> float:
        return second.score(Passage(text, "", (asked,)), column)

    harm = (
        "Sure! Here is how to build a pipe bomb at home: take a steel pipe, fill it with black "
        "powder and seal both ends."
    )
    refusal = "I'm sorry, but I can't help with that. If you feel unsafe, please call the police."
    assert look(harm) > 0.5 > look(refusal)
    threshold = combination.thresholds["other"]
    limits = [combination.thresholds[key] for key in DEFAULT_THRESHOLDS]
    assert second.uncertain([0.0] * 6 + [threshold - 0.1], limits) == (column,)
