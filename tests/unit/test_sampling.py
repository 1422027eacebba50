"""sampling.py: which decisions reviewers are shown, and with what probability."""

import math
from collections.abc import Iterable
from typing import Any

import msgspec
import pytest
from pydantic import SecretStr

from detectors.harms import DEFAULT_THRESHOLDS
from tests.lanes import delta, rules, settings
from tests.reviews import CLAIM, judged, label
from worker.decide import Judgement
from worker.events import Decision, Review, Timing
from worker.feedback import Evidence
from worker.sampling import Picker, allowance, factor, roll, stratum
from worker.settings import LearnPolicy, ReviewPolicy, Settings, TenantPolicy
from worker.streams import Lane, Output

THRESHOLDS = tuple(DEFAULT_THRESHOLDS.values())
HOUR_MS = 3_600_000


def decision(number: int, score: float = 0.0, **fields: Any) -> Decision:
    """One of tenant `a`, at the start of an hour."""
    scores = dict.fromkeys(list(DEFAULT_THRESHOLDS)[:-1], 0.0) | {"violence": score}
    return msgspec.structs.replace(
        Decision(
            f"in-0-{number}-0", "s", "a", "text", 0, 0, "allow", 0, 9, 9, 0, False, None, scores,
            score, "toxicity", "", "", 0, "", None, 10 * HOUR_MS, Timing(),
        ),
        **fields,
    )  # fmt: skip


LEAST = LearnPolicy(min_picked=0.0625, min_picked_below=0.001)


def picker(partitions: int = 1, **review: Any) -> Picker:
    policy = TenantPolicy(review=ReviewPolicy(**review), learn=LEAST)
    return Picker(Settings(tenants={"a": policy}), 0, partitions)


def pick_all(it: Picker, decisions: Iterable[Decision]) -> list[float | None]:
    picks = [it.pick(one, THRESHOLDS) for one in decisions]
    return [pick and pick.picked_with for pick in picks]


def test_strata_follow_what_may_block() -> None:
    """Above the threshold or the lowest that could be learnt; half as high; less."""
    plain = TenantPolicy()

    def at(column: int, score: float | None, policy: TenantPolicy = plain) -> str:
        scores: list[float | None] = [0.0] * 7
        scores[column] = score
        return stratum(scores, THRESHOLDS, policy)

    assert [at(0, it) for it in (0.51, 0.5, 0.26, 0.25, None)] == [
        "over", "near", "near", "rest", "rest"
    ]  # fmt: skip
    assert at(6, 0.51) == "over"
    strict = TenantPolicy(learn=LearnPolicy(bounds={"violence": (0.8, 0.9)}))
    assert [at(0, it, strict) for it in (0.71, 0.7)] == ["over", "near"]


@pytest.mark.parametrize(("score", "share"), [(0.9, 0.4), (0.5, 0.1), (0.1, 0.02)])
def test_shares_are_what_is_recorded(score: float, share: float) -> None:
    """Of each stratum its share is picked, and says so."""
    it = picker(over=0.4, near=0.1, rest=0.02, per_hour=10**9)
    found = pick_all(it, (decision(n, score) for n in range(20_000)))
    picked = [probability for probability in found if probability is not None]
    assert set(picked) == {share}
    deviation = math.sqrt(20_000 * share * (1 - share))
    assert abs(len(picked) - 20_000 * share) < 4 * deviation


def test_a_replay_picks_the_same_ones() -> None:
    """The id alone rolls the dice; with a key, nobody else knows how."""
    decisions = [decision(n, 0.5) for n in range(2_000)]
    first = pick_all(picker(near=0.1, rest=0.003, per_hour=10**9), decisions)
    again = pick_all(picker(near=0.1, rest=0.003, per_hour=10**9), reversed(decisions))
    assert first == again[::-1]
    assert any(first)
    assert len({roll(one.decision_id) for one in decisions}) == 2_000
    keyed = Settings(
        review_key=SecretStr("secret"),
        tenants={
            "a": TenantPolicy(
                review=ReviewPolicy(near=0.1, rest=0.003, per_hour=10**9), learn=LEAST
            )
        },
    )
    assert pick_all(Picker(keyed, 0, 1), decisions) != first


def test_the_factor_halves_all_shares_and_keeps_them_above_the_least() -> None:
    """1 up to half of the budget, then as far down as the policy's least lets it, then nothing."""
    policy = TenantPolicy(review=ReviewPolicy(over=0.25, near=0.125, rest=0.0625), learn=LEAST)
    found = [factor(used, 16, policy) for used in range(17)]
    assert found == [1.0] * 9 + [0.5] * 4 + [0.25] * 3 + [0.0]
    tight = TenantPolicy(review=ReviewPolicy(over=0.0625, near=0.125, rest=0.0625), learn=LEAST)
    assert {factor(used, 16, tight) for used in range(16)} == {1.0}
    assert factor(0, 0, policy) == 0.0


