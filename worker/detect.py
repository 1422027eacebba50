"""Batch -> detectors -> scores, off the event loop."""

import time
from collections.abc import Sequence

import numpy as np

from detectors import combine
from detectors.combine import Combination
from detectors.harms import COLUMNS
from detectors.protocol import Detector, Encoded, Passage
from worker.errors import DetectorError


def model_id(
    detectors: Sequence[Detector], combination: Combination | None = None, second: str = ""
) -> str:
    """Names and digests, as decisions carry them. second: the second look's digest, if any."""
    parts = [(detector.name, detector.digest) for detector in detectors]
    if combination is not None:
        parts.append(("combined", combination.digest))
    if second:
        parts.append(("logprob", second))
    return "+".join(f"{name}@{digest[:6]}" for name, digest in parts)


def encode(detectors: Sequence[Detector], passages: Sequence[Passage]) -> list[tuple[Encoded, ...]]:
    """For each passage what each detector reads. Raises DetectorError."""
    try:
        columns = [detector.encode(passages) for detector in detectors]
    except Exception as error:
        msg = f"encoding failed: {type(error).__name__}"
        raise DetectorError(msg) from error
    return list(zip(*columns, strict=True))


def judge(
    detectors: Sequence[Detector], passage: Passage, combination: Combination | None = None
) -> tuple[tuple[Encoded, ...], tuple[tuple[float, ...], str], float]:
    """`encode` and `score` of one passage, and the milliseconds that the first took."""
    start = time.perf_counter()
    (encoded,) = encode(detectors, [passage])
    encode_ms = (time.perf_counter() - start) * 1e3
    return encoded, score(detectors, [encoded], combination)[0], encode_ms


def score(
    detectors: Sequence[Detector], batch: Sequence[tuple[Encoded, ...]],
    combination: Combination | None = None,
) -> list[tuple[tuple[float, ...], str]]:  # fmt: skip
    """For each passage its scores, (7,), and the detector that gave most of `harmful`.

    Of several detectors' scores the highest counts, unless a combination was learnt. Columns in
    which a detector gave no probability are NaN. Raises DetectorError.
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
    whole = combination.combined(stacked) if combination else combine.highest(stacked)  # (B, 7)
    names = [detector.name for detector in detectors]
    leading = np.nan_to_num(stacked[:, :, -1], nan=2.0).argmax(axis=0)  # (B,)
    return [
        (tuple(row), names[lead])
        for row, lead in zip(whole.tolist(), leading.tolist(), strict=True)
    ]
