"""The log-prob classifier's arithmetic and how it asks its helper."""

import math
import random
import re
from collections.abc import Callable

import numpy as np
import pytest

from detectors.logprob import (
    Affine,
    Aggregation,
    LogProb,
    Splitter,
    accuracy,
    aggregated,
    cross_entropy,
    log_mean_exp,
    log_sigmoid,
    log_sum_exp,
    probabilities,
    probability,
    text_part,
)
from detectors.prompts import PROMPTS, ClassPrompts, body, prefix
from detectors.protocol import Passage, Turn

PROMPTS_OF_TWO = ClassPrompts(("Harmful.",), ("Harmless.",))


def words(prompt: str) -> list[str]:
    """Tokens of the fakes: a word with the space before it, or one other character."""
    return re.findall(r" ?\w+|\s|[^\w\s]", prompt)


class Fake:
    """Likes some words better behind some beginnings of a prompt; counts what it is asked."""

    def __init__(self, liking: Callable[[str, str], float], drop_first: bool = False) -> None:
        self.liking = liking
        self.drop_first = drop_first
        self.asked: list[list[str]] = []

    def __call__(self, prompts: list[str]) -> list[list[float]]:
        self.asked.append(prompts)
        return [self._row(prompt) for prompt in prompts]

    def _row(self, prompt: str) -> list[float]:
        start = prompt.split("\n", maxsplit=1)[0]
        row = [self.liking(start, word) for word in words(prompt)]
        return row[1:] if self.drop_first else row


class Counting(Fake):
    """The same with tokens of its own."""

    def split(self, prefix: str, prompt: str) -> int:
        return len(words(prefix))


def bombs(start: str, word: str) -> float:
    """A bomb is likelier behind the harmful prompt, a cake behind the other, 2 nats each."""
    if "bomb" in word:
        return -1.0 if start.startswith("Harmful") else -3.0
    if "cake" in word:
        return -3.0 if start.startswith("Harmful") else -1.0
    return -2.0


def test_the_likelier_class_gets_the_probability() -> None:
    """P_pos is the sigmoid of the difference of the two sums, in the order of the texts."""
    found = LogProb(Fake(bombs), PROMPTS_OF_TWO, aggregation="sum").classify_batch(
        ["a bomb", "a cake", "a stone", "bomb bomb cake"]
    )
    expected = [1 / (1 + math.exp(-d)) for d in (2.0, -2.0, 0.0, 2.0)]
    assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("aggregation", "margin"),
    [("sum", 2.0), ("token", 2.0 / 2), ("byte", 2.0 / len(b" a bomb"))],
)
def test_aggregations_divide_by_tokens_or_bytes_of_the_text_alone(
    aggregation: Aggregation, margin: float
) -> None:
    """The class prompt's own tokens and bytes count for nothing, however long it is."""
    long = ClassPrompts(("Harmful " + "very " * 50,), ("Harmless",))
    margins = LogProb(Fake(bombs), long, aggregation=aggregation).margins(
        [Passage("a bomb", "", ())]
    )
    assert margins == pytest.approx([margin])


def test_a_mean_does_not_grow_with_the_text() -> None:
    """The same words ten times over: the sum's margin is tenfold, the mean's is as it was."""
    texts = [Passage(" ".join(["bomb"] * n), "", ()) for n in (1, 10)]
    once, tenfold = LogProb(Fake(bombs), PROMPTS_OF_TWO, aggregation="sum").margins(texts)
    assert tenfold == pytest.approx(10 * once)
    once, tenfold = LogProb(Fake(bombs), PROMPTS_OF_TWO, aggregation="token").margins(texts)
    assert tenfold == pytest.approx(once)


def test_bytes_are_utf8() -> None:
    """A character of three bytes counts three."""
    helper = Fake(lambda start, word: -3.0 if start.startswith("Harmful") else -1.0)
    (margin,) = LogProb(helper, PROMPTS_OF_TWO, aggregation="byte").margins([Passage("日", "", ())])
    assert margin == pytest.approx(-2.0 / 4)  # the space before it, and three


