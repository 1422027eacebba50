"""Reviewers' labels -> evidence per tenant, harm and model digest. Pure: `now_ms` is Kafka's clock.

    for each record of the thresholds topic:  evidence.in_force(record)
    for each label, by its Kafka timestamp:   evidence.add(label, judged, now_ms)
    from time to time:                        for claim in evidence.settle(now_ms): propose(...)

A rebuild is the same without `propose`. docs/thresholds.md says why each rule is as it is.
"""

import heapq
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, Self
from zlib import crc32

import numpy as np

from detectors.harms import OTHER, THRESHOLD_KEYS
from worker import drift
from worker.certify import BOUNDS, GRID, STAKES, Blocked, Goal, Tally, bin_of
from worker.events import Decision, Label, Review, ThresholdRecord
from worker.settings import LearnPolicy

MAX_OPEN = 100_000  # decisions with labels that are not settled yet; about 1 kB each
MAX_SETTLED = 500_000  # ids remembered, twice; about 70 bytes each
MAX_CLAIMS = 5_000  # tenants and models come from outside; some 50 kB each with ten reviewers
MAX_REVIEWERS = 64  # of one claim that are told apart; more share these places
MAX_VOTES = 16  # reviewers of one decision
MAX_WEIGHTS = 12  # of one claim, as they are; others are rounded to powers of 2, by chance
RECENT = 200  # decisions that an alarm looks back on

_NOT_SCORED = {"keyword", "short", "policy"}  # no threshold could change them
_SMALLEST = 2.0**-6  # weight; smaller ones are rounded to it or to 0
SAME = 1e-6  # scores and probabilities that went through somebody's JSON
_NOWHERE = -(2**62)


class Claim(NamedTuple):
    """What evidence is kept apart for."""

    tenant: str
    harm: str
    model: str


class Judged(NamedTuple):
    """What a label is held against: the decision of its id, and how it was picked.

    least: the lowest probability with which any decision above the lowest candidate could have
    been picked at that moment, which earlier picks alone may lower; None: the policy's min_picked.
    """

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
    least: float | None = None

    @classmethod
    def of(cls, decision: Decision, least: float | None = None) -> Self:
        """From a decision, or from a review item."""
        picked_with = decision.picked_with if isinstance(decision, Review) else None
        return cls(
            decision.decision_id, decision.stream_id, decision.tenant, decision.model,
            decision.stage, decision.harm, decision.scores, decision.harmful, decision.ts_ms,
            picked_with, least,
        )  # fmt: skip

    def score_of(self, harm: str) -> float | None:
        """The score that is held against the harm's threshold."""
        return self.harmful if harm == OTHER else self.scores.get(harm)


class Accepted(NamedTuple):
    """The label is sound. `counts`: whether it is evidence; `why` it is not."""

    counts: bool
    why: str = ""


class Rejected(NamedTuple):
    """The label is a dead letter."""

    reason: str
    field: str


_COUNTS = Accepted(True)


