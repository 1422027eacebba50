"""A checkpoint's tokenizer to the tokenizer.json that serves, and how its windows are laid out.

Older folders have a vocabulary and no tokenizer.json; transformers builds one. What serves is
changed in two ways that plain text does not notice, so that no text can speak in special tokens
and, with WordPiece, none can hide in an unknown word.
"""

import json
import re
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
from tokenizers import Tokenizer
from transformers import AutoTokenizer, DebertaTokenizer

from detectors.protocol import Passage, Turn
from detectors.tokens import Inputs, Layout, Lengths, PairTokens
from export.errors import ExportError

_LONGEST_WORD: Final = 48  # characters; WordPiece is quadratic in it and gives up at 100
_LEAST_SHARE: Final = 0.9  # of the model's ids that tokens have; some pad to a round number
_NO_LIMIT: Final = 1_000_000  # transformers writes 1e30 for a tokenizer that states no length
_FILE: Final = "tokenizer.json"
_ASKED: Final = "Where to?"
_PLAIN: Final = (
    "Good morning, how are you?",
    "I will find you, and you'll be sorry: 2,500 times over.",
    "A naïve café on the Straße costs €3.50 (50% off).",
    "First line.\nSecond line, with  two spaces",
    "a",
)


class Made(NamedTuple):
    """What serving needs to make windows."""

    content: bytes  # of tokenizer.json
    layout: Layout
    longest: (
        int | None
    )  # tokens of one input, special ones included; None: the tokenizer has no say


def convert(folder: Path, vocab_size: int) -> Made:
    """The tokenizer of a checkpoint folder. Raises ExportError where windows cannot be made.

    vocab_size: of the model. transformers makes up a tokenizer of five tokens where the files for
    one are missing, and says nothing.
    """
    try:
        found: Any = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True, use_fast=True
        )
        plain = _plain_tokenizer(folder, found)
    except Exception as error:  # transformers and tokenizers raise nearly everything
        raise ExportError(
            f"{folder}: no tokenizer.json, and none can be made of what is there: {error}"
        ) from error
    if not _LEAST_SHARE * vocab_size <= plain.get_vocab_size() <= vocab_size:
        raise ExportError(
            f"{folder}: the tokenizer has {plain.get_vocab_size()} tokens, the model {vocab_size}: "
            "its files are missing, or another model's"
        )
    if found.pad_token_id is None:
        raise ExportError(f"{folder}: the tokenizer has no padding token")
    layout = _layout(plain, int(found.pad_token_id))
    if isinstance(found, DebertaTokenizer) and not _has_own(folder):
        # What transformers 5 makes of vocabulary and merges doubles the middle [SEP] of a pair;
        # the checkpoints were trained with one, as transformers 4 had it.
        layout = msgspec.structs.replace(layout, between=layout.between[:1], types=(0, 1))
    content = json.dumps(hardened(json.loads(plain.to_str())), ensure_ascii=False).encode()
    longest = int(found.model_max_length)
    made = Made(content, layout, longest if longest < _NO_LIMIT else None)
    _compare(plain, found.unk_token_id, made)
    return made


def _has_own(folder: Path) -> bool:
    return (folder / _FILE).is_file()


def _plain_tokenizer(folder: Path, theirs: Any) -> Tokenizer:
    """The folder's own tokenizer.json before what transformers would make of it."""
    made = theirs.backend_tokenizer
    plain = Tokenizer.from_file(str(folder / _FILE)) if _has_own(folder) else made
    if plain.num_special_tokens_to_add(is_pair=True) == 0:
        plain = made  # the file leaves the special tokens to its user
    plain.no_truncation()
    plain.no_padding()
    return plain


def _layout(plain: Tokenizer, pad: int) -> Layout:
    """Read off a pair as the tokenizer puts it together: what belongs to no side is special."""
    pair = plain.encode("word", "word")
    sides = list(pair.sequence_ids)
    if 0 not in sides or 1 not in sides:
        raise ExportError(f"the tokenizer puts a pair together as {sides}: there are no two sides")
    first, second = sides.index(0), sides.index(1)
    behind = len(sides) - sides[::-1].index(0)  # the first side's end
    end = len(sides) - sides[::-1].index(1)
    return Layout(
        start=tuple(pair.ids[:first]),
        between=tuple(pair.ids[behind:second]),
        end=tuple(pair.ids[end:]),
        types=(pair.type_ids[first], pair.type_ids[second]),
        pad=pad,
    )


def hardened(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer.json for text that wants to deceive; others read the same.

    - Special tokens are no part of a text: "[SEP]" is five characters, not the end of a side.
    - WordPiece makes one unknown token of a word with one unknown character, or of a very long
      word. Such a character stands alone, and words are cut at 48 characters.
    """
    special = {t["content"] for t in tokenizer["added_tokens"] if t["special"]}
    changed = dict(tokenizer)
    changed["truncation"] = changed["padding"] = changed["post_processor"] = None
    changed["added_tokens"] = [t for t in tokenizer["added_tokens"] if not t["special"]]
    changed["model"] = _unspeakable(tokenizer["model"], special)
    if changed["model"]["type"] == "WordPiece":
        changed["pre_tokenizer"] = _splitting(changed["pre_tokenizer"], tokenizer["model"]["vocab"])
    return changed


def _unspeakable(model: dict[str, Any], special: set[str]) -> dict[str, Any]:
    """The same vocabulary, its special tokens spelt with a space: no text comes with one inside."""
    hidden = special - {model.get("unk_token")}

    def name(token: str) -> str:
        return f" {token}" if token in hidden else token

    vocab = model["vocab"]
    if isinstance(vocab, dict):
        return {**model, "vocab": {name(token): number for token, number in vocab.items()}}
    return {**model, "vocab": [[name(token), score] for token, score in vocab]}


def _splitting(before: dict[str, Any] | None, vocab: dict[str, int]) -> dict[str, Any]:
    steps = [before] if before else []
    steps += [_isolate(f"[^{_known(vocab)}]"), _isolate(f".{{{_LONGEST_WORD}}}")]
    return {"type": "Sequence", "pretokenizers": steps}


def _isolate(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def _known(vocab: dict[str, int]) -> str:
    """Characters that the vocabulary holds both at a word's start and inside one."""
    known = sorted(token for token in vocab if len(token) == 1 and "##" + token in vocab)
    return "".join(re.escape(char) for char in known)


def _compare(plain: Tokenizer, unknown: int | None, made: Made) -> None:
    """Raises ExportError where the windows of an ordinary text are not what it was trained on.

    A text that has an unknown token is left out: there ours are meant to differ.
    """
    for inputs in ("text", "pair"):
        for text in _PLAIN:
            expected = _expected(plain, made.layout, text, inputs)
            ours = _window(made, text, inputs)
            if ours != expected and unknown not in expected:
                raise ExportError(f"{inputs} window of {text!r} is {ours}, expected {expected}")


def _expected(plain: Tokenizer, layout: Layout, text: str, inputs: Inputs) -> list[int]:
    if inputs == "text":
        found: list[int] = plain.encode(text).ids
        return found
    sides = [plain.encode(side, add_special_tokens=False).ids for side in (_ASKED, text)]
    return [*layout.start, *sides[0], *layout.between, *sides[1], *layout.end]


def _window(made: Made, text: str, inputs: Inputs) -> list[int]:
    tokens = PairTokens(made.content, Lengths(64, 192, 48), made.layout, inputs)
    (window,) = tokens.encode(Passage(text, "", (Turn("user", _ASKED),))).windows
    found: list[int] = window.ids.tolist()
    return found