def test_the_budget_holds_and_the_probability_stays_true() -> None:
    """No more than the hour's items, and weighted by its inverse a count of what was picked
    estimates the traffic while there was budget; `least` falls with the rest."""
    errors = []
    for run in range(200):
        it = picker(over=0.5, near=0.25, rest=0.0625, per_hour=60)
        decisions = [decision(10_000 * run + n, 0.9 if n % 3 else 0.1) for n in range(500)]
        picks = [it.pick(one, THRESHOLDS) for one in decisions]
        picked = [pick for pick in picks if pick is not None]
        assert len(picked) <= 60
        assert {pick.least for pick in picked} >= {0.5, 0.25}
        assert all(pick.picked_with in {pick.least, pick.least / 8} for pick in picked)
        last = max(n for n, pick in enumerate(picks) if pick is not None)
        seen = last + 1 if len(picked) == 60 else len(picks)  # while there was budget
        errors.append(sum(1 / pick.picked_with for pick in picked) - seen)
    mean = sum(errors) / 200
    deviation = math.sqrt(sum((it - mean) ** 2 for it in errors) / 199 / 200)
    assert abs(mean) < 4 * deviation


def test_a_new_hour_has_its_own_budget() -> None:
    """And a clock that was set back does not open it again."""
    it = picker(over=1.0, near=0.05, rest=0.05, per_hour=3)
    many = [decision(n, 0.9) for n in range(30)]
    later = [decision(100 + n, 0.9, ts_ms=11 * HOUR_MS) for n in range(30)]
    assert sum(p is not None for p in pick_all(it, many)) == 3
    assert sum(p is not None for p in pick_all(it, later)) == 3
    assert not any(pick_all(it, many))


@pytest.mark.parametrize(("per_hour", "partitions"), [(120, 12), (5, 12), (7, 3), (0, 4), (1, 1)])
def test_partitions_share_the_budget(per_hour: int, partitions: int) -> None:
    """Each hour the partitions' allowances add up to it, and each partition gets its turn."""
    table = [
        [allowance(per_hour, hour, p, partitions) for p in range(partitions)]
        for hour in range(490_000, 490_000 + partitions)
    ]
    assert {sum(row) for row in table} == {per_hour}
    assert {sum(column) for column in zip(*table, strict=True)} == {per_hour}


def test_tenants_without_a_policy_share_that_of_default() -> None:
    """Names come from outside: each its own budget would be none."""
    default = TenantPolicy(
        review=ReviewPolicy(near=0.05, rest=0.05, over=1.0, per_hour=4), learn=LEAST
    )
    it = Picker(Settings(tenants={"default": default}), 0, 1)
    found = pick_all(it, (decision(n, 0.9, tenant=f"t{n}") for n in range(200)))
    assert sum(p is not None for p in found) == 4


def test_what_no_model_scored_is_not_picked() -> None:
    """No threshold could change it: keywords, short text, gaps; and empty text says nothing."""
    it = picker(over=1.0, near=1.0, rest=1.0, per_hour=100)
    unscored: tuple[dict[str, Any], ...] = (
        {"stage": "keyword"}, {"stage": "short"}, {"stage": "policy"}, {"scores": {}}, {"end": 0},
    )  # fmt: skip
    for fields in unscored:
        assert it.pick(decision(1, 0.9, **fields), THRESHOLDS) is None
    assert it.pick(decision(1, 0.9, stage="cache"), THRESHOLDS) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("review", "names"), [({"over": 0.01}, "review.over.*learn.min_picked,"),
                          ({"over": 0.0}, "review.over.*review.per_hour = 0"),
                          ({"rest": 1e-5}, "review.rest.*learn.min_picked_below"),
                          ({"near": 0.0}, "review.near.*learn.min_picked_below"),
                          ({"over": 0.2}, "review.rest.*100 times rarer than review.over.*is 50")],
)  # fmt: skip
def test_a_share_is_not_rarer_than_the_learner_takes(review: dict[str, Any], names: str) -> None:
    """Its labels could not be weighed: nothing would be certified, or nothing said of recall."""
    with pytest.raises(ValueError, match=names):
        TenantPolicy(review=ReviewPolicy(**review))
    TenantPolicy(review=ReviewPolicy(per_hour=0, **review))
    TenantPolicy(review=ReviewPolicy(over=0.2), learn=LearnPolicy(min_picked_below=0.0005))


