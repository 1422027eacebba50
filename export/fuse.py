"""The fp32 graph to the one for CUDA: attention fused into one operator a layer, fp16 inside.

onnxruntime's own pattern matching does it, on the graph of the legacy exporter with plain
attention; attention with a bias by position (MPNet), which it does not know, is done here. What is
left stays as it was and is counted: DeBERTa's attention has no operator to go into.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import onnx
from onnx import numpy_helper
from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST
from onnxruntime.transformers.fusion_options import FusionOptions
from onnxruntime.transformers.onnx_model import OnnxModel
from onnxruntime.transformers.optimizer import optimize_model

from export.biased import fuse_biased
from export.to_onnx import mark

_ATTENTION: Final = ("Attention", "MultiHeadAttention")
_SHAPES: Final = ("Shape", "Size")  # their results do not depend on the values
_INTEGERS: Final = (onnx.TensorProto.INT32, onnx.TensorProto.INT64, onnx.TensorProto.BOOL)


class Fused(NamedTuple):
    """How many attentions there are, and how many became one operator."""

    fused: int
    attentions: int


def fuse(whole: Path, fused: Path, heads: int, hidden: int) -> Fused:
    """Writes the graph with what can be fused fused, in fp32 still.

    whole: a graph whose last layer works for all tokens, else that one is not recognised.
    """
    graph = onnx.load(str(whole))
    attentions = _count(graph, ("Softmax",))
    _divide_scores(graph)
    options = FusionOptions("bert")
    # Padding as a mask of tokens, not as a length: it is then right wherever the padding is.
    options.use_raw_attention_mask(True)
    found = optimize_model(graph, "bert", heads, hidden, opt_level=0, optimization_options=options)
    fuse_biased(found, heads)
    found.save_model_to_file(str(fused))
    mark(fused)
    return Fused(_count(found.model, _ATTENTION), attentions)


def halve(fused: Path, fp16: Path) -> None:
    """Writes the same graph in fp16; inputs are ids as before and logits stay fp32."""
    graph = OnnxModel(onnx.load(str(fused)))
    graph.convert_float_to_float16(
        keep_io_types=True,
        op_block_list=list(DEFAULT_OP_BLOCK_LIST),
        node_block_list=sorted(_counting(graph.model)),
    )
    graph.save_model_to_file(str(fp16))
    mark(fp16)


def _divide_scores(graph: Any) -> None:
    """Scores times 1 / sqrt(d), as transformers 5 has it, to scores by sqrt(d).

    The pattern looks for the first product above the softmax and means the one of the mask.
    """
    by_output = {name: node for node in graph.graph.node for name in node.output}
    for product, scale in list(_scaled_scores(graph, by_output)):
        value = numpy_helper.to_array(scale)
        name = f"{product.name}_divisor"
        graph.graph.initializer.append(numpy_helper.from_array((1.0 / value).astype("f4"), name))
        product.op_type = "Div"
        product.input[1] = name


def _scaled_scores(graph: Any, by_output: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Products of a MatMul and a constant, right below the mask's Add and a Softmax."""
    constants = {i.name: i for i in graph.graph.initializer}
    constants |= {
        node.output[0]: node.attribute[0].t
        for node in graph.graph.node
        if node.op_type == "Constant"
    }
    for softmax in (node for node in graph.graph.node if node.op_type == "Softmax"):
        masked = by_output.get(softmax.input[0])
        if masked is None or masked.op_type != "Add":
            continue
        product = by_output.get(masked.input[0])
        if product is not None and product.op_type == "Mul" and product.input[1] in constants:
            yield product, constants[product.input[1]]


def _counting(model: Any) -> set[str]:
    """Nodes in floats whose results are rounded to integers: positions, in buckets by logarithm.

    fp16 has eleven bits: a bucket computed in it may be the next one.
    """
    by_output = {name: node for node in model.graph.node for name in node.output}
    found: set[str] = set()
    waiting = [node for node in model.graph.node if _to_integers(node)]
    while waiting:
        for name in waiting.pop().input:
            node = by_output.get(name)
            if node is None or node.name in found or node.op_type in _SHAPES:
                continue
            found.add(node.name)
            waiting.append(node)
    return found


def _to_integers(node: Any) -> bool:
    return node.op_type == "Cast" and any(
        given.name == "to" and given.i in _INTEGERS for given in node.attribute
    )


def _count(model: Any, kinds: Iterable[str]) -> int:
    return sum(node.op_type in kinds for node in model.graph.node)
