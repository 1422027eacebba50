"""Evidence -> thresholds: what is certified, and what to publish. Pure.

A certificate is a bet won. The wealth of a fixed mixture of stakes is bounded by a nonnegative
martingale while the running average stays on the wrong side of the target, so by Ville's
inequality it ever reaches 1/delta with probability at most delta (Ville 1939; Waudby-Smith &
Ramdas 2024). Candidates are tested in a fixed sequence at the full delta each (Learn-then-Test,
Angelopoulos et al. 2021). docs/thresholds.md has the proofs and the assumptions.

Arrays of counts have the axes (..., B, 2, L): score bin, outcome, weight. Whatever stands before
them (worlds, or a simulation's histories) is carried through.
"""

import math
from bisect import bisect_left
from functools import cache
from typing import Final, Literal, NamedTuple, Self

import msgspec
import numpy as np
from numpy.typing import NDArray

from worker.events import ThresholdRecord
from worker.settings import LearnPolicy

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int32]

GRID: Final = tuple(round(0.01 * step, 2) for step in range(101))  # thresholds; also B bins
BOUNDS: Final = (0.5, 0.95)  # lowest and highest candidate where a policy names none
STAKES: Final = np.array([0.04, 0.1, 0.2, 0.4, 0.65, 0.95])  # (K,) of what may be lost at most
_PRIOR = -math.log(len(STAKES))  # log share of the money on each stake
_FIRST_EPOCH = 0.8  # of delta; the later ones share the rest
_RECALLS = np.linspace(0.0, 1.0, 101)  # candidates for the recall interval
_MORE = 1.2  # times the labels of the last record: fewer are no news by themselves
_ENDLESS = 100_000  # labels that nobody will ever give
_GUESS_AFTER = 5  # decisions above a candidate; with fewer the rate of growth is a guess
_STEP = 0.05
_STEP_UP_BELOW, _STEP_DOWN_ABOVE = 0.8, 0.95  # precision


def bin_of(score: float) -> int:
    """How many of GRID lie below the score: it is above GRID[j] exactly where that is over j."""
    return bisect_left(GRID, score)


class Goal(NamedTuple):
    """What is certified: precision, or recall, of at least `level` against the outcomes.

    ratio: the highest weight below the lowest candidate; above it weights are at most 1.
    Reviewers who call at most a share `wrong` of harmless text harmful see a precision of at most
    q + (1 - q) wrong where it is q; so that is what they have to see.
    """

    kind: Literal["precision", "recall"]
    level: float
    ratio: float = 1.0

    @classmethod
    def of(cls, policy: LearnPolicy) -> Self:
        """What a tenant wants."""
        ratio = policy.rarer_below
        if policy.recall_floor is None:
            target, wrong = policy.target_precision, policy.reviewer_error
            return cls("precision", target + (1.0 - target) * wrong, ratio)
        return cls("recall", policy.recall_floor, ratio)

    def gain(self, above: bool, weights: FloatArray) -> FloatArray:
        """(2, L) what a stake of 1 wins by outcome and weight if the goal is met; at least -1."""
        if self.kind == "precision":
            each = np.array([-self.level, 1.0 - self.level]) * above / self.level
            weights = np.minimum(weights, 1.0)  # more has only what lies below every candidate
        else:
            each = np.array([0.0, above - self.level]) / (self.level * self.ratio)
        gains: FloatArray = each[:, None] * weights
        return gains

    def concerns(self, above: bool, harmful: bool | None) -> bool:
        """Whether a decision says anything about the goal."""
        return bool(above and harmful is not None if self.kind == "precision" else harmful)

    def loss(self, above: bool, harmful: bool, weight: float) -> float:
        """What a stake of 1 wins by one decision if the goal is missed; at least -1."""
        if self.kind == "precision":
            return weight * (self.level - harmful) * above / (1.0 - self.level)
        return weight * harmful * (self.level - above) / (1.0 - self.level)


def stake_wealth(counts: IntArray, weights: FloatArray, goal: Goal, at: int) -> FloatArray:
    """(..., K) log wealth of each stake on GRID[at] meeting the goal.

    counts: (..., B, 2, L). weights: (L,).
    """
    over = counts[..., at + 1 :, :, :].sum(axis=-3)
    wealth: FloatArray = over.reshape(*over.shape[:-2], -1) @ _log_factors(goal, True, weights)
    if goal.kind == "recall":
        under = counts[..., : at + 1, :, :].sum(axis=-3)
        wealth += under.reshape(*under.shape[:-2], -1) @ _log_factors(goal, False, weights)
    return wealth


