"""Attention with a bias by relative position, as MPNet's, to one MultiHeadAttention a layer.

    softmax((q @ k / sqrt(d) + position bias) + mask) @ v

The two biases are the same in every layer, so they are added once.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from onnx import NodeProto, helper, numpy_helper
from onnxruntime.transformers.onnx_model import OnnxModel


class _Projection(NamedTuple):
    """A linear map of the states: query, key or value."""

    product: str  # name of the (B, T, H) states times weights
    bias: np.ndarray  # (H,)
    nodes: tuple[NodeProto, ...]  # what only the plain attention needs


class _Found(NamedTuple):
    """One attention in plain operators."""

    query: _Projection
    key: _Projection
    value: _Projection
    biases: tuple[str, str]  # names of position bias (B, N, T, T) and mask (B, 1, 1, T)
    output: str  # name of the (B, T, H) result
    nodes: tuple[NodeProto, ...]


def fuse_biased(model: OnnxModel, heads: int) -> None:
    """Replaces every such attention in `model`."""
    graph = _Graph(model)
    summed: dict[tuple[str, str], str] = {}
    for number, softmax in enumerate(model.get_nodes_by_op_type("Softmax")):
        found = graph.attention(softmax)
        if found is None:
            continue
        if found.biases not in summed:
            summed[found.biases] = f"attention_bias_{len(summed)}"
            model.add_node(helper.make_node("Add", list(found.biases), [summed[found.biases]],
                                            name=summed[found.biases]))  # fmt: skip
        _replace(model, found, heads, summed[found.biases], number)
    model.prune_graph()
    model.topological_sort()


def _replace(model: OnnxModel, found: _Found, heads: int, bias: str, number: int) -> None:
    sides = (found.query, found.key, found.value)
    name = f"biased_attention_{number}"
    weights = np.concatenate([side.bias for side in sides]).astype(np.float32)  # (3 H,)
    model.add_initializer(numpy_helper.from_array(weights, f"{name}_bias"))
    inputs = [*(side.product for side in sides), f"{name}_bias", "", bias]
    model.remove_nodes([*found.nodes, *(node for side in sides for node in side.nodes)])
    model.add_node(
        helper.make_node(
            "MultiHeadAttention", inputs, [found.output], name=name, domain="com.microsoft",
            num_heads=heads,
        )
    )  # fmt: skip


class _Graph:
    """Who makes what."""

    def __init__(self, model: OnnxModel) -> None:
        self._makers: Mapping[str, NodeProto] = model.output_name_to_node()
        self._readers: Mapping[str, list[NodeProto]] = model.input_name_to_nodes()
        self._model = model

    def attention(self, softmax: NodeProto) -> _Found | None:
        """The attention around this softmax, if it is of that form."""
        above = self._up(softmax, 0, "Add", "Add", "Div", "MatMul")
        below = self._down(softmax, "MatMul", "Transpose", "Reshape")
        if above is None or below is None:
            return None
        query, key = self._projection(above[3], 0), self._projection(above[3], 1)
        value = self._projection(below[0], 1)
        if query is None or key is None or value is None:
            return None
        biases = (_other(above[1], above[2]), _other(above[0], above[1]))
        return _Found(query, key, value, biases, below[2].output[0], (softmax, *above, *below))

    def _projection(self, product: NodeProto, side: int) -> _Projection | None:
        found = self._up(product, side, "Transpose", "Reshape", "Add", "MatMul")
        if found is None:
            return None
        for name in found[2].input:
            bias = self._model.get_initializer(name)
            if bias is not None:
                nodes = tuple(found[:3])
                return _Projection(found[3].output[0], numpy_helper.to_array(bias), nodes)
        return None

    def _up(self, node: NodeProto, index: int, *kinds: str) -> list[NodeProto] | None:
        """The nodes of these kinds that make input `index`, nearest first.

        Beyond the first, a node's first input leads on, or the second where it alone fits: a
        linear map's Add has its bias on either side.
        """
        found: list[NodeProto] = []
        names = [node.input[index]]
        for kind in kinds:
            makers = [self._makers[name] for name in names if name in self._makers]
            fitting = [maker for maker in makers if maker.op_type == kind]
            if not fitting:
                return None
            found.append(fitting[0])
            names = list(fitting[0].input[:2])
        return found

    def _down(self, node: NodeProto, *kinds: str) -> list[NodeProto] | None:
        """The nodes of these kinds that read the output, each the only reader."""
        found: list[NodeProto] = []
        for kind in kinds:
            readers = self._readers.get(node.output[0], [])
            if len(readers) != 1 or readers[0].op_type != kind:
                return None
            node = readers[0]
            found.append(node)
        return found


def _other(node: NodeProto, maker: NodeProto) -> str:
    """The input of `node` that `maker` does not make."""
    found: str = next(name for name in node.input if name not in maker.output)
    return found
