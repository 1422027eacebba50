"""The toxicity detector: a model folder behind the Detector protocol."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from detectors.calibrate import Calibration, calibrated
from detectors.harms import COLUMNS
from detectors.protocol import Encoded, FloatArray, Passage
from detectors.session import Folder, Manifest, Provider, Session
from detectors.tokens import Lengths, PairTokens

_DECIMALS = 6  # of a score: what a decision shows is what was compared


class Toxicity:
    """Calibrated scores of the six harms and of any harm."""

    def __init__(self, folder: Path, provider: Provider = "cpu") -> None:
        """folder: manifest.json, graph, tokenizer. Raises OSError or ModelError (a ValueError)."""
        checked = Folder(folder)
        manifest = checked.manifest
        self.name = manifest.name
        self.digest = checked.digest
        self._thresholds = dict(manifest.thresholds)
        self._calibration = _calibration(manifest)
        self._tokens = PairTokens(checked.read(manifest.tokenizer), _lengths(manifest))
        self._session = Session(checked, provider)

    @property
    def thresholds(self) -> dict[str, float]:
        """By THRESHOLD_KEYS, chosen on held-out rows when the model was made."""
        return dict(self._thresholds)

    def encode(self, passages: Sequence[Passage]) -> list[Encoded]:
        """Token windows of each passage. Every character of `text` lies in some window."""
        return [self._tokens.encode(passage) for passage in passages]

    def score(self, batch: Sequence[Encoded]) -> FloatArray:
        """(B, 7) probabilities, of each column the highest over the passage's windows.

        Raises ValueError where the model gives NaN.
        """
        scores = np.empty((len(batch), len(COLUMNS)))
        for row, encoded in enumerate(batch):
            scores[row] = self._score(encoded)
        return scores.round(_DECIMALS)

    def _score(self, encoded: Encoded) -> FloatArray:
        logits = np.stack([self._session.logits(window) for window in encoded.windows])  # (W, 7)
        highest: FloatArray = calibrated(logits, self._calibration).max(axis=0)  # (7,)
        return highest


def _calibration(manifest: Manifest) -> Calibration:
    pairs = np.array([manifest.calibration[column] for column in COLUMNS])  # (7, 2)
    return Calibration(slopes=pairs[:, 0], intercepts=pairs[:, 1])


def _lengths(manifest: Manifest) -> Lengths:
    lengths = manifest.lengths
    return Lengths(lengths.conversation, lengths.text, lengths.overlap)