def _log_factors(goal: Goal, is_above: bool, weights: FloatArray) -> FloatArray:
    """(2 L, K)."""
    gains = goal.gain(is_above, weights).reshape(-1, 1)
    factors: FloatArray = np.log1p(gains * STAKES)
    return factors


def mixed(stakes: FloatArray) -> FloatArray:
    """(..., K) log wealth of each stake -> (...) of the mixture."""
    most = stakes.max(axis=-1)
    mixture: FloatArray = most + np.log(np.exp(stakes - most[..., None]).sum(axis=-1)) + _PRIOR
    return mixture


def epoch_delta(delta: float, epoch: int) -> float:
    """The part of delta that an epoch may spend; over all epochs they add up to delta."""
    if epoch == 0:
        return _FIRST_EPOCH * delta
    return (1.0 - _FIRST_EPOCH) * delta / (epoch * (epoch + 1))


class Blocked(NamedTuple):
    """Sums over what the threshold in force has blocked since it was last looked at."""

    decisions: int = 0
    weight: float = 0.0
    harmful: float = 0.0  # weight of the harmful ones

    @property
    def precision(self) -> float | None:
        """Of what the threshold in force blocks; None where nothing was looked at."""
        return self.harmful / self.weight if self.weight > 0.0 else None


class Tally(NamedTuple):
    """One claim's evidence at one instant.

    Worlds: (W,) the first has everybody's labels, each other one lacks one reviewer's.
    """

    tenant: str
    harm: str
    model: str
    labels: int  # settled decisions counted in this epoch
    settled_ms: int  # when the last of them was settled
    weights: FloatArray  # (L,)
    counts: IntArray  # (W, B, 2, L) settled decisions
    recent: tuple[tuple[int, int, int], ...]  # the latest of them: bin, outcome, weight
    since: Blocked
    largest_share: float = 0.0  # of all labels, by the busiest reviewer
    alarm: bool = False  # the threshold in force misses its goal
    complaints: bool = False  # ... says who complained
    too_rare: int = 0  # decisions above a candidate, picked with less than the policy's least
    too_rare_below: int = 0  # ... below all candidates


def walk(policy: LearnPolicy, harm: str) -> tuple[int, ...]:
    """Candidates as indices of GRID, in the order in which they are tested."""
    up = _between(*policy.bounds.get(harm, BOUNDS))
    return up if policy.recall_floor is not None else up[::-1]


@cache
def _between(lowest: float, highest: float) -> tuple[int, ...]:
    return tuple(at for at, threshold in enumerate(GRID) if lowest <= threshold <= highest)


def certified(
    counts: IntArray, weights: FloatArray, goal: Goal, order: tuple[int, ...], delta: float,
    done: int = 0,
) -> int:  # fmt: skip
    """How many candidates of the sequence are certified now.

    counts: (W, B, 2, L); all worlds must reach 1/delta. done: how many were certified before; what
    was certified once stays so.
    """
    enough = -math.log(delta)
    while done < len(order):
        wealth = mixed(stake_wealth(counts, weights, goal, order[done]))  # (W,)
        if wealth.min() < enough:
            break
        done += 1
    return done


def shipped(tenant: str, harm: str, model: str, threshold: float, version: int) -> ThresholdRecord:
    """The record of a claim that nothing is published for: the model's own threshold.

    version: of the tenant's and harm's last record, whatever model it was for; else 0.
    """
    return ThresholdRecord(
        tenant=tenant, harm=harm, model=model, threshold=threshold, previous=threshold,
        version=version, method="shipped", reason="as shipped with the model",
    )  # fmt: skip


def spoken_of(
    record: ThresholdRecord, model: str, before: ThresholdRecord | None = None
) -> ThresholdRecord:
    """The record with what labels have shown of `model`, and of no other.

    before: the last record that was learnt from it. An operator's word outlives models, and so do
    the fields beside it; a model that comes back has spent some of its epochs' delta.
    """
    if record.learnt_from == model:
        return record
    if before is None and record.model == model:  # as shipped
        before = record
    known = before or shipped(record.tenant, record.harm, model, record.threshold, record.version)
    return msgspec.structs.replace(
        record, learnt_from=model, labels=known.labels, walked_from=known.walked_from,
        level=known.level, delta=known.delta, recall_floor=known.recall_floor,
        certified=known.certified, certified_before=known.certified_before, epoch=known.epoch,
        epoch_ms=known.epoch_ms, declined=known.declined,
    )  # fmt: skip


