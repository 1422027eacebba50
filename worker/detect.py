"""Batch -> detectors -> scores, off the event loop."""

from collections.abc import Sequence

import numpy as np

from detectors.harms import COLUMNS
from detectors.protocol import Detector, Encoded, Passage
from worker.errors import DetectorError


def model_id(detectors: Sequence[Detector]) -> str:
    """Names and digests, as decisions and cache keys carry them."""
    return "+".join(f"{detector.name}@{detector.digest[:6]}" for detector in detectors)


def encode(detectors: Sequence[Detector], passages: Sequence[Passage]) -> list[tuple[Encoded, ...]]:
    """For each passage what each detector reads. Raises DetectorError."""
    try:
        columns = [detector.encode(passages) for detector in detectors]
    except Exception as error:
        msg = f"encoding failed: {type(error).__name__}"
        raise DetectorError(msg) from error
    return list(zip(*columns, strict=True))


def score(
    detectors: Sequence[Detector], batch: Sequence[tuple[Encoded, ...]]
) -> list[tuple[tuple[float, ...], str]]:
    """For each passage the highest score per column, (7,), and the detector that gave most of it.

    Columns in which a detector gave no probability are NaN. Raises DetectorError.
    """
    try:
        matrices = [
            np.asarray(detector.score([row[i] for row in batch]), dtype=np.float64)
            for i, detector in enumerate(detectors)
        ]  # D times (B, 7)
    except Exception as error:
        msg = f"scoring failed: {type(error).__name__}"
        raise DetectorError(msg) from error
    for detector, matrix in zip(detectors, matrices, strict=True):
        if matrix.shape != (len(batch), len(COLUMNS)):
            raise DetectorError(f"{detector.name} gave {matrix.shape} scores for {len(batch)} rows")
    stacked = np.stack(matrices)  # (D, B, 7)
    stacked = np.where((stacked >= 0.0) & (stacked <= 1.0), stacked, np.nan)
    highest = stacked.max(axis=0)  # (B, 7); NaN wins
    names = [detector.name for detector in detectors]
    leading = np.nan_to_num(stacked[:, :, -1], nan=2.0).argmax(axis=0)  # (B,)
    return [
        (tuple(row), names[lead])
        for row, lead in zip(highest.tolist(), leading.tolist(), strict=True)
    ]
