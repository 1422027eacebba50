"""The words detector: a linear model over hashed words and stretches of characters.

It knows words and no sentences, and so it errs elsewhere than the encoders beside it. A folder
holds manifest.json and one graph, as `python -m export.words` writes it:

    buckets (F,) int64, counts (F,) float32 -> logits (1, 7)
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, Literal

import msgspec
import numpy as np

from detectors import grams
from detectors.calibrate import Calibration, calibrated
from detectors.harms import COLUMNS
from detectors.protocol import Encoded, FloatArray, Passage, Window
from detectors.session import Graph, ModelError, check_said, digest_of, read_checked

FORMAT: Final = 1  # of the manifest
KIND: Final = "words"
INPUTS: Final = ("buckets", "counts")
_DECIMALS: Final = 6  # of a score: what a decision shows is what was compared
_LONGEST: Final = 1_200  # characters read as one; the worker's own are 800 at most
_STEP: Final = _LONGEST // 2  # from one window of a longer text to the next


class WordsManifest(msgspec.Struct, frozen=True):
    """manifest.json of a words model, as far as serving needs it."""

    format: int
    kind: Literal["words"]
    name: str
    columns: tuple[str, ...]
    model: str  # file name of the graph
    opset: int
    bits: int  # of a bucket's number
    features: int  # grams.VERSION that the weights were learnt with
    files: dict[str, str]  # file name -> SHA-256, hex
    calibration: dict[str, tuple[float, float]]  # column -> slope, intercept
    thresholds: dict[str, float]  # by THRESHOLD_KEYS


class Words:
    """Calibrated scores of the six harms and of any harm. Thread-safe.

    Each passage is its own call of the graph, so no score depends on a batch.
    """

    def __init__(self, folder: Path) -> None:
        """folder: manifest.json and graph. Raises OSError or ModelError (a ValueError)."""
        raw = (folder / "manifest.json").read_bytes()
        manifest = checked(raw)
        self.name = manifest.name
        self.digest = digest_of(raw, manifest.files)
        self._bits = manifest.bits
        self._thresholds = dict(manifest.thresholds)
        pairs = np.array([manifest.calibration[column] for column in COLUMNS])  # (7, 2)
        self._calibration = Calibration(slopes=pairs[:, 0], intercepts=pairs[:, 1])
        self._graph = Graph(read_checked(folder, manifest.model, manifest.files), manifest.opset)
        if set(self._graph.inputs) != set(INPUTS) or "logits" not in self._graph.outputs:
            raise ModelError(f"the graph wants {sorted(self._graph.inputs)}: no words model")

    @property
    def thresholds(self) -> dict[str, float]:
        """By THRESHOLD_KEYS, chosen on held-out rows when the model was made."""
        return dict(self._thresholds)

    def encode(self, passages: Sequence[Passage]) -> list[Encoded]:
        """Buckets as `ids` and how often each was hit as `type_ids`, of the text before and the
        segment; the conversation is not read.

        Nothing of it goes through an encoder, so it costs no tokens.
        """
        return [
            Encoded(tuple(map(self._window, _cut(passage))), tokens=0, text_tokens=0)
            for passage in passages
        ]

    def score(self, batch: Sequence[Encoded]) -> FloatArray:
        """(B, 7) probabilities, of each column the highest over the passage's windows.

        A text without a visible character gets what the model says of no text at all.
        """
        if not batch:
            return np.empty((0, len(COLUMNS)))
        logits = [
            np.concatenate([self._logits(window) for window in encoded.windows]).max(axis=0)
            for encoded in batch
        ]
        return calibrated(np.stack(logits), self._calibration).round(_DECIMALS)

    def _window(self, text: str) -> Window:
        return Window(*grams.buckets(text, self._bits))

    def _logits(self, window: Window) -> FloatArray:
        """(1, 7)"""
        counts = window.type_ids.astype(np.float32)
        (logits,) = self._graph.run(["logits"], {"buckets": window.ids, "counts": counts})
        found: FloatArray = logits.astype(np.float64)
        return found


def _cut(passage: Passage) -> Iterator[str]:
    """What is read as one text: before and segment, or half-overlapping parts of a long segment.

    A few harmful words among very many others would weigh too little. Where there is too much,
    the text before loses its front first, as it does for the encoders.
    """
    whole = passage.before + passage.text
    text = whole[max(0, min(len(passage.before), len(whole) - _LONGEST)) :]
    yield text[:_LONGEST]
    for start in range(_STEP, len(text) - _STEP, _STEP):
        yield text[start : start + _LONGEST]


def checked(raw: bytes) -> WordsManifest:
    """The manifest in a file's bytes. Raises ModelError."""
    try:
        manifest = msgspec.json.decode(raw, type=WordsManifest)
    except msgspec.DecodeError as error:
        raise ModelError(f"manifest.json is no words model's: {error}") from error
    if manifest.format != FORMAT:
        raise ModelError(f"manifest format {manifest.format}, this version reads {FORMAT}")
    if manifest.features != grams.VERSION:
        raise ModelError(
            f"features of version {manifest.features}, this version makes {grams.VERSION}: "
            "train and export the model again"
        )
    check_said(manifest)
    return manifest
