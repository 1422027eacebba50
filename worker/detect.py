"""Batch -> detectors -> scores, off the event loop."""

import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from detectors import combine
from detectors.combine import Combination, follows
from detectors.harms import COLUMNS
from detectors.protocol import BoolArray, Detector, Encoded, FloatArray, IntArray, Passage
from worker.errors import DetectorError


class Scored(NamedTuple):
    """What the detectors say of one passage."""

    scores: tuple[float, ...]  # (7,) as harms.COLUMNS
    stage: str  # the detector that gave most of `harmful`
    tokens: int  # that went through the models


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
        missing = [
            detector.name for detector, column in zip(detectors, columns, strict=True)
            if len(column) != len(passages) or not all(row.windows for row in column)
        ]  # fmt: skip
    except Exception as error:
        msg = f"encoding failed: {type(error).__name__}"
        raise DetectorError(msg) from error
    if missing:
        raise DetectorError(f"{', '.join(missing)}: encode gives no window for each passage")
    return list(zip(*columns, strict=True))


def judge(
    detectors: Sequence[Detector], passage: Passage, combination: Combination | None = None,
    whole: bool = False,
) -> tuple[tuple[Encoded, ...], Scored, float]:  # fmt: skip
    """`encode` and `score` of one passage, and the milliseconds that the first took."""
    start = time.perf_counter()
    (encoded,) = encode(detectors, [passage])
    encode_ms = (time.perf_counter() - start) * 1e3
    (scored,) = score(detectors, [encoded], combination, follows([passage]), [whole])
    return encoded, scored, encode_ms


def score(
    detectors: Sequence[Detector], batch: Sequence[tuple[Encoded, ...]],
    combination: Combination | None, later: Sequence[bool] | BoolArray,
    whole: Sequence[bool] = (),
) -> list[Scored]:  # fmt: skip
    """What the detectors say of each passage.

    Of several detectors' scores the highest counts, unless a combination was learnt; that may also
    leave it at the first detectors for a passage that these settle. Columns in which a detector
    gave no probability are NaN. Raises DetectorError.

    later: which passages follow others of their reply. whole: for which every detector is asked,
    whatever the first ones find; empty: none.
    """
    later = np.asarray(later, dtype=bool)
    stages = combination.stages if combination else ()
    stacked = np.full((len(detectors), len(batch), len(COLUMNS)), np.nan)
    asked = np.zeros(len(batch), dtype=np.int64)  # detectors, of each passage
    left = np.arange(len(batch))  # passages that no stage has settled
    begin = 0
    for stage in (*stages, None):
        end = stage.detectors if stage else len(detectors)
        some = _scores(detectors[begin:end], [batch[i] for i in left.tolist()], begin)
        stacked[begin:end, left] = some
        asked[left] = end
        if stage:
            settled = stage.settles(stacked[:end, left], later[left])
            left = left[~settled | np.array([bool(whole) and whole[i] for i in left.tolist()])]
        if not len(left):
            break
        begin = end
    combined = (
        combination.combined(stacked, later, asked) if combination else combine.highest(stacked)
    )  # (B, 7)
    counts = np.arange(len(detectors))[:, None] < asked  # (D, B)
    tokens = (counts * _tokens(batch)).sum(axis=0)  # (B,)
    leading = np.where(counts, np.nan_to_num(stacked[:, :, -1], nan=2.0), -1.0).argmax(axis=0)
    return [
        Scored(tuple(row), detectors[lead].name, read)
        for row, lead, read in zip(
            combined.tolist(), leading.tolist(), tokens.tolist(), strict=True
        )
    ]


def _scores(
    detectors: Sequence[Detector], batch: Sequence[tuple[Encoded, ...]], begin: int = 0
) -> FloatArray:
    """(D, B, 7) of the detectors that read the parts of each row from `begin` on; NaN where what
    one gives is no probability. Raises DetectorError."""
    try:
        matrices = [
            np.asarray(detector.score([row[i] for row in batch]), dtype=np.float64)
            for i, detector in enumerate(detectors, begin)
        ]  # D times (B, 7)
    except Exception as error:
        msg = f"scoring failed: {type(error).__name__}"
        raise DetectorError(msg) from error
    for detector, matrix in zip(detectors, matrices, strict=True):
        if matrix.shape != (len(batch), len(COLUMNS)):
            raise DetectorError(f"{detector.name} gave {matrix.shape} scores for {len(batch)} rows")
    stacked = np.stack(matrices)
    return np.where((stacked >= 0.0) & (stacked <= 1.0), stacked, np.nan)


def _tokens(batch: Sequence[tuple[Encoded, ...]]) -> IntArray:
    """(D, B) tokens that each detector reads of each passage."""
    return np.array([[row.tokens for row in rows] for rows in batch], dtype=np.int64).T