class Evidence:
    """Everything that labels have said, as counts."""

    def __init__(self, policy: Callable[[str], LearnPolicy]) -> None:
        """policy: of a tenant."""
        self._policy = policy
        self._claims: dict[Claim, _Counts] = {}
        self._models: dict[tuple[str, str], list[Claim]] = {}  # by tenant and harm
        self._records: dict[tuple[str, str], ThresholdRecord] = {}
        self._open: dict[tuple[str, str], _Vote] = {}  # by decision and harm
        self._due: list[tuple[int, str, str]] = []  # a heap of their (ms, decision, harm)
        self._settled = _Settled()
        self._ringing: dict[Claim, None] = {}  # by complaints, or settled for want of room

    def in_force(self, record: ThresholdRecord) -> None:
        """What is published now for a tenant and harm: at start and after each publication.

        Epoch and watch begin where the record says, so call it before the labels are read again.
        """
        self._records[record.tenant, record.harm] = record
        for claim in self._models.get((record.tenant, record.harm), ()):
            self._claims[claim].in_force(record)

    def add(self, label: Label, judged: Judged | None, now_ms: int) -> Accepted | Rejected:
        """Take a label. judged: None where no decision has its id. now_ms: its timestamp."""
        if judged is None:
            return Rejected("no decision has this id", "decision_id")
        refused = _malformed(label) or _forged(label, judged)
        if refused is not None:
            return refused
        if judged.stage in _NOT_SCORED:
            return Accepted(False, "no threshold decided it")
        if label.harm == OTHER and judged.harm not in {None, OTHER}:
            return Accepted(False, "a harm type explains it")
        return (
            self._complain(label, judged)
            if label.picked_with is None
            else self._vote(label, judged, now_ms)
        )

    def _vote(self, label: Label, judged: Judged, now_ms: int) -> Accepted:
        """Take a sound label on a decision that was picked."""
        key = (label.decision_id, label.harm)
        vote = self._open.get(key)
        if vote is not None:
            return vote.add(label.reviewer, label.harmful)
        if self._settled.knows(key, judged.ts_ms):
            return Accepted(False, "settled already")
        counts = self._counts(Claim(label.tenant, label.harm, judged.model))
        if counts is None:
            return Accepted(False, "too many tenants and models")
        return self._opened(key, label, judged, counts, now_ms)

    def _opened(
        self, key: tuple[str, str], label: Label, judged: Judged, counts: "_Counts", now_ms: int
    ) -> Accepted:
        score = judged.score_of(label.harm) or 0.0
        weight = counts.weigh(score, judged, label.decision_id)
        if weight is None:
            return Accepted(False, "picked with less than min_picked")
        if len(self._open) >= MAX_OPEN:
            self._settle_first()
        due = now_ms + counts.policy.settle_ms
        self._open[key] = _Vote(counts, score, weight, judged.ts_ms, label.reviewer, label.harmful)
        heapq.heappush(self._due, (due, *key))
        return _COUNTS

    def _complain(self, label: Label, judged: Judged) -> Accepted:
        key = (label.decision_id, f"{label.harm} complaint")
        counts = self._counts(Claim(label.tenant, label.harm, judged.model))
        if counts is not None and not self._settled.knows(key, judged.ts_ms):
            self._settled.remember(key, judged.ts_ms)
            if counts.complain(label, judged):
                self._ringing[counts.claim] = None
        return Accepted(False, "complaint")

    def blocked(self, judged: Judged) -> None:
        """Count a blocked decision, reviewed or not: what complaints are weighed against."""
        harm = judged.harm
        if harm is not None and judged.stage not in _NOT_SCORED:
            counts = self._counts(Claim(judged.tenant, harm, judged.model))
            if counts is not None:
                counts.blocked(judged)

    def settle(self, now_ms: int) -> Iterator[Claim]:
        """Settle what is due up to `now_ms`; each claim to test, at the instant that it is due.

        Run it to its end. `now_ms`: no label with an earlier timestamp will be added any more.
        What falls due in one millisecond is settled together, so that a record's `since_ms` and
        `epoch_ms` cut between milliseconds.
        """
        while self._due and self._due[0][0] <= now_ms:
            at = self._due[0][0]
            touched: dict[Claim, None] = {}
            while self._due and self._due[0][0] == at:
                touched[self._settle_first()] = None
            yield from [claim for claim in touched if self._claims[claim].is_due()]
        ringing, self._ringing = self._ringing, {}
        yield from ringing

    def _settle_first(self) -> Claim:
        at, *key = heapq.heappop(self._due)
        vote = self._open.pop((key[0], key[1]))
        self._settled.remember((key[0], key[1]), vote.decided_ms)
        vote.counts.settle(vote, at)
        return vote.counts.claim

    def _counts(self, claim: Claim) -> "_Counts | None":
        counts = self._claims.get(claim)
        if counts is None and len(self._claims) < MAX_CLAIMS:
            counts = self._claims[claim] = _Counts(claim, self._policy(claim.tenant))
            self._models.setdefault(claim[:2], []).append(claim)
            record = self._records.get(claim[:2])
            if record is not None:
                counts.in_force(record)
        return counts

    def snapshot(self, claim: Claim) -> Tally:
        """The claim's counts now; empty ones where there are none."""
        return (self._claims.get(claim) or _Counts(claim, self._policy(claim.tenant))).tally()

    @property
    def claims(self) -> tuple[Claim, ...]:
        """All that labels were counted for."""
        return tuple(self._claims)