def in_force(record: ThresholdRecord) -> float:
    """The threshold that workers hold scores against, as of this record."""
    return record.threshold if record.status == "applied" else record.previous


def propose(
    tally: Tally, policy: LearnPolicy, current: ThresholdRecord, now_ms: int
) -> ThresholdRecord | None:
    """The record to publish next, or None where it would say nothing new.

    current: the last one published; where there is none or it is another model's, `shipped(...)`.
    The result's version is current's plus 1; threshold == previous where nothing moves. Raises
    ValueError where `current` is of another tenant, harm or model.
    """
    if (current.tenant, current.harm) != tally[:2] or current.model not in {"", tally.model}:
        msg = f"{current.tenant}/{current.harm} of {current.model}: not what the evidence is about"
        raise ValueError(msg)
    current = spoken_of(current, tally.model)
    draft = _draft(tally, policy, current, now_ms)
    if current.method == "operator":
        record = _held(tally, draft, current)
    elif policy.method == "step":
        record = _stepped(tally, policy, draft, current)
    else:
        record = _certified(tally, policy, draft, current)
    return None if record is None else _with_recall(record, tally, policy)


def _draft(
    tally: Tally, policy: LearnPolicy, current: ThresholdRecord, now_ms: int
) -> ThresholdRecord:
    """The next record if nothing moves."""
    first = next((GRID[at] for at in walk(policy, tally.harm)), None)
    return msgspec.structs.replace(
        current, threshold=in_force(current), previous=in_force(current),
        version=current.version + 1, status="applied", method=policy.method,
        target_precision=policy.target_precision, recall_floor=policy.recall_floor,
        delta=policy.delta, level=Goal.of(policy).level, labels=tally.labels, model=tally.model,
        ts_ms=now_ms, alarm=False, labels_needed=None, reason="", walked_from=first,
        precision=tally.since.precision,
    )  # fmt: skip


def _moved(draft: ThresholdRecord, tally: Tally, to: float, *, ask: bool) -> ThresholdRecord:
    """The draft with another threshold, watched from now on unless somebody is asked first."""
    if ask:
        return msgspec.structs.replace(draft, threshold=to, status="proposed")
    return msgspec.structs.replace(draft, threshold=to, since_ms=tally.settled_ms, declined=None)


# -- certified ------------------------------------------------------------------------------------


def _certified(
    tally: Tally, policy: LearnPolicy, draft: ThresholdRecord, current: ThresholdRecord
) -> ThresholdRecord | None:
    """See `propose`."""
    goal, order = Goal.of(policy), walk(policy, tally.harm)
    done = _walked(order, current.certified)
    if _goes_elsewhere(draft, current):
        done, draft = 0, msgspec.structs.replace(draft, certified_before=None)
    elif tally.labels < current.labels:
        lost = "labels were lost from the log: counting starts anew"
        return msgspec.structs.replace(_renewed(draft, tally), reason=lost)
    delta = epoch_delta(policy.delta, current.epoch)
    obstacle = _obstacle(tally, policy)
    if not obstacle:
        judges = tally.counts if policy.max_reviewer_share < 1.0 else tally.counts[:1]
        done = certified(judges, tally.weights, goal, order, delta, done)
    missing, why = _missing(tally, goal, order[done:], delta)
    reason = obstacle or why
    draft = msgspec.structs.replace(
        draft, certified=_last(order, done), labels_needed=missing, reason=reason
    )
    if tally.alarm:
        return _alarmed(tally, policy, draft, current, order[:done])
    to = _destination(tally, goal, order, done, draft)
    if to is None or to == draft.threshold:
        asked = _complained(tally, policy, draft, current, order[:done])
        says_more = _is_news(draft, current) or _has_doubled(draft, current)
        return asked or (draft if says_more else None)
    if to == current.declined or _pends(current, to):
        return None
    says = f"{goal.kind} at {to:.2f} is at least {goal.level:g}; {reason}"
    draft = msgspec.structs.replace(draft, reason=says)
    return _moved(draft, tally, to, ask=policy.approval)


def _goes_elsewhere(draft: ThresholdRecord, current: ThresholdRecord) -> bool:
    """Whether certificates of the last record are for something else than what is wanted now."""
    names = ("level", "recall_floor", "delta", "walked_from")
    return any(getattr(draft, name) != getattr(current, name) for name in names)


