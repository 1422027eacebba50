"""detectors/second.py and what load.py makes of it: second.json, and which helper is asked."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from detectors import combine
from detectors import second as seconds
from detectors.combine import Combination
from detectors.harms import COLUMNS
from detectors.load import LoadError, SecondSpec, load_second, second_digest
from detectors.logprob import Affine
from detectors.prompts import ClassPrompts, Limits
from detectors.protocol import Passage, Turn
from detectors.second import Band, Plan, SecondError
from tests.fakes import SaysDetector, second_plan
from tests.unit.test_remote import good, serving
from worker.cli import _shipped
from worker.pipeline import Pipeline
from worker.settings import Settings

TINY = Path(__file__).parent.parent / "models" / "causal"
ENCODERS = (SaysDetector.digest,)
DETECTORS = (SaysDetector(),)
PYTHON = "python:tests.fakes:SaysHelper"


def written(path: Path, **changes: Any) -> Path:
    """second.json, with other fields than a sound one's."""
    fields = json.loads(json.dumps({
        "format": 1, "encoders": list(ENCODERS), "aggregation": "byte",
        "limits": {"conversation": 100, "before": 50},
        "calibration": {"violence": {"slope": 2.0, "intercept": -1.0}},
        "band": {"violence": {"below": 0.2, "above": 0.1}},
    }))  # fmt: skip
    path.write_text(json.dumps(fields | changes))
    return path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    """All of it, from the file or from the folder that holds it."""
    plan = second_plan(
        aggregation="sum",
        limits=Limits(10, 20),
        prompts={"harmful": ClassPrompts(("a",), ("b", "c"))},
    )
    seconds.write(tmp_path / seconds.FILE, plan)
    assert seconds.read(tmp_path, ENCODERS) == plan
    assert seconds.read(tmp_path / seconds.FILE, ENCODERS) == plan


def test_fields_that_are_not_known_change_nothing(tmp_path: Path) -> None:
    """Figures may stand beside it; the digest is that of what is used."""
    plan = seconds.read(written(tmp_path / "a.json"), ENCODERS)
    with_figures = seconds.read(written(tmp_path / "b.json", figures={"auroc": 0.9}), ENCODERS)
    assert plan.digest("x") == with_figures.digest("x")
    assert (plan.aggregation, plan.limits, plan.band) == (
        "byte", Limits(100, 50), {"violence": Band(0.2, 0.1)},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"format": 2}, "format 2"),
        ({"encoders": ["00"]}, "other detectors (00; these are 5a155a)"),
        ({"encoders": []}, "other detectors (none"),
        ({"encoders": [*ENCODERS, "00"]}, "other detectors"),
        ({"band": {"other": {"below": 0.1, "above": 0.1}}}, "'other' is no column"),
        ({"band": {"violence": {"below": -0.1, "above": 0.1}}}, "widths are 0 to 1"),
        ({"band": {"violence": {"below": 0.1, "above": 1.1}}}, "widths are 0 to 1"),
        ({"band": {"violence": {"below": 0.1}}}, "above"),
        ({"band": {"violence": {"below": 0.1, "above": 0.1, "wide": 1}}}, "wide"),
        ({"band": {"harmful": {"below": 0.1, "above": 0.1}}}, "harmful has a band"),
        ({"calibration": {"violence": {"slope": 0, "intercept": 0}}}, "must count for more"),
        ({"calibration": {"violence": {"slope": -1, "intercept": 0}}}, "must count for more"),
        ({"calibration": {"violence": {"slope": "1", "intercept": 0}}}, "slope"),
        ({"aggregation": "mean"}, "aggregation"),
        ({"limits": {"conversation": -1, "before": 0}}, "0 or more"),
        ({"prompts": {"violence": {"harmful": [], "harmless": ["a"]}}}, "each class needs one"),
        ({"prompts": {"violence": {"harmful": ["a"], "harmless": [""]}}}, "each class needs one"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path: Path, changes: Any, says: str) -> None:
    """The message names the file, and what is wrong in it."""
    path = written(tmp_path / "second.json", **changes)
    with pytest.raises(SecondError) as refused:
        seconds.read(path, ENCODERS)
    assert says in str(refused.value)
    assert str(path) in str(refused.value)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"format": 1}', "NaN"])
def test_what_is_no_plan_is_refused(tmp_path: Path, content: str) -> None:
    """Whatever it is."""
    (tmp_path / "second.json").write_text(content)
    with pytest.raises(SecondError, match=r"second\.json"):
        seconds.read(tmp_path, ENCODERS)
    with pytest.raises(SecondError, match="it says when the model is asked"):
        seconds.read(tmp_path / "none.json", ENCODERS)


