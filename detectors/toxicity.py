"""The toxicity detector: a model folder behind the Detector protocol."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from detectors.calibrate import Calibration, calibrated
from detectors.harms import COLUMNS
from detectors.protocol import Encoded, FloatArray, Passage
from detectors.session import Folder, Manifest, Precision, Provider, Session
from detectors.tokens import Lengths, PairTokens

DECIMALS = 6  # of a score: what a decision shows is what was compared


class Toxicity:
    """Calibrated scores of the six harms and of any harm."""

    def __init__(
        self, folder: Path, provider: Provider = "cpu", precision: Precision | None = None
    ) -> None:
        """folder: manifest.json, graphs, tokenizer. Raises OSError or ModelError (a ValueError).

        precision: None takes what the manifest serves on `provider`.
        """
        checked = Folder(folder)
        manifest = checked.manifest
        self.name = manifest.name
        self._thresholds = dict(manifest.thresholds)
        self._calibration = _calibration(manifest)
        self._labels = manifest.labels
        self._view = manifest.view
        self._tokens = PairTokens(
            checked.read(manifest.tokenizer), _lengths(manifest), manifest.layout, manifest.inputs
        )
        self._session = Session(checked, provider, precision)
        self.digest = self._session.digest

    @property
    def thresholds(self) -> dict[str, float]:
        """By THRESHOLD_KEYS, chosen on held-out rows when the model was made."""
        return dict(self._thresholds)

    def encode(self, passages: Sequence[Passage]) -> list[Encoded]:
        """Token windows of each passage. Every character of `text` lies in some window."""
        return [self._tokens.encode(self._seen(passage)) for passage in passages]

    def _seen(self, passage: Passage) -> Passage:
        return Passage(passage.text, "", ()) if self._view == "segment" else passage

    def score(self, batch: Sequence[Encoded]) -> FloatArray:
        """(B, 7) probabilities, of each column the highest over the passage's windows.

        Raises ValueError where the model gives NaN.
        """
        if not batch:
            return np.empty((0, len(COLUMNS)))
        windows = [window for encoded in batch for window in encoded.windows]
        logits = self._session.all_logits(windows)  # (W, L)
        if self._labels is not None:
            logits = self._labels.log_odds(logits)  # (W, 7)
        starts = np.cumsum([0, *(len(encoded.windows) for encoded in batch[:-1])])
        highest = np.maximum.reduceat(calibrated(logits, self._calibration), starts)  # (B, 7)
        return highest.round(DECIMALS)


def _calibration(manifest: Manifest) -> Calibration:
    pairs = np.array([manifest.calibration[column] for column in COLUMNS])  # (7, 2)
    return Calibration(slopes=pairs[:, 0], intercepts=pairs[:, 1])


def _lengths(manifest: Manifest) -> Lengths:
    lengths = manifest.lengths
    return Lengths(lengths.conversation, lengths.text, lengths.overlap)
