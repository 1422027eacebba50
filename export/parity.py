"""How far the exported graphs are from the checkpoint."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import onnxruntime as ort
import torch

from detectors.calibrate import sigmoid
from detectors.protocol import FloatArray, Window
from training.classifier import padded
from training.model import Judge

FP32_TOLERANCE: Final = 1e-4  # logits, largest difference

LogitsOf = Callable[[Window], FloatArray]


class ParityError(Exception):
    """The graph does not compute what the checkpoint does: it must not ship."""


class Loss(NamedTuple):
    """What int8 costs, in uncalibrated probabilities."""

    mean: float
    p99: float
    largest: float


def of_torch(judge: Judge) -> LogitsOf:
    """(7,) logits of one window by the checkpoint itself."""

    def logits(window: Window) -> FloatArray:
        with torch.no_grad():
            row: FloatArray = judge(*padded([window]))[0].double().numpy()
        return row

    return logits


def of_graph(path: Path) -> LogitsOf:
    """(7,) logits of one window by a graph that has no manifest yet."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def logits(window: Window) -> FloatArray:
        feeds = {
            "input_ids": window.ids[None],
            "token_type_ids": window.type_ids[None],
            "attention_mask": np.ones((1, len(window.ids)), dtype=np.int64),
        }
        row: FloatArray = session.run(["logits"], feeds)[0][0].astype(np.float64)
        return row

    return logits


def check_fp32(judge: Judge, graph: Path, windows: Sequence[Window]) -> float:
    """The largest difference of a logit. Raises ParityError above FP32_TOLERANCE."""
    largest = float(np.abs(_all(of_torch(judge), windows) - _all(of_graph(graph), windows)).max())
    if not largest <= FP32_TOLERANCE:
        raise ParityError(f"fp32 graph is off by {largest:.2e}, tolerance {FP32_TOLERANCE:.0e}")
    return largest


def int8_loss(fp32: Path, int8: Path, windows: Sequence[Window]) -> Loss:
    """How far int8 moves the scores of `windows`."""
    moved = np.abs(sigmoid(_all(of_graph(fp32), windows)) - sigmoid(_all(of_graph(int8), windows)))
    return Loss(float(moved.mean()), float(np.quantile(moved, 0.99)), float(moved.max()))


def _all(logits_of: LogitsOf, windows: Sequence[Window]) -> FloatArray:
    return np.stack([logits_of(window) for window in windows])  # (N, 7)
