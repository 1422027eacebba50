"""scores x thresholds x policy -> verdict. Pure.

What could not be judged never reads as allow: see `_unavailable`.
"""

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from detectors.harms import COLUMNS, HARMFUL, HARMS, OTHER, THRESHOLD_KEYS
from worker.events import Verdict
from worker.settings import Action, TenantPolicy
from worker.thresholds import InForce

_SEVERITY: dict[Action, int] = {"block": 2, "revise": 1, "flag": 0}
WITHOUT_LOGPROB = "; logprob unavailable"  # ends a reason: the second look did not come in time
ZEROS = (0.0,) * len(COLUMNS)
_UNKNOWN = (float("nan"),) * len(COLUMNS)


class Judgement(NamedTuple):
    """What the detectors say about one segment."""

    scores: tuple[float, ...] | None  # (7,) as harms.COLUMNS; NaN: could not be judged; None: none
    stage: str  # what settled it
    cause: str = ""  # why there are no scores, or where they come from
    queue_ms: float = 0.0
    prefilter_ms: float = 0.0
    tokenise_ms: float = 0.0
    infer_ms: float = 0.0
    forced: bool = False  # blocked whatever the policy: a stream that lost a part
    unasked: bool = False  # a second look was due and did not come: the detectors' scores stand


class Ruling(NamedTuple):
    """The verdict on one segment, and why."""

    verdict: Verdict
    harm: str | None
    stage: str
    reason: str
    scores: dict[str, float]
    harmful: float | None


def is_probability(scores: Iterable[float]) -> bool:
    """Whether every score is a number in 0..1; NaN is not."""
    return all(0.0 <= score <= 1.0 for score in scores)


def keyword_scores(harms: Collection[str]) -> tuple[float, ...]:
    """(7,) 1 for each harm that a blocking keyword names, and for `harmful`."""
    return (*(1.0 if harm in harms else 0.0 for harm in HARMS), 1.0)


def combine(judgements: Sequence[Judgement]) -> Judgement:
    """The judgement of a segment from those of the windows that it lies in, its own first.

    The highest score per harm counts, and NaN above all. A gap judges nothing before it. What a
    keyword blocks stays blocked: a harm or a doubt beside it could only excuse it.
    """
    own = judgements[0]
    if own.stage == "keyword":
        return own
    for judgement in judgements[1:]:
        if own.scores is None or own.forced or judgement.forced:
            return own
        if judgement.scores is None:
            return own._replace(scores=None, stage="policy", cause=judgement.cause)
        highest = tuple(_highest(a, b) for a, b in zip(own.scores, judgement.scores, strict=True))
        if highest != own.scores:
            own = own._replace(scores=highest, stage=judgement.stage)
        own = own._replace(unasked=own.unasked or judgement.unasked)
    return own


def _highest(a: float, b: float) -> float:
    return max(a, b) if a == a and b == b else float("nan")  # noqa: PLR0124 - NaN is unequal to itself


def rule(judgement: Judgement, in_force: InForce, policy: TenantPolicy) -> Ruling:
    """The verdict. A score equal to its threshold does not count, one above it does."""
    if judgement.forced:
        return Ruling("block", None, "policy", judgement.cause, {}, None)
    scores = judgement.scores or _UNKNOWN
    known = {h: s for h, s in zip(COLUMNS, scores, strict=True) if 0.0 <= s <= 1.0}
    harmful = known.pop(HARMFUL, None)
    worst = _worst(scores, in_force.values, policy)
    action = policy.actions.get(worst.harm, "block") if worst else None
    doubt = [h for h, s in zip(THRESHOLD_KEYS, scores, strict=True) if not 0.0 <= s <= 1.0]
    if action != "block" and any(policy.fail_mode.get(h, "closed") == "closed" for h in doubt):
        return Ruling("block", None, "policy", "unavailable", known, harmful)
    aside = f"; unavailable, fail_mode open: {', '.join(doubt)}" if doubt else ""
    aside += WITHOUT_LOGPROB if judgement.unasked else ""
    if worst is None or action is None:
        stage = "policy" if doubt else judgement.stage
        return Ruling("allow", None, stage, f"below thresholds{aside}", known, harmful)
    verdict: Verdict = "allow" if action == "flag" else action
    reason = f"{'flagged: ' if action == 'flag' else ''}{worst.says}{aside}"
    return Ruling(verdict, worst.harm, judgement.stage, reason, known, harmful)


class _Over(NamedTuple):
    """A harm above its threshold."""

    harm: str
    score: float
    threshold: float

    @property
    def says(self) -> str:
        name = HARMFUL if self.harm == OTHER else self.harm
        return f"{name} {self.score:.3f} above {self.threshold:.3f}"


def _worst(
    scores: tuple[float, ...], thresholds: tuple[float, ...], policy: TenantPolicy
) -> _Over | None:
    """Of the harms above their thresholds the one with the gravest action, then the most above."""
    triples = zip(THRESHOLD_KEYS, scores, thresholds, strict=True)
    over = [_Over(*it) for it in triples if it[2] < it[1] <= 1.0]  # NaN compares false
    if len(over) > 1 and over[-1].harm == OTHER:
        over.pop()  # `other` is for what no type explains
    if not over:
        return None
    return max(
        over,
        key=lambda it: (_SEVERITY[policy.actions.get(it.harm, "block")], it.score - it.threshold),
    )
