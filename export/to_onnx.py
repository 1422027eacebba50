"""A trained Judge to an ONNX graph whose last layer works for the first token alone."""

from pathlib import Path
from typing import Any, Final

import onnx
import torch
from torch import Tensor, nn

from detectors.session import OPSET_KEY
from training.model import Judge

OPSET: Final = 17
INPUTS: Final = ("input_ids", "token_type_ids", "attention_mask")
_MASKED: Final = -1e4  # added to the attention of padding: enough for fp32 and in range of fp16


class Served(nn.Module):
    """What Judge computes, less what nobody reads: only the first token's state is used.

    The last layer's queries, its attention and feed-forward run for one position: 1.9x on CPU at
    fp32, with the same numbers.
    """

    def __init__(self, judge: Judge) -> None:
        super().__init__()
        encoder: Any = judge.encoder  # a BertModel; transformers types it as any model
        self.embeddings: Any = encoder.embeddings
        self.layers: Any = encoder.encoder.layer
        self.head = judge.head

    def forward(self, input_ids: Tensor, token_type_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """All (B, T) int64; returns (B, 7) logits."""
        states = self.embeddings(input_ids=input_ids, token_type_ids=token_type_ids)  # (B, T, H)
        bias = (1.0 - attention_mask[:, None, None, :].to(states.dtype)) * _MASKED  # (B, 1, 1, T)
        for layer in self.layers[:-1]:
            states = _layer(layer, states, states, bias)
        first = _layer(self.layers[-1], states[:, :1], states, bias)  # (B, 1, H)
        logits: Tensor = self.head(first[:, 0])  # (B, 7)
        return logits


def _layer(layer: Any, queries: Tensor, states: Tensor, bias: Tensor) -> Tensor:
    """One BERT layer. queries: (B, Q, H), the positions wanted; states: (B, T, H)."""
    attention = layer.attention.self
    size = attention.attention_head_size
    q = _heads(attention.query(queries), size)  # (B, N, Q, D)
    k = _heads(attention.key(states), size)  # (B, N, T, D)
    v = _heads(attention.value(states), size)
    weights = torch.softmax(q @ k.transpose(-1, -2) / size**0.5 + bias, dim=-1)  # (B, N, Q, T)
    mixed = (weights @ v).transpose(1, 2).flatten(2)  # (B, Q, H)
    attended = layer.attention.output(mixed, queries)
    out: Tensor = layer.output(layer.intermediate(attended), attended)  # (B, Q, H)
    return out


def _heads(states: Tensor, size: int) -> Tensor:
    return torch.unflatten(states, -1, (-1, size)).transpose(1, 2)


def to_onnx(judge: Judge, path: Path) -> None:
    """Writes the fp32 graph: three (B, T) int64 inputs, `logits` (B, 7); B and T are free."""
    example = torch.ones(2, 16, dtype=torch.int64)
    axes = {name: {0: "batch", 1: "tokens"} for name in INPUTS}
    with torch.no_grad():
        torch.onnx.export(
            Served(judge).eval(),
            (example, torch.zeros_like(example), example),
            str(path),
            input_names=list(INPUTS),
            output_names=["logits"],
            dynamic_axes={**axes, "logits": {0: "batch"}},
            opset_version=OPSET,
            dynamo=False,  # the graph that onnxruntime's fusions and quantiser know best
        )
    mark(path)


def mark(path: Path) -> None:
    """Writes the graph's opset into its metadata, where the session can read it."""
    graph = onnx.load(str(path))
    onnx.helper.set_model_props(graph, {OPSET_KEY: str(opset(path))})
    onnx.save(graph, str(path))


def opset(path: Path) -> int:
    """The opset of the graph's own operators; contributed ones have versions of their own."""
    imports = onnx.load(str(path)).opset_import
    return int(next(entry.version for entry in imports if entry.domain in ("", "ai.onnx")))
