"""Rows to passages as the worker would judge them: a segment, the text before, the turns."""

import random
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

from detectors.harms import COLUMNS
from detectors.protocol import Passage, Turn
from detectors.segments import DEFAULT_LIMITS, pieces
from training import sources
from training.rows import Row

_LONGEST: Final = DEFAULT_LIMITS.max_chars
_HARM_SHOWS: Final = 300  # a harmful reply's opening, "Sure, here is", is not harm yet
_TURN_SHOWS: Final = 60  # characters of it, of what is harmful from a known place on
_MOST_WINDOWS: Final = 2  # of one row, in training
_UNKNOWN: Final = (0.0,) * len(COLUMNS)  # weights of a passage without labels
_ALONE_SHARE: Final = 0.3  # of the samples, once more without context
_OPENING_SHARE: Final = 0.3  # of harmful rows, their first segment too: is it harmful yet?
_SCARCE: Final = ("violence", "privacy_violation", "sexual_content")


class Sample(NamedTuple):
    """A passage with targets. targets, weights: (7,), columns as in harms.COLUMNS."""

    passage: Passage
    targets: tuple[float, ...]
    weights: tuple[float, ...]
    source: str


def judged(row: Row) -> list[Passage]:
    """Every passage that the worker, at its default settings, would judge of this row, in order."""
    passages: list[Passage] = []
    for piece in pieces(row.text):
        before = [passage.text for passage in passages[-DEFAULT_LIMITS.context_segments :]]
        passages.append(Passage(piece, "".join(before), row.conversation))
    return passages


def capped(rows: Iterable[Row], chance: random.Random) -> list[Row]:
    """At most the source's cap of each, chosen by chance."""
    by_source: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_source[row.source].append(row)
    chosen: list[Row] = []
    for source, members in sorted(by_source.items()):
        chance.shuffle(members)
        chosen += members[: sources.cap(source)]
    return chosen


def samples(rows: Iterable[Row], chance: random.Random) -> list[Sample]:
    """Training windows of `rows`, and harmless segments put under other people's requests."""
    rows = list(rows)
    found = [sample for row in rows for sample in _of_row(row, chance)]
    found += [*_borrowed_requests(rows, chance), *_turned(rows, chance)]
    return [*found, *_alone(found, chance)]


def one(row: Row, chance: random.Random) -> Sample:
    """One of the row's windows whose label is the row's, as the worker would give it."""
    windows = judged(row)
    if max(row.targets) > 0:
        windows = _enough(row) or windows[-1:]
    return Sample(chance.choice(windows), row.targets, row.weights, row.source)


def _of_row(row: Row, chance: random.Random) -> Iterator[Sample]:
    windows = _harmful_windows(row) if max(row.targets) > 0 else judged(row)
    most = 2 * _MOST_WINDOWS if _scarce(row) else _MOST_WINDOWS
    for passage in chance.sample(windows, min(most, len(windows))):
        yield Sample(passage, row.targets, row.weights, row.source)
    if max(row.targets) > 0 and chance.random() < _OPENING_SHARE:
        yield Sample(next(iter(judged(row))), row.targets, _UNKNOWN, row.source)


def _alone(found: Iterable[Sample], chance: random.Random) -> Iterator[Sample]:
    """Segments without what came before, as the toxicity detector reads them.

    Too little of a harmful text is not known to be harmful: only a teacher says of it.
    """
    for sample in found:
        passage = sample.passage
        if not (passage.before or passage.conversation) or chance.random() > _ALONE_SHARE:
            continue
        enough = max(sample.targets) == 0 or len(passage.text) >= _HARM_SHOWS
        said = enough or sample.source == "turned"
        yield sample._replace(
            passage=Passage(passage.text, "", ()), weights=sample.weights if said else _UNKNOWN
        )


def _scarce(row: Row) -> bool:
    return row.kind == "reply" and any(row.targets[COLUMNS.index(harm)] for harm in _SCARCE)


def _harmful_windows(row: Row) -> list[Passage]:
    """Windows that hold enough of a harmful text to be harmful themselves; a short one whole."""
    return _enough(row) or [
        judged(row)[-1] if row.turns_at else Passage(row.text, "", row.conversation)
    ]


def _enough(row: Row) -> list[Passage]:
    windows, end = [], 0
    for passage in judged(row):
        end += len(passage.text)
        shown = min(end - row.turns_at, len(passage.text))  # of what is harmful, in the segment
        if row.turns_at:
            enough = shown >= _TURN_SHOWS
        else:
            enough = shown + len(passage.before) >= _HARM_SHOWS
        if enough:
            windows.append(passage)
    return windows


def _turned(rows: list[Row], chance: random.Random) -> Iterator[Sample]:
    """A short text, harmful or not, behind an ordinary answer's beginning: 4,000 such passages.

    Most harmful rows are harmful throughout, and posts have no conversation. The worker meets
    answers that turn: the label is that of the segment, and the change of style is on both sides.
    Only texts that stood alone turn: "Yes, do that" is harmful behind its own question alone.
    """
    plain = [row for row in rows if row.source in sources.SOUND and row.kind == "reply"]
    alone = (row for row in rows if row.kind != "prompt" and not row.conversation)
    short = [row for row in alone if 40 <= len(row.text) <= _LONGEST]
    harmful = [row for row in short if max(row.targets) > 0]
    harmless = [row for row in short if max(row.targets) == 0 and row.weights[-1] > 0]
    if not (plain and harmful and harmless):
        return
    for number in range(4_000):
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
