"""A model folder is served only if it is what its manifest says."""

import json
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detectors.protocol import Window
from detectors.session import Folder, ModelError, Session

SHIPPED = Path(__file__).parents[2] / "models" / "toxicity"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SHIPPED, tmp_path / "toxicity"))


def change(folder: Path, **fields: Any) -> None:
    """Writes other values into the manifest."""
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | fields))


def window(*ids: int) -> Window:
    return Window(np.array(ids), np.zeros(len(ids), dtype=np.int64))


def test_the_shipped_folder_gives_seven_finite_logits() -> None:
    """One window, one row."""
    found = Session(Folder(SHIPPED)).logits(window(101, 7592, 102, 2088, 102))
    assert found.shape == (7,)
    assert np.isfinite(found).all()


@pytest.mark.parametrize("name", ["model.int8.onnx", "tokenizer.json"])
def test_one_changed_byte_is_refused(folder: Path, name: str) -> None:
    """A file with another digest is not read as a model."""
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(ModelError, match=f"{name} has SHA-256"):
        Folder(folder)


def test_the_digest_moves_with_the_calibration(folder: Path) -> None:
    """Everything that can move a score is in the digest."""
    before = Folder(folder).digest
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    change(folder, calibration=manifest["calibration"] | {"violence": [1.25, 0.5]})
    after = Folder(folder).digest
    assert before != after
    assert len(after) == 64


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": 99}, "format 99"),
        ({"opset": 99}, "opset 99"),
        ({"columns": ["violence"]}, "the model scores"),
        ({"calibration": {}}, "calibration"),
        ({"thresholds": {"spam": 0.5}}, "unknown harms"),
        ({"thresholds": {"violence": 1.5}}, r"outside 0\.\.1"),
        ({"files": {}}, "digest in the manifest"),
        ({"model": "../model.onnx"}, "digest in the manifest"),
        ({"opset": None}, "cannot be read"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(
    folder: Path, fields: dict[str, Any], message: str
) -> None:
    """Each field is checked, and the error says which it was."""
    change(folder, **fields)
    with pytest.raises(ModelError, match=message):
        Folder(folder)


def test_a_pickle_is_never_read(folder: Path) -> None:
    """Not even with the right digest."""
    (folder / "model.pkl").write_bytes(b"cos\nsystem\n")
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    files = manifest["files"] | {"model.pkl": sha256(b"cos\nsystem\n").hexdigest()}
    change(folder, model="model.pkl", files=files)
    with pytest.raises(ModelError, match=r"no \.onnx or \.json"):
        Folder(folder)


def test_another_opset_than_the_graph_was_exported_with_is_refused(folder: Path) -> None:
    """The manifest is held against what the graph says of itself."""
    opset = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["opset"]
    change(folder, opset=opset - 1)
    with pytest.raises(ModelError, match="exported with opset"):
        Session(Folder(folder))


def test_a_graph_that_onnxruntime_cannot_read_is_refused(folder: Path) -> None:
    """With a digest that fits, the graph itself is still checked."""
    graph = b"not a graph"
    (folder / "model.int8.onnx").write_bytes(graph)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    change(folder, files=manifest["files"] | {"model.int8.onnx": sha256(graph).hexdigest()})
    with pytest.raises(ModelError, match="refuses the graph"):
        Session(Folder(folder))


def test_a_provider_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker told to use a GPU does not quietly use the CPU."""
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(ModelError, match="CUDAExecutionProvider"):
        Session(Folder(SHIPPED), "cuda")
