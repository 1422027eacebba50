"""How far the exported graphs are from the checkpoint."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import onnxruntime as ort
import torch

from detectors.calibrate import sigmoid
from detectors.labels import LabelMap
from detectors.protocol import FloatArray, Window
from export.to_onnx import Classifier, of_judge
from training.model import Judge

FP32_TOLERANCE: Final = 1e-4  # logits, largest difference
FP16_TOLERANCE: Final = 0.02  # the same; scores differ by a quarter of it at most

LogitsOf = Callable[[Window], FloatArray]


class ParityError(Exception):
    """The graph does not compute what the checkpoint does: it must not ship."""


class Loss(NamedTuple):
    """What a coarser graph costs, in uncalibrated probabilities."""

    mean: float
    p99: float
    largest: float


def of_torch(judge: Judge) -> LogitsOf:
    """(7,) logits of one window by the checkpoint itself."""
    return of_classifier(of_judge(judge))


def of_classifier(classifier: Classifier) -> LogitsOf:
    """(L,) logits of one window by a model in torch, mask and all as transformers has them."""

    def logits(window: Window) -> FloatArray:
        feeds = {name: torch.from_numpy(_feeds(window)[name]) for name in classifier.inputs}
        with torch.no_grad():
            row: FloatArray = classifier.logits(feeds)[0].double().numpy()
        return row

    return logits


def of_graph(path: Path) -> LogitsOf:
    """(L,) logits of one window by a graph that has no manifest yet."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3  # what it cannot fold into constants is of no interest here
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]

    def logits(window: Window) -> FloatArray:
        feeds = _feeds(window)
        found = session.run(["logits"], {name: feeds[name] for name in names})
        row: FloatArray = found[0][0].astype(np.float64)
        return row

    return logits


def _feeds(window: Window) -> dict[str, Any]:
    """(1, T) each."""
    return {
        "input_ids": window.ids[None],
        "token_type_ids": window.type_ids[None],
        "attention_mask": np.ones((1, len(window.ids)), dtype=np.int64),
    }


def check_fp32(judge: Judge, graph: Path, windows: Sequence[Window]) -> float:
    """The largest difference of a logit. Raises ParityError above FP32_TOLERANCE."""
    return check(of_torch(judge), graph, windows, FP32_TOLERANCE)


def check(reference: LogitsOf, graph: Path, windows: Sequence[Window], tolerance: float) -> float:
    """The largest difference of a logit. Raises ParityError above `tolerance`, and for NaN."""
    largest = float(np.abs(_all(reference, windows) - _all(of_graph(graph), windows)).max())
    if not largest <= tolerance:
        raise ParityError(f"{graph.name} is off by {largest:.2e}, tolerance {tolerance:.0e}")
    return largest


def int8_loss(
    fp32: Path, int8: Path, windows: Sequence[Window], labels: LabelMap | None = None
) -> Loss:
    """How far int8 moves the scores of `windows`; of our columns where there is a label map."""
    before, after = (_all(of_graph(path), windows) for path in (fp32, int8))
    if labels is not None:
        before, after = labels.log_odds(before), labels.log_odds(after)
    moved = np.abs(sigmoid(before) - sigmoid(after))
    return Loss(float(moved.mean()), float(np.quantile(moved, 0.99)), float(moved.max()))


def _all(logits_of: LogitsOf, windows: Sequence[Window]) -> FloatArray:
    return np.stack([logits_of(window) for window in windows])  # (N, L)
