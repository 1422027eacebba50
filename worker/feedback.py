"""Reviewers' labels -> evidence per tenant, harm and model digest. Pure: `now_ms` is Kafka's clock.

    for each record of the thresholds topic:  evidence.in_force(record)
    for each label, by its Kafka timestamp:   evidence.add(label, judged, now_ms)
    from time to time:                        for claim in evidence.settle(now_ms): propose(...)

A rebuild is the same without `propose`. docs/thresholds.md says why each rule is as it is.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, Self

from worker.certify import Tally
from worker.events import Decision, Label, ThresholdRecord
from worker.settings import LearnPolicy


class Claim(NamedTuple):
    """What evidence is kept apart for."""

    tenant: str
    harm: str
    model: str


class Judged(NamedTuple):
    """What a label is held against: the decision of its id, and how it was picked."""

    decision_id: str
    stream_id: str
    tenant: str
    model: str
    stage: str
    harm: str | None
    scores: Mapping[str, float]
    harmful: float | None
    ts_ms: int
    picked_with: float | None = None  # None: was not picked
    least: float | None = None  # see docs/thresholds.md; None: as the tenant's policy says

    @classmethod
    def of(cls, decision: Decision, least: float | None = None) -> Self:
        """From a decision or a review item."""
        raise NotImplementedError


class Accepted(NamedTuple):
    """The label is sound. `counts`: whether it is evidence; `why` it is not."""

    counts: bool
    why: str = ""  # complaint, settled, stage, explained


class Rejected(NamedTuple):
    """The label is a dead letter."""

    reason: str
    field: str


class Evidence:
    """Everything that labels have said, as counts."""

    def __init__(self, policy: Callable[[str], LearnPolicy]) -> None:
        """policy: of a tenant."""
        raise NotImplementedError

    def in_force(self, record: ThresholdRecord) -> None:
        """What is published now for a tenant and harm: at start and after each publication.

        Epoch and watch begin where the record says, so call it before the labels are read again.
        """
        raise NotImplementedError

    def add(self, label: Label, judged: Judged | None, now_ms: int) -> Accepted | Rejected:
        """Take a label. judged: None where no decision has its id. now_ms: its timestamp."""
        raise NotImplementedError

    def blocked(self, judged: Judged) -> None:
        """Count a blocked decision, reviewed or not: what complaints are weighed against."""
        raise NotImplementedError

    def settle(self, now_ms: int) -> Iterator[Claim]:
        """Settle what is due up to `now_ms`; each claim to test, at the instant that it is due.

        `now_ms`: no label with an earlier timestamp will be added any more.
        """
        raise NotImplementedError

    def snapshot(self, claim: Claim) -> Tally:
        """The claim's counts now; empty ones where there are none."""
        raise NotImplementedError
