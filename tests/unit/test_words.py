"""The words detector over its model folder."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detectors.harms import COLUMNS, THRESHOLD_KEYS
from detectors.load import LoadError, load_detector
from detectors.protocol import Passage, Turn
from detectors.session import ModelError
from detectors.words import Words

MODELS = Path(__file__).parents[2] / "models"
SHIPPED = MODELS / "words"
THREAT = "I will kill you and everyone you love, you worthless piece of shit."
HARMLESS = "Wash the rice until the water runs clear, then let it rest for a while. "


@pytest.fixture(scope="module")
def words() -> Words:
    return Words(SHIPPED)


def scores(words: Words, *texts: str) -> Any:
    return words.score(words.encode([Passage(text, "", ()) for text in texts]))


def test_it_brings_its_name_digest_and_thresholds(words: Words) -> None:
    """A decision can say which model settled it, and what it was held against."""
    assert words.name == "words"
    assert len(words.digest) == 64
    assert set(words.thresholds) == set(THRESHOLD_KEYS)
    words.thresholds["violence"] = 0.0
    assert words.thresholds["violence"] > 0


def test_it_loads_as_any_other_folder() -> None:
    """The settings name it like the encoders; it has no graph for a GPU, and says so."""
    assert isinstance(load_detector("words", MODELS), Words)
    with pytest.raises(LoadError, match="on the CPU alone"):
        load_detector("words@cuda", MODELS)


def test_a_threat_scores_above_a_recipe(words: Words) -> None:
    """Whatever the figures: the plain cases are right."""
    threat, recipe = scores(words, THREAT, HARMLESS)
    harmful = COLUMNS.index("harmful")
    assert threat[harmful] > 0.5 > recipe[harmful]


def test_spelling_does_not_hide_a_slur(words: Words) -> None:
    """The text is judged as a reader sees it."""
    plain, hidden = scores(words, "you stupid bitch, shut up", "yоu stup1d b1tch, shut up")
    assert np.array_equal(plain, hidden)


@pytest.mark.parametrize(
    "text", ["", " \n", "\u200b", "...", "\U0001f600" * 300, "\ud83d", "日本語"]
)
def test_any_text_has_scores(words: Words, text: str) -> None:
    """Of nothing to read too: the model's word on no text at all."""
    found = scores(words, text)
    assert found.shape == (1, 7)
    assert ((found >= 0) & (found <= 1)).all()
    if not text.strip(" \n\u200b"):
        assert np.array_equal(found, scores(words, ""))


def test_a_row_does_not_depend_on_its_batch(words: Words) -> None:
    """Alone or among others, in any order and on several threads: bit for bit the same."""
    some = [THREAT, HARMLESS, "", "a", HARMLESS * 100, THREAT * 30]
    alone = np.concatenate([scores(words, text) for text in some])
    assert np.array_equal(scores(words, *some), alone)
    assert np.array_equal(scores(words, *some[::-1]), alone[::-1])
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: scores(words, *some), range(8)):
            assert np.array_equal(found, alone)


def test_what_came_before_is_read_with_it_and_the_conversation_is_not(words: Words) -> None:
    """A word that the seam cuts stays a word."""
    asked = (Turn("user", THREAT),)
    parts = [
        Passage("ll you and everyone", "I will ki", ()),
        Passage("I will kill you and everyone", "", ()),
        Passage("I will kill you and everyone", "", asked),
    ]
    found = words.score(words.encode(parts))
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[1], found[2])


@pytest.mark.parametrize("place", [0, 20, 100, 199])
def test_harm_anywhere_in_a_long_segment_is_seen(words: Words, place: int) -> None:
    """A few words among very many others do not drown: the highest of the windows counts."""
    text = HARMLESS * place + THREAT * 4 + HARMLESS * (199 - place)
    assert scores(words, text)[0, -1] > 2 * scores(words, HARMLESS * 200)[0, -1]


