"""A detector that gives every text the same scores: the host path without a model."""

from collections.abc import Sequence
from hashlib import sha256

import numpy as np

from detectors.harms import COLUMNS
from detectors.protocol import Encoded, FloatArray, Passage, Window

_CHARS_PER_TOKEN = 4  # English text, roughly


class Constant:
    """The same row for every passage; encodes without a tokenizer."""

    name = "toxicity"

    def __init__(self, scores: Sequence[float] = (0.01,) * len(COLUMNS)) -> None:
        """scores: (7,) probabilities, columns as in harms.COLUMNS. ValueError otherwise."""
        row = np.asarray(scores, dtype=np.float64)
        if row.shape != (len(COLUMNS),):
            raise ValueError(f"scores has shape {row.shape}, expected ({len(COLUMNS)},)")
        if not ((row >= 0.0) & (row <= 1.0)).all():  # NaN fails the comparison, too
            raise ValueError(f"scores outside 0..1: {row.tolist()}")
        self._row = row
        self.digest = sha256(row.tobytes()).hexdigest()

    @property
    def thresholds(self) -> dict[str, float]:
        """None of its own: the defaults hold."""
        return {}

    def encode(self, passages: Sequence[Passage]) -> list[Encoded]:
        """One window of the size that a tokenizer would give, filled with zeros."""
        return [_sized(passage) for passage in passages]

    def score(self, batch: Sequence[Encoded]) -> FloatArray:
        """(B, 7) the constant row, once a passage."""
        return np.tile(self._row, (len(batch), 1))


def _sized(passage: Passage) -> Encoded:
    tokens = len(passage.text) // _CHARS_PER_TOKEN + 1
    zeros = np.zeros(tokens, dtype=np.int64)
    return Encoded((Window(zeros, zeros),), tokens=tokens, text_tokens=tokens)
