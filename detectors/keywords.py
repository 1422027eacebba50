"""The keyword prefilter: which listed terms end in a segment, and where.

A stream arrives in segments cut anywhere, and the hits of all segments together are those of the
whole text. Three rules make it so:
- the text folds code point by code point (normalise.py), so a cut changes no character;
- the caller hands on the folded end of what came before (`next_tail`), one character longer than
  a term may be, so that a term's first character and its left neighbour are always there;
- a term counts in the segment that holds its last character, once its right neighbour is known.
  Where the next code point is invisible that is only later: then the hit counts in the segment
  that goes on with invisible code points, which belong to the term's last character. A caller
  that must not release the term before should not cut there.

A word ends where a letter or digit is not followed by another. Between two characters of which
one is from a script without spaces (Han, kana, Thai, ...) a word may always end. Korean counts as
spaced: a term with a particle attached needs its own entry. Phrases match over any run of
whitespace and hyphens.
"""

import hashlib
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, Literal, NamedTuple, get_args

from ahocorasick_rs import AhoCorasick

from detectors import normalise
from detectors.harms import THRESHOLD_KEYS
from detectors.normalise import fold, is_leet, is_mark, is_spaced_letter, unleet

Action = Literal["block", "suspect"]
ACTIONS: Final[tuple[Action, ...]] = get_args(Action)

SHIPPED: Final = Path(__file__).with_name("keywords.toml")
MAX_TERM_CHARS: Final = 64  # normalised; bounds what a stream keeps between segments


class KeywordError(ValueError):
    """A keyword file that cannot be used. The message names the field and what to do."""


class Hit(NamedTuple):
    """One listed term found in a segment."""

    harm: str  # one of harms.THRESHOLD_KEYS: `other` too
    action: Action
    start: int  # code points of the segment; 0 where the term began before it
    end: int  # exclusive, at least 1; invisible code points after the term are part of it
    term: int  # index into `Keywords.entries`: user text is never logged


class Entry(NamedTuple):
    """One term of the list."""

    harm: str
    action: Action
    text: str  # normalised


class _Match(NamedTuple):
    """Characters [start, end) of the searched text read as a term."""

    term: int  # index into `Keywords._terms`
    start: int
    end: int


class Keywords:
    """A list of terms, ready to search. Immutable, hence thread-safe."""

    # The longest term a list may have and its left neighbour; not this list's longest term, so
    # that a tail kept while one list was in force serves the next.
    tail_chars: Final = 1 + MAX_TERM_CHARS

    def __init__(self, entries: Iterable[Entry], digest: str) -> None:
        self.entries = tuple(entries)
        self.digest = digest
        self._terms = list(dict.fromkeys(entry.text for entry in self.entries))
        self._machine = AhoCorasick(self._terms)
        self._indices: dict[str, list[int]] = {}
        for index, entry in enumerate(self.entries):
            self._indices.setdefault(entry.text, []).append(index)

    @classmethod
    def load(cls, path: Path) -> "Keywords":
        """The list in a TOML file: a table a harm, each with `block` and `suspect` arrays.

        `digest` is the SHA-256 (hex) of the file and the normaliser's version. Raises KeywordError
        where the file is unreadable, malformed or empty.
        """
        try:
            content = path.read_bytes()
            tables = tomllib.loads(content.decode())
        except OSError as error:
            raise KeywordError(f"{path.name}: {error.strerror}: check the path") from error
        except ValueError as error:  # not UTF-8, not TOML
            raise KeywordError(f"{path.name}: not readable as TOML: {error}") from error
        entries = list(_entries(path.name, tables))
        if not entries:
            raise KeywordError(f"{path.name}: no terms: add some, or restore the shipped list")
        versioned = content + b"\0" + normalise.VERSION.encode()
        return cls(entries, hashlib.sha256(versioned).hexdigest())

    def next_tail(self, tail: str, text: str) -> str:
        """What `find` needs to know of the stream's text once `text` is past: the next `tail`.

        At most `tail_chars` characters, folded: whitespace runs are one space, invisible code
        points gone, however long they were.
        """
        kept = self.tail_chars
        size = 2 * kept
        while size < len(text):  # a suffix folds to a suffix, so most of a long text need not
            folded = fold(text[-size:])
            if len(folded) >= kept:
                return folded[-kept:]
            size *= 2
        return fold(tail + text)[-kept:]

    def find(self, text: str, tail: str = "", following: str = "") -> list[Hit]:
        """Hits that end in `text`, by start, end and term. Never raises.

        tail: what `next_tail` gave for the segments before. following: the stream's text right
        after `text`, of which the first code point counts; empty at the stream's end.
        """
        head, body = fold(tail), fold(text)
        if head.endswith(" ") and body.startswith(" "):
            body = body[1:]
        first_end = len(head) if _goes_on(text) else len(head) + 1
        matches = [m for m in self._matches(head + body, following[:1]) if m.end >= first_end]
        return self._located(matches, text, len(head), len(head) + len(body)) if matches else []

    def _matches(self, plain: str, following: str) -> Iterator[_Match]:
        """Matches between word boundaries, in the plain and the leetspeak readings."""
        after = fold(following)[:1]
        unknown_end = len(plain) if following and not after else None
        for reading in (plain, *unleet(plain)):
            for term, start, end in self._machine.find_matches_as_indexes(reading, True):
                beyond = plain[end : end + 1] or after
                if end == unknown_end or not _is_whole(
                    reading[start:end], plain[max(0, start - 1) : start], beyond
                ):
                    continue
                if reading is plain or is_leet(plain[start:end]):
                    yield _Match(term, start, end)

    def _located(self, matches: Sequence[_Match], text: str, begin: int, end: int) -> list[Hit]:
        """Hits in code points of `text`, which came out as characters begin..end of the search."""
        spans = normalise.normalise(text)
        first = end - len(spans.text)  # of `text`; begin - 1 where its first space joined the tail
        lead = spans.span(0, 0)[0] if spans.text else len(text)  # invisible code points in front
        hits: set[Hit] = set()  # two readings may find the same
        for term, m_start, m_end in matches:
            start = spans.span(m_start - first, m_start - first)[0] if m_start >= begin else 0
            stop = spans.span(m_end - 1 - first, m_end - 1 - first)[1] if m_end > begin else lead
            for index in self._indices[self._terms[term]]:
                entry = self.entries[index]
                hits.add(Hit(entry.harm, entry.action, start, stop, index))
        return sorted(hits, key=lambda hit: (hit.start, hit.end, hit.term))


