"""Passages to token windows: the conversation as side 0, the stream's text as side 1.

[CLS] excerpt of the conversation [SEP] text before + judged text [SEP]

Other encoders write it otherwise, as <s> A </s></s> B </s>; a Layout says how. One that was
trained on single texts gets the stream's text alone.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Final, Literal, NamedTuple

import msgspec
import numpy as np
from tokenizers import Tokenizer

from detectors.protocol import Encoded, Passage, Turn, Window

_CHARS_PER_TOKEN: Final = 8  # generous: English has about 4.5, so a clip by it rarely bites
_SCRUB: Final = dict.fromkeys(range(55296, 57344), 65533)  # lone surrogates


class Lengths(NamedTuple):
    """Token budgets of one window; special tokens come on top."""

    conversation: int = 64
    text: int = 192  # a segment of 400 characters and as much before it
    overlap: int = 48  # tokens that two windows of one long text share


DEFAULT_LENGTHS: Final = Lengths()

Inputs = Literal["pair", "text"]  # text: the model never saw a conversation


class Layout(msgspec.Struct, frozen=True):
    """The special tokens of a window, as ids."""

    start: tuple[int, ...]
    between: tuple[int, ...]
    end: tuple[int, ...]
    types: tuple[int, int] = (0, 1)  # of side 0 and its marks, of side 1 and the end
    pad: int | None = None  # what fills a batch; None: never padded

    def around(self, inputs: Inputs) -> int:
        """How many of them a window has."""
        return len(self.start) + len(self.end) + (len(self.between) if inputs == "pair" else 0)


class _Spans(NamedTuple):
    """Tokens of a stream's text and where the judged part of them begins."""

    ids: list[int]
    first: int  # index of the first token that holds a character of the judged text


class PairTokens:
    """Windows of passages. Thread-safe: the tokenizer is only read."""

    def __init__(
        self,
        tokenizer: bytes,
        lengths: Lengths = DEFAULT_LENGTHS,
        layout: Layout | None = None,
        inputs: Inputs = "pair",
    ) -> None:
        """tokenizer: a tokenizer.json. ValueError if it is unreadable.

        Without a layout it is [CLS] A [SEP] B [SEP], and ValueError where the vocabulary has
        neither [CLS], [SEP] nor <s>, </s>.
        """
        self._tokenizer = _read(tokenizer)
        # The turns before a stream are the same for each of its segments. Clipped turns only, so
        # the cache stays below 5 MB.
        self._turn_ids = lru_cache(maxsize=1024)(self._fresh_turn_ids)
        self._lengths = lengths
        self._inputs = inputs
        self.layout: Final = layout or _by_name(self._tokenizer)
        if not 0 <= lengths.overlap < lengths.text:
            raise ValueError(f"overlap {lengths.overlap} must lie in 0..{lengths.text - 1}")

    def encode(self, passage: Passage) -> Encoded:
        """Every character of `passage.text` is in some window; `before` loses its front first."""
        excerpt = self._excerpt(passage.conversation) if self._inputs == "pair" else []
        spans = self._spans(passage)
        windows = tuple(self._window(excerpt, part) for part in _cut(spans, self._lengths))
        return Encoded(
            windows,
            tokens=sum(len(window.ids) for window in windows),
            text_tokens=len(spans.ids) - spans.first,
        )

    def _spans(self, passage: Passage) -> _Spans:
        """Tokens of before + text, read as one: a word cut by the seam stays a word."""
        before = passage.before[-self._lengths.text * _CHARS_PER_TOKEN :]
        encoding = self._encoded(before + passage.text)
        ends = [end for _, end in encoding.offsets]
        first = next((i for i, end in enumerate(ends) if end > len(before)), len(ends))
        return _Spans(encoding.ids, first)

    def _excerpt(self, conversation: Sequence[Turn]) -> list[int]:
        """At most `lengths.conversation` ids: the newest user turn, then the newest others."""
        ids: list[int] = []
        for turn in _by_importance(conversation):
            room = self._lengths.conversation - len(ids)
            if room <= 0:
                break
            ids += _head_and_tail(self._turn_ids(self._clipped(turn.content)), room)
        return ids

    def _clipped(self, content: str) -> str:
        """The two ends of a long turn, more of each than any window takes."""
        keep = self._lengths.conversation * _CHARS_PER_TOKEN
        return content if len(content) <= 2 * keep else f"{content[:keep]} {content[-keep:]}"

    def _fresh_turn_ids(self, content: str) -> tuple[int, ...]:
        return tuple(self._encoded(content).ids)

    def _encoded(self, text: str):  # type: ignore[no-untyped-def]  # tokenizers ships no types
        # Rust strings cannot hold a surrogate; U+FFFD has the same length, so offsets stay.
        return self._tokenizer.encode(text.translate(_SCRUB), add_special_tokens=False)

    def _window(self, excerpt: list[int], text: list[int]) -> Window:
        layout = self.layout
        if self._inputs == "pair":
            ahead, second = [*layout.start, *excerpt, *layout.between], layout.types[1]
        else:
            ahead, second = list(layout.start), layout.types[0]
        ids = np.array([*ahead, *text, *layout.end], dtype=np.int64)
        type_ids = np.full(len(ids), second, dtype=np.int64)
        type_ids[: len(ahead)] = layout.types[0]
        return Window(ids, type_ids)


def _by_name(tokenizer: Tokenizer) -> Layout:
    start, end = _special(tokenizer, "[CLS]", "<s>"), _special(tokenizer, "[SEP]", "</s>")
    pads = (tokenizer.token_to_id(name) for name in ("[PAD]", "<pad>"))
    return Layout((start,), (end,), (end,), pad=next((i for i in pads if i is not None), None))


def _special(tokenizer: Tokenizer, *names: str) -> int:
    for name in names:
        found: int | None = tokenizer.token_to_id(name)
        if found is not None:
            return found
    raise ValueError(f"the tokenizer has no {names[0]}")


def _read(content: bytes) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_buffer(content)
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(f"not a tokenizer.json: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _by_importance(conversation: Sequence[Turn]) -> Iterator[Turn]:
    newest_first = list(reversed(conversation))
    asked = next((i for i, turn in enumerate(newest_first) if turn.role == "user"), None)
    if asked is not None:
        yield newest_first.pop(asked)
    yield from newest_first


def _head_and_tail(ids: tuple[int, ...], room: int) -> tuple[int, ...]:
    """At most `room` ids. The ends of a request tell more than its middle."""
    if len(ids) <= room:
        return ids
    tail = room // 2
    return ids[: room - tail] + ids[len(ids) - tail :]


def _cut(spans: _Spans, lengths: Lengths) -> Iterator[list[int]]:
    """One window where the judged tokens fit, else overlapping ones over all of them.

    What room the first window has goes to the text before; later windows overlap the last one.
    """
    ids, budget = spans.ids, lengths.text
    start = max(0, min(spans.first, len(ids) - budget))
    if len(ids) - spans.first > budget:
        start = max(0, spans.first - lengths.overlap)
    yield ids[start : start + budget]
    while start + budget < len(ids):
        start = min(start + budget - lengths.overlap, len(ids) - budget)
        yield ids[start : start + budget]
