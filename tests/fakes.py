"""Detectors that stand in for models. Settings name them `python:tests.fakes:HashDetector`."""

import hashlib
import os
import time
from collections.abc import Sequence

import numpy as np

from detectors.harms import COLUMNS
from detectors.protocol import Encoded, FloatArray, Passage, Window

HARMFUL_SHARE = 0.03  # of all passages, about


class HashDetector:
    """Scores that depend on every character of text, context and conversation, and on nothing else.

    About three passages in a hundred score 0.95 for one harm, above every default threshold; the
    others stay below 0.5. TIDEGATE_TEST_SCORE_MS: how long a batch takes, so that a kill finds
    work in flight.
    """

    name = "toxicity"
    digest = "fa4e" * 8

    def __init__(self) -> None:
        self._score_s = float(os.environ.get("TIDEGATE_TEST_SCORE_MS", "1")) / 1e3

    @property
    def thresholds(self) -> dict[str, float]:
        """None of its own: the defaults hold."""
        return {}

    def encode(self, passages: Sequence[Passage]) -> list[Encoded]:
        """One window that holds the passage's digest."""
        return [_digested(passage) for passage in passages]

    def score(self, batch: Sequence[Encoded]) -> FloatArray:
        """(B, 7) scores read off the digests."""
        time.sleep(self._score_s)
        return np.stack([_scores(row.windows[0]) for row in batch])


class StuckDetector(HashDetector):
    """Holds the interpreter's lock for seconds, so that the event loop stands still."""

    def score(self, batch: Sequence[Encoded]) -> FloatArray:
        """As HashDetector, but long after."""
        _hold_the_lock()
        return super().score(batch)


def _hold_the_lock() -> None:
    """One call into C that takes about half a minute and lets nobody else run."""
    sum(range(2_000_000_000))


def _digested(passage: Passage) -> Encoded:
    hasher = hashlib.blake2b(digest_size=16)
    for turn in passage.conversation:
        for part in turn:
            _add(hasher, part)
    _add(hasher, passage.before)
    _add(hasher, passage.text)
    ids = np.frombuffer(hasher.digest(), dtype=np.uint8).astype(np.int64)  # (16,)
    return Encoded((Window(ids, np.zeros_like(ids)),), tokens=len(ids), text_tokens=len(ids))


def _add(hasher: "hashlib.blake2b", part: str) -> None:
    coded = part.encode("utf-8", "surrogatepass")
    hasher.update(len(coded).to_bytes(8, "little"))
    hasher.update(coded)


def _scores(window: Window) -> FloatArray:
    """(7,) columns as in harms.COLUMNS; the last, `harmful`, is the highest."""
    row = window.ids[: len(COLUMNS)] / 255 * 0.4  # (7,)
    picked = int(window.ids[8]) * 256 + int(window.ids[9])
    if picked / 65_536 < HARMFUL_SHARE:
        row[picked % (len(COLUMNS) - 1)] = 0.95
    row[-1] = row[:-1].max()
    return np.asarray(row, dtype=np.float64)
