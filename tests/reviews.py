"""Labels and the decisions that they are about, for tests of the learner's pure half."""

from collections.abc import Iterable
from typing import Any

import msgspec

from worker.certify import propose, shipped
from worker.events import Label, ThresholdRecord
from worker.feedback import Claim, Evidence, Judged
from worker.settings import LearnPolicy

CLAIM = Claim("t", "violence", "m")
PICKED = 0.1
PLAIN = LearnPolicy(settle_ms=0, test_every=1, min_picked=PICKED)


def judged(number: int = 0, score: float = 0.9, **fields: Any) -> Judged:
    """A decision of `CLAIM` that was picked for review."""
    plain = Judged(
        f"d-{number}", "s", "t", "m", "toxicity", None, {"violence": score}, score, number,
        PICKED,
    )  # fmt: skip
    return plain._replace(**fields)


def label(
    number: int = 0, harmful: bool = True, reviewer: str = "r0", score: float = 0.9, **fields: Any
) -> Label:
    """What a reviewer says about `judged(number, score)`."""
    plain = Label(
        decision_id=f"d-{number}", stream_id="s", tenant="t", harm="violence", score=score,
        harmful=harmful, reviewer=reviewer, picked_with=PICKED,
    )  # fmt: skip
    return msgspec.structs.replace(plain, **fields)


class Learner:
    """Evidence, and what is published from it: time is the number of the label."""

    def __init__(self, policy: LearnPolicy = PLAIN, start: float = 0.7) -> None:
        self.policy = policy
        self.evidence = Evidence(lambda _: policy)
        self.record = shipped(*CLAIM, start, 0)
        self.records: list[ThresholdRecord] = []
        self.now_ms = 0
        self.evidence.in_force(self.record)

    def tell(self, outcomes: Iterable[bool], score: float = 0.99, reviewers: int = 3) -> None:
        """One label each, of reviewers in turn."""
        for harmful in outcomes:
            self.now_ms += 1
            number = self.now_ms
            self.evidence.add(
                label(number, harmful, f"r{number % reviewers}", score), judged(number, score),
                number,
            )  # fmt: skip
            self.test()

    def test(self) -> None:
        """Settle, and publish what comes of it."""
        for claim in self.evidence.settle(self.now_ms):
            after = propose(self.evidence.snapshot(claim), self.policy, self.record, self.now_ms)
            if after is not None:
                self.publish(after)

    def publish(self, record: ThresholdRecord) -> None:
        self.record = record
        self.records.append(record)
        self.evidence.in_force(record)
