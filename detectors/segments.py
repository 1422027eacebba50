"""Where a stream's text is cut into segments. Pure, and a function of the text alone.

Here, since training cuts as the worker does (docs/guarantees.md says what holds of a cut).
"""

import re
import sys
import unicodedata
from collections.abc import Iterator
from typing import Final, NamedTuple

_CLOSERS: Final = "\"'”’»)\\]*_`"
_CJK_CLOSERS: Final = "」』”’）】》"
# Possessive throughout: a later character must never change where an earlier match ended.
_SENTENCE_END: Final = re.compile(
    rf"(?:[.!?…]++[{_CLOSERS}]*+\s++|[。！？｡]++[{_CJK_CLOSERS}]*+\s*+|\n\s*+)(?=\S)"
)
_SPACES: Final = "".join(chr(c) for c in range(sys.maxunicode + 1) if chr(c).isspace())
_RUN: Final = ".!?…。！？｡" + "\"'”’»)]*_`" + _CJK_CLOSERS + _SPACES
_REGIONAL: Final = "".join(map(chr, range(0x1F1E6, 0x1F200)))
_MAX_BACK_OFF: Final = 32  # code points; longer combining sequences are cut all the same


class Limits(NamedTuple):
    """How text is cut, in code points and segments."""

    min_chars: int
    max_chars: int
    context_segments: int


DEFAULT_LIMITS: Final = Limits(120, 400, 1)  # of the worker's settings; a test compares them


def pieces(text: str, limits: Limits = DEFAULT_LIMITS) -> Iterator[str]:
    """The segments of a whole text: they join to it, and only the last may be short."""
    start = 0
    while length := next_cut(text[start : start + limits.max_chars + 1], limits):
        yield text[start : start + length]
        start += length
    yield text[start:]


def next_cut(text: str, limits: Limits, scan_from: int = 0) -> int:
    """Where the first segment of `text` ends, or 0 while that is open.

    The cut lies before a code point that is there: 0 < cut < len(text). Reads at most
    max_chars + 1 code points, and a longer text never moves a cut.
    scan_from: no sentence end that begins earlier can count (see `scan_mark`).
    """
    length = len(text)
    if length <= limits.min_chars:
        return 0
    for match in _SENTENCE_END.finditer(text, scan_from, limits.max_chars + 1):
        if match.end() >= limits.min_chars:
            return match.end()
    return _forced_cut(text, limits.max_chars) if length > limits.max_chars else 0


def scan_mark(text: str) -> int:
    """Where the next scan may start when `text` held no cut: a match needs an unbroken run of
    terminators, closers and white space up to the text that is still to come."""
    return len(text.rstrip(_RUN))


def _forced_cut(text: str, at: int) -> int:
    """At the last white-space edge in the second half, else at `at`, in no combining sequence."""
    for edge in range(at, at // 2, -1):
        if text[edge - 1].isspace() and not text[edge].isspace():
            return edge
    for cut in range(at, max(at - _MAX_BACK_OFF, at // 2), -1):
        if not _joined(text, cut):
            return cut
    return at


def _joined(text: str, cut: int) -> bool:
    """Whether a cut there would go through one visible character."""
    left, right = text[cut - 1], text[cut]
    if left != "\u200d" and "\U0001f1e6" <= right <= "\U0001f1ff":  # two of these are one flag
        return (cut - len(text[:cut].rstrip(_REGIONAL))) % 2 == 1
    return left == "\u200d" or unicodedata.category(right) in {"Mn", "Mc", "Me", "Cf", "Sk"}
