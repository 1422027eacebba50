"""Figures from probabilities: ranking, calibration, and how sure they are. numpy alone.

Every function takes weights of shape (..., N), so that a bootstrap over prompts is one call with
(R, N) weights. Without weights each row counts once.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from detectors.protocol import FloatArray, IntArray

BINS: Final = 10  # of the calibration error and the reliability diagram; equal width
DRAWS: Final = 500  # of a bootstrap
_SEED: Final = 1

Statistic = Callable[[FloatArray], FloatArray]  # weights (..., N) -> (...)
Ranking = Callable[[FloatArray, FloatArray, FloatArray | None], FloatArray]


class Interval(NamedTuple):
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float


NOTHING: Final = Interval(float("nan"), float("nan"), float("nan"))


class Bins(NamedTuple):
    """A reliability diagram, (BINS,) each; NaN in the shares of an empty bin."""

    counts: FloatArray
    predicted: FloatArray  # mean probability
    observed: FloatArray  # share that was harmful


def auroc(targets: FloatArray, scores: FloatArray, weights: FloatArray | None = None) -> FloatArray:
    """Chance that a harmful row scores above a harmless one, ties half; NaN without both.

    targets, scores: (N,); weights: (..., N). Returns (...).
    """
    hits, misses = _curve(targets, scores, weights)  # (..., K) after each distinct score
    widths = np.diff(misses, axis=-1, prepend=0.0)
    heights = hits - np.diff(hits, axis=-1, prepend=0.0) / 2
    return _ratio((widths * heights).sum(axis=-1), hits[..., -1] * misses[..., -1])


def auprc(targets: FloatArray, scores: FloatArray, weights: FloatArray | None = None) -> FloatArray:
    """Average precision: precision at each distinct score, weighted by the recall it adds.

    No line is drawn between the points, as sklearn's. NaN without both classes.
    """
    hits, misses = _curve(targets, scores, weights)  # (..., K)
    precision = _ratio(hits, hits + misses, empty=0.0)
    gained = np.diff(hits, axis=-1, prepend=0.0)
    area = _ratio((precision * gained).sum(axis=-1), hits[..., -1])
    return np.where(misses[..., -1] > 0, area, np.nan)


def f1(targets: FloatArray, above: FloatArray, weights: FloatArray | None = None) -> FloatArray:
    """2 hits / (blocked + harmful); NaN without a harmful row. above: (N,) 0 or 1."""
    weights = _given(targets, weights)
    hits = (weights * targets * above).sum(axis=-1)
    positives = (weights * targets).sum(axis=-1)
    both = (weights * above).sum(axis=-1) + positives
    return np.where(positives > 0, _ratio(2 * hits, both), np.nan)


def share(flags: FloatArray, weights: FloatArray | None = None) -> FloatArray:
    """Weighted mean of (N,) flags; NaN of none."""
    weights = _given(flags, weights)
    return _ratio((weights * flags).sum(axis=-1), weights.sum(axis=-1))


def calibration_error(
    targets: FloatArray, probabilities: FloatArray, weights: FloatArray | None = None
) -> FloatArray:
    """Expected calibration error over BINS bins of equal width (Guo et al. 2017)."""
    weights = _given(targets, weights)
    bins = _bins(probabilities)
    gaps = weights * (targets - probabilities)  # (..., N)
    by_bin = [np.abs(gaps[..., bins == b].sum(axis=-1)) for b in range(BINS)]
    return _ratio(np.sum(by_bin, axis=0), weights.sum(axis=-1))


def reliability(targets: FloatArray, probabilities: FloatArray) -> Bins:
    """How often the rows of each bin were harmful."""
    bins = _bins(probabilities)
    counts = np.bincount(bins, minlength=BINS).astype(float)
    return Bins(
        counts,
        _ratio(np.bincount(bins, weights=probabilities, minlength=BINS), counts),
        _ratio(np.bincount(bins, weights=targets, minlength=BINS), counts),
    )


def precision_recall(targets: FloatArray, scores: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Recall and precision after each distinct score, strictest first, (K,) each."""
    hits, misses = _curve(targets, scores, None)
    return hits / hits[-1], hits / (hits + misses)


def draws(groups: Sequence[str], count: int = DRAWS) -> FloatArray:
    """(count, N) how often each row counts when prompts are drawn with replacement.

    Rows on one prompt come and go together: they say less than as many rows on different ones.
    """
    return _drawn(tuple(groups), count)


@lru_cache(maxsize=2)  # several figures of the same rows; 20 MB for 5,000 of them
def _drawn(groups: tuple[str, ...], count: int) -> FloatArray:
    _, index = np.unique(np.array(groups), return_inverse=True)
    members = int(index.max()) + 1 if len(index) else 0
    chance = np.random.default_rng(_SEED)
    drawn = chance.multinomial(members, np.full(members, 1 / max(1, members)), size=count)
    return drawn[:, index].astype(float)


def interval(statistic: Statistic, groups: Sequence[str]) -> Interval:
    """A figure of all rows, with the middle 95 % of its values over bootstrap draws."""
    if not len(groups):
        return NOTHING
    value = float(statistic(np.ones(len(groups))))
    over = statistic(draws(groups))
    over = over[np.isfinite(over)]
    if not len(over):
        return Interval(value, float("nan"), float("nan"))
    low, high = np.quantile(over, (0.025, 0.975))
    return Interval(value, float(low), float(high))


def share_interval(flags: FloatArray, groups: Sequence[str]) -> Interval:
    """A share with its interval. Where no row, or every one, is flagged, a bootstrap would be
    sure of it; the exact bound for as many prompts stands in."""
    found = interval(lambda weights: share(flags, weights), groups)
    prompts = len(set(groups))
    if found.value == 0.0:
        return found._replace(high=1 - 0.025 ** (1 / prompts))
    return found._replace(low=0.025 ** (1 / prompts)) if found.value == 1.0 else found


def _curve(
    targets: FloatArray, scores: FloatArray, weights: FloatArray | None
) -> tuple[FloatArray, FloatArray]:
    """Weights of harmful and of harmless rows at or above each distinct score, highest first."""
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.diff(scores[order]) != 0, True).nonzero()[0]  # of each run of ties
    ordered = _given(targets, weights)[..., order]  # (..., N)
    hits = (ordered * targets[order]).cumsum(axis=-1)[..., last]
    return hits, ordered.cumsum(axis=-1)[..., last] - hits


def _given(like: FloatArray, weights: FloatArray | None) -> FloatArray:
    return np.ones(len(like)) if weights is None else weights


def _bins(probabilities: FloatArray) -> IntArray:
    return np.minimum((probabilities * BINS).astype(np.int64), BINS - 1)


def _ratio(above: npt.ArrayLike, below: npt.ArrayLike, empty: float = float("nan")) -> FloatArray:
    above, below = np.asarray(above, dtype=float), np.asarray(below, dtype=float)
    return np.where(below > 0, above / np.where(below > 0, below, 1.0), empty)
