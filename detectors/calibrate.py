"""Logits to probabilities: one slope and one intercept a column (Platt 1999)."""

from typing import NamedTuple

import numpy as np

from detectors.protocol import FloatArray


class Calibration(NamedTuple):
    """p = sigmoid(slope * logit + intercept), by column."""

    slopes: FloatArray  # (7,)
    intercepts: FloatArray  # (7,)


def calibrated(logits: FloatArray, calibration: Calibration) -> FloatArray:
    """(N, 7) probabilities of (N, 7) logits, columns as in harms.COLUMNS.

    Raises ValueError where a logit is NaN or infinite: such a number lies below no threshold in
    earnest, so it must not be turned into a probability.
    """
    if not np.isfinite(logits).all():
        raise ValueError("the model gave a logit that is not finite")
    return sigmoid(logits * calibration.slopes + calibration.intercepts)


def sigmoid(values: FloatArray) -> FloatArray:
    """1 / (1 + exp(-values)), same shape. The exponent is never positive, so nothing overflows."""
    small = np.exp(-np.abs(values))
    return np.where(values >= 0, 1.0, small) / (1.0 + small)
