"""Somebody else's checkpoint to a served model, for each architecture: needs the train extra.

The checkpoints are made here, tiny and untrained, and torch is asked what it makes of the same
text with transformers' own tokenizer. What the tables in docs/log.md say of fusion is counted here.
"""

import gzip
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from detectors.calibrate import sigmoid
from detectors.harms import COLUMNS, DEFAULT_THRESHOLDS, HARMS
from detectors.protocol import FloatArray, Passage, Turn, Window
from detectors.session import Folder, Precision, Session
from detectors.tokens import Lengths, PairTokens
from detectors.toxicity import Toxicity
from tests.models.make_served import LABELS, MAP, SERVED, make
from tests.models.tiny import KINDS, checkpoint

pytestmark = pytest.mark.train

FP32, FP16 = 1e-4, 0.02  # logits, as the export has it
FIRST_TOKEN_ALONE = {"bert", "distilbert", "roberta", "xlm-roberta", "mpnet"}
FUSED = {kind: "0 of 2" if kind.startswith("deberta") else "2 of 2" for kind in KINDS}
JIGSAW = ("toxic", "severe_toxic", "obscene", "threat", "insult", "identity_hate")
ASKED = "Where does the train leave?"
TEXTS = (
    "Good morning.",
    "I will find you, and then the train leaves at ten past nine.",
    "Take the second exit. " * 6,
    "a",
)


class Exported(NamedTuple):
    """A checkpoint folder and the model folder made of it."""

    kind: str
    checkpoint: Path
    folder: Path


@pytest.fixture(scope="module")
def label_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("labels") / "map.toml"
    path.write_text(MAP)
    return path


@pytest.fixture(scope="module", params=KINDS)
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, label_file: Path
) -> Exported:
    from export import foreign

    work = tmp_path_factory.mktemp(request.param)
    made = checkpoint(request.param, work / "checkpoint", LABELS)
    foreign.export(foreign.Asked(made, label_file, work / "model"))
    return Exported(request.param, made, work / "model")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint to spoil copies of."""
    return checkpoint("bert", tmp_path_factory.mktemp("bert") / "bert", LABELS)


def manifest(exported: Exported) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((exported.folder / "manifest.json").read_text())
    return found


def torch_logits(exported: Exported) -> Callable[[str, str], FloatArray]:
    """What transformers says of a pair: its tokenizer, its model, nothing of ours."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(exported.checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(exported.checkpoint)

    def feeds(asked: str, text: str) -> Any:
        if exported.kind != "deberta":
            return tokenizer(asked, text, return_tensors="pt")
        # transformers 5 doubles the [SEP] between; 4 had one, and so have the checkpoints.
        behind = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = [*tokenizer(asked)["input_ids"], *behind, tokenizer.sep_token_id]
        return {"input_ids": torch.tensor([ids])}

    def logits(asked: str, text: str) -> FloatArray:
        with torch.no_grad():
            row: FloatArray = model(**feeds(asked, text)).logits[0].double().numpy()
        return row

    return logits


def windows(exported: Exported) -> list[Window]:
    served = Toxicity(exported.folder)
    passages = [Passage(text, "", (Turn("user", ASKED),)) for text in (*TEXTS, "b c " * 300)]
    return [window for e in served.encode(passages) for window in e.windows]


def test_text_in_scores_out_are_those_of_transformers(exported: Exported) -> None:
    """Tokenizer, windows, graph and label map together, fp32: logits within 1e-4."""
    expected_of = torch_logits(exported)
    session = Session(Folder(exported.folder), precision="fp32")
    served = Toxicity(exported.folder, precision="fp32")
    for text in TEXTS:
        encoded = served.encode([Passage(text, "", (Turn("user", ASKED),))])
        expected = expected_of(ASKED, text)
        assert np.abs(session.logits(encoded[0].windows[0]) - expected).max() <= FP32
        p = np.exp(expected) / np.exp(expected).sum()
        scores = dict(zip(COLUMNS, served.score(encoded)[0], strict=True))
        assert scores["harmful"] == pytest.approx(1 - p[0], abs=FP32)
        assert scores["violence"] == pytest.approx(p[2], abs=FP32)
        assert scores["hate_speech"] == pytest.approx(1 - (1 - p[1]) * (1 - p[2]), abs=FP32)


