"""What an export reads weights from: whole safetensors and nothing else."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from export import weights
from export.errors import ExportError


class Trap:
    """Unpickling it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def safetensors(path: Path, *, size: int = 8, short: int = 0) -> Path:
    """A file with one tensor of `size` bytes, `short` of them missing."""
    header = {"a": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}
    content = json.dumps(header | {"__metadata__": {"format": "pt"}}).encode()
    path.write_bytes(len(content).to_bytes(8, "little") + content + bytes(size - short))
    return path


def index(folder: Path, *names: str) -> None:
    content = {"weight_map": {f"layer.{i}": name for i, name in enumerate(names)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def test_a_whole_file_is_found(tmp_path: Path) -> None:
    """Also beside a pickle of the same weights, which is not looked at."""
    (tmp_path / "pytorch_model.bin").write_bytes(b"whatever")
    expected = safetensors(tmp_path / "model.safetensors")
    assert weights.files(tmp_path) == (expected,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl", "a.ckpt"])
def test_a_pickle_is_refused_and_not_opened(tmp_path: Path, name: str) -> None:
    """The error says why, and what to do."""
    (tmp_path / name).write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(ExportError, match=rf"{name} alone: a pickle runs code.*safetensors"):
        weights.files(tmp_path)
    assert not (tmp_path / "sprung").exists()


def test_a_pickle_by_another_name_is_refused(tmp_path: Path) -> None:
    """The name does not make it safe."""
    (tmp_path / "model.safetensors").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(ExportError, match="is no safetensors file"):
        weights.files(tmp_path)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("short", [1, 8])
def test_half_a_file_is_refused(tmp_path: Path, short: int) -> None:
    """A copy that broke off."""
    safetensors(tmp_path / "model.safetensors", short=short)
    with pytest.raises(ExportError, match="its header says"):
        weights.files(tmp_path)


def test_all_shards_are_found(tmp_path: Path) -> None:
    """Each once, in order."""
    expected = tuple(safetensors(tmp_path / f"{i}.safetensors") for i in range(2))
    index(tmp_path, "0.safetensors", "1.safetensors", "0.safetensors")
    assert weights.files(tmp_path) == expected


@pytest.mark.parametrize("name", ["pytorch_model-1.bin", "../model.safetensors"])
def test_an_index_that_leads_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    """A safetensors index is no way round: not to a pickle, not out of the folder."""
    index(tmp_path, name)
    with pytest.raises(ExportError, match="only safetensors beside it do"):
        weights.files(tmp_path)


def test_a_shard_that_is_missing_is_refused(tmp_path: Path) -> None:
    """Named, before anything is loaded."""
    index(tmp_path, "1.safetensors")
    with pytest.raises(ExportError, match=r"1\.safetensors is no safetensors file"):
        weights.files(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    """Empty, say."""
    with pytest.raises(ExportError, match=r"holds no model\.safetensors"):
        weights.files(tmp_path)
