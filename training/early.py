"""How much of a harmful reply is out when the block comes. Streamed and cut as the worker does.

A segment is shown once it and all before it are allowed, so what is out when segment i is blocked
is the text before it; what was read by then is the text up to its end.
"""

from itertools import islice
from typing import Final, NamedTuple

import numpy as np

from detectors.protocol import FloatArray
from detectors.segments import pieces
from training import metrics
from training.metrics import Interval
from training.rows import Row
from training.scores import Judged

LONG: Final = 3  # segments from which on there is much to be early in


class Early(NamedTuple):
    """One set of replies. Shares are of the reply's characters."""

    harmful: int
    harmless: int
    released_median: float  # of all harmful replies; one never blocked counts 1
    released_p90: float
    never: Interval  # share of the harmful replies that no block stopped
    blocked_released_median: float  # of those that were blocked
    blocked_released_p90: float
    blocked_read: float  # mean share read when the block came, of those that were blocked
    harmless_blocked: Interval  # share of harmless replies blocked at any prefix
    macro_f1: float  # of blocked against harmful, a reply at a time


def released(judged: Judged) -> FloatArray:
    """(N,) share of each reply that is shown: 1 where nothing was blocked."""
    return np.array([_shown(row, at) for row, at in _pairs(judged)])


def read(judged: Judged) -> FloatArray:
    """(N,) share of each reply that was read when it was decided: 1 where nothing was blocked."""
    ends = [_shown(row, at + 1) if at >= 0 else 1.0 for row, at in _pairs(judged)]
    return np.array(ends)


def early(judged: Judged) -> Early:
    """judged: replies whose `harmful` label is sure."""
    targets, blocked = judged.targets(-1), judged.blocked
    harmful, caught = targets > 0, (targets > 0) & (blocked > 0)
    shown, seen = released(judged), read(judged)
    groups = np.array(judged.groups)
    return Early(
        int(harmful.sum()),
        int((~harmful).sum()),
        _quantile(shown[harmful], 0.5),
        _quantile(shown[harmful], 0.9),
        metrics.share_interval(1 - blocked[harmful], groups[harmful].tolist()),
        _quantile(shown[caught], 0.5),
        _quantile(shown[caught], 0.9),
        float(seen[caught].mean()) if caught.any() else float("nan"),
        metrics.share_interval(blocked[~harmful], groups[~harmful].tolist()),
        float(metrics.f1(targets, blocked) + metrics.f1(1 - targets, 1 - blocked)) / 2,
    )


def is_long(row: Row) -> bool:
    """Whether the reply has LONG segments or more."""
    return sum(1 for _ in pieces(row.text)) >= LONG


def _pairs(judged: Judged) -> list[tuple[Row, int]]:
    return list(zip(judged.rows, judged.blocked_at.tolist(), strict=True))


def _shown(row: Row, before: int) -> float:
    """Share of the text that lies before segment number `before`; all of it for -1."""
    if before < 0:
        return 1.0
    return sum(map(len, islice(pieces(row.text), before))) / len(row.text)


def _quantile(values: FloatArray, at: float) -> float:
    return float(np.quantile(values, at)) if len(values) else float("nan")
