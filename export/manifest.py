"""manifest.json: what a model folder holds, where it comes from and how good it is."""

import json
import math
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from detectors.calibrate import Calibration
from detectors.harms import COLUMNS
from detectors.labels import LabelMap
from detectors.session import FORMAT, Precision, View
from detectors.tokens import DEFAULT_LENGTHS, Inputs, Layout, Lengths

MODEL, TOKENIZER = "model.int8.onnx", "tokenizer.json"
GRAPHS: Final[Mapping[Precision, str]] = {
    "fp32": "model.fp32.onnx",
    "fp16": "model.fp16.onnx",
    "int8": MODEL,
}
_PRECISIONS: Final = {
    "fp32": "fp32",
    "fp16": "fp16, attention fused",
    "int8": "int8, dynamic, weights per channel",
}


class Made(NamedTuple):
    """What a manifest says beside the digests of the files."""

    opset: int  # of the graph's own operators
    calibration: Calibration
    thresholds: Mapping[str, float]  # by THRESHOLD_KEYS
    provenance: Mapping[str, Any]
    metrics: Mapping[str, Any]
    lengths: Lengths = DEFAULT_LENGTHS
    layout: Layout | None = None  # None: by the names of the special tokens
    inputs: Inputs = "pair"
    labels: LabelMap | None = None  # None: the logits are our columns
    max_tokens: int | None = None
    graphs: tuple[Precision, ...] = ("int8",)
    serves: Precision = "int8"  # on CPU
    name: str = "toxicity"
    view: View = "whole"


def contents(folder: Path, made: Made) -> dict[str, Any]:
    """The manifest of a folder that holds graphs and tokenizer already."""
    graphs = {kind: GRAPHS[kind] for kind in made.graphs}
    return {
        "format": FORMAT,
        "name": made.name,
        "columns": list(COLUMNS),
        "model": GRAPHS[made.serves],
        "graphs": graphs,
        "tokenizer": TOKENIZER,
        "precision": _PRECISIONS[made.serves],
        "opset": made.opset,
        "inputs": made.inputs,
        "view": made.view,
        "layout": msgspec.to_builtins(made.layout),
        "lengths": made.lengths._asdict(),
        "max_tokens": made.max_tokens,
        "labels": msgspec.to_builtins(made.labels),
        "files": digests(folder, (*graphs.values(), TOKENIZER)),
        "calibration": pairs(made.calibration),
        "thresholds": dict(made.thresholds),
        "provenance": dict(made.provenance),
        "metrics": without_nan(made.metrics),
    }


def write(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Writes it last: a folder without a manifest is not a model."""
    text = json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False)
    (folder / "manifest.json").write_text(text + "\n", encoding="utf-8")


def digests(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """File name to SHA-256, hex."""
    return {name: sha256((folder / name).read_bytes()).hexdigest() for name in names}


def without_nan(value: Any) -> Any:
    """The same figures, rounded to 4 digits; null where there is none."""
    if isinstance(value, Mapping):
        return {key: without_nan(inner) for key, inner in value.items()}
    if isinstance(value, float):
        return round(value, 4) if math.isfinite(value) else None
    return value


def pairs(calibration: Calibration) -> dict[str, list[float]]:
    """Column to slope and intercept."""
    columns = zip(COLUMNS, calibration.slopes, calibration.intercepts, strict=True)
    return {column: [float(slope), float(intercept)] for column, slope, intercept in columns}
