"""Specs to detectors: what cannot be had is named, with what to do."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from detectors.constant import Constant
from detectors.harms import THRESHOLD_KEYS
from detectors.load import LoadError, load_combination, load_detectors
from detectors.protocol import Passage
from worker.settings import Settings

MODELS = Path(__file__).parents[2] / "models"


class Useless:
    """No detector at all."""

    name = "useless"


text = "not callable"


def test_specs_become_detectors_in_their_order() -> None:
    """A folder and a user's own, side by side."""
    found = load_detectors(["python:detectors.constant:Constant", "toxicity"], MODELS)
    assert [type(detector).__name__ for detector in found] == ["Constant", "Toxicity"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nothing", "there are: .*toxicity"),
        ("nothing@cuda", "there are: .*toxicity"),
        ("toxicity@cuda", "no CUDAExecutionProvider"),
        ("python:", "python:package.module:attr"),
        ("python:detectors.constant", "python:package.module:attr"),
        ("python:no_such_package.module:Detector", "PYTHONPATH"),
        ("python:detectors.constant:Missing", "no 'Missing'"),
        (f"python:{__name__}:Useless", "without digest, thresholds, encode, score"),
        (f"python:{__name__}:text", "cannot be called"),
    ],
)
def test_a_spec_that_leads_nowhere_says_what_to_do(spec: str, message: str) -> None:
    """One error type, and its message names spec and remedy."""
    with pytest.raises(LoadError, match=message) as raised:
        load_detectors([spec], MODELS)
    assert spec in str(raised.value)


@pytest.mark.parametrize(
    "names", [Settings().detectors, ("toxicity", "words", "context"), ("toxicity", "context")]
)
def test_what_ships_is_weighed_as_it_was_learnt(names: tuple[str, ...]) -> None:
    """All detectors by default, and the encoders alone for who names these: nobody falls back to
    the highest score because there are three now."""
    found = load_combination(MODELS, load_detectors(names, MODELS))
    assert found is not None
    assert tuple(found.detectors) == names
    assert set(found.thresholds) == set(THRESHOLD_KEYS)


def test_no_spec_at_all_is_refused() -> None:
    """A worker without a detector would allow everything."""
    with pytest.raises(LoadError, match="no detector"):
        load_detectors([], MODELS)


def test_a_damaged_folder_is_a_load_error(tmp_path: Path) -> None:
    """Also what the session refuses stops the worker as one kind of error."""
    (tmp_path / "toxicity").mkdir()
    (tmp_path / "toxicity" / "manifest.json").write_text("{")
    with pytest.raises(LoadError, match=r"toxicity.*cannot be read"):
        load_detectors(["toxicity"], tmp_path)


def test_the_constant_scores_every_passage_alike() -> None:
    """Its rows are the row it was given, and its digest tells one row from another."""
    constant = Constant([0.25] * 7)
    encoded = constant.encode([Passage("a" * 41, "", ()), Passage("", "", ())])
    assert [e.tokens for e in encoded] == [11, 1]
    assert constant.score(encoded).tolist() == [[0.25] * 7] * 2
    assert constant.digest != Constant().digest


@pytest.mark.parametrize(
    "make",
    [
        lambda: Constant([0.5] * 6),
        lambda: Constant([1.5] * 7),
        lambda: Constant([float("nan")] * 7),
    ],
)
def test_the_constant_refuses_what_is_no_row(make: Callable[[], Constant]) -> None:
    """Seven probabilities, nothing else."""
    with pytest.raises(ValueError, match="scores"):
        make()


def test_opening_a_model_costs_little_more_than_its_weights() -> None:
    """Not twice their size, as where onnxruntime is handed the bytes."""
    script = (
        "from pathlib import Path\n"
        "from detectors.load import load_detector\n"
        "def resident(): return int(open('/proc/self/statm').read().split()[1]) * 4096\n"
        "load_detector('toxicity', Path('models'))\n"
        "before = resident()\n"
        "held = load_detector('context_large', Path('models'))\n"
        "print(resident() - before)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], cwd=MODELS.parent, capture_output=True, check=True
    )
    size = (MODELS / "context_large" / "model.int8.onnx").stat().st_size
    assert int(ended.stdout) < size * 1.2
