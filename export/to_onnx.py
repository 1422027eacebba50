"""A classifier in torch to an ONNX graph: two or three (B, T) int64 inputs, `logits` (B, L)."""

import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Final, NamedTuple

import onnx
import torch
from torch import Tensor, nn

from detectors.session import INPUTS, OPSET_KEY
from export.last_layer import first_token_alone
from training.model import Judge

OPSET: Final = 17
_MASKED: Final = -1e4  # added to the attention of padding: enough for fp32 and in range of fp16
_MASKS_ITSELF: Final = ("deberta", "deberta-v2")  # wants the mask as ones and zeros

Feeds = Mapping[str, Tensor]


class Classifier(NamedTuple):
    """A classifier as the exporter sees it."""

    module: nn.Module
    encoder: Any  # the transformers model inside it, whose config says what it is
    logits: Callable[[Feeds], Tensor]  # (B, L) of (B, T) feeds, by INPUTS

    @property
    def inputs(self) -> tuple[str, ...]:
        """The inputs that move its logits."""
        typed = getattr(self.encoder.config, "type_vocab_size", 0) > 1
        return INPUTS if typed else tuple(name for name in INPUTS if name != "token_type_ids")


def of_judge(judge: Judge) -> Classifier:
    """Our own classifier."""
    encoder: Any = judge.encoder  # transformers types it as any model

    def logits(feeds: Feeds) -> Tensor:
        ids = feeds["input_ids"]
        types = feeds.get("token_type_ids", torch.zeros_like(ids))
        found: Tensor = judge(ids, types, feeds["attention_mask"])
        return found

    return Classifier(judge, encoder, logits)


def of_transformers(model: Any) -> Classifier:
    """A sequence-classification model of transformers."""
    return Classifier(model, model.base_model, lambda feeds: model(**feeds).logits)


def to_onnx(judge: Judge, path: Path) -> None:
    """Writes the fp32 graph of our own classifier, the one to serve on CPU."""
    write(of_judge(judge), path)


def write(classifier: Classifier, path: Path, *, whole: bool = False) -> bool:
    """Writes the fp32 graph; B and T are free. Whether the last layer is for one token alone.

    whole: every layer for every token, as onnxruntime's attention fusion wants it.
    """
    names = classifier.inputs
    example = tuple(_example(name) for name in names)
    axes = {name: {0: "batch", 1: "tokens"} for name in names}
    reduced = nullcontext(False) if whole else first_token_alone(classifier.encoder)
    # What the tracer takes for constant would show where the graph is held against torch.
    quiet = warnings.catch_warnings(action="ignore")
    with torch.no_grad(), reduced as alone, quiet:
        torch.onnx.export(
            _Traced(classifier).eval(),
            example,
            str(path),
            input_names=list(names),
            output_names=["logits"],
            dynamic_axes={**axes, "logits": {0: "batch"}},
            opset_version=OPSET,
            dynamo=False,  # the graph that onnxruntime's fusions and quantiser know best
        )
    mark(path)
    return alone


class _Traced(nn.Module):
    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.module = classifier.module  # so that its weights are the graph's
        self._classifier = classifier
        self._adds_mask = classifier.encoder.config.model_type not in _MASKS_ITSELF

    def forward(self, *inputs: Tensor) -> Tensor:
        """All (B, T) int64, in the order of `classifier.inputs`; returns (B, L) logits."""
        feeds = dict(zip(self._classifier.inputs, inputs, strict=True))
        if self._adds_mask:
            # A mask of four dimensions passes through transformers as it is: one pattern for all.
            there = feeds["attention_mask"][:, None, None, :].to(torch.float32)
            feeds["attention_mask"] = (1.0 - there) * _MASKED  # (B, 1, 1, T)
        return self._classifier.logits(feeds)


def _example(name: str) -> Tensor:
    """Two rows of sixteen tokens; what the ids are does not matter, but none is padding."""
    return torch.full((2, 16), 0 if name == "token_type_ids" else 1 if name != "input_ids" else 5)


def mark(path: Path) -> None:
    """Writes the graph's opset into its metadata, where the session can read it."""
    graph = onnx.load(str(path))
    onnx.helper.set_model_props(graph, {OPSET_KEY: str(opset(path))})
    onnx.save(graph, str(path))


def opset(path: Path) -> int:
    """The opset of the graph's own operators; contributed ones have versions of their own."""
    imports = onnx.load(str(path)).opset_import
    return int(next(entry.version for entry in imports if entry.domain in ("", "ai.onnx")))
