"""Evidence -> thresholds: what is certified, and what to publish. Pure.

The theorem is in docs/thresholds.md: a fixed mixture of bets is a nonnegative supermartingale
under the running-average null, and Ville's inequality bounds its ever reaching 1/delta.
"""

from typing import NamedTuple

from worker.events import ThresholdRecord
from worker.settings import LearnPolicy


class Tally(NamedTuple):
    """One claim's evidence: what `propose` reads. Fields follow."""


def propose(
    evidence: Tally, policy: LearnPolicy, current: ThresholdRecord, now_ms: int
) -> ThresholdRecord | None:
    """The record to publish next, or None where it would say nothing new.

    current: the last one published; where there is none, or it is another model's, `shipped(...)`.
    The result's version is current's plus 1; `threshold == previous` where labels are missing.
    """
    raise NotImplementedError


def shipped(tenant: str, harm: str, model: str, threshold: float, version: int) -> ThresholdRecord:
    """The record of a claim that nothing is published for: the model's own threshold."""
    raise NotImplementedError
