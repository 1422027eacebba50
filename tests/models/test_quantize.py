"""Int8 of small graphs: every form in which a table is looked up. Needs the train extra."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.train


def outputs(folder: Path, lookups: Sequence[dict[str, int]]) -> tuple[list[Any], list[Any], Any]:
    """Of one 6 x 6 table, looked up once for each set of attributes: fp32, int8, its graph."""
    import onnx
    import onnxruntime as ort
    from onnx import helper, numpy_helper

    from export.quantize import quantize
    from export.to_onnx import mark

    table = np.random.default_rng(0).normal(size=(6, 6)).astype(np.float32)
    names = [f"y{place}" for place in range(len(lookups))]
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["table", "ids"], [name], **attributes)
            for name, attributes in zip(names, lookups, strict=True)
        ],
        "lookups",
        [helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, [1, "T"])],
        [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names],
        [numpy_helper.from_array(table, "table")],
    )
    opsets = [helper.make_opsetid("", 17)]
    fp32, int8 = folder / "fp32.onnx", folder / "int8.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), fp32)
    mark(fp32)
    quantize(fp32, int8)
    ids = {"ids": np.array([[0, 2, 3]])}
    said = [ort.InferenceSession(str(path)).run(None, ids) for path in (fp32, int8)]
    return said[0], said[1], onnx.load(int8).graph


@pytest.mark.parametrize(
    "lookups", [[{}], [{"axis": 0}], [{}, {}], [{"axis": 1}], [{}, {"axis": 1}]]
)
def test_a_table_gives_its_rows_within_half_a_step(
    tmp_path: Path, lookups: Sequence[dict[str, int]]
) -> None:
    """Looked up once or more; by another axis in fp32, since no scale is a row's there."""
    exact, found, _ = outputs(tmp_path, lookups)
    for expected, got in zip(exact, found, strict=True):
        assert got.shape == expected.shape
        assert np.abs(got - expected).max() <= 3 / 127


def test_a_table_looked_up_twice_is_stored_once(tmp_path: Path) -> None:
    """Under the names by which training.shipped finds it, and no longer in fp32."""
    _, _, graph = outputs(tmp_path, [{}, {}])
    assert sorted(table.name for table in graph.initializer) == ["table.int8", "table.scale"]
