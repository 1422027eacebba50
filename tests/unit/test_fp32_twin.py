"""The fp32 twin of a model folder: the graph that its int8 one was made from, and no other."""

import json
from hashlib import sha256
from pathlib import Path

import pytest

from detectors.harms import THRESHOLD_KEYS
from detectors.protocol import Passage
from detectors.session import Folder
from training.scores import OfFolder, fp32_twin, precision, run_of
from worker.settings import HERE


def digest(content: bytes) -> str:
    return sha256(content).hexdigest()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder with the shipped manifest over other bytes."""
    made = tmp_path / "models" / "toxicity"
    made.mkdir(parents=True)
    manifest = json.loads((HERE / "models" / "toxicity" / "manifest.json").read_bytes())
    contents = {manifest["model"]: b"int8 graph", manifest["tokenizer"]: b"{}"}
    manifest["files"] = {name: digest(content) for name, content in contents.items()}
    for name, content in contents.items():
        (made / name).write_bytes(content)
    (made / "manifest.json").write_text(json.dumps(manifest))
    return made


def run(tmp_path: Path, name: str, int8: bytes, fp32: bytes) -> None:
    onnx = tmp_path / "runs" / name / "onnx"
    onnx.mkdir(parents=True)
    (onnx / "model.int8.onnx").write_bytes(int8)
    (onnx / "model.onnx").write_bytes(fp32)


def test_the_twin_is_the_graph_beside_the_same_int8_one(folder: Path, tmp_path: Path) -> None:
    """Found by digest among the runs; everything else is the folder's; its digest is its own."""
    run(tmp_path, "first", b"another int8 graph", b"another")
    run(tmp_path, "second", b"int8 graph", b"fp32 graph")
    twin = fp32_twin(folder, tmp_path / "runs")
    assert twin is not None
    found, original = Folder(twin), Folder(folder)
    assert found.read(found.manifest.model) == b"fp32 graph"
    assert precision(found.manifest) == "fp32"
    assert precision(original.manifest) == "int8"
    assert found.manifest.calibration == original.manifest.calibration
    assert found.manifest.thresholds == original.manifest.thresholds
    assert found.digest != original.digest
    assert fp32_twin(folder, tmp_path / "runs") == twin  # made anew, not twice


def test_another_run_s_graph_is_no_twin(folder: Path, tmp_path: Path) -> None:
    """Rather none than one of other weights."""
    run(tmp_path, "first", b"another int8 graph", b"another")
    assert fp32_twin(folder, tmp_path / "runs") is None


def test_a_folder_s_own_fp32_graph_comes_first(folder: Path, tmp_path: Path) -> None:
    """A manifest that names one needs no run."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    (folder / "model.fp32.onnx").write_bytes(b"own")
    manifest["graphs"] = {"int8": manifest["model"], "fp32": "model.fp32.onnx"}
    manifest["files"]["model.fp32.onnx"] = digest(b"own")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    twin = fp32_twin(folder, tmp_path / "runs")
    assert twin is not None
    assert Folder(twin).read("model.onnx") == b"own"


def test_what_is_no_encoder_is_compared_as_it_is(tmp_path: Path) -> None:
    """One graph, no precision to its name, no twin and no run that it was quantised in."""
    folder = HERE / "models" / "words"
    words = OfFolder(folder, "words")
    assert (words.name, words.kind, len(words.digest)) == ("words", "words", 64)
    assert set(words.thresholds) == set(THRESHOLD_KEYS)
    assert words.score([Passage("some text", "", ())]).shape == (1, 7)
    assert fp32_twin(folder, tmp_path) is None
    assert run_of(folder, tmp_path) is None