def test_several_prompts_are_averaged_as_probabilities() -> None:
    """log mean exp, not the mean of logs: one prompt that fits is enough to say so."""
    helper = Fake(lambda start, word: {"H1": -1.0, "H2": -9.0, "N1": -4.0}[start[:2]])
    prompts = ClassPrompts(("H1", "H2"), ("N1",))
    (margin,) = LogProb(helper, prompts, aggregation="token").margins([Passage("x", "", ())])
    assert margin == pytest.approx(math.log((math.exp(-1) + math.exp(-9)) / 2) + 4)


@pytest.mark.parametrize("fake", [Fake, Counting])
@pytest.mark.parametrize("drop_first", [False, True])
def test_with_or_without_tokens_and_first_token_it_is_the_same(
    fake: type[Fake], drop_first: bool
) -> None:
    """A helper that leaves out what nothing precedes moves no score; nor does one that splits."""
    if fake is Counting and drop_first:
        pytest.skip("a splitter counts log-probs, this one counts words")
    helper = fake(bombs, drop_first)
    found = LogProb(helper, PROMPTS_OF_TWO, aggregation="sum").margins(
        [Passage("a bomb", "So: ", (Turn("user", "Bake a cake!"),))]
    )
    assert found == pytest.approx([2.0])


def test_a_splitter_is_never_asked_for_a_prefix_alone() -> None:
    """It knows its tokens; others are asked for each prefix once a chunk."""
    texts = [f"text {i}" for i in range(4)]
    splits, plain = Counting(bombs), Fake(bombs)
    assert isinstance(splits, Splitter)
    LogProb(splits, PROMPTS_OF_TWO).classify_batch(texts)
    LogProb(plain, PROMPTS_OF_TWO).classify_batch(texts)
    assert [len(asked) for asked in splits.asked] == [2 * 4]
    assert [len(asked) for asked in plain.asked] == [2 * 4 + 2]


def test_the_conversation_stands_before_the_text_and_is_not_scored() -> None:
    """A question about bombs is in the prompt, and its words score for neither class."""
    helper = Fake(bombs)
    passage = Passage("a stone", "", (Turn("user", "bomb bomb bomb"),))
    assert LogProb(helper, PROMPTS_OF_TWO).classify([passage]) == [0.5]
    assert all("> bomb bomb bomb" in prompt for prompt in helper.asked[0])


def test_chunks_bound_what_is_held_and_change_nothing() -> None:
    """At most `chunk` texts are prompts at a time, in whatever order they come."""
    texts = [random.Random(i).choice(["bomb", "cake", "stone"]) * (1 + i % 3) for i in range(50)]
    helper = Fake(bombs)
    small = LogProb(helper, PROMPTS_OF_TWO, chunk=7).classify_batch(texts)
    assert small == LogProb(Fake(bombs), PROMPTS_OF_TWO, chunk=1000).classify_batch(texts)
    assert max(len(asked) for asked in helper.asked) <= 7 * 2 + 2


def test_a_bar_goes_to_stderr_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """Results may be piped."""
    LogProb(Fake(bombs), PROMPTS_OF_TWO, progress=True).classify_batch(["bomb"] * 3)
    assert capsys.readouterr().out == ""


def test_calibration_is_applied_to_the_margin() -> None:
    """sigmoid(slope * margin + intercept)."""
    classifier = LogProb(
        Fake(bombs), PROMPTS_OF_TWO, aggregation="sum", calibration=Affine(0.5, -1.0)
    )
    assert classifier.classify_batch(["bomb"]) == pytest.approx([0.5])


def test_no_texts_give_no_probabilities() -> None:
    """An empty list is answered with one, and the helper is not asked."""
    helper = Fake(bombs)
    assert LogProb(helper, PROMPTS_OF_TWO).classify_batch([]) == []
    assert helper.asked == []


def test_an_empty_text_is_an_error() -> None:
    """There is nothing to score, so there is no probability, 0.5 least of all."""
    with pytest.raises(ValueError, match="empty text"):
        LogProb(Fake(bombs), PROMPTS_OF_TWO).classify_batch(["bomb", ""])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 0.5])
