"""A foreign model's folder as it serves, without torch: a tiny RoBERTa, committed.

`make_served.py` made it; `test_export_hf.py` holds it against what the export makes today.
"""

import json
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detectors import combine
from detectors.buckets import Shape, batches
from detectors.calibrate import sigmoid
from detectors.constant import Constant
from detectors.harms import COLUMNS
from detectors.protocol import Encoded, Passage, Turn, Window
from detectors.session import Folder, ModelError, Session
from detectors.toxicity import Toxicity

SERVED = Path(__file__).parent / "served"
TOLERANCE = 1e-4
TURNS = (Turn("user", "where does the train leave?"),)
PASSAGES = [
    Passage(text, before, turns)
    for text in ("you", "I will kill the lot of you.", "a b c d e f g " * 9, "")
    for before in ("", "well, in the end ")
    for turns in ((), TURNS, TURNS * 5)
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SERVED, tmp_path / "served"))


@pytest.fixture(scope="module")
def windows() -> list[Window]:
    served = Toxicity(SERVED)
    return [window for e in served.encode(PASSAGES) for window in e.windows]


def change(folder: Path, **fields: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_window_is_laid_out_as_roberta_wants_it() -> None:
    """<s> conversation </s></s> text </s>, no types, whatever the conversation."""
    served = Toxicity(SERVED)
    (window,) = served.encode([Passage("you", "", TURNS)])[0].windows
    assert window.ids[0] == 0
    assert window.ids[-1] == 2
    assert (window.ids == 2).nonzero()[0][:2].tolist() == [len(window.ids) - 4, len(window.ids) - 3]
    assert not window.type_ids.any()


def test_a_text_cannot_speak_in_special_tokens() -> None:
    """</s> in a text is four characters."""
    served = Toxicity(SERVED)
    (window,) = served.encode([Passage("a</s></s>b<s><pad><mask>", "", TURNS)])[0].windows
    assert (window.ids == 2).sum() == 3
    assert (window.ids == 0).sum() == 1
    assert not (window.ids == 1).any()
    assert not (window.ids == 4).any()


def test_scores_are_the_label_map_s_of_the_logits(windows: list[Window]) -> None:
    """Three logits in, seven probabilities out; the columns without a label are 0."""
    served = Toxicity(SERVED, precision="fp32")
    (window,) = windows[:1]
    logits = Session(Folder(SERVED), precision="fp32").logits(window)
    assert logits.shape == (3,)
    p = np.exp(logits) / np.exp(logits).sum()
    found = served.score([Encoded((window,), len(window.ids), 1)])[0]
    expected = dict.fromkeys(COLUMNS, 0.0) | {
        "violence": p[2], "hate_speech": 1 - (1 - p[1]) * (1 - p[2]), "harmful": 1 - p[0],
    }  # fmt: skip
    assert dict(zip(COLUMNS, found, strict=True)) == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_buckets_give_the_scores_of_windows_alone(windows: list[Window], precision: Any) -> None:
    """Padded, masked, in any order and company: 1e-4, though the graph is another one's bucket."""
    folder = Folder(SERVED)
    alone = Session(folder, precision=precision)
    bucketed = Session(folder, precision=precision, bucketed=True)
    expected = alone.all_logits(windows)
    tolerance = TOLERANCE if precision == "fp32" else 0.02
    for order in (np.arange(len(windows)), np.arange(len(windows))[::-1]):
        found = bucketed.all_logits([windows[i] for i in order])
        assert np.abs(found - expected[order]).max() <= tolerance


def test_a_window_scores_the_same_in_every_shape(windows: list[Window]) -> None:
    """Also one that is far too large: padding changes nothing but the time it takes."""
    session = Session(Folder(SERVED), precision="fp32")
    expected = session.all_logits(windows)
    for shape in (Shape(1, 64), Shape(3, 64), Shape(16, 64)):
        for batch in batches(windows, [shape], pad=1):
            feeds = {name: batch.feeds[name] for name in session._inputs}
            (rows,) = session._session.run(["logits"], feeds)
            found = rows[: len(batch.positions)]
            assert np.abs(found - expected[batch.positions]).max() <= TOLERANCE


def test_without_the_mask_padding_would_be_read(windows: list[Window]) -> None:
    """The two tests above can fail."""
    session = Session(Folder(SERVED), precision="fp32")
    short = [window for window in windows if len(window.ids) < 30]
    expected = session.all_logits(short)
    for batch in batches(short, [Shape(len(short), 64)], pad=1):
        feeds = {name: batch.feeds[name] for name in session._inputs}
        feeds["attention_mask"] = np.ones_like(feeds["attention_mask"])
        (rows,) = session._session.run(["logits"], feeds)
        assert np.abs(rows - expected[batch.positions]).max() > 100 * TOLERANCE


def test_alone_or_among_others_the_served_scores_are_the_same() -> None:
    """int8, one text a call."""
    served = Toxicity(SERVED)
    encoded = served.encode(PASSAGES)
    alone = np.concatenate([served.score([e]) for e in encoded])
    assert np.array_equal(served.score(encoded), alone)


def test_each_precision_has_a_digest_of_its_own() -> None:
    """A cache shared by workers on CPU and GPU keeps their scores apart."""
    folder = Folder(SERVED)
    digests = {p: Session(folder, precision=p).digest for p in ("fp32", "fp16", "int8")}
    assert len(set(digests.values())) == 3
    assert digests["int8"] == folder.digest == Toxicity(SERVED).digest


def test_a_combination_is_for_every_graph_of_the_folder(tmp_path: Path) -> None:
    """It is learnt with the graph of the CPU, and a GPU serves another one."""
    graphs = [Toxicity(SERVED), Toxicity(SERVED, precision="fp16")]
    other = Constant()
    other.name = "other"
    digests = {it.name: it.digest for it in (graphs[0], other)}
    weights = {column: [1.0, 1.0, 0.0] for column in COLUMNS}
    contents = {"detectors": digests, "weights": weights, "thresholds": {}}
    (tmp_path / combine.FILE).write_text(json.dumps(contents))
    assert [combine.read(tmp_path, (it, other)) is not None for it in graphs] == [True, True]


def test_int8_stays_near_fp32(windows: list[Window]) -> None:
    """0.1 in probability, here on untrained weights; the manifest has each model's own figure."""
    folder = Folder(SERVED)
    exact, coarse = (Session(folder, precision=p).all_logits(windows) for p in ("fp32", "int8"))
    moved = np.abs(sigmoid(exact) - sigmoid(coarse)).max()
    assert 0 < moved <= 0.1


@pytest.mark.parametrize("name", ["model.fp32.onnx", "model.fp16.onnx", "model.int8.onnx"])
def test_one_changed_byte_in_any_graph_is_refused(folder: Path, name: str) -> None:
    """When that graph is to be run; the served one always."""
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(ModelError, match=f"{name} has SHA-256"):
        Session(Folder(folder), precision=name.split(".")[1])  # type: ignore[arg-type]  # a name


def test_a_further_graph_that_is_not_there_stops_only_its_user(folder: Path) -> None:
    """A folder for CPUs need not carry the graph for GPUs."""
    (folder / "model.fp16.onnx").unlink()
    Toxicity(folder)
    with pytest.raises(FileNotFoundError):
        Toxicity(folder, precision="fp16")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"opset": 16}, "exported with opset 17"),
        ({"labels": None}, "gives 3 logits, the manifest says 7"),
        ({"max_tokens": 63}, "windows of 64 tokens, the model has 63"),
        ({"inputs": "both"}, "cannot be read"),
        ({"format": 3}, "format 3"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(
    folder: Path, fields: dict[str, Any], message: str
) -> None:
    """What the second format added is checked like the rest."""
    change(folder, **fields)
    with pytest.raises(ModelError, match=message):
        Toxicity(folder)


@pytest.mark.parametrize(
    ("change_of", "message"),
    [
        ({"names": ["neutral", "threat", "spam"]}, r"labels \['toxic'\] are not the model's"),
        ({"activation": "relu"}, "cannot be read"),
        ({"negative": None, "ignored": ["neutral"]}, "nothing says `harmful`"),
    ],
)
def test_a_label_map_that_does_not_fit_is_refused(
    folder: Path, change_of: dict[str, Any], message: str
) -> None:
    """The arithmetic of a changed map is never tried."""
    labels = json.loads((folder / "manifest.json").read_text())["labels"]
    change(folder, labels=labels | change_of)
    with pytest.raises(ModelError, match=message):
        Folder(folder)


def test_a_column_without_labels_cannot_be_calibrated(folder: Path) -> None:
    """A slope and an intercept could make a score of what nobody said."""
    calibration = json.loads((folder / "manifest.json").read_text())["calibration"]
    change(folder, calibration=calibration | {"misinformation": [1.0, 40.0]})
    with pytest.raises(ModelError, match="no label speaks of it"):
        Folder(folder)


def test_a_pickle_among_the_graphs_is_never_read(folder: Path) -> None:
    """Not even with the right digest."""
    (folder / "model.bin").write_bytes(b"cos\nsystem\n")
    manifest = json.loads((folder / "manifest.json").read_text())
    change(
        folder,
        graphs=manifest["graphs"] | {"fp32": "model.bin"},
        files=manifest["files"] | {"model.bin": sha256(b"cos\nsystem\n").hexdigest()},
    )
    with pytest.raises(ModelError, match=r"no \.onnx or \.json"):
        Session(Folder(folder), precision="fp32")


def test_cuda_takes_no_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    """It scales over a whole batch, so scores would depend on who shares it."""
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CUDAExecutionProvider"])
    with pytest.raises(ModelError, match="int8 scales over a whole batch"):
        Session(Folder(SERVED), "cuda", "int8")


def test_buckets_need_a_padding_token(folder: Path) -> None:
    """Which one it is only the tokenizer knows, and RoBERTa counts positions by it."""
    layout = json.loads((folder / "manifest.json").read_text())["layout"]
    change(folder, layout=layout | {"pad": None})
    with pytest.raises(ModelError, match="no padding token"):
        Session(Folder(folder), precision="fp32", bucketed=True)


def test_a_single_text_model_gets_the_text_alone(folder: Path) -> None:
    """The stream's text, what stands before it too, and nothing of the conversation."""
    change(folder, inputs="text", lengths={"conversation": 0, "text": 45, "overlap": 11})
    served = Toxicity(folder)
    with_turns, without = served.encode(
        [Passage("you", "kill ", TURNS), Passage("you", "kill ", ())]
    )
    assert with_turns.windows[0].ids.tolist() == without.windows[0].ids.tolist()
    assert (with_turns.windows[0].ids == 2).sum() == 1
    assert with_turns.text_tokens == 1


def test_a_long_text_is_read_to_its_end() -> None:
    """Windows over all of it, each within the model's positions; harm at the end still shows."""
    served = Toxicity(SERVED)
    (found,) = served.encode([Passage("a b c d " * 200, "", TURNS)])
    assert len(found.windows) > 20
    assert max(len(window.ids) for window in found.windows) <= 64
    assert found.text_tokens == 1600