def _malformed(label: Label) -> Rejected | None:
    if label.harm not in THRESHOLD_KEYS:
        return Rejected("unknown harm", "harm")
    if not 0.0 <= label.score <= 1.0:  # NaN too
        return Rejected("outside 0..1", "score")
    if label.picked_with is not None and not 0.0 < label.picked_with <= 1.0:
        return Rejected("not above 0 and at most 1", "picked_with")
    return None


def _forged(label: Label, judged: Judged) -> Rejected | None:
    """What does not match the decision of the label's id."""
    score, picked = judged.score_of(label.harm), judged.picked_with
    if label.decision_id != judged.decision_id:
        wrong = "decision_id"
    elif label.stream_id != judged.stream_id:
        wrong = "stream_id"
    elif label.tenant != judged.tenant:
        wrong = "tenant"
    elif score is None or abs(score - label.score) > SAME:
        wrong = "score"
    elif label.picked_with is not None and (
        picked is None or abs(picked - label.picked_with) > SAME * picked
    ):
        wrong = "picked_with"
    else:
        return None
    return Rejected("is not the decision's", wrong)


class _Settled:
    """Which decisions count no more: the latest by id, and all older ones."""

    def __init__(self) -> None:
        self._new: set[int] = set()  # hashes: an accident with one in 2**64 loses one label
        self._new_ms = _NOWHERE  # latest decision of these
        self._old: set[int] = set()
        self._old_ms = _NOWHERE
        self._closed_ms = _NOWHERE  # decisions up to here are not labelled any more

    def knows(self, key: tuple[str, str], decided_ms: int) -> bool:
        hashed = hash(key)
        return decided_ms <= self._closed_ms or hashed in self._new or hashed in self._old

    def remember(self, key: tuple[str, str], decided_ms: int) -> None:
        if len(self._new) >= MAX_SETTLED:
            self._closed_ms = max(self._closed_ms, self._old_ms)
            self._old, self._old_ms = self._new, self._new_ms
            self._new, self._new_ms = set(), _NOWHERE
        self._new.add(hash(key))
        self._new_ms = max(self._new_ms, decided_ms)


class _Vote:
    """One decision and harm whose labels are still coming."""

    __slots__ = ("counts", "decided_ms", "says", "score", "weight")

    def __init__(
        self, counts: "_Counts", score: float, weight: int, decided_ms: int,
        reviewer: str, harmful: bool,
    ) -> None:  # fmt: skip
        self.counts = counts
        self.score = score
        self.weight = weight  # which of the claim's
        self.decided_ms = decided_ms
        self.says = {reviewer: harmful}

    def add(self, reviewer: str, harmful: bool) -> Accepted:
        if reviewer not in self.says and len(self.says) >= MAX_VOTES:
            return Accepted(False, "enough reviewers")
        self.says[reviewer] = harmful
        return _COUNTS


def outcome(says: Mapping[str, bool], without: str | None = None) -> bool | None:
    """What reviewers settled on: harmful where most say so; a tie is harmless.

    without: a reviewer who is not asked. None: nobody is left.
    """
    votes = [harmful for reviewer, harmful in says.items() if reviewer != without]
    return 2 * sum(votes) > len(votes) if votes else None