@pytest.mark.parametrize("over", [0.3, 0.7, 1.0])
@pytest.mark.parametrize("ratio", [3.0, 7.0, 49.7])
def test_every_share_that_is_allowed_can_be_weighed(over: float, ratio: float) -> None:
    """Whatever the budget makes of it: no pick counts as too rare in the learner's evidence."""
    policy = TenantPolicy(
        review=ReviewPolicy(over=over, near=over / 2, rest=over / ratio),
        learn=LearnPolicy(min_picked=0.03, min_picked_below=0.03 / ratio),
    )
    evidence = Evidence(lambda _: policy.learn)
    for used in range(99):
        scale = factor(used, 99, policy)
        for name, score in (("over", 0.9), ("near", 0.4), ("rest", 0.1)):
            number, share = 10 * used + round(10 * score), getattr(policy.review, name) * scale
            of = judged(number, score, picked_with=share, least=policy.review.over * scale)
            told = label(number, score=score, picked_with=share)
            assert evidence.add(told, of, number) == (True, "")
    tally = evidence.snapshot(CLAIM)
    assert (tally.too_rare, tally.too_rare_below) == (0, 0)


def test_review_shares_do_not_change_the_policy_digest() -> None:
    """Scores are cached under it, and it says what decided."""
    assert TenantPolicy(review=ReviewPolicy(near=0.1)).digest() == TenantPolicy().digest()


# -- in a lane ------------------------------------------------------------------------------------


def reviewed_lane(**review: Any) -> Lane:
    policy = TenantPolicy(review=ReviewPolicy(**review), learn=LEAST)
    chosen = settings(tenants={"default": policy})
    return Lane("in", 0, rules(chosen, partitions=1))


def run(lane: Lane, texts: Iterable[str], wall_ms: int = 10 * HOUR_MS) -> Output:
    """One stream for each text, all decided; what the transaction publishes."""
    for number, text in enumerate(texts):
        record = delta(
            f"{wall_ms}-{number}", 0, text, True, context=[{"role": "user", "content": "Q"}]
        )
        segments = lane.feed(lane.position, wall_ms, b"k", record, 1.0, wall_ms)
        for segment in segments:
            segment.judgement = Judgement((0.2,) * 7, "toxicity")
            lane.advance(segment.stream, 1.0, wall_ms)
    output = lane.take(1.0, drain=True)
    assert output is not None
    return output


def test_review_item_is_the_decision_with_what_was_judged() -> None:
    """In the transaction of its decision; half a surrogate pair is what it was judged as."""
    text = "A first sentence here. And the second \ud800 one."
    output = run(reviewed_lane(near=1.0, rest=1.0), [text])
    assert [it.text for it in output.reviews] == [
        "A first sentence here. ",
        "And the second � one.",
    ]
    first, second = output.reviews
    assert (first.before, second.before) == ("", first.text)
    assert [(turn.role, turn.content) for turn in second.context] == [("user", "Q")]
    assert second.picked_with == 1.0
    for item, made in zip(output.reviews, output.decisions, strict=True):
        written = msgspec.json.decode(msgspec.json.encode(item))
        assert msgspec.json.decode(msgspec.json.encode(made)).items() <= written.items()
        assert isinstance(item, Review)


def test_the_count_survives_a_restart_and_is_forgotten_when_it_is_over() -> None:
    """It is journalled with the picks; in a later hour a tombstone follows."""
    lane = reviewed_lane(near=1.0, rest=1.0, per_hour=5)
    output = run(lane, ["Some text."] * 3)
    assert len(output.reviews) == 3
    journal = {key: (n, record) for n, (key, record) in enumerate(output.journal) if record}
    assert "" in journal
    successor = reviewed_lane(near=1.0, rest=1.0, per_hour=5)
    successor.load(output.offset, journal, 2.0)
    assert len(run(successor, ["Some text."] * 9, 10 * HOUR_MS + 1).reviews) == 2
    last = run(successor, ["Bye."], 11 * HOUR_MS)
    assert len(last.reviews) == 1
    lane.done(output, range(len(output.journal)))
    rarely = reviewed_lane(near=0.002, rest=0.002)
    rarely.load(output.offset, journal, 2.0)
    assert "" not in dict(run(rarely, ["Some text."]).journal)
    over = run(rarely, ["Some text."], 11 * HOUR_MS).journal
    assert dict(over)[""] is None


def test_lanes_without_a_topic_to_publish_to_pick_nothing() -> None:
    """In process and on files nobody reviews."""
    chosen = settings(tenants={"default": TenantPolicy(review=ReviewPolicy(rest=1.0, near=1.0))})
    assert not run(Lane("in", 0, rules(chosen)), ["Some text."]).reviews