def test_a_combination_is_one_of_the_encoders() -> None:
    """Other weights are other scores, and a band around those is another band."""
    together = Combination({}, {}, {}, digest="c0")
    assert seconds.encoders(DETECTORS, None) == ENCODERS
    assert seconds.encoders(DETECTORS, together) == (*ENCODERS, "c0")


@pytest.mark.parametrize(
    "change",
    [
        {"aggregation": "sum"},
        {"limits": Limits(1, 1)},
        {"calibration": {"violence": Affine(1.0, 0.1)}},
        {"band": {"violence": Band(0.1, 0.2)}},
        {"prompts": {"violence": ClassPrompts(("a",), ("b",))}},
    ],
)
def test_the_digest_changes_with_all_that_can_move_a_score(change: Any) -> None:
    """The helper's own digest too."""
    plan = second_plan()
    assert plan.digest("x") == second_plan().digest("x")
    assert plan.digest("x") != plan.digest("y")
    assert plan.digest("x") != second_plan(**change).digest("x")


def test_the_digest_changes_with_the_prompts_of_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan that names none is asked with those, so they are part of it."""
    before = second_plan().digest("x")
    monkeypatch.setattr(seconds, "PROMPTS", {"violence": ClassPrompts(("a",), ("b",))})
    assert second_plan().digest("x") != before


# -- helpers ----------------------------------------------------------------------------------


def refused(spec: SecondSpec, models: Path) -> str:
    with pytest.raises(LoadError) as error:
        load_second(spec, models, DETECTORS, None)
    with pytest.raises(LoadError) as early:
        second_digest(spec, models, DETECTORS, None)
    assert str(error.value) == str(early.value)
    return str(error.value)


def test_a_folder_serves_with_its_plan(tmp_path: Path) -> None:
    """A model that was exported: log-probs to a calibrated score; the digest costs no loading."""
    shutil.copytree(TINY, tmp_path / "logprob")
    seconds.write(tmp_path / "logprob" / seconds.FILE, second_plan())
    spec = SecondSpec("logprob")
    second = load_second(spec, tmp_path, DETECTORS, None)
    assert second is not None
    passage = Passage("A text.", "Before it. ", (Turn("user", "Why?"),))
    score = second.score(passage, COLUMNS.index("violence"))
    assert 0.0 < score < 1.0
    assert score != 0.5
    assert second.score(passage._replace(text="Another."), 0) != score
    assert second.digest == second_digest(spec, tmp_path, DETECTORS, None)


def test_a_folder_that_cannot_serve_is_refused(tmp_path: Path) -> None:
    """No folder, no plan, a plan for others, weights that are not those of the manifest."""
    spec = SecondSpec("logprob")
    assert "python -m export.causal" in refused(spec, tmp_path)
    shutil.copytree(TINY, tmp_path / "logprob")
    assert "second.json" in refused(spec, tmp_path)
    written(tmp_path / "logprob" / "second.json", encoders=["00"])
    assert "choose it again" in refused(spec, tmp_path)
    written(tmp_path / "logprob" / "second.json")
    (tmp_path / "logprob" / "model.fp32.onnx").write_bytes(b"other weights")
    with pytest.raises(LoadError, match=r"model\.fp32\.onnx"):
        load_second(spec, tmp_path, DETECTORS, None)


def test_a_plan_for_a_combination_is_for_every_graph_of_its_folders(tmp_path: Path) -> None:
    """A detector on a GPU has another digest than the one that the plan names."""
    shutil.copytree(TINY, tmp_path / "logprob")
    written(tmp_path / "logprob" / "second.json", encoders=["aa", "bb", "c0"])
    together = Combination({"toxicity": "aa", "context": "bb"}, {}, {}, digest="c0")
    on_gpu = SaysDetector()
    on_gpu.digest = combine.with_graph("aa", "model.fp16.onnx")
    spec = SecondSpec("logprob")
    assert load_second(spec, tmp_path, (on_gpu, *DETECTORS), together) is not None
    assert second_digest(spec, tmp_path, (on_gpu, *DETECTORS), together)


def test_what_has_to_fit_is_left_out_where_it_does_not(tmp_path: Path) -> None:
    """No folder, or made for other detectors: none. A broken one is an error all the same."""
    spec = SecondSpec("logprob", fitting=True)

    def loaded() -> tuple[bool, str]:
        second = load_second(spec, tmp_path, DETECTORS, None)
        return second is not None, second_digest(spec, tmp_path, DETECTORS, None)

    assert loaded() == (False, "")
    shutil.copytree(TINY, tmp_path / "logprob")
    written(tmp_path / "logprob" / "second.json", encoders=["00"], format=2)
    (tmp_path / "logprob" / "manifest.json").rename(tmp_path / "manifest.json")
    assert loaded() == (False, "")  # what is wrong with it is nothing to these detectors
    (tmp_path / "manifest.json").rename(tmp_path / "logprob" / "manifest.json")
    written(tmp_path / "logprob" / "second.json", format=2)
    assert "format 2" in refused(spec, tmp_path)
    written(tmp_path / "logprob" / "second.json")
    found, digest = loaded()
    assert found
    assert digest == second_digest(SecondSpec("logprob"), tmp_path, DETECTORS, None)


def test_a_folder_may_hold_plans_for_several_choices_of_detectors(tmp_path: Path) -> None:
    """The one for these detectors counts, whatever it is called; without one it is as with none."""
    folder = tmp_path / "logprob"
    shutil.copytree(TINY, folder)
    written(folder / "second.json", encoders=["00"])
    written(folder / "second-mine.json")
    written(folder / "second-zero.json", encoders=["01"])
    fitting, named = SecondSpec("logprob", fitting=True), SecondSpec("logprob")
    for spec in (fitting, named):
        assert load_second(spec, tmp_path, DETECTORS, None) is not None
    (folder / "second-mine.json").write_text("{")
    assert "second-mine.json" in refused(named, tmp_path)
    (folder / "second-mine.json").unlink()
    assert load_second(fitting, tmp_path, DETECTORS, None) is None
    assert "choose it again" in refused(named, tmp_path)


def test_a_server_is_asked_with_a_plan_of_ones_own(tmp_path: Path) -> None:
    """Both have to be named. A server's name of the model is all that is known of it."""
    path = written(tmp_path / "second.json")
    with serving(good) as server:
        assert "logprob_plan" in refused(SecondSpec(server.url, model="small"), tmp_path)
        assert "logprob_model" in refused(SecondSpec(server.url, path), tmp_path)
        spec = SecondSpec(server.url, path, "small", key="secret", deadline_ms=30_000)
        second = load_second(spec, tmp_path, DETECTORS, None)
        assert second is not None
        try:
            assert 0.0 < second.score(Passage("a bomb", "", ()), 0) < 1.0
            assert server.requests[0]["model"] == "small"
            assert server.headers[0]["Authorization"] == "Bearer secret"
        finally:
            second.close()
        elsewhere = spec._replace(name="http://another:8000/v1")
        other = spec._replace(model="large")
        digests = [second_digest(it, tmp_path, DETECTORS, None) for it in (spec, elsewhere, other)]
        assert digests[0] == second.digest == digests[1] != digests[2]


