"""Which decisions reviewers are shown, and with what probability. Pure.

A label counts 1/picked_with in the learner's evidence, so `picked_with` must be the true
probability of being picked, and never close to 0. Hence:

- Shares come from the settings, by stratum: `over` (a score that some threshold may come to lie
  below), `near` (a score at least half as high), `rest`. Allowed text is looked at too, and
  likelier misses more often. All of `over` has one share: docs/thresholds.md, section 9.
- Chance is a keyed hash of the decision's id: any replay rolls the same, and who does not know
  `review_key` cannot tell what will be looked at.
- The budget is a count that is kept with the decisions. While less than half of it is used it
  changes nothing, and a replay picks the same ones. Beyond, all shares are halved as long as that
  leaves them above the policy's least; when it is used up nothing is picked until the next hour.
  That factor depends on earlier picks alone, never on the roll that it is held against, so the
  probability is the true one, given the past, which is what sequential tests ask for.
- The count is journalled in the transaction that publishes the picks. A restart goes on with the
  count of what was published: what a kill undid is rolled again, and nobody has seen it.

A live counter that a restart forgets would overrun the budget with each kill; rates alone, without
a count, would know no budget at all.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from detectors.harms import HARMS, THRESHOLD_KEYS
from worker.certify import BOUNDS
from worker.events import Decision
from worker.settings import Settings, TenantPolicy

Stratum = Literal["over", "near", "rest"]

_HOUR_MS = 3_600_000
_NEAR = 0.5  # of what makes it `over`
NOT_SCORED = {"keyword", "short", "policy"}  # no model's score, so no threshold could change it


class Pick(NamedTuple):
    """How a decision was picked."""

    picked_with: float
    least: float  # what any decision in `over` would have been picked with at that moment


def stratum(
    scores: Sequence[float | None], thresholds: Sequence[float], policy: TenantPolicy
) -> Stratum:
    """How close the scores come to what may block. None: no score of that harm.

    scores, thresholds: (7,) as THRESHOLD_KEYS.
    """
    found: Stratum = "rest"
    for harm, score, threshold in zip(THRESHOLD_KEYS, scores, thresholds, strict=True):
        line = min(threshold, policy.learn.bounds.get(harm, BOUNDS)[0])
        if score is not None and score > line:
            return "over"
        if score is not None and score > _NEAR * line:
            found = "near"
    return found


def factor(used: int, allowed: int, policy: TenantPolicy) -> float:
    """What all shares are multiplied with: 1, a power of 1/2, or 0 with the budget used up."""
    if used >= allowed:
        return 0.0
    review, learn = policy.review, policy.learn
    lowest = max(
        (least / share for share, least in (
            (review.over, learn.min_picked),
            (review.near, learn.min_picked_below),
            (review.rest, learn.min_picked_below),
        ) if share > 0.0),
        default=1.0,
    )  # fmt: skip
    scale, left = 1.0, 1.0 - used / allowed
    while scale > 2.0 * left and scale / 2.0 >= lowest:
        scale /= 2.0
    return scale


def roll(decision_id: str, key: bytes = b"") -> float:
    """A number in 0..1, below 1, that is a function of id and key (at most 64 bytes)."""
    hasher = hashlib.blake2b(
        decision_id.encode(), digest_size=8, key=key, person=b"tidegate-review"
    )
    return (int.from_bytes(hasher.digest(), "little") >> 11) * 2.0**-53


def allowance(per_hour: int, hour: int, partition: int, partitions: int) -> int:
    """How many items of an hour's budget are this partition's: over all partitions `per_hour`.

    Items are dealt out in turn, and the next hour goes on where the last one ended, so that a
    budget smaller than the number of partitions reaches all of them.
    """
    begin, end = hour * per_hour, (hour + 1) * per_hour
    return (end - partition - 1) // partitions - (begin - partition - 1) // partitions


class Picker:
    """Picks decisions of one lane for review, and counts them."""

    def __init__(self, settings: Settings, partition: int, partitions: int) -> None:
        self._settings = settings
        self._partition = partition
        self._partitions = partitions
        secret = settings.review_key.get_secret_value() if settings.review_key else ""
        self._key = hashlib.blake2b(secret.encode()).digest() if secret else b""
        self._hour = 0  # since the epoch
        self._picked: dict[str, int] = {}  # in this hour, by policy

    def pick(self, decision: Decision, thresholds: Sequence[float]) -> Pick | None:
        """How a decision was picked that reviewers shall see; None where they shall not.

        thresholds: (7,) that it was made with. Tenants without a policy of their own share
        `default`'s budget.
        """
        if not decision.scores or decision.start == decision.end or decision.stage in NOT_SCORED:
            return None
        policy = self._settings.tenant(decision.tenant)
        rolled = roll(decision.decision_id, self._key)
        if rolled >= max(policy.review.over, policy.review.near, policy.review.rest):
            return None  # whatever its stratum: most decisions cost no more than this
        name = decision.tenant if decision.tenant in self._settings.tenants else "default"
        scores = [*(decision.scores.get(harm) for harm in HARMS), decision.harmful]  # (7,)
        share: float = getattr(policy.review, stratum(scores, thresholds, policy))
        scale = self._factor(name, policy, decision.ts_ms // _HOUR_MS)
        if rolled >= share * scale:
            return None
        self._picked[name] = self._picked.get(name, 0) + 1
        return Pick(share * scale, policy.review.over * scale)

    def _factor(self, name: str, policy: TenantPolicy, hour: int) -> float:
        if hour > self._hour:  # a clock that was set back must not open the budget again
            self._hour, self._picked = hour, {}
        allowed = allowance(policy.review.per_hour, self._hour, self._partition, self._partitions)
        return factor(self._picked.get(name, 0), allowed, policy)

    @property
    def is_fresh(self) -> bool:
        """Whether nothing is counted: a restart needs no state."""
        return not self._picked

    @property
    def state(self) -> dict[str, Any]:
        """What `restore` needs, as a JSON object."""
        return {"hour": self._hour, "picked": self._picked}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where the last owner's published picks ended."""
        self._hour, self._picked = int(state["hour"]), dict(state["picked"])