def test_every_precision_is_as_near_to_torch_as_the_manifest_says(exported: Exported) -> None:
    """fp32 1e-4 and fp16 0.02 in logits, over long windows too; int8 is measured."""
    import torch
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(exported.checkpoint).eval()
    typed = "token_type_ids" in Session(Folder(exported.folder), precision="fp32")._inputs
    folder = Folder(exported.folder)
    found: dict[Precision, Session] = {
        "fp32": Session(folder, precision="fp32"), "fp16": Session(folder, precision="fp16"),
    }  # fmt: skip
    for window in windows(exported):
        feeds = {"input_ids": torch.from_numpy(window.ids[None])}
        if typed:
            feeds["token_type_ids"] = torch.from_numpy(window.type_ids[None])
        with torch.no_grad():
            expected = model(**feeds).logits[0].double().numpy()
        assert np.abs(found["fp32"].logits(window) - expected).max() <= FP32
        assert np.abs(found["fp16"].logits(window) - expected).max() <= FP16
    metrics = manifest(exported)["metrics"]
    assert float(metrics["fp32_largest_logit_error"]) <= FP32
    assert float(metrics["fp16_largest_logit_error"]) <= FP16
    assert 0 < metrics["int8_score_error"]["largest"] <= 0.1


def test_attentions_are_fused(exported: Exported) -> None:
    """Counted in the fp16 graph, and the same number in the manifest."""
    import onnx

    metrics = manifest(exported)["metrics"]
    graph = onnx.load(str(exported.folder / "model.fp16.onnx")).graph
    kinds = [node.op_type for node in graph.node]
    fused = kinds.count("Attention") + kinds.count("MultiHeadAttention")
    assert f"{fused} of {fused + kinds.count('Softmax')}" == FUSED[exported.kind]
    assert metrics["attentions_fused"] == FUSED[exported.kind]


def test_fp16_holds_halves_and_takes_ids(exported: Exported) -> None:
    """The weights are halves, so the file is; inputs and logits are as in the other graphs."""
    import onnx

    model = onnx.load(str(exported.folder / "model.fp16.onnx"))
    floats = [i for i in model.graph.initializer if len(i.dims) == 2 and i.data_type in (1, 10)]
    assert {i.data_type for i in floats} == {onnx.TensorProto.FLOAT16}
    assert model.graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    assert {i.type.tensor_type.elem_type for i in model.graph.input} == {onnx.TensorProto.INT64}


def test_the_last_layer_works_for_the_first_token_where_it_can(exported: Exported) -> None:
    """Said in the manifest, and seen in the graph: one attention has one query."""
    alone = manifest(exported)["metrics"]["last_layer_for_first_token_alone"]
    assert alone == (exported.kind in FIRST_TOKEN_ALONE)


def test_buckets_give_the_scores_of_windows_alone(exported: Exported) -> None:
    """Batches of fixed shapes, fp32, within 1e-4 of one window a call."""
    folder = Folder(exported.folder)
    some = windows(exported)
    expected = Session(folder, precision="fp32").all_logits(some)
    found = Session(folder, precision="fp32", bucketed=True).all_logits(some)
    assert np.abs(found - expected).max() <= FP32


def test_no_text_speaks_in_special_tokens(exported: Exported) -> None:
    """Whatever they are called: they stand around the sides and nowhere else."""
    layout = manifest(exported)["layout"]
    special = {*layout["start"], *layout["between"], *layout["end"], layout["pad"]}
    text = "a[SEP]b</s>c[CLS]d<s>e[PAD]f<pad> [MASK]g<mask> </s></s> [SEP]"
    served = Toxicity(exported.folder)
    (window,) = served.encode([Passage(text, "", (Turn("user", text),))])[0].windows
    count = sum(int(number) in special for number in window.ids)
    assert count == len(layout["start"]) + len(layout["between"]) + len(layout["end"])


def test_a_tokenizer_file_serves_like_the_vocabulary_it_was_made_of(
    exported: Exported, tmp_path: Path
) -> None:
    """A checkpoint saved by transformers has a tokenizer.json; windows are the same."""
    from transformers import AutoTokenizer

    from export import tokenizer

    AutoTokenizer.from_pretrained(exported.checkpoint).save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").exists()
    made = tokenizer.convert(tmp_path, len(AutoTokenizer.from_pretrained(tmp_path)))
    before, after = (
        PairTokens(content, Lengths(64, 192, 48), made.layout)
        for content in (made.content, (exported.folder / "tokenizer.json").read_bytes())
    )
    for text in (*TEXTS, "Zebra 東京 naïve 😀", "x" * 300):
        passage = Passage(text, "", (Turn("user", ASKED),))
        assert before.encode(passage).windows[0].ids.tolist() == (
            after.encode(passage).windows[0].ids.tolist()
        )
    if exported.kind != "deberta":  # the file is taken at its word, and it doubles the [SEP]
        assert list(made.layout.between) == manifest(exported)["layout"]["between"]