def test_a_helper_of_ones_own_is_made_as_a_detector_is(tmp_path: Path) -> None:
    """python:module:attr, called without arguments."""
    path = written(tmp_path / "second.json", aggregation="token")
    second = load_second(SecondSpec(PYTHON, path), tmp_path, DETECTORS, None)
    assert second is not None
    assert second.score(Passage("second=0.5", "", ()), 0) == pytest.approx(0.2689, abs=1e-4)
    assert "logprob_plan" in refused(SecondSpec(PYTHON), tmp_path)
    assert "no 'Nobody'" in refused(SecondSpec("python:tests.fakes:Nobody", path), tmp_path)


# -- settings ---------------------------------------------------------------------------------


def test_the_learner_calls_the_model_what_the_worker_calls_it(tmp_path: Path) -> None:
    """A threshold holds for one model: both have to mean the same by it."""
    settings = Settings(
        detectors=("python:tests.fakes:SaysDetector",), logprob=PYTHON,
        logprob_plan=written(tmp_path / "second.json"),
    )  # fmt: skip
    _, model = _shipped(settings)
    assert model == Pipeline(settings).rules.model
    assert "+logprob@" in model


def test_a_deadline_that_the_hold_deadline_cuts_off_is_refused() -> None:
    """Only where there is a second look."""
    with pytest.raises(ValidationError, match="less than hold_timeout_ms"):
        Settings(logprob="logprob", logprob_deadline_ms=5_000)
    Settings(hold_timeout_ms=300)


def test_a_worker_that_cannot_have_it_does_not_start(tmp_path: Path) -> None:
    """Rather than run without it."""
    with pytest.raises(LoadError, match="logprob 'nothing'"):
        Pipeline(Settings(logprob="nothing", models=tmp_path), DETECTORS)


def test_only_harms_with_a_band_are_prompted_for() -> None:
    """A helper computes what prompts begin with when it is loaded."""
    bands = {"violence": Band(0.1, 0.0), "harmful": Band(0.0, 0.0)}
    lines = {"violence": Affine(1.0, 0.0)}
    plan: Plan = second_plan(band=bands, calibration=lines)
    assert plan.heads() == plan.asks("violence").heads()
