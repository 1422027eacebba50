"""Makes the words detector: `python -m export.words --run RUN --out models/words --data DATA`.

Weights to a graph in half precision, then calibration, thresholds and figures from what serves,
then the manifest.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from detectors import grams
from detectors.combine import log_odds
from detectors.harms import COLUMNS
from detectors.protocol import Window
from detectors.session import Graph
from detectors.words import FORMAT, INPUTS, KIND, Words
from export import card, figures, manifest
from export.combined import PLAIN
from export.to_onnx import OPSET, mark
from training import rows, sources, thresholds, words
from training.measure import Scored, stacked
from training.rows import Row
from training.windows import judged
from training.words import Model

GRAPH: Final = "model.fp16.onnx"
_A_SOURCE: Final = 40  # rows of a known source, at most
_SHORTEST: Final = 1e-6  # length of a row that is divided by; that of no features is 0


def main(argv: Sequence[str] | None = None) -> None:
    """Run to model folder, figures printed."""
    parser = argparse.ArgumentParser(prog="python -m export.words", description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="run folder of training.words")
    parser.add_argument("--out", type=Path, required=True, help="model folder")
    parser.add_argument("--data", type=Path, required=True, help="folder that holds permissive/")
    given = parser.parse_args(argv)
    out: Path = given.out
    out.mkdir(parents=True, exist_ok=True)
    model = words.load(given.run)
    write(model, out / GRAPH)
    settings = json.loads((given.run / "settings.json").read_text(encoding="utf-8"))
    said = _manifest(out, settings, _provenance(given.data / "permissive", settings))
    # First without calibration, so that calibration is made from what serves.
    manifest.write(out, said)
    raw = Words(out)
    held = figures.held(given.data, _A_SOURCE)
    scored = {name: _scored(raw, some) for name, some in held.items()}
    calibration = thresholds.calibrate(scored["calibrate"])
    chosen = figures.choose(scored, calibration)
    metrics = figures.of(scored, calibration, chosen)
    metrics["largest_logit_error"] = f"{_error(model, out, settings['bits'], held['report']):.1e}"
    manifest.write(
        out,
        said
        | {
            "calibration": manifest.pairs(calibration),
            "thresholds": chosen,
            "metrics": manifest.without_nan(metrics),
        },
    )
    Words(out)  # what was written loads
    print(card.tables(manifest.without_nan(metrics), chosen))


def write(model: Model, path: Path) -> None:
    """The graph: buckets and counts to logits; its idf and weights are one table in fp16."""
    table = np.hstack([model.idf[:, None], model.weights]).astype(np.float16)  # (B, 8)
    constants = {
        "table": table,
        "bias": model.bias.astype(np.float32)[None],  # (1, 7)
        "shortest": np.float32(_SHORTEST),
        "widths": np.array([1, len(COLUMNS)], np.int64),
        "first": np.array([0], np.int64),
        "last": np.array([1], np.int64),
    }
    nodes = [
        helper.make_node("Gather", ["table", "buckets"], ["half"]),  # (F, 8)
        helper.make_node("Cast", ["half"], ["rows"], to=TensorProto.FLOAT),
        helper.make_node("Split", ["rows", "widths"], ["idf", "weights"], axis=1),
        helper.make_node("Unsqueeze", ["counts", "last"], ["column"]),  # (F, 1)
        helper.make_node("Mul", ["column", "idf"], ["values"]),
        helper.make_node("Mul", ["values", "values"], ["squares"]),
        helper.make_node("ReduceSum", ["squares", "first"], ["square"]),  # (1, 1)
        helper.make_node("Sqrt", ["square"], ["length"]),
        helper.make_node("Max", ["length", "shortest"], ["divisor"]),
        helper.make_node("Mul", ["values", "weights"], ["products"]),
        helper.make_node("ReduceSum", ["products", "first"], ["sums"]),  # (1, 7)
        helper.make_node("Div", ["sums", "divisor"], ["scaled"]),
        helper.make_node("Add", ["scaled", "bias"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes, "words",
        [
            helper.make_tensor_value_info(INPUTS[0], TensorProto.INT64, ["F"]),
            helper.make_tensor_value_info(INPUTS[1], TensorProto.FLOAT, ["F"]),
        ],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, len(COLUMNS)])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )  # fmt: skip
    made = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=8,
        producer_name="tidegate",
    )
    onnx.checker.check_model(made, full_check=True)
    onnx.save(made, str(path))
    mark(path)


def _manifest(
    out: Path, settings: Mapping[str, Any], provenance: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "kind": KIND,
        "name": KIND,
        "columns": list(COLUMNS),
        "model": GRAPH,
        "precision": "fp16 weights, fp32 sums",
        "opset": OPSET,
        "bits": settings["bits"],
        "features": grams.VERSION,
        "files": manifest.digests(out, [GRAPH]),
        "calibration": manifest.pairs(PLAIN),
        "thresholds": {},
        "provenance": dict(provenance),
    }


def _provenance(data: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "settings": dict(settings),
        **rows.provenance(data),
        "calibrated_with": sorted(sources.CALIBRATING),
    }


def _scored(detector: Words, some: Sequence[Row]) -> Scored:
    """The highest log-odds over each row's segments."""
    highest = [log_odds(detector.score(detector.encode(judged(row)))).max(axis=0) for row in some]
    return Scored(list(some), stacked(highest))


def _error(model: Model, out: Path, bits: int, some: Sequence[Row]) -> float:
    """The largest difference of a logit between the graph and its weights in fp32."""
    graph = Graph((out / GRAPH).read_bytes(), OPSET)
    errors = []
    for row in some[:: max(1, len(some) // 200)]:
        window = Window(*grams.buckets(row.text, bits))
        values = window.type_ids * model.idf[window.ids]
        length = max(float(np.sqrt((values * values).sum())), _SHORTEST)
        expected = values @ model.weights[window.ids] / length + model.bias
        feeds = {INPUTS[0]: window.ids, INPUTS[1]: window.type_ids.astype(np.float32)}
        errors.append(float(np.abs(graph.run(["logits"], feeds)[0][0] - expected).max()))
    return max(errors)


if __name__ == "__main__":
    main()
