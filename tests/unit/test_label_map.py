"""Label files: what ships is right, and what is wrong is named."""

from pathlib import Path

import numpy as np
import pytest

from detectors.calibrate import sigmoid
from detectors.harms import COLUMNS, DEFAULT_THRESHOLDS
from export import label_map
from export.errors import ExportError

JIGSAW = ("toxic", "severe_toxic", "obscene", "threat", "insult", "identity_hate")
GOOD = """
source = "a/model"
licence = "MIT"
data = "comments"
inputs = "text"
activation = "softmax"
negative = "ok"
[columns]
violence = ["threat"]
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "map.toml"
    path.write_text(text)
    return path


def test_toxic_bert_has_a_map() -> None:
    """unitary/toxic-bert: six sigmoids. The likeliest of them is `harmful`; two are harms of ours,
    and swearing is not sexual content."""
    labels = label_map.read(Path("toxic-bert"))
    found = labels.map_of(JIGSAW, "multi_label_classification")
    logits = np.array([[2.0, -5.0, 3.0, -1.0, 0.5, -4.0]])
    scores = dict(zip(COLUMNS, sigmoid(found.log_odds(logits))[0].round(6), strict=True))
    assert scores == pytest.approx({
        "violence": 0.268941, "hate_speech": 0.017986, "misinformation": 0.0,
        "privacy_violation": 0.0, "illegal_activity": 0.0, "sexual_content": 0.0,
        "harmful": 0.952574,
    })  # fmt: skip
    assert (labels.inputs, labels.licence) == ("text", "Apache-2.0")


def test_toxic_comment_model_has_a_map() -> None:
    """martin-ha/toxic-comment-model: toxic or not, and nothing of the six."""
    labels = label_map.read(Path("toxic-comment-model.toml"))
    found = labels.map_of(("non-toxic", "toxic"), None)
    scores = sigmoid(found.log_odds(np.array([[1.0, 3.0]])))[0].round(6)
    assert scores.tolist() == [0, 0, 0, 0, 0, 0, pytest.approx(0.880797)]
    assert labels.inputs == "text"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("licence", "license"), "license"),
        (('"text"', '"both"'), "inputs"),
        (('"softmax"', '"relu"'), "activation"),
        (("[columns]", "[columns"), "map.toml"),
        (('["threat"]', '{ labels = ["threat"], combine = "mean" }'), "combine"),
        (('["threat"]', '{ labels = ["threat"], weigth = 2 }'), "weigth"),
    ],
)
def test_a_file_that_cannot_be_read_says_where(
    tmp_path: Path, change: tuple[str, str], message: str
) -> None:
    """A misspelt field is an error, not a default."""
    with pytest.raises(ExportError, match=message):
        label_map.read(written(tmp_path, GOOD.replace(*change)))


@pytest.mark.parametrize(
    ("names", "problem", "message"),
    [
        (("ok", "threat", "spam"), None, r"labels \['spam'\] go nowhere"),
        (("ok", "menace"), None, r"labels \['threat'\] are not the model's"),
        (("ok", "threat"), "multi_label_classification", "one is wrong"),
    ],
)
def test_a_file_for_another_model_is_refused(
    tmp_path: Path, names: tuple[str, ...], problem: str | None, message: str
) -> None:
    """Labels and activation are held against the checkpoint's own."""
    labels = label_map.read(written(tmp_path, GOOD))
    with pytest.raises(ExportError, match=message):
        labels.map_of(names, problem)


def test_thresholds_are_the_file_s_or_the_contract_s(tmp_path: Path) -> None:
    """A file may give some of them."""
    labels = label_map.read(written(tmp_path, GOOD + "[thresholds]\nother = 0.5\n"))
    assert labels.all_thresholds() == DEFAULT_THRESHOLDS | {"other": 0.5}


@pytest.mark.parametrize("line", ["harmful = 0.5", "violence = 1.5"])
def test_thresholds_that_make_no_sense_are_refused(tmp_path: Path, line: str) -> None:
    """By the keys that decisions use, within 0..1."""
    with pytest.raises(ExportError, match="thresholds"):
        label_map.read(written(tmp_path, f"{GOOD}[thresholds]\n{line}\n"))


def test_a_map_that_is_not_there_says_which_are(tmp_path: Path) -> None:
    """Those that come along are named."""
    with pytest.raises(ExportError, match="toxic-bert, toxic-comment-model"):
        label_map.read(tmp_path / "missing.toml")