class _Counts:
    """What is known of one claim. Row 0 is everybody's world; row i lacks reviewer i."""

    def __init__(self, claim: Claim, policy: LearnPolicy) -> None:
        self.claim = claim
        self.policy = policy
        self._goal = Goal.of(policy)
        self._lowest = policy.bounds.get(claim.harm, BOUNDS)[0]
        self._threshold: float | None = None  # in force
        self._epoch: tuple[int, int] = (0, _NOWHERE)
        self._since_ms = _NOWHERE
        self._rows: dict[str, int] = {}  # reviewer -> row
        self._weights = [1.0]  # a column of counts each
        self._columns = {1.0: 0}
        self._settled_ms = _NOWHERE
        self._begin_epoch()
        self._begin_watch()

    def _begin_epoch(self) -> None:
        self._labels = 0
        self._due = False
        self._too_rare = self._too_rare_below = 0
        self._rows.clear()
        self._given = [0]  # (rows,) labels; row 0 is not used
        self._table = np.zeros((1, len(GRID), 2, len(self._weights)), np.int32)
        self._recent: deque[tuple[int, int, int]] = deque(maxlen=RECENT)

    def _begin_watch(self) -> None:
        rows = 1 + len(self._rows)
        self._since = Blocked()
        self._wealth = drift.begin(rows)  # (rows, K)
        self._watched = 0  # decisions bet on
        self._rang = self._told = False
        self._blocked = 0
        self._complaints: dict[str, int] = {}  # harmless, by who complained
        self._complained = False

    def in_force(self, record: ThresholdRecord) -> None:
        """Begin what the record begins: an epoch, a watch, or nothing."""
        if record.model not in {"", self.claim.model}:
            return
        threshold = record.threshold if record.status == "applied" else record.previous
        ours = record.learnt_from in {"", self.claim.model}  # an operator's may tell of another's
        if ours and record.epoch_ms and (record.epoch, record.epoch_ms) != self._epoch:
            self._epoch = (record.epoch, record.epoch_ms)
            self._begin_epoch()
            self._since_ms = _NOWHERE
        if (threshold, record.since_ms) != (self._threshold, self._since_ms):
            self._threshold, self._since_ms = threshold, record.since_ms
            self._begin_watch()

    # -- weights ------------------------------------------------------------------------------

    def weigh(self, score: float, judged: Judged, decision_id: str) -> int | None:
        """Which of the claim's weights a decision has; None: it was picked too rarely for any."""
        least = judged.least or self.policy.min_picked
        weight = round(least / (judged.picked_with or least), 12)
        if weight > 1.0 and score > self._lowest:
            self._too_rare += 1
            return None
        if weight > self._goal.ratio:
            self._too_rare_below += 1
            weight = self._goal.ratio
        if weight not in self._columns and len(self._weights) >= MAX_WEIGHTS:
            weight = self._rounded(weight, crc32(decision_id.encode()) / 2**32)
        return self._column(weight)

    def _column(self, weight: float) -> int:
        column = self._columns.get(weight)
        if column is None:
            column = self._columns[weight] = len(self._weights)
            self._weights.append(weight)
            more = np.zeros_like(self._table[..., :1])
            self._table = np.concatenate([self._table, more], axis=-1)
        return column

    def _rounded(self, weight: float, chance: float) -> float:
        """One of the two nearest powers of 2; the mean over chances is the weight itself."""
        power = 2.0 ** math.ceil(math.log2(max(weight, _SMALLEST)))
        low = power / 2.0 if weight > _SMALLEST else 0.0
        high = min(power, self._goal.ratio)
        return high if chance * (high - low) < weight - low else low

    # -- settling -----------------------------------------------------------------------------

    def settle(self, vote: _Vote, at_ms: int) -> None:
        """Count a decision in all worlds."""
        self._settled_ms = max(self._settled_ms, at_ms)
        if at_ms <= self._epoch[1]:
            return
        self._labels += 1
        self._due |= self._labels % self.policy.test_every == 0
        whole, others = self._outcomes(vote.says)
        at, column = bin_of(vote.score), vote.weight
        self._recent.append((at, int(whole), column))
        self._table[0, at, int(whole), column] += 1  # a bool would be a mask
        for row, without in others.items():
            self._given[row] += 1
            if without is not whole:
                self._table[row, at, int(whole), column] -= 1
                if without is not None:
                    self._table[row, at, int(without), column] += 1
        if self._threshold is not None and at_ms > self._since_ms:
            self._watch(vote.score > self._threshold, whole, others, self._weights[column])

    def _outcomes(self, says: dict[str, bool]) -> tuple[bool, dict[int, bool | None]]:
        """The outcome in everybody's world, and in those that lack one of its reviewers."""
        if len(self._rows) + len(says) > MAX_REVIEWERS:
            says = self._named(says)
        if len(says) == 1:
            ((name, whole),) = says.items()
            return whole, {self._row(name): None}
        return bool(outcome(says)), {self._row(name): outcome(says, name) for name in says}

    def _named(self, says: dict[str, bool]) -> dict[str, bool]:
        """Reviewers as they are told apart; who share a place are one, and the last word counts."""
        return {self._place(name): harmful for name, harmful in says.items()}

    def _place(self, name: str) -> str:
        if name in self._rows or len(self._rows) < MAX_REVIEWERS:
            return name
        places = list(self._rows)
        return places[crc32(name.encode()) % len(places)]

    def _row(self, name: str) -> int:
        row = self._rows.get(name)
        if row is None:
            row = self._rows[name] = len(self._given)
            self._given.append(0)
            self._table = np.concatenate([self._table, np.zeros_like(self._table[:1])])
            self._wealth = np.concatenate([self._wealth, self._wealth[:1]])
        return row

    def _watch(
        self, above: bool, whole: bool, others: dict[int, bool | None], weight: float
    ) -> None:
        """Look at one more decision under the threshold in force."""
        if above:
            decisions, total, harmful = self._since
            self._since = Blocked(decisions + 1, total + weight, harmful + weight * whole)
        if not self._rang:
            self._bet(above, whole, others, weight)

    def _bet(self, above: bool, whole: bool, others: dict[int, bool | None], weight: float) -> None:
        """Bet on one more decision, in each world, that the goal is missed.

        All worlds share the numbering: one that leaves decisions out uses less of the prior.
        """
        if self._goal.kind == "precision" and not above:
            return
        if self._goal.kind == "recall" and True not in (whole, *others.values()):
            return
        before = self._wealth
        self._watched += 1
        after = before.copy()
        if self._goal.concerns(above, whole):
            after = drift.advance(before, self._watched, self._goal.loss(above, whole, weight))
        for row, without in others.items():
            if without is not whole:
                after[row] = before[row]
                if without is not None and self._goal.concerns(above, without):
                    loss = self._goal.loss(above, without, weight)
                    after[row] = drift.advance(before[row], self._watched, loss)
        self._wealth = after
        judges = after if self.policy.max_reviewer_share < 1.0 else after[:1]
        self._rang = bool(drift.rings(judges, self.policy.delta))

    def is_due(self) -> bool:
        """Whether it is time for a test: an alarm, or so many decisions of this epoch again."""
        due = self._due or (self._rang and not self._told)
        self._due, self._told = False, self._rang
        return due

    # -- complaints ---------------------------------------------------------------------------

    def blocked(self, judged: Judged) -> None:
        """One more block by the threshold in force."""
        self._blocked += self._is_blocked(judged)

    def complain(self, label: Label, judged: Judged) -> bool:
        """Count a complaint; whether the alarm has just begun to ring.

        At most 1 - target of the blocks may be wrong, so betting on more confirmed complaints
        than that is betting on lost precision. The most frequent complainer's do not count.
        """
        if label.harmful or not self._is_blocked(judged):
            return False
        who = label.reviewer
        if who not in self._complaints and len(self._complaints) >= MAX_REVIEWERS:
            who = next(iter(self._complaints))
        self._complaints[who] = self._complaints.get(who, 0) + 1
        wrong = sum(self._complaints.values()) - max(self._complaints.values())
        right = max(0, self._blocked - wrong)
        before, target = self._complained, self.policy.target_precision
        won = np.log1p(STAKES * target / (1.0 - target)) * wrong + np.log1p(-STAKES) * right
        self._complained = bool(np.exp(won).mean() >= 1.0 / self.policy.delta)
        return self._complained and not before

    def _is_blocked(self, judged: Judged) -> bool:
        score = judged.score_of(self.claim.harm)
        if self._threshold is None or score is None or judged.ts_ms <= self._since_ms:
            return False
        return score > self._threshold

    # -- out ----------------------------------------------------------------------------------

    def tally(self) -> Tally:
        """Everything as it is now."""
        counts = self._table.copy()  # (W, B, 2, L)
        counts[1:] += counts[0]
        return Tally(
            *self.claim, labels=self._labels, settled_ms=max(0, self._settled_ms),
            weights=np.array(self._weights), counts=counts, recent=tuple(self._recent),
            since=self._since, largest_share=max(self._given) / max(1, sum(self._given)),
            alarm=self._rang, complaints=self._complained, too_rare=self._too_rare,
            too_rare_below=self._too_rare_below,
        )  # fmt: skip