def test_a_log_prob_that_is_none_is_an_error(bad: float) -> None:
    """NaN, an infinity or a positive number never becomes a probability."""
    helper = Counting(lambda start, word: bad if "bomb" in word else -1.0)
    with pytest.raises(ValueError, match="NaN, infinite or positive"):
        LogProb(helper, PROMPTS_OF_TWO).classify_batch(["a bomb"])


def test_nan_in_the_prompt_is_an_error_too() -> None:
    """NaN equals nothing, so the prompt's tokens are not the same with the text behind them."""
    helper = Fake(lambda start, word: math.nan if word == "Harmful" else -1.0)
    with pytest.raises(ValueError, match="score otherwise"):
        LogProb(helper, PROMPTS_OF_TWO).classify_batch(["a bomb"])


def test_too_few_lists_are_an_error() -> None:
    """An answer for fewer prompts cannot be told apart from answers in another order."""
    with pytest.raises(ValueError, match="1 lists for 4 prompts"):
        LogProb(lambda prompts: [[-1.0]], PROMPTS_OF_TWO).classify_batch(["a bomb"])


def test_the_split_is_checked() -> None:
    """What is cut off must be the prompt's own log-probs, and something must be left."""
    assert text_part([-1.0, -2.0], [-1.04, -2.0, -3.0], 0.1) == [-3.0]
    with pytest.raises(ValueError, match="score otherwise"):
        text_part([-1.0, -2.0], [-1.0, -2.5, -3.0], 0.1)
    with pytest.raises(ValueError, match="none for the text"):
        text_part([-1.0, -2.0], [-1.0, -2.0], 0.1)


@pytest.mark.parametrize("prompts", [((), ("a",)), (("a",), ()), (("a", ""), ("b",))])
def test_each_class_needs_a_prompt(prompts: tuple[tuple[str, ...], tuple[str, ...]]) -> None:
    """A class without words has no score."""
    with pytest.raises(ValueError, match="needs a prompt"):
        LogProb(Fake(bombs), ClassPrompts(*prompts))


def test_two_scores_far_below_zero() -> None:
    """At -10,000 nats exp is 0; the difference is what counts."""
    with np.errstate(all="raise", under="ignore"):
        assert probability(-1e4, -1e4) == 0.5
        assert probability(-1e4, -1e4 - 2) == pytest.approx(1 / (1 + math.exp(-2)))
        assert probability(-1e4, 0.0) == 0.0
        assert probability(0.0, -1e4) == 1.0
        assert probability(-60.0, 40.0) == pytest.approx(math.exp(-100))
    assert log_sum_exp(-1e4, -1e4) == pytest.approx(-1e4 + math.log(2))
    assert log_sum_exp(-60.0, 40.0) == 40.0
    assert log_sum_exp(-2.0, -1.0) == pytest.approx(math.log(math.exp(-2) + math.exp(-1)))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_that_are_no_numbers_are_errors(bad: float) -> None:
    """No NaN and no infinity becomes a probability anywhere."""
    for scores in ((bad, -1.0), (-1.0, bad), (bad, bad)):
        with pytest.raises(ValueError, match="not finite"):
            probability(*scores)
        with pytest.raises(ValueError, match="not finite"):
            log_sum_exp(*scores)
    with pytest.raises(ValueError, match="not finite"):
        probabilities(np.array([0.0, bad]))
    with pytest.raises(ValueError, match="not finite"):
        log_mean_exp(np.array([[0.0, bad]]))


def test_log_mean_exp_by_its_definition_and_far_from_it() -> None:
    """As written where exp can be, and right at both ends of what it cannot."""
    rows = np.array([[-1.0, -3.0], [-60.0, 40.0], [-1e4, -1e4], [800.0, 799.0]])
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        found = log_mean_exp(rows)
    assert found[0] == pytest.approx(math.log((math.exp(-1) + math.exp(-3)) / 2))
    assert found[1] == pytest.approx(40 - math.log(2))
    assert found[2] == -1e4
    assert found[3] == pytest.approx(800 + math.log((1 + math.exp(-1)) / 2))
    with pytest.raises(ValueError, match="no scores"):
        log_mean_exp(np.empty((1, 0)))


