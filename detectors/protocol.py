"""What a detector is: encode passages on the CPU, then score a batch of them."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


class Turn(NamedTuple):
    """One turn of the conversation that led to the judged text."""

    role: str
    content: str


class Passage(NamedTuple):
    """What one judgement sees."""

    text: str  # the segment that is judged
    before: str  # the stream's text right before it; may be empty
    conversation: tuple[Turn, ...]  # turns before the stream, oldest first; may be empty


class Window(NamedTuple):
    """One row of model input, padding excluded."""

    ids: IntArray  # (T,) token ids, special tokens included
    type_ids: IntArray  # (T,) 0 for the conversation, 1 for the judged text


class Encoded(NamedTuple):
    """A passage as a detector reads it: one window, or several where it is long."""

    windows: tuple[Window, ...]  # at least one
    tokens: int  # tokens that go through the model, all windows together; 0 where it is no encoder
    text_tokens: int  # of these, tokens of the segment itself; each counted once


class Detector(Protocol):
    """Scores passages. Thread-safe: `score` is called from several threads at once."""

    @property
    def name(self) -> str:
        """Short name, the decision's `stage` when this detector settles it."""
        ...

    @property
    def digest(self) -> str:
        """Hex digest of everything that can move a score (weights, tokenizer, calibration)."""
        ...

    @property
    def thresholds(self) -> dict[str, float]:
        """Thresholds the model was shipped with, by THRESHOLD_KEYS; may be empty."""
        ...

    def encode(self, passages: Sequence[Passage]) -> list[Encoded]:
        """Token windows of each passage. Every character of `text` lies in some window."""
        ...

    def score(self, batch: Sequence[Encoded]) -> FloatArray:
        """(B, 7) calibrated probabilities in 0..1, columns as in harms.COLUMNS.

        A row does not depend on the others: alone or in any batch it is the same within 1e-4.
        """
        ...