def test_the_other_version_of_deberta_has_one_mark_in_the_middle(tmp_path: Path) -> None:
    """[CLS] A [SEP] B [SEP], as its authors and transformers 4 have it."""
    from export import tokenizer

    folder = checkpoint("deberta", tmp_path / "deberta", LABELS)
    vocab = json.loads((folder / "vocab.json").read_text())
    layout = tokenizer.convert(folder, len(vocab)).layout
    assert layout.between == layout.end == (vocab["[SEP]"],)


@pytest.mark.parametrize(
    ("kind", "labels", "problem", "ready"),
    [
        ("bert", JIGSAW, "multi_label_classification", "toxic-bert"),
        ("distilbert", ("non-toxic", "toxic"), None, "toxic-comment-model"),
    ],
)
def test_the_maps_that_come_along_export_such_models(
    tmp_path: Path, kind: str, labels: tuple[str, ...], problem: str | None, ready: str
) -> None:
    """Single texts: the conversation is left out, and `harmful` is what torch says of the text."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from export import foreign

    made = checkpoint(kind, tmp_path / kind, labels, problem_type=problem)
    foreign.export(foreign.Asked(made, Path(ready), tmp_path / "model"))
    model = AutoModelForSequenceClassification.from_pretrained(made).eval()
    tokenizer = AutoTokenizer.from_pretrained(made)
    served = Toxicity(tmp_path / "model", precision="fp32")
    for text in TEXTS:
        with torch.no_grad():
            logits = model(**tokenizer(text, return_tensors="pt")).logits[0].double()
        likeliest = logits.sigmoid().max() if problem else logits.softmax(dim=0)[1]
        scores = served.score(served.encode([Passage(text, "", (Turn("user", ASKED),))]))
        assert scores[0, -1] == pytest.approx(float(likeliest), abs=FP32)


def spoilt(bert: Path, folder: Path, change: Callable[[Path], object]) -> Path:
    shutil.copytree(bert, folder, dirs_exist_ok=True)
    change(folder)
    return folder


def reconfigured(**fields: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


def as_pickle(folder: Path) -> None:
    import torch
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def without_head(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    kept = load_file(folder / "model.safetensors")
    save_file(
        {name: value for name, value in kept.items() if not name.startswith("classifier")},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (as_pickle, r"pytorch_model\.bin alone: a pickle runs code"),
        (without_head, r"no weights for classifier\.bias"),
        (reconfigured(model_type="llama"), "architecture 'llama'"),
        (reconfigured(is_decoder=True), "is_decoder"),
        (reconfigured(problem_type="multi_label_classification"), "one is wrong"),
        (reconfigured(id2label={"0": "neutral", "1": "toxic", "2": "spam"}), "not the model's"),
        (lambda folder: (folder / "vocab.txt").unlink(), "its files are missing"),
        (lambda folder: (folder / "config.json").unlink(), r"config\.json cannot be read"),
    ],
)
def test_what_cannot_be_exported_is_refused(
    bert: Path, tmp_path: Path, label_file: Path, change: Callable[[Path], object], message: str
) -> None:
    """One error type, a message each, and no model folder left behind."""
    from export import foreign
    from export.errors import ExportError

    folder = spoilt(bert, tmp_path / "bert", change)
    with pytest.raises(ExportError, match=message):
        foreign.export(foreign.Asked(folder, label_file, tmp_path / "out"))
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_graph_that_is_another_model_s_is_caught(bert: Path, tmp_path: Path) -> None:
    """The parity check has teeth: with one weight moved it fails."""
    import torch

    from export import checkpoint as folders
    from export import parity
    from export.to_onnx import of_transformers, write

    model = folders.load(bert)
    write(of_transformers(model), tmp_path / "model.onnx")
    with torch.no_grad():
        model.classifier.bias[0] += 0.01
    window = Window(np.array([2, 40, 41, 3]), np.zeros(4, np.int64))
    reference = parity.of_classifier(of_transformers(model))
    with pytest.raises(parity.ParityError, match="off by 1"):
        parity.check(reference, tmp_path / "model.onnx", [window], parity.FP32_TOLERANCE)


def test_the_command_exports_and_says_what_is_wrong(
    bert: Path, tmp_path: Path, label_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`python -m export --hf`: metrics on success; one line and a non-zero exit on failure."""
    from export.__main__ import main

    labels, out = str(label_file), str(tmp_path / "out")
    main(["--hf", str(bert), "--labels", labels, "--out", out, "--serve", "fp32"])
    assert json.loads(capsys.readouterr().out)["attentions_fused"] == "2 of 2"
    assert (
        json.loads((tmp_path / "out" / "manifest.json").read_text())["model"] == "model.fp32.onnx"
    )
    assert "untrained" in (tmp_path / "out" / "CARD.md").read_text()
    with pytest.raises(SystemExit) as stopped:
        main(["--hf", str(tmp_path), "--labels", labels, "--out", out])
    assert "holds no model.safetensors" in str(stopped.value)


