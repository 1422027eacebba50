"""Does the threshold in force still meet its goal? Pure.

A bet that it does not, begun anew with every tenth decision: M_n = (M_{n-1} + p_n) (1 + c loss_n),
where p_n = 1/(j (j+1)) at the beginning of the j-th ten, else 0. These prior weights sum to 1, and
while the goal is met no factor is above 1 on average, so M_n plus the weights still to come is a
nonnegative supermartingale from 1 on: by Ville's inequality M_n ever reaches 1/delta with
probability at most delta. When the goal is lost after n decisions, the bet begun then has lost
log(j (j+1)), j = n/10, and nothing else. (Beginning with every decision would lose
2 log 10 more, which takes longer to win back than ten decisions.)
"""

import numpy as np
from numpy.typing import NDArray

from worker.certify import STAKES, FloatArray

TEN = 10  # decisions between two beginnings


def begin(worlds: int) -> FloatArray:
    """(W, K) wealth before the first decision."""
    return np.zeros((worlds, len(STAKES)))


def advance(wealth: FloatArray, number: int | FloatArray, loss: float | FloatArray) -> FloatArray:
    """(..., K) wealth after one more decision.

    number: this decision's, from 1 on. loss: what a stake of 1 wins by it if the goal is missed,
    at least -1. Both may be arrays that broadcast with `wealth`.
    """
    tens = (number - 1) // TEN
    prior = ((number - 1) % TEN == 0) / ((tens + 1) * (tens + 2))
    after: FloatArray = (wealth + prior) * (1.0 + STAKES * loss)
    return after


def rings(wealth: FloatArray, delta: float) -> NDArray[np.bool_]:
    """(...) whether the mixture of stakes is at 1/delta in all worlds. wealth: (..., W, K)."""
    return np.asarray(wealth.sum(axis=-1).min(axis=-1) >= len(STAKES) / delta)
