"""A checkpoint of somebody else's to a model folder: `python -m export --hf FOLDER --labels MAP`.

Graph, fused graph, fp16, int8, each held against torch; then tokenizer, label map, manifest and
the stub of a card. With --data it is calibrated on our rows, like our own; without, its scores are
the model's own probabilities, and the manifest says so.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from detectors.harms import COLUMNS
from detectors.labels import LabelMap
from detectors.protocol import FloatArray, Passage, Turn, Window
from detectors.session import Precision
from detectors.tokens import DEFAULT_LENGTHS, Inputs, Lengths, PairTokens
from detectors.toxicity import Toxicity
from export import calibrate, card, checkpoint, label_map, manifest, parity, tokenizer, weights
from export.errors import ExportError
from export.fuse import Fused, fuse, halve
from export.label_map import LabelFile
from export.quantize import quantize
from export.to_onnx import Classifier, of_transformers, opset, write

_SHORTEST_TEXT: Final = 32  # tokens; less of a text tells too little
_TEXTS: Final = (
    "Good morning. The train leaves at ten past nine from platform four.",
    "I will find you and hurt you, you worthless piece of dirt.",
    "People like them should not be allowed to live in this country.",
    "Mix the flour with the butter, then leave the dough to rest for an hour. " * 6,
    "Sure! First, check whether the patient is breathing. " * 3,
    "Nobody asked you, idiot.",
    "Ünïcödé, 中文字符, emoji 😀 and a\ttab.",
    "",
)


class Asked(NamedTuple):
    """What the command line says."""

    folder: Path  # of the checkpoint
    labels: Path
    out: Path
    data: Path | None = None  # holds permissive/; None: not calibrated
    serves: Precision = "int8"
    threads: int = 2


class _Graphs(NamedTuple):
    """What was measured of the graphs."""

    first_token_alone: bool
    fused: Fused
    metrics: Mapping[str, Any]


def export(asked: Asked) -> dict[str, Any]:
    """Writes the model folder and returns its manifest. Raises ExportError or ParityError."""
    labels = label_map.read(asked.labels)
    model = checkpoint.load(asked.folder)
    named = labels.map_of(checkpoint.names(model), model.config.problem_type)
    made = tokenizer.convert(asked.folder, model.config.vocab_size)
    most = min(checkpoint.positions(model), made.longest or checkpoint.positions(model))
    lengths = fitting(labels.inputs, most - made.layout.around(labels.inputs))
    tokens = PairTokens(made.content, lengths, made.layout, labels.inputs)

    asked.out.mkdir(parents=True, exist_ok=True)
    (asked.out / "manifest.json").unlink(missing_ok=True)  # no model until it is whole
    (asked.out / manifest.TOKENIZER).write_bytes(made.content)
    graphs = _write_graphs(of_transformers(model), asked.out, _windows(tokens), named)
    fitted = _fitted(asked, labels, named, tokens)
    contents = manifest.contents(
        asked.out,
        manifest.Made(
            opset=opset(asked.out / manifest.GRAPHS["fp32"]),
            calibration=fitted.calibration,
            thresholds=fitted.thresholds,
            provenance=_provenance(asked, labels, model.config.model_type, fitted),
            metrics={**graphs.metrics, **fitted.metrics},
            lengths=lengths,
            layout=made.layout,
            inputs=labels.inputs,
            labels=named,
            max_tokens=most,
            graphs=("fp32", "fp16", "int8"),
            serves=asked.serves,
        ),
    )
    manifest.write(asked.out, contents)
    (asked.out / "CARD.md").write_text(card.stub(contents), encoding="utf-8")
    _check_served(asked.out)
    return contents


def fitting(inputs: Inputs, room: int) -> Lengths:
    """Token budgets for a model that has `room` tokens beside the special ones.

    Raises ExportError where that leaves too little text.
    """
    wanted = DEFAULT_LENGTHS
    text = min(wanted.text, room)
    asked = min(wanted.conversation, room - text) if inputs == "pair" else 0
    if inputs == "pair" and asked < wanted.conversation:
        asked = min(wanted.conversation, room // 4)
        text = min(wanted.text, room - asked)
    if text < _SHORTEST_TEXT:
        raise ExportError(f"the model takes {room} tokens: too few for a text of {_SHORTEST_TEXT}")
    return Lengths(asked, text, min(wanted.overlap, text // 4))


def _write_graphs(
    classifier: Classifier, out: Path, windows: Sequence[Window], labels: LabelMap
) -> _Graphs:
    """All three graphs into `out`. Raises ParityError where fp32 or fp16 is not the checkpoint."""
    fp32, fp16, int8 = (out / manifest.GRAPHS[kind] for kind in ("fp32", "fp16", "int8"))
    reference = parity.of_classifier(classifier)
    alone = write(classifier, fp32)
    largest = parity.check(reference, fp32, windows, parity.FP32_TOLERANCE)
    with tempfile.TemporaryDirectory() as work:
        whole, fused = Path(work) / "whole.onnx", Path(work) / "fused.onnx"
        write(classifier, whole, whole=True)
        config = classifier.encoder.config
        counted = fuse(whole, fused, config.num_attention_heads, config.hidden_size)
        parity.check(reference, fused, windows, parity.FP32_TOLERANCE)
        halve(fused, fp16)
    half = parity.check(reference, fp16, windows, parity.FP16_TOLERANCE)
    quantize(fp32, int8)
    metrics = {
        # As text: rounding to four digits would make it 0.
        "fp32_largest_logit_error": f"{largest:.1e}",
        "fp16_largest_logit_error": f"{half:.1e}",
        "int8_score_error": parity.int8_loss(fp32, int8, windows, labels)._asdict(),
        "last_layer_for_first_token_alone": alone,
        "attentions_fused": f"{counted.fused} of {counted.attentions}",
    }
    return _Graphs(alone, counted, metrics)


def _windows(tokens: PairTokens) -> list[Window]:
    turns = (Turn("user", "Where does the train to the coast leave?"),)
    passages = [Passage(text, before, turns) for text in _TEXTS for before in ("", "Of course. ")]
    return [window for passage in passages for window in tokens.encode(passage).windows]


def _fitted(
    asked: Asked, labels: LabelFile, named: LabelMap, tokens: PairTokens
) -> calibrate.Fitted:
    thresholds = labels.all_thresholds()
    if asked.data is None:
        return calibrate.Fitted(calibrate.IDENTITY, thresholds, {}, ())
    graph = parity.of_graph(asked.out / manifest.GRAPHS[asked.serves])

    def log_odds(window: Window) -> FloatArray:
        row: FloatArray = named.log_odds(graph(window)[None])[0]
        return row

    chosen = calibrate.Sample(asked.data / "permissive", asked.threads)
    return calibrate.fit(chosen, tokens, log_odds, named, thresholds)


def _provenance(
    asked: Asked, labels: LabelFile, architecture: str, fitted: calibrate.Fitted
) -> dict[str, Any]:
    files = weights.files(asked.folder)
    return {
        "source": labels.source,
        "architecture": architecture,
        "licence": labels.licence,
        "data": labels.data,
        "label_map": asked.labels.name,
        "checkpoint": manifest.digests(asked.folder, [file.name for file in files]),
        "calibrated": list(fitted.columns),
    }


def _check_served(folder: Path) -> None:
    """What was written loads, and scores: a folder that fails here must not be left as a model."""
    try:
        served = Toxicity(folder)
        scores = served.score(served.encode([Passage(text, "", ()) for text in _TEXTS]))
    except ValueError as error:
        (folder / "manifest.json").unlink()
        raise ExportError(f"the folder does not serve: {error}") from error
    if not ((scores >= 0) & (scores <= 1)).all() or scores.shape[1] != len(COLUMNS):
        (folder / "manifest.json").unlink()
        raise ExportError(f"the folder gives scores outside 0..1: {np.unique(scores)[:4]}")