def test_log_sigmoid_keeps_what_the_probability_loses() -> None:
    """log P of a margin of -1,000 is -1,000, though P itself is 0."""
    assert log_sigmoid(np.array([-1e3, 0.0, 40.0])) == pytest.approx(
        [-1e3, -math.log(2), -math.exp(-40)]
    )


def test_an_empty_or_impossible_text_has_no_score() -> None:
    """No log-probs, no bytes: an error each."""
    with pytest.raises(ValueError, match="no score"):
        aggregated([], "sum", 3)
    with pytest.raises(ValueError, match="no score"):
        aggregated([-1.0], "byte", 0)


def test_accuracy_counts_one_half_as_positive() -> None:
    """P_pos >= 0.5 says 1."""
    assert accuracy([0.5, 0.49999, 0.9, 0.1], [1, 0, 0, 0]) == 0.75
    assert accuracy([0.5], [0]) == 0.0


def test_cross_entropy_is_the_formula_and_finite_at_the_ends() -> None:
    """The mean of -[y log p + (1-y) log(1-p)]; a sure and wrong verdict costs 36 nats."""
    given, labels = [0.9, 0.2, 0.6], [1, 0, 0]
    expected = -(math.log(0.9) + math.log(0.8) + math.log(0.4)) / 3
    assert cross_entropy(given, labels) == pytest.approx(expected, rel=1e-12)
    with np.errstate(all="raise"):
        assert cross_entropy([1.0, 0.0], [1, 0]) == pytest.approx(0.0, abs=1e-15)
        assert cross_entropy([0.0, 1.0], [1, 0]) == pytest.approx(36.04, abs=0.01)


@pytest.mark.parametrize("figure", [accuracy, cross_entropy])
@pytest.mark.parametrize(
    ("given", "labels"),
    [([], []), ([0.5], []), ([0.5, 0.5], [1]), ([math.nan], [1]), ([1.1], [1]), ([-0.1], [0]),
     ([0.5], [2]), ([0.5], [-1]), ([0.5], [0.5])],
)  # fmt: skip
def test_figures_of_nonsense_are_errors(
    figure: Callable[[list[float], list[int]], float], given: list[float], labels: list[int]
) -> None:
    """Nothing, different lengths, NaN, no probability, no label."""
    with pytest.raises(ValueError, match=r"probabilit|label"):
        figure(given, labels)


def test_shipped_prompts_cover_every_column() -> None:
    """Each harm and `harmful` has as many prompts of either class."""
    from detectors.harms import COLUMNS

    assert tuple(PROMPTS) == COLUMNS
    for prompts in PROMPTS.values():
        assert len(prompts.harmful) == len(prompts.harmless) > 1


def test_a_prompt_is_what_its_page_says() -> None:
    """Turns, text before and text, each quoted under its title."""
    passage = Passage("It is\nfine.", "Well. ", (Turn("user", "How?"), Turn("robot", "Hm.")))
    assert prefix("Harmful.", passage) + body(passage.text) == (
        "Harmful.\n\n### User\n> How?\n### Other\n> Hm.\n### Answer so far\n> Well. \n"
        "### Answer\n> It is\n> fine."
    )


def test_long_surroundings_are_cut_and_the_text_never() -> None:
    """The newest user turn goes first; of a long one both ends stay; `before` keeps its end."""
    from detectors.prompts import Limits

    turns = (Turn("user", "old " * 50), Turn("user", "a" * 60 + "b" * 60), Turn("assistant", "c"))
    whole = prefix("P", Passage("t", "x" * 30 + "end", turns), Limits(80, 5))
    assert "old" not in whole
    assert "> " + "a" * 39 + " … " + "b" * 38 + "\n" in whole
    assert "> xxend\n" in whole
    assert "x" * 33 not in whole
    assert "> short\n" in prefix("P", Passage("t", "short", ()), Limits(80, 7))
    assert body("y" * 100_000).count("y") == 100_000
