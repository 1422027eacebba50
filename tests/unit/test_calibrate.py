"""Logits to probabilities."""

import numpy as np
import pytest

from detectors.calibrate import Calibration, calibrated, sigmoid

PLAIN = Calibration(slopes=np.ones(7), intercepts=np.zeros(7))


def test_sigmoid_is_exact_in_the_middle_and_finite_at_the_ends() -> None:
    """No logit overflows, and the ends are 0 and 1."""
    with np.errstate(all="raise", under="ignore"):
        found = sigmoid(np.array([-1e4, -60.0, 0.0, 60.0, 1e4]))
    assert found[2] == 0.5
    assert found[0] == 0.0
    assert found[4] == 1.0
    assert found[1] == pytest.approx(8.7565e-27, rel=1e-4)


def test_each_column_has_its_own_slope_and_intercept() -> None:
    """Column i is sigmoid(slope i * logit i + intercept i)."""
    calibration = Calibration(slopes=np.arange(1.0, 8.0), intercepts=np.full(7, -1.0))
    found = calibrated(np.ones((2, 7)), calibration)  # (2, 7)
    assert found[1] == pytest.approx(1 / (1 + np.exp(-np.arange(0.0, 7.0))))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_logit_that_is_no_number_is_refused(bad: float) -> None:
    """NaN lies below every threshold, so it may never become a score."""
    logits = np.zeros((3, 7))
    logits[1, 4] = bad
    with pytest.raises(ValueError, match="not finite"):
        calibrated(logits, PLAIN)
