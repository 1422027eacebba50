"""Text to hashed features: words, pairs of words, and stretches of 2 to 5 characters.

Hashed rather than looked up, so that there is no vocabulary to ship or to search, and every text
has features, misspelt ones too (Weinberger et al. 2009, arXiv:0902.2206). All arithmetic is on
whole arrays of code points, modulo 2^64.
"""

import re
from typing import Final

import numpy as np
import numpy.typing as npt

from detectors.normalise import fold, is_leet, unleet
from detectors.protocol import IntArray

# Raise it with any change to what comes out, normalise's too: weights are for one version. Only
# code points that a newer Python's Unicode assigns may fold otherwise without one.
VERSION: Final = 1
ORDERS: Final = (2, 3, 4, 5)  # characters of a stretch
_Hashes = npt.NDArray[np.uint64]

_BASE: Final = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no power of it vanishes
_NEXT: Final = np.uint64(0xD6E8FEB86659FD93)
_MIXERS: Final = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
# By these a hash differs from that of the same letters as another kind of feature.
_WORD: Final = np.uint64(0x8CB92BA72F3D8DD7)
_TWO_WORDS: Final = np.uint64(0x52DCE729DA3ED6E5)
_STRETCH: Final = {order: np.uint64(0x2545F4914F6CDD1D + 2 * order) for order in ORDERS}
_SPACE: Final = ord(" ")
_IN_WORDS: Final = np.array([chr(code).isalnum() for code in range(128)] + [True])
_LEET_RUN: Final = re.compile(r"[a-z0134579@$!8\x80-\U0010ffff]+")


def readable(text: str) -> str:
    """The text as it is hashed: folded (normalise.fold), leetspeak read as letters, trimmed."""
    folded = fold(text).strip(" ")
    readings = unleet(folded)
    if not readings:
        return folded
    letters = readings[0]  # 1 and ! as i; as long as the text

    def read(run: re.Match[str]) -> str:
        word = run.group().rstrip("!")  # there it is punctuation
        if not is_leet(word):
            return run.group()
        return letters[run.start() : run.start() + len(word)] + run.group()[len(word) :]

    return _LEET_RUN.sub(read, folded)


def buckets(text: str, bits: int) -> tuple[IntArray, IntArray]:
    """(F,) buckets in 0..2^bits - 1, ascending, each once, and (F,) how often each was hit.

    A text without a visible character has no features: both are empty.
    """
    codes = np.frombuffer(readable(text).encode("utf-32-le"), dtype=np.uint32).astype(np.uint64)
    if not len(codes):
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    hashes = np.concatenate([*_words(codes), *_stretches(codes)])
    chosen = (_mixed(hashes) >> np.uint64(64 - bits)).astype(np.int64)
    found, counts = np.unique(chosen, return_counts=True)
    return found, counts.astype(np.int64)


def _words(codes: _Hashes) -> list[_Hashes]:
    """Hashes of each word and of each two that follow one another, whatever stands between."""
    inside = _IN_WORDS[np.minimum(codes, 128)]
    first = np.flatnonzero(inside & ~np.concatenate([[False], inside[:-1]]))
    if not len(first):
        return []
    letters = np.flatnonzero(inside)
    starts = np.searchsorted(letters, first)  # of each word among the letters
    lengths = np.diff(starts, append=len(letters))
    places = np.arange(len(letters)) - np.repeat(starts, lengths)
    powers = np.cumprod(np.full(int(lengths.max()), _BASE))
    words = np.add.reduceat(codes[letters] * powers[places], starts)
    pairs = words[:-1] * _NEXT + words[1:]
    return [words ^ _WORD, pairs ^ _TWO_WORDS]


def _stretches(codes: _Hashes) -> list[_Hashes]:
    """Hashes of the stretches of each order; a space only at their ends, as the edge of a word."""
    padded = np.concatenate([[_SPACE], codes, [_SPACE]]).astype(np.uint64)
    spaces = np.cumsum(padded == _SPACE)
    found = []
    rolling = padded
    for order in ORDERS:
        count = len(padded) - order + 1
        if count < 1:
            break
        rolling = rolling[:count] * _BASE + padded[order - 1 :]
        within = spaces[order - 2 : order - 2 + count] - spaces[:count]  # spaces between the ends
        found.append(rolling[within == 0] ^ _STRETCH[order])
    return found


def _mixed(hashes: _Hashes) -> _Hashes:
    """Every bit of the input moves the high bits of the output (splitmix64's finaliser)."""
    shift = np.uint64(32)
    mixed = (hashes ^ (hashes >> shift)) * _MIXERS[0]
    return (mixed ^ (mixed >> shift)) * _MIXERS[1]
