"""Around which scores a second look is worth its time: the band of one harm."""

from collections.abc import Sequence
from itertools import product
from typing import Final, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from detectors import second
from detectors.calibrate import sigmoid
from detectors.logprob import Affine
from detectors.logprob_calibration import platt
from detectors.protocol import FloatArray
from training.metrics import NOTHING, Interval, interval

WIDTHS: Final = (0.0, 0.05, 0.1, 0.2, 0.3)  # of a band, below and above the threshold
_LEAST: Final = 60  # labelled passages inside a band, or it stays empty

Mask = npt.NDArray[np.bool_]
T = TypeVar("T")


def only(some: Sequence[T], chosen: Mask) -> list[T]:
    """Those for which `chosen`, (N,), holds."""
    return [it for it, wanted in zip(some, chosen, strict=True) if wanted]


class Look(NamedTuple):
    """Passages near a threshold whose label is known: (M,) each."""

    scores: FloatArray  # the encoders'
    margins: FloatArray  # of the second look
    targets: FloatArray  # 0 or 1
    groups: list[str]
    seconds: float  # of CPU, a passage


def choose(
    looks: Sequence[Look], threshold: float
) -> tuple[Affine | None, second.Band | None, tuple[object, ...]]:
    """Calibration and band from the first look, or neither; figures of both looks."""
    first, report = looks[0], looks[1]
    cost = first.seconds * 1e3
    if len(first.targets) < _LEAST or len(set(first.targets)) < 2:
        nothing = float("nan")
        return None, None, (len(first.targets), 0.0, 0.0, 0, nothing, 0, nothing, cost)
    line = platt_or_flat(first.margins, first.targets)
    best = _best(first, line, threshold)
    shown = best or second.Band(0.1, 0.1)
    cut = _best_cut(first, threshold, shown)
    found = [_gain(look, line, threshold, shown, cut) for look in (first, report)]
    row = (
        len(first.targets), *((best.below, best.above) if best else (0.0, 0.0)),
        found[0][1], found[0][0], found[1][1], found[1][0], cost,
    )  # fmt: skip
    return (line, best, row) if best else (None, None, row)


def _best(look: Look, line: Affine, threshold: float) -> second.Band | None:
    """The band that gains most right decisions; of equal ones the one that asks least."""
    best: tuple[float, second.Band] | None = None
    for below, above in product(WIDTHS, WIDTHS):
        band = second.Band(below, above)
        cut = _best_cut(look, threshold, band)
        gain, asked = _gain(look, line, threshold, band, cut)
        if asked < _LEAST or not gain.low > 0:
            continue
        total = gain.value * asked - 1e-6 * asked
        if best is None or total > best[0]:
            best = total, band
    return best[1] if best else None


def _inside(look: Look, threshold: float, band: second.Band) -> Mask:
    return (look.scores >= threshold - band.below) & (look.scores <= threshold + band.above)


def _best_cut(look: Look, threshold: float, band: second.Band) -> float:
    """The threshold that by itself decides most of the band rightly.

    Against the one in force a look that blocks everything would gain wherever most of the band is
    harmful, as another threshold does for nothing.
    """
    inside = _inside(look, threshold, band)
    scores, harmful = look.scores[inside], look.targets[inside] == 1
    cuts = [threshold, threshold - band.below - 1e-9, *scores]
    return float(max(cuts, key=lambda cut: ((scores > cut) == harmful).sum()))


def _gain(
    look: Look, line: Affine, threshold: float, band: second.Band, cut: float
) -> tuple[Interval, int]:
    """Mean of right with the look less right by a cut, inside the band; how many are inside."""
    inside = _inside(look, threshold, band)
    if not inside.any():
        return NOTHING, 0
    harmful = look.targets[inside] == 1
    without = (look.scores[inside] > cut) == harmful
    with_it = (sigmoid(line.apply(look.margins[inside])) > threshold) == harmful
    gain = with_it.astype(float) - without.astype(float)

    def mean(weights: FloatArray) -> FloatArray:
        found: FloatArray = (weights * gain).sum(axis=-1) / weights.sum(axis=-1)
        return found

    return interval(mean, only(look.groups, inside)), int(inside.sum())


def platt_or_flat(margins: FloatArray, targets: FloatArray) -> Affine:
    """Platt scaling; margins that rank the wrong way round count for next to nothing."""
    try:
        return platt(list(margins), [int(it) for it in targets])
    except ValueError as error:
        print(f"platt: {error}")
        return Affine(1e-6, 0.0)
