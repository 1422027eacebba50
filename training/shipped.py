"""Weights of a graph that ships, as a run to go on from:
`python -m training.shipped --model models/context --base minilm --out runs/shipped`.

Checkpoints are four times the size and do not ship. The int8 graph holds each weight to half a step
of its scale, near enough to start from: `training.classifier --start-from runs/shipped/model.pt`.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor

from training import base
from training.classifier import Settings
from training.model import fresh

_PREFIX: Final = "module."  # of the classifier in the graph
_ON_THE_WAY: Final = ("Cast", "Mul")  # between the product of integers and its bias
Arrays = Mapping[str, npt.NDArray[np.float32]]


def main(argv: Sequence[str] | None = None) -> None:
    """Writes a run folder with model.pt, settings and tokenizer."""
    parser = argparse.ArgumentParser(prog="python -m training.shipped", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of a model that ships")
    parser.add_argument("--base", choices=list(base.BASES), default="minilm")
    parser.add_argument(
        "--layers", type=int, default=0, help="of the base, from the bottom; 0 = all"
    )
    parser.add_argument("--out", type=Path, required=True, help="run folder, made")
    arguments = parser.parse_args(argv)
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    weights = recovered(arguments.model / "model.int8.onnx", arguments.base, arguments.layers)
    torch.save(weights, out / "model.pt")
    settings = Settings(base=arguments.base, layers=arguments.layers)
    (out / "settings.json").write_text(json.dumps(asdict(settings), indent=2))
    (out / "tokenizer.json").write_bytes((arguments.model / "tokenizer.json").read_bytes())
    print(f"{len(weights)} tensors; next: training.classifier --start-from {out / 'model.pt'}")


def recovered(graph: Path, name: str, layers: int) -> dict[str, Tensor]:
    """State of a Judge of the base `name`. ValueError where the graph is not of that base."""
    model = onnx.load(str(graph))
    stored = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    found = dict(_named(model.graph, stored))
    state = fresh(name, layers).state_dict()
    wrong = [
        key for key, value in state.items()
        if value.is_floating_point() and (key not in found or found[key].shape != value.shape)
    ]  # fmt: skip
    if wrong:
        raise ValueError(f"{graph}: is not of {name} with these layers: no {', '.join(wrong[:3])}")
    return {
        key: torch.tensor(found[key], dtype=value.dtype) if key in found else value
        for key, value in state.items()
    }


def _named(graph: onnx.GraphProto, stored: Arrays) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    """Each weight under its name in the checkpoint, in the shape that torch keeps."""
    for name, array in stored.items():
        if not name.startswith(_PREFIX):
            continue
        table, _, form = name.rpartition(".")
        if form == "int8":
            yield _key(table), array * stored[f"{table}.scale"]
        elif array.dtype == np.float32 and form in ("weight", "bias"):
            yield _key(name), array
    readers = {given: node for node in graph.node for given in node.input}
    for product in (node for node in graph.node if node.op_type == "MatMulInteger"):
        after = readers.get(product.output[0])
        while after is not None and after.op_type in _ON_THE_WAY:
            after = readers.get(after.output[0])
        for bias in (given for given in (after.input if after else ()) if given in stored):
            weight = _real(product.input[1], stored)  # (in, out), torch keeps (out, in)
            yield _key(bias.removesuffix("bias") + "weight"), weight.T


def _real(name: str, stored: Arrays) -> npt.NDArray[np.float32]:
    """What an array in int8 stands for, a scale for each column."""
    plain = name.removesuffix("_quantized")
    off = stored[name].astype(np.float32) - stored[f"{plain}_zero_point"].astype(np.float32)
    return np.ascontiguousarray(off * stored[f"{plain}_scale"])


def _key(name: str) -> str:
    """The last layer is wrapped for its first token alone (export/last_layer.py)."""
    parts = name.removeprefix(_PREFIX).split(".")
    if "layer" in parts and parts.count("layer") > 1:
        parts.pop(len(parts) - 1 - parts[::-1].index("layer"))
    return ".".join(parts)


if __name__ == "__main__":
    main()