def written_rows(folder: Path) -> None:
    """600 rows; the token `kill` means violence nine times in ten, hate speech has no positives."""
    chance = random.Random(0)
    folder.mkdir()
    with gzip.open(folder / "made.jsonl.gz", "wt") as lines:
        for i in range(600):
            harmful = chance.random() < 0.5
            shows = harmful == (chance.random() < 0.9)
            labels = dict.fromkeys(HARMS) | {"violence": int(harmful), "hate_speech": 0}
            record: dict[str, Any] = {
                "id": str(i), "source": "dices" if i % 3 == 0 else "gptfuzz", "kind": "reply",
                "licence": "CC0", "context": [], "text": "kill you" if shows else "the in you",
                "harmful": int(harmful), "labels": labels, "split": "dev", "group": str(i),
            }  # fmt: skip
            lines.write(json.dumps(record) + "\n")


def test_calibration_on_rows_makes_probabilities_of_log_odds(tmp_path: Path) -> None:
    """Platt scaling finds the nine in ten; a column with one class stays as it was."""
    from export import calibrate

    written_rows(tmp_path / "permissive")
    checked = Folder(SERVED)
    assert checked.manifest.labels is not None
    tokens = PairTokens(checked.read("tokenizer.json"), layout=checked.manifest.layout)
    vocab = json.loads(checked.read("tokenizer.json"))["model"]["vocab"]

    def overconfident(window: Window) -> FloatArray:
        return np.full(7, 12.0 if vocab["k"] in window.ids else -12.0)

    sample = calibrate.Sample(tmp_path / "permissive", 1)
    found = calibrate.fit(
        sample, tokens, overconfident, checked.manifest.labels, DEFAULT_THRESHOLDS
    )
    assert found.columns == ("violence", "harmful")
    violence, hate = (COLUMNS.index(name) for name in ("violence", "hate_speech"))
    slopes, intercepts = found.calibration
    assert sigmoid(slopes * 12 + intercepts)[violence] == pytest.approx(0.9, abs=0.06)
    assert (slopes[hate], intercepts[hate]) == (1.0, 0.0)
    assert set(found.metrics["unseen"]) == {"violence", "hate_speech", "harmful"}
    assert found.metrics["unseen"]["violence"]["auroc"] == pytest.approx(0.9, abs=0.06)
    assert found.metrics["unseen"]["violence"]["ece"] < 0.08


@pytest.mark.parametrize("kind", ["mpnet", "deberta-v2"])
def test_positions_are_counted_in_fp32_inside_an_fp16_graph(
    tmp_path: Path, label_file: Path, kind: str
) -> None:
    """In halves MPNet's bucket of 181, 256 and 362 tokens, and DeBERTa-v3's of 16 distances, would
    be another one. The logarithm they come from stays a float."""
    import onnx
    import onnxruntime as ort

    from export import foreign

    made = checkpoint(kind, tmp_path / kind, LABELS)
    foreign.export(foreign.Asked(made, label_file, tmp_path / "model"))
    graph = onnx.load(str(tmp_path / "model" / "model.fp16.onnx"))
    logs = [node.output[0] for node in graph.graph.node if node.op_type == "Log"]
    assert logs
    graph.graph.output.extend(onnx.ValueInfoProto(name=name) for name in logs)
    session = ort.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    types = {given.name: given.type for given in session.get_outputs()}
    assert {types[name] for name in logs} == {"tensor(float)"}


def test_the_committed_folder_is_what_the_export_makes(tmp_path: Path) -> None:
    """The tests without torch run on today's export: same logits, tokenizer and manifest."""
    make(tmp_path)
    some = [
        w for e in Toxicity(SERVED).encode([Passage(t, "", ()) for t in TEXTS]) for w in e.windows
    ]
    fresh, committed = (
        Session(Folder(folder), precision="fp32").all_logits(some) for folder in (tmp_path, SERVED)
    )
    assert np.abs(fresh - committed).max() <= FP32
    assert (tmp_path / "tokenizer.json").read_bytes() == (SERVED / "tokenizer.json").read_bytes()
    ours, theirs = (
        json.loads((folder / "manifest.json").read_text()) for folder in (tmp_path, SERVED)
    )
    for name in ("layout", "labels", "lengths", "inputs", "max_tokens", "format", "opset"):
        assert ours[name] == theirs[name]