def _walked(order: tuple[int, ...], last: float | None) -> int:
    """How many of the sequence are certified, from the last of them."""
    at = None if last is None else bin_of(last)
    return order.index(at) + 1 if at in order else 0


def _last(order: tuple[int, ...], done: int) -> float | None:
    return GRID[order[done - 1]] if done else None


def _obstacle(tally: Tally, policy: LearnPolicy) -> str:
    """Why nothing may be certified whatever the labels say."""
    least, too_rare = policy.min_picked, tally.too_rare
    if policy.recall_floor is not None and tally.too_rare_below:
        least, too_rare = policy.min_picked_below, tally.too_rare_below
    if too_rare:
        return (
            f"{too_rare} decisions were picked with less than {least:g}, so no weight is right "
            "for them and nothing is certified: lower min_picked, or raise the shares"
        )
    if tally.largest_share > policy.max_reviewer_share:
        return (
            f"one reviewer gave {tally.largest_share:.0%} of the labels, "
            f"at most {policy.max_reviewer_share:.0%} may be one's"
        )
    return ""


def _destination(
    tally: Tally, goal: Goal, order: tuple[int, ...], done: int, draft: ThresholdRecord
) -> float | None:
    """The threshold to put in force; None: the one that is.

    What lies further along the walk than the threshold in force is wanted at once. What lies
    before it only where the walk is stuck, that is, where the next candidate needs more labels
    than it has had: until then the one in force may well be reached.
    """
    if not done:
        return None
    last = GRID[order[done - 1]]
    if _is_before(draft.threshold, last, goal) or done == len(order):
        return last
    had = tally.counts[0, order[done] + 1 :].sum()
    needed = draft.labels_needed
    return last if needed is None or needed > had else None


def estimated(
    counts: IntArray, weights: FloatArray, kind: Literal["precision", "recall"], at: int
) -> float | None:
    """Weighted precision or recall at GRID[at]; None where nothing is known. counts: (B, 2, L)."""
    over = counts[at + 1 :].sum(axis=0) @ weights  # (2,)
    whole = over.sum() if kind == "precision" else (counts.sum(axis=0) @ weights)[1]
    return float(over[1] / whole) if whole > 0.0 else None


def _missing(
    tally: Tally, goal: Goal, rest: tuple[int, ...], delta: float
) -> tuple[int | None, str]:
    """Labels above the next candidate that it still needs at the present rate, and in words."""
    if not rest:
        return None, "every candidate is certified"
    at = rest[0]
    stakes = stake_wealth(tally.counts, tally.weights, goal, at)  # (W, K)
    worst = int(mixed(stakes).argmin())
    had, counted = (int(tally.counts[world, at + 1 :].sum()) for world in (0, worst))
    needed = _labels_needed(stakes[worst], counted, had, goal, delta)
    if needed is None:
        estimate = estimated(tally.counts[0], tally.weights, goal.kind, at) or 0.0
        why = f"{goal.kind} at {GRID[at]:.2f} is {estimate:.3f} so far: more labels like these"
        return None, f"{why} will not certify {goal.level:g}"
    others = " of other reviewers" if had and not counted else ""
    return needed, f"about {needed} more labels{others} above {GRID[at]:.2f} are needed there"


def _labels_needed(
    stakes: FloatArray, counted: int, had: int, goal: Goal, delta: float
) -> int | None:
    """How many more decisions bring one of the stakes to 1/delta; None: none do. stakes: (K,).

    counted: decisions in the world that has won least; had: in everybody's.
    """
    goes_to = -math.log(delta) - _PRIOR
    if counted < _GUESS_AFTER:  # as if half of what the goal allows to be wrong were
        right = 0.5 * (1.0 + goal.level)
        gains = np.log1p(goal.gain(True, np.ones(1)) * STAKES)  # (2, K)
        growth = (1.0 - right) * gains[0] + right * gains[1]
        return math.ceil(goes_to / float(growth.max()))
    rates = stakes / had
    growing = rates > 0.0
    if not growing.any():
        return None
    needed = math.ceil(float(((goes_to - stakes[growing]) / rates[growing]).min()))
    return max(1, needed) if needed < _ENDLESS else None


