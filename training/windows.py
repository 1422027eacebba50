"""Rows to passages as the worker would judge them: a segment, the text before, the turns."""

import random
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

from detectors.harms import COLUMNS
from detectors.protocol import Passage, Turn
from training import sources
from training.rows import Row

_SENTENCE_END: Final = re.compile(r"[.!?:](?=\s)|\n+")
_SHORTEST, _LONGEST = 120, 400  # characters of a segment, as the worker's settings have them
_BEFORE: Final = 500  # characters of the text before that the worker gives
_HARM_SHOWS: Final = 300  # a harmful reply's opening, "Sure, here is", is not harm yet
_MOST_WINDOWS: Final = 2  # of one row, in training
_SCARCE: Final = ("violence", "privacy_violation", "sexual_content")


class Sample(NamedTuple):
    """A passage with targets. targets, weights: (7,), columns as in harms.COLUMNS."""

    passage: Passage
    targets: tuple[float, ...]
    weights: tuple[float, ...]
    source: str


def segments(text: str) -> list[str]:
    """Near enough to the worker's cut: sentence ends, 120 to 400 characters. Joins to `text`."""
    cut, start = [], 0
    while len(text) - start > _LONGEST:
        ends = [m.end() for m in _SENTENCE_END.finditer(text, start, start + _LONGEST)]
        far = [end for end in ends if end - start >= _SHORTEST]
        space = text.rfind(" ", start + _SHORTEST, start + _LONGEST) + 1
        end = far[0] if far else (space or start + _LONGEST)
        cut.append(text[start:end])
        start = end
    return [*cut, text[start:]] if text[start:] else cut


def judged(row: Row) -> list[Passage]:
    """Every passage that the worker would judge of this row, in order."""
    passages, start = [], 0
    for segment in segments(row.text):
        before = row.text[max(0, start - _BEFORE) : start]
        passages.append(Passage(segment, before, row.conversation))
        start += len(segment)
    return passages


def capped(rows: Iterable[Row], chance: random.Random) -> list[Row]:
    """At most the source's cap of each, chosen by chance."""
    by_source: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_source[row.source].append(row)
    chosen: list[Row] = []
    for source, members in sorted(by_source.items()):
        chance.shuffle(members)
        chosen += members[: sources.CAPS.get(source, sources.CAP)]
    return chosen


def samples(rows: Iterable[Row], chance: random.Random) -> list[Sample]:
    """Training windows of `rows`, and harmless segments put under other people's requests."""
    rows = list(rows)
    found = [sample for row in rows for sample in _of_row(row, chance)]
    return [*found, *_borrowed_requests(rows, chance), *_turned(rows, chance)]


def _of_row(row: Row, chance: random.Random) -> Iterator[Sample]:
    if max(row.targets) > 0:
        windows = _harmful_windows(row)
    else:
        windows = [_less_before(passage, chance) for passage in judged(row)]
    most = 2 * _MOST_WINDOWS if _scarce(row) else _MOST_WINDOWS
    for passage in chance.sample(windows, min(most, len(windows))):
        yield Sample(passage, row.targets, row.weights, row.source)


def _less_before(passage: Passage, chance: random.Random) -> Passage:
    """Half of the time as the worker gives it, else with less: every length is harmless."""
    if chance.random() < 0.5:
        return passage
    return passage._replace(before=passage.before[chance.randrange(_BEFORE) :])


def _scarce(row: Row) -> bool:
    return row.kind == "reply" and any(row.targets[COLUMNS.index(harm)] for harm in _SCARCE)


def _harmful_windows(row: Row) -> list[Passage]:
    """Windows that hold enough of a harmful text to be harmful themselves."""
    windows = [p for p in judged(row) if len(p.before) + len(p.text) >= _HARM_SHOWS]
    return windows or [Passage(row.text, "", row.conversation)]


def _turned(rows: list[Row], chance: random.Random) -> Iterator[Sample]:
    """A short text, harmful or not, behind an ordinary answer's beginning: 6,000 such passages.

    Most harmful rows are harmful throughout, and posts have no conversation. The worker meets
    answers that turn: the label is that of the segment, and the change of style is on both sides.
    """
    plain = [row for row in rows if row.source in sources.SOUND and row.kind == "reply"]
    short = [row for row in rows if row.kind != "prompt" and 40 <= len(row.text) <= _LONGEST]
    harmful = [row for row in short if max(row.targets) > 0]
    harmless = [row for row in short if max(row.targets) == 0 and row.weights[-1] > 0]
    if not (plain and harmful and harmless):
        return
    for number in range(6_000):
        turned = chance.choice(harmful if number % 2 else harmless)
        reply = chance.choice(plain)
        opening = chance.choice(judged(reply))
        before = "" if number % 3 == 0 else f"{opening.text.rstrip()} "
        passage = Passage(turned.text, before, reply.conversation)
        yield Sample(passage, turned.targets, turned.weights, "turned")


def _borrowed_requests(rows: list[Row], chance: random.Random) -> Iterator[Sample]:
    """A harmful request does not make an ordinary answer harmful: 600 mismatched pairs."""
    asked = [row for row in rows if row.kind == "prompt" and row.targets[-1] == 1]
    plain = [row for row in rows if row.source in sources.SOUND and row.kind == "reply"]
    if not asked or not plain:
        return
    for _ in range(600):
        reply, request = chance.choice(plain), chance.choice(asked)
        passage = chance.choice(judged(reply))
        under = passage._replace(conversation=(Turn("user", request.text),))
        yield Sample(under, reply.targets, reply.weights, "borrowed")
