"""decide.py: scores x thresholds x policy -> verdict."""

import math

import pytest

from detectors.harms import DEFAULT_THRESHOLDS, HARMS, THRESHOLD_KEYS
from worker.decide import Judgement, combine, keyword_scores, rule
from worker.settings import TenantPolicy
from worker.thresholds import InForce

IN_FORCE = InForce(tuple(DEFAULT_THRESHOLDS[harm] for harm in THRESHOLD_KEYS), 3)
NAN = float("nan")


def judged(**scores: float) -> Judgement:
    """A judgement with these scores, the others 0.01."""
    columns = [scores.get(harm, 0.01) for harm in (*HARMS, "harmful")]
    return Judgement(tuple(columns), "toxicity")


def test_score_at_the_threshold_passes_and_one_above_blocks() -> None:
    """`above` means above."""
    at = DEFAULT_THRESHOLDS["violence"]
    assert rule(judged(violence=at), IN_FORCE, TenantPolicy()).verdict == "allow"
    above = rule(judged(violence=math.nextafter(at, 1)), IN_FORCE, TenantPolicy())
    assert (above.verdict, above.harm) == ("block", "violence")


def test_harmful_alone_blocks_as_other() -> None:
    """Where no type reaches its threshold but `harmful` does, the harm is `other`."""
    ruling = rule(judged(harmful=0.95), IN_FORCE, TenantPolicy())
    assert (ruling.verdict, ruling.harm) == ("block", "other")


def test_a_type_explains_more_than_other() -> None:
    """`other` is only named when no type is above its threshold."""
    assert rule(judged(violence=0.71, harmful=1.0), IN_FORCE, TenantPolicy()).harm == "violence"


def test_scores_are_present_on_passes() -> None:
    """Evidence needs them: all six and `harmful`."""
    ruling = rule(judged(violence=0.2), IN_FORCE, TenantPolicy())
    assert list(ruling.scores) == list(HARMS)
    assert (ruling.scores["violence"], ruling.harmful) == (0.2, 0.01)


def test_gravest_action_wins_over_the_largest_margin() -> None:
    """A flagged harm far above must not hide a blocked one just above."""
    policy = TenantPolicy(actions={"violence": "flag", "hate_speech": "revise"})
    both = judged(violence=0.99, hate_speech=0.81)
    assert rule(both, IN_FORCE, policy).verdict == "revise"
    three = judged(violence=0.99, hate_speech=0.99, sexual_content=0.76)
    assert rule(three, IN_FORCE, policy).harm == "sexual_content"


def test_a_second_look_that_did_not_come_is_said_last() -> None:
    """Of the segment's own window, and of a later one that it lies in; on passes and on blocks."""
    unasked = judged(violence=0.2)._replace(unasked=True)
    for judgement in (
        unasked,
        combine([judged(), unasked]),
        combine([unasked, judged(violence=0.9)]),
        combine([judged(violence=0.9), judged(), unasked]),
    ):
        reason = rule(judgement, IN_FORCE, TenantPolicy()).reason
        assert reason.endswith("; logprob unavailable")
    whole = rule(combine([judged(), judged()]), IN_FORCE, TenantPolicy())
    assert whole.reason == "below thresholds"


def test_flag_allows_and_says_so() -> None:
    """A flagged segment is shown; its decision names the harm."""
    ruling = rule(judged(violence=0.9), IN_FORCE, TenantPolicy(actions={"violence": "flag"}))
    assert (ruling.verdict, ruling.harm) == ("allow", "violence")
    assert ruling.reason.startswith("flagged")


@pytest.mark.parametrize("bad", [NAN, -0.1, 1.1, float("inf"), float("-inf")])
@pytest.mark.parametrize("column", range(7))
def test_a_score_that_is_no_probability_never_reads_as_allow(bad: float, column: int) -> None:
    """NaN is below every threshold: it must block all the same, in every column."""
    scores = [0.01] * 7
    scores[column] = bad
    ruling = rule(Judgement(tuple(scores), "toxicity"), IN_FORCE, TenantPolicy())
    assert (ruling.verdict, ruling.reason) == ("block", "unavailable")


def test_no_scores_block() -> None:
    """A failed detector blocks with reason `unavailable`."""
    ruling = rule(Judgement(None, "policy"), IN_FORCE, TenantPolicy())
    assert (ruling.verdict, ruling.reason, ruling.scores) == ("block", "unavailable", {})


def test_fail_mode_open_is_per_harm() -> None:
    """Only the harms that a tenant opened may pass in doubt."""
    partial = TenantPolicy(fail_mode={"violence": "open"})
    assert rule(Judgement(None, ""), IN_FORCE, partial).verdict == "block"
    without_violence = Judgement((NAN, *[0.01] * 6), "toxicity")
    ruling = rule(without_violence, IN_FORCE, partial)
    assert (ruling.verdict, "violence" in ruling.reason) == ("allow", True)
    assert "violence" not in ruling.scores
    without_hate = Judgement((0.01, NAN, *[0.01] * 5), "toxicity")
    assert rule(without_hate, IN_FORCE, partial).verdict == "block"


def test_fail_mode_open_for_all_says_so() -> None:
    """The decision of an unjudged segment that passes names what is missing."""
    policy = TenantPolicy(fail_mode=dict.fromkeys(THRESHOLD_KEYS, "open"))
    ruling = rule(Judgement(None, ""), IN_FORCE, policy)
    assert (ruling.verdict, ruling.stage) == ("allow", "policy")
    assert "fail_mode open" in ruling.reason


def test_a_known_harm_blocks_even_where_doubt_may_pass() -> None:
    """fail_mode open opens nothing that is known to be harmful."""
    policy = TenantPolicy(fail_mode=dict.fromkeys(THRESHOLD_KEYS, "open"))
    ruling = rule(Judgement((NAN, 0.99, *[0.01] * 5), "toxicity"), IN_FORCE, policy)
    assert (ruling.verdict, ruling.harm) == ("block", "hate_speech")


def test_a_keyword_scores_one_for_its_harm_and_for_harmful() -> None:
    """As the contract says; the rest is 0."""
    scores = keyword_scores({"sexual_content"})
    assert scores == (0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0)


def test_combining_windows_takes_the_highest_per_harm() -> None:
    """A segment is as harmful as the worst window that it lies in."""
    own, later = judged(violence=0.2, harmful=0.3), judged(violence=0.9)
    combined = combine([own, later])
    assert combined.scores is not None
    assert (combined.scores[0], combined.scores[-1]) == (0.9, 0.3)


def test_combining_with_a_missing_window_is_missing() -> None:
    """Doubt about one window is doubt about the segment; so is NaN, on either side."""
    assert combine([judged(), Judgement(None, "policy")]).scores is None
    for pair in ([judged(), judged(violence=NAN)], [judged(violence=NAN), judged()]):
        scores = combine(pair).scores
        assert scores is not None
        assert math.isnan(scores[0])
