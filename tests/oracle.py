"""What Tidegate must decide, worked out from the whole text at once.

Written from docs/guarantees.md and the contract, on purpose without worker.assemble, worker.streams
and worker.decide: plain loops, one after the other, no state between deltas.
"""

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

TERMINATORS = ".!?…"
CLOSERS = "\"'”’»)]*_`"
CJK_TERMINATORS = "。！？｡"
CJK_CLOSERS = "」』”’）】》"
LONGEST_BACK_OFF = 32  # code points of a combining sequence; a longer one may be cut

HARMS = (
    "violence", "hate_speech", "misinformation", "privacy_violation", "illegal_activity",
    "sexual_content", "other",
)  # fmt: skip
THRESHOLDS = (0.70, 0.80, 0.60, 0.90, 0.85, 0.75, 0.90)
ZEROS = (0.0,) * 7

Row = tuple[float, ...]  # (7,) the six harms, then harmful
ScoreRow = Callable[[str, str, Sequence[tuple[str, str]]], Row]  # text, before, conversation


class Rules(NamedTuple):
    """The settings that decisions depend on."""

    min_chars: int
    max_chars: int
    context_segments: int = 1
    lookahead_segments: int = 0
    release_ahead_chars: int = 0
    short_chars: int = 10
    actions: Mapping[str, str] = {}  # by harm; missing ones block


class Expected(NamedTuple):
    """One decision, as far as it is a function of text, conversation and settings."""

    segment: int
    start: int
    end: int
    verdict: str
    released_to: int
    leaked: int
    final: bool
    harm: str | None
    row: Row


def as_received(units: str) -> str:
    """The text whose UTF-16 units these are: pairs of halves are one code point."""
    return units.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")


# -- segments -------------------------------------------------------------------------------------


def segment_bounds(text: str, min_chars: int, max_chars: int) -> list[tuple[int, int]]:
    """Start and end of every segment; the last one ends with the text, even an empty one."""
    bounds = []
    start = 0
    while (length := first_cut(text[start:], min_chars, max_chars)) is not None:
        bounds.append((start, start + length))
        start += length
    return [*bounds, (start, len(text))]


def first_cut(rest: str, min_chars: int, max_chars: int) -> int | None:
    """Where the first segment ends; None where no code point behind any cut is there."""
    view = rest[: max_chars + 1]
    ends = [end for end in sentence_ends(view) if end >= min_chars]
    if ends:
        return min(ends)
    if len(rest) <= max_chars:
        return None
    return white_space_cut(view, max_chars) or unbroken_cut(view, max_chars)


def sentence_ends(view: str) -> list[int]:
    """Ends of sentences and lines behind which a code point is there that is no white space."""
    ends = []
    for begin, char in enumerate(view):
        if char in TERMINATORS:
            at = past(view, past(view, begin, TERMINATORS), CLOSERS)
            needs_space = True
        elif char in CJK_TERMINATORS:
            at = past(view, past(view, begin, CJK_TERMINATORS), CJK_CLOSERS)
            needs_space = False
        elif char == "\n":
            at, needs_space = begin + 1, False
        else:
            continue
        end = at
        while end < len(view) and view[end].isspace():
            end += 1
        if end < len(view) and not (needs_space and end == at):
            ends.append(end)
    return ends


def past(view: str, at: int, chars: str) -> int:
    """The first index from `at` on that holds none of `chars`."""
    while at < len(view) and view[at] in chars:
        at += 1
    return at


def white_space_cut(view: str, max_chars: int) -> int | None:
    """The last edge between white space and something else, in the second half."""
    edges = [i for i in range(1, len(view)) if view[i - 1].isspace() and not view[i].isspace()]
    return max((edge for edge in edges if 2 * edge > max_chars), default=None)


def unbroken_cut(view: str, max_chars: int) -> int:
    """At the maximum, or before the visible character that it would cut."""
    for back in range(min(LONGEST_BACK_OFF, max_chars)):
        cut = max_chars - back
        if 2 * cut <= max_chars:
            break
        if not belong_together(view[:cut], view[cut]):
            return cut
    return max_chars


def belong_together(left: str, char: str) -> bool:
    """Whether `char` goes on with the visible character at the end of `left`."""
    if left.endswith("\N{ZERO WIDTH JOINER}"):
        return True
    if is_flag_half(char):
        halves = 0
        while halves < len(left) and is_flag_half(left[-1 - halves]):
            halves += 1
        return halves % 2 == 1
    return unicodedata.category(char) in ("Mn", "Mc", "Me", "Cf", "Sk")


def is_flag_half(char: str) -> bool:
    """Whether it is a regional indicator, two of which make a flag."""
    return 0x1F1E6 <= ord(char) <= 0x1F1FF


# -- decisions ------------------------------------------------------------------------------------


def expect(
    text: str, rules: Rules, score: ScoreRow, conversation: Sequence[tuple[str, str]] = ()
) -> list[Expected]:
    """Every decision of the stream, in order."""
    bounds = segment_bounds(text, rules.min_chars, rules.max_chars)
    rows = [window_row(text, bounds, i, rules, score, conversation) for i in range(len(bounds))]
    decisions: list[Expected] = []
    released_to, shown, revised = 0, 0, False
    for index, (start, end) in enumerate(bounds):
        last = index == len(bounds) - 1
        row = row_with_lookahead(rows, index, rules)
        verdict, harm = verdict_of(row, rules.actions)
        leaked = 0
        if verdict == "allow":
            if not revised:
                released_to = end if last else end + rules.release_ahead_chars
                shown = max(shown, released_to)
        else:
            leaked = max(0, min(shown, end) - start)
            released_to = min(released_to, start)
            revised = True
        final = last or verdict == "block"
        decisions.append(
            Expected(index, start, end, verdict, released_to, leaked, final, harm, row)
        )
        if final:
            break
    return decisions


def window_row(
    text: str, bounds: Sequence[tuple[int, int]], index: int, rules: Rules, score: ScoreRow,
    conversation: Sequence[tuple[str, str]],
) -> Row:  # fmt: skip
    """Scores of one segment, read with the segments before it."""
    start, end = bounds[index]
    before = text[bounds[max(0, index - rules.context_segments)][0] : start]
    if start == end or len(before) + end - start < rules.short_chars:
        return ZEROS
    return score(text[start:end], before, conversation)


def row_with_lookahead(rows: Sequence[Row], index: int, rules: Rules) -> Row:
    """The highest score per harm of the awaited windows that the segment lies in."""
    reach = min(rules.lookahead_segments, rules.context_segments)
    windows = rows[index : index + reach + 1]
    return tuple(max(column) for column in zip(*windows, strict=True))


def verdict_of(row: Row, actions: Mapping[str, str]) -> tuple[str, str | None]:
    """Verdict and harm: the gravest action, then the score farthest above its threshold."""
    over = {
        harm: score - threshold
        for harm, score, threshold in zip(HARMS, row, THRESHOLDS, strict=True)
        if score > threshold
    }
    if len(over) > 1:
        over.pop("other", None)
    for action in ("block", "revise", "flag"):
        acting = {it: above for it, above in over.items() if actions.get(it, "block") == action}
        if acting:
            harm = max(acting, key=lambda name: acting[name])
            return ("allow" if action == "flag" else action), harm
    return "allow", None
