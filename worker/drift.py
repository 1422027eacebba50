"""Does the threshold in force still meet its goal? Pure.

A bet that it does not, begun anew at each decision: M_n = (M_{n-1} + 1/(n (n+1))) (1 + c loss_n).
The prior weights 1/(n (n+1)) of the beginnings sum to 1, and while the goal is met no factor is
above 1 on average, so M_n plus the weights still to come is a nonnegative supermartingale from 1
on, and by Ville's inequality M_n ever reaches 1/delta with probability at most delta. Whenever
the goal is lost after decision n, only log(n (n+1)) is lost with it.
"""

import numpy as np
from numpy.typing import NDArray

from worker.certify import STAKES, FloatArray


def begin(worlds: int) -> FloatArray:
    """(W, K) wealth before the first decision."""
    return np.zeros((worlds, len(STAKES)))


def advance(wealth: FloatArray, number: int | FloatArray, loss: float | FloatArray) -> FloatArray:
    """(..., K) wealth after one more decision.

    number: this decision's, from 1 on. loss: what a stake of 1 wins by it if the goal is missed,
    at least -1. Both may be arrays that broadcast with `wealth`.
    """
    prior = 1.0 / (number * (number + 1))
    after: FloatArray = (wealth + prior) * (1.0 + STAKES * loss)
    return after


def rings(wealth: FloatArray, delta: float) -> NDArray[np.bool_]:
    """(...) whether the mixture of stakes is at 1/delta in all worlds. wealth: (..., W, K)."""
    return np.asarray(wealth.sum(axis=-1).min(axis=-1) >= len(STAKES) / delta)