def _is_news(draft: ThresholdRecord, current: ThresholdRecord) -> bool:
    """Whether a record that moves nothing says something: it must not bury a pending proposal."""
    if current.status == "proposed":
        return False
    if (draft.certified, draft.epoch) != (current.certified, current.epoch) or not current.reason:
        return True
    if current.method != draft.method or _goes_elsewhere(draft, current):
        return True
    if draft.labels < _MORE * current.labels:
        return False
    before, now = current.labels_needed, draft.labels_needed
    if before is None or now is None:
        return before is not now
    return not 0.5 * before < now < 2.0 * before


def _has_doubled(draft: ThresholdRecord, current: ThresholdRecord) -> bool:
    """Whether precision and recall can be told far better than the last record does."""
    return current.status != "proposed" and draft.labels >= max(2 * current.labels, _GUESS_AFTER)


# -- alarms ---------------------------------------------------------------------------------------


def _alarmed(
    tally: Tally, policy: LearnPolicy, draft: ThresholdRecord, current: ThresholdRecord,
    sound: tuple[int, ...],
) -> ThresholdRecord | None:  # fmt: skip
    """After an alarm: back along the walk to a certified threshold.

    sound: candidates certified in this epoch, in the order of the walk. If the one in force is
    among them, the traffic has changed, and a new epoch begins. If not, it never was any good,
    and the evidence is what it was.
    """
    goal = Goal.of(policy)
    to = _refuge(tally, policy, draft, sound)
    if to is not None and (to == current.declined or _pends(current, to)):
        return None
    says = f"alarm: labels show {goal.kind} below {goal.level:g} at {draft.threshold:g}"
    if draft.threshold in {GRID[at] for at in sound}:
        back = to if to is not None else draft.certified_before
        draft = msgspec.structs.replace(_renewed(draft, tally), certified_before=back)
    if to is not None:
        draft = msgspec.structs.replace(draft, alarm=True, reason=says)
        return _moved(draft, tally, to, ask=policy.approval)
    says += f"; nothing further back is certified, so nothing moves; {draft.reason}"
    is_told = current.alarm and not _is_news(draft, current)
    return None if is_told else msgspec.structs.replace(draft, alarm=True, reason=says)


def _complained(
    tally: Tally, policy: LearnPolicy, draft: ThresholdRecord, current: ThresholdRecord,
    sound: tuple[int, ...],
) -> ThresholdRecord | None:  # fmt: skip
    """Where complaints ring the alarm, a person is asked, whatever the policy says.

    Whoever wants less moderation can complain in any number.
    """
    is_asked_for = tally.complaints and policy.recall_floor is None
    to = _refuge(tally, policy, draft, sound) if is_asked_for else None
    if to is None or to == current.declined or current.status == "proposed":
        return None
    target = f"{policy.target_precision:g} at {draft.threshold:g}"
    asked = msgspec.structs.replace(
        draft, alarm=True, reason=f"alarm: complaints show precision below {target}"
    )
    return _moved(asked, tally, to, ask=True)


def _pends(current: ThresholdRecord, to: float) -> bool:
    return current.status == "proposed" and current.threshold == to


def _is_before(threshold: float, other: float, goal: Goal) -> bool:
    return threshold > other if goal.kind == "precision" else threshold < other


def _refuge(
    tally: Tally, policy: LearnPolicy, draft: ThresholdRecord, sound: tuple[int, ...]
) -> float | None:
    """The certified candidate to go back to; None: there is none.

    If the one in force is not certified itself, the nearest one that is; if it is, or if
    certificates are of earlier epochs, the nearest one that the latest outcomes do not speak
    against; where they speak against all, the first of the walk.
    """
    goal, order = Goal.of(policy), walk(policy, tally.harm)
    known = sound or order[: _walked(order, draft.certified_before)]
    back = [at for at in known if _is_before(GRID[at], draft.threshold, goal)]
    if not back:
        return None
    if sound and draft.threshold not in {GRID[at] for at in sound}:
        return GRID[back[-1]]
    counts = np.zeros_like(tally.counts[0])
    for at, harmful, weight in tally.recent:
        counts[at, harmful, weight] += 1
    estimates = [(estimated(counts, tally.weights, goal.kind, at), at) for at in reversed(back)]
    fine = [at for estimate, at in estimates if estimate is not None and estimate >= goal.level]
    return GRID[fine[0] if fine else back[0]]


def _renewed(draft: ThresholdRecord, tally: Tally) -> ThresholdRecord:
    """The draft in a new epoch: what was counted so far describes other traffic."""
    return msgspec.structs.replace(
        draft, epoch=draft.epoch + 1, epoch_ms=tally.settled_ms, since_ms=tally.settled_ms,
        certified=None, labels=0, labels_needed=None,
    )  # fmt: skip


