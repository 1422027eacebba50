"""The weights of an int8 graph as a run to go on from. Needs the train extra."""

import json
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.train


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A classifier with an untrained head, and a folder with its graph and tokenizer."""
    import torch

    from export.quantize import quantize
    from export.to_onnx import to_onnx
    from training import base
    from training.model import fresh

    torch.manual_seed(0)
    judge = fresh().eval()
    folder = tmp_path_factory.mktemp("shipped")
    to_onnx(judge, folder / "model.onnx")
    quantize(folder / "model.onnx", folder / "model.int8.onnx")
    tokenizer = base.tokenizer_json(base.folder() / "tokenizer.json")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return judge, folder


def test_each_weight_is_within_half_a_step_of_its_scale(
    shipped: tuple[Any, Path], tmp_path: Path
) -> None:
    """A step is at most 1/127 of the largest weight of the column, or of the row of a table.

    Every tensor of the checkpoint is there, and training can start from what is written.
    """
    import torch

    from training import shipped as module
    from training.model import load

    judge, folder = shipped
    module.main(["--model", str(folder), "--out", str(tmp_path)])
    found, meant = load(tmp_path).state_dict(), judge.state_dict()
    assert set(found) == set(meant)
    for name, value in meant.items():
        if value.is_floating_point() and value.dim() == 2:
            step = value.abs().amax(dim=1, keepdim=True) / 127
            assert ((found[name] - value).abs() <= 0.51 * step).all(), name
        else:
            assert torch.equal(found[name], value), name


def test_a_graph_of_another_base_is_refused(shipped: tuple[Any, Path]) -> None:
    """The sizes do not fit: the missing weights are named."""
    from training.shipped import recovered

    with pytest.raises(ValueError, match=r"not of minilm .*: no encoder\.embeddings\.word"):
        recovered(Path(__file__).parent / "served" / "model.int8.onnx", "minilm", 0)
