"""Weight files of a checkpoint folder: whole safetensors, never a pickle. Needs no torch."""

import json
from pathlib import Path
from typing import Any, Final

from export.errors import ExportError

_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_UNSAFE: Final = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".h5", ".msgpack")
_LONGEST_HEADER: Final = 100_000_000  # bytes, as the format has it


def files(folder: Path) -> tuple[Path, ...]:
    """The weight files, each a whole safetensors. Raises ExportError; nothing is unpickled."""
    found = _shards(folder)
    for file in found:
        _check_whole(file)
    return found


def _shards(folder: Path) -> tuple[Path, ...]:
    if (folder / _WHOLE).is_file():
        return (folder / _WHOLE,)
    if (folder / _INDEX).is_file():
        return _of_index(folder)
    unsafe = sorted(p.name for p in folder.glob("*") if p.suffix in _UNSAFE)
    if unsafe:
        raise ExportError(
            f"{folder} has its weights in {', '.join(unsafe)} alone: a pickle runs code when it is "
            f"read, so it is refused. Get the same model as {_WHOLE}, or write it with "
            "save_pretrained where you trust its source"
        )
    raise ExportError(f"{folder} holds no {_WHOLE}")


def _of_index(folder: Path) -> tuple[Path, ...]:
    names = sorted(set(_json(folder / _INDEX)["weight_map"].values()))
    strange = [n for n in names if not n.endswith(".safetensors") or Path(n).name != n]
    if strange:
        raise ExportError(f"{folder / _INDEX} leads to {strange}: only safetensors beside it do")
    return tuple(folder / name for name in names)


def _check_whole(file: Path) -> None:
    try:
        expected = _expected_size(file)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExportError(f"{file} is no safetensors file: {error}") from error
    if file.stat().st_size != expected:
        raise ExportError(f"{file} has {file.stat().st_size} bytes, its header says {expected}")


def _expected_size(file: Path) -> int:
    """Bytes of the length, of the header in JSON behind it, and of what that says is behind it."""
    with file.open("rb") as content:
        length = int.from_bytes(content.read(8), "little")
        if not 2 <= length <= min(_LONGEST_HEADER, file.stat().st_size - 8):
            raise ValueError(f"it begins with a header of {length} bytes")
        header = json.loads(content.read(length))
    ends = [part["data_offsets"][1] for name, part in header.items() if name != "__metadata__"]
    return 8 + length + int(max(ends, default=0))


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ExportError(f"{path} is no JSON: {error}") from error