@pytest.mark.parametrize("length", [1, 1_199, 1_200, 1_201, 1_800, 1_801, 5_000])
def test_every_character_of_a_segment_lies_in_a_window(words: Words, length: int) -> None:
    """And of the text before the front is left out first."""
    for where in {0, length // 2, length - 1}:
        plain = "x" * length
        marked = f"{plain[:where]}z{plain[where + 1 :]}"
        (found, without) = (
            words.encode([Passage(text, "y " * 2_000, ())])[0] for text in (marked, plain)
        )
        read = {bucket for window in found.windows for bucket in window.ids.tolist()}
        known = {bucket for window in without.windows for bucket in window.ids.tolist()}
        assert read - known


def test_long_ago_is_not_judged_again(words: Words) -> None:
    """A long text before loses its front, and adds no windows of its own."""
    since = HARMLESS * 20
    found = words.encode([Passage(HARMLESS, THREAT * 9 + since, ()), Passage(HARMLESS, since, ())])
    assert len(found[0].windows) == len(found[1].windows) == 1
    scored = words.score(found)
    assert np.array_equal(scored[0], scored[1])


def test_it_costs_no_tokens(words: Words) -> None:
    """Nothing goes through an encoder, so batches and the counted tokens leave it out."""
    (found,) = words.encode([Passage(HARMLESS, "", ())])
    assert (found.tokens, found.text_tokens) == (0, 0)
    assert len(found.windows) == 1


def test_no_passages_are_no_rows(words: Words) -> None:
    """An empty batch has the shape of a batch."""
    assert words.encode([]) == []
    assert words.score([]).shape == (0, 7)


def test_scores_have_six_decimals_in_float64(words: Words) -> None:
    """The number that a decision shows is the number that was compared."""
    found = scores(words, THREAT)
    assert found.dtype == np.float64
    assert np.array_equal(found, found.round(6))


def changed(tmp_path: Path, **said: Any) -> Path:
    folder = tmp_path / "words"
    shutil.copytree(SHIPPED, folder)
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | said))
    return folder


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"format": 9}, "format 9"),
        ({"features": 99}, "features of version 99"),
        ({"opset": 7}, "opset 7"),
        ({"columns": ["harmful"]}, "expected"),
        ({"calibration": {}}, "does not name each column"),
        ({"thresholds": {"violence": 2.0}}, "outside 0..1"),
        ({"thresholds": {"vice": 0.5}}, "unknown harms"),
        ({"files": {}}, "no .onnx or .json file with a digest"),
        ({"bits": "many"}, "no words model's"),
    ],
)
def test_a_manifest_that_cannot_serve_is_refused(
    tmp_path: Path, said: dict[str, Any], message: str
) -> None:
    """Before anything is scored, and with the reason."""
    with pytest.raises(ModelError, match=message):
        Words(changed(tmp_path, **said))


def test_a_changed_graph_is_refused(tmp_path: Path) -> None:
    """Half a copy is no model."""
    folder = changed(tmp_path)
    graph = folder / json.loads((folder / "manifest.json").read_bytes())["model"]
    graph.write_bytes(graph.read_bytes()[:-1] + b"x")
    with pytest.raises(ModelError, match="SHA-256"):
        Words(folder)


def test_another_graph_is_refused(tmp_path: Path) -> None:
    """An encoder's graph under a words manifest would be fed what it cannot read."""
    manifest = json.loads((MODELS / "toxicity" / "manifest.json").read_bytes())
    graph = (MODELS / "toxicity" / manifest["model"]).read_bytes()
    files = {manifest["model"]: sha256(graph).hexdigest()}
    folder = changed(tmp_path, model=manifest["model"], files=files, opset=manifest["opset"])
    (folder / manifest["model"]).write_bytes(graph)
    with pytest.raises(ModelError, match="no words model"):
        Words(folder)


def test_the_digest_is_of_everything_that_moves_a_score(tmp_path: Path, words: Words) -> None:
    """Another calibration is another detector, and so another cache."""
    manifest = json.loads((SHIPPED / "manifest.json").read_bytes())
    calibration = manifest["calibration"] | {"violence": [1.0, 0.0]}
    assert Words(changed(tmp_path, calibration=calibration)).digest != words.digest