def _goes_on(text: str) -> bool:
    """Whether the text begins with a code point that belongs to the character before it."""
    return bool(text) and not fold(text[0])


def _is_whole(term: str, before: str, after: str) -> bool:
    """Whether a term between these neighbours (empty at the text's ends) is not part of a word."""
    if before and is_spaced_letter(before) and is_spaced_letter(term[0]):
        return False
    if after and is_mark(after):
        return False
    return not (after and is_spaced_letter(after) and is_spaced_letter(term[-1]))


# --- the file ------------------------------------------------------------------------------------


def _entries(name: str, tables: Mapping[str, object]) -> Iterator[Entry]:
    for harm, table in tables.items():
        if harm not in THRESHOLD_KEYS:
            raise KeywordError(f"{name}: [{harm}]: no such harm; use {', '.join(THRESHOLD_KEYS)}")
        if not isinstance(table, dict) or not set(table) <= set(ACTIONS):
            raise KeywordError(f"{name}: [{harm}]: give `block` and `suspect` arrays, nothing else")
        for action in ACTIONS:
            yield from _listed(f"{name}: {harm}.{action}", harm, action, table.get(action, []))


def _listed(field: str, harm: str, action: Action, terms: object) -> Iterator[Entry]:
    if not isinstance(terms, list):
        raise KeywordError(f"{field}: must be an array of strings")
    for position, term in enumerate(terms):
        place = f"{field}[{position}]"  # the place, not the term: lists are kept out of logs too
        if not isinstance(term, str):
            raise KeywordError(f"{place}: must be a string: put it in quotes")
        yield Entry(harm, action, _term(place, term))


def _term(place: str, term: str) -> str:
    folded = fold(term).strip(" ")
    if not any(char.isalnum() for char in folded):
        raise KeywordError(f"{place}: has no letter or digit: remove it")
    if len(folded) > MAX_TERM_CHARS:
        msg = f"{place}: {len(folded)} characters once normalised: shorten it to {MAX_TERM_CHARS}"
        raise KeywordError(msg)
    return folded


def _ignore(_: str) -> None:
    pass


class KeywordFile:
    """The list in a file, followed as it changes. A file that cannot be used changes nothing.

    Not thread-safe: it belongs to one task. A changed file is read and compiled where `current`
    is called (10,000 terms: some 0.1 s).
    """

    def __init__(
        self, path: Path, interval_s: float = 5.0, on_error: Callable[[str], None] = _ignore
    ) -> None:
        """Raises KeywordError where the file cannot be used: there is no older list yet."""
        self._path = path
        self._interval_s = interval_s
        self._on_error = on_error
        self._looked = float("-inf")  # seconds, on the caller's clock
        self._seen = _identity(path)  # before reading: a change in between is then seen later
        self._keywords = Keywords.load(path)

    def current(self, now: float) -> Keywords:
        """The list in force; looks for a change at most once per interval. Never raises.

        now: seconds on any clock that does not run backwards. `on_error` is told once per change
        why the new file was refused.
        """
        if now - self._looked >= self._interval_s:
            self._looked = now
            self._follow()
        return self._keywords

    def _follow(self) -> None:
        identity = _identity(self._path)
        if identity == self._seen:
            return
        self._seen = identity
        try:
            self._keywords = Keywords.load(self._path)
        except KeywordError as error:
            self._on_error(str(error))


def _identity(path: Path) -> tuple[int, int] | None:
    """Modification time (ns) and size; None where there is no file to look at."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size