def _held(tally: Tally, draft: ThresholdRecord, current: ThresholdRecord) -> ThresholdRecord | None:
    """Where an operator has set the threshold it stays, and an alarm is told once."""
    if not tally.alarm or current.alarm:
        return None
    says = f"alarm: labels show that {current.threshold:g}, set by an operator, misses the target"
    return msgspec.structs.replace(
        draft, method="operator", model=current.model, alarm=True, reason=says
    )


# -- step -----------------------------------------------------------------------------------------


def _stepped(
    tally: Tally, policy: LearnPolicy, draft: ThresholdRecord, current: ThresholdRecord
) -> ThresholdRecord | None:
    """Precision of blocked items below 0.8: up 0.05, above 0.95: down 0.05. No guarantee."""
    seen = tally.since
    missing = policy.labels_per_step - seen.decisions
    if current.status == "proposed":
        return None
    if missing > 0 or seen.precision is None:
        reason = f"{missing} more labels of blocked items needed"
        waits = msgspec.structs.replace(draft, labels_needed=missing, reason=reason)
        return waits if current.method != "step" else None
    to = _step_from(draft.threshold, seen.precision, policy, tally.harm)
    reason = f"precision {seen.precision:.3f} of {seen.decisions} blocked items"
    obstacle = _obstacle(tally, policy)
    if obstacle:
        to, reason = draft.threshold, obstacle
    draft = msgspec.structs.replace(
        draft, reason=reason, labels_needed=policy.labels_per_step, since_ms=tally.settled_ms
    )
    if to == draft.threshold:
        return draft
    return _moved(draft, tally, to, ask=policy.approval)


def _step_from(threshold: float, precision: float, policy: LearnPolicy, harm: str) -> float:
    lowest, highest = policy.bounds.get(harm, BOUNDS)
    if precision < _STEP_UP_BELOW:
        return max(threshold, min(round(threshold + _STEP, 6), highest))
    if precision > _STEP_DOWN_ABOVE:
        return min(threshold, max(round(threshold - _STEP, 6), lowest))
    return threshold


# -- recall ---------------------------------------------------------------------------------------


def _with_recall(draft: ThresholdRecord, tally: Tally, policy: LearnPolicy) -> ThresholdRecord:
    """The draft with what is known of recall at its threshold: nothing, if weights are wrong."""
    if tally.too_rare_below or tally.too_rare:
        return msgspec.structs.replace(draft, recall=None, recall_low=None, recall_high=None)
    at = min(bin_of(draft.threshold), len(GRID) - 1)  # the next of GRID, where it is none itself
    counts, ratio = tally.counts[0], Goal.of(policy).ratio
    largest = 1.0 if GRID[at] >= policy.bounds.get(tally.harm, BOUNDS)[0] else ratio
    low, high = recall_interval(counts, tally.weights, at, policy.delta, largest, ratio)
    return msgspec.structs.replace(
        draft, recall=estimated(tally.counts[0], tally.weights, "recall", at),
        recall_low=low, recall_high=high,
    )  # fmt: skip


def recall_interval(
    counts: IntArray, weights: FloatArray, at: int, delta: float, largest: float, ratio: float
) -> tuple[float, float]:
    """Recall at GRID[at] lies in it with probability 1 - delta, however often it is asked.

    The recalls that neither bet, on more and on less, has refuted at delta/2. counts: (B, 2, L).
    largest, ratio: the highest possible weight above GRID[at], and below.
    """
    over = counts[at + 1 :, 1].sum(axis=0)  # (L,)
    under = counts[: at + 1, 1].sum(axis=0)
    inside = _RECALLS[1:-1, None, None]  # (R, 1, 1)
    up = np.minimum(weights, largest)[:, None] * STAKES  # (L, K)
    down = weights[:, None] * STAKES
    more = over @ np.log1p(up * (1.0 - inside) / (inside * ratio))  # (R, K)
    more += under @ np.log1p(-down / ratio)
    less = under @ np.log1p(down * inside / ((1.0 - inside) * largest))
    less += over @ np.log1p(-up / largest)
    refuted = -math.log(delta / 2.0)
    too_low = _RECALLS[1:-1][mixed(more) >= refuted]
    too_high = _RECALLS[1:-1][mixed(less) >= refuted]
    return float(max(too_low, default=0.0)), float(min(too_high, default=1.0))
