"""Label maps: a foreign model's logits to log-odds of our columns."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from detectors.calibrate import sigmoid
from detectors.harms import COLUMNS
from detectors.labels import LabelMap, Rule

NAMES = ("neutral", "toxic", "threat")
LOGITS = np.array([[1.0, 2.0, -0.5], [3.0, -1.0, 0.25]])
SOFTMAX = np.exp(LOGITS) / np.exp(LOGITS).sum(axis=1, keepdims=True)
INDEPENDENT = 1 / (1 + np.exp(-LOGITS))


def made(activation: Any = "sigmoid", **columns: Any) -> LabelMap:
    rules = {column: Rule(*given) for column, given in columns.items()}
    return LabelMap(NAMES, activation, rules, negative="neutral", ignored=("toxic", "threat"))


def column(labels: LabelMap, name: str, logits: Any = LOGITS) -> Any:
    return sigmoid(labels.log_odds(logits)[:, COLUMNS.index(name)])


@pytest.mark.parametrize(
    ("activation", "rule", "expected"),
    [
        ("sigmoid", (("threat",),), INDEPENDENT[:, 2]),
        ("sigmoid", (("toxic", "threat"), "max"), INDEPENDENT[:, 1:].max(axis=1)),
        ("sigmoid", (("toxic", "threat"), "noisy-or"), 1 - (1 - INDEPENDENT[:, 1:]).prod(axis=1)),
        ("softmax", (("threat",),), SOFTMAX[:, 2]),
        ("softmax", (("toxic", "threat"), "max"), SOFTMAX[:, 1:].max(axis=1)),
        ("softmax", (("toxic", "threat"), "sum"), SOFTMAX[:, 1:].sum(axis=1)),
        ("softmax", (("toxic", "threat"), "noisy-or"), 1 - (1 - SOFTMAX[:, 1:]).prod(axis=1)),
    ],
)
def test_a_column_is_the_probability_that_its_rule_says(
    activation: Any, rule: Any, expected: Any
) -> None:
    """Worked out in probabilities, the plain way."""
    found = column(made(activation, violence=rule), "violence")
    assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("activation", "probability"), [("sigmoid", INDEPENDENT[:, 0]), ("softmax", SOFTMAX[:, 0])]
)
def test_harmful_is_what_the_negative_label_leaves(activation: Any, probability: Any) -> None:
    """Where no rule makes `harmful`."""
    assert column(made(activation), "harmful") == pytest.approx(1 - probability, abs=1e-12)


def test_a_rule_for_harmful_comes_before_the_negative_label() -> None:
    """What is said outright counts."""
    found = column(made(harmful=(("threat",),)), "harmful")
    assert found == pytest.approx(INDEPENDENT[:, 2])


def test_a_column_without_a_label_scores_nothing() -> None:
    """A score of 0 at the decimals that a decision shows, and it is listed as silent."""
    labels = made(violence=(("threat",),))
    assert column(labels, "misinformation").round(6).tolist() == [0.0, 0.0]
    assert set(labels.silent()) == set(COLUMNS) - {"violence", "harmful"}


@given(st.lists(st.floats(-60_000, 60_000), min_size=3, max_size=3), st.sampled_from(NAMES[1:]))
def test_no_finite_logit_gives_anything_but_a_number(logits: list[float], label: str) -> None:
    """fp16 reaches 65,504; nothing overflows on the way."""
    for activation in ("sigmoid", "softmax"):
        for combine in ("max", "noisy-or"):
            labels = made(activation, violence=((label, "neutral"), combine))
            found = labels.log_odds(np.array([logits]))
            assert np.isfinite(found).all()


@pytest.mark.parametrize("z", [-40.0, -1e-3, 0.0, 1e-3, 40.0, 300.0])
def test_noisy_or_of_one_cause_is_that_cause(z: float) -> None:
    """In log-odds, so neither end of the scale is lost to rounding."""
    labels = made(violence=(("toxic",), "noisy-or"))
    found = labels.log_odds(np.array([[0.0, z, 0.0]]))[0, COLUMNS.index("violence")]
    assert found == pytest.approx(z, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_logit_that_is_no_number_is_refused(bad: float) -> None:
    """Also one that a maximum would hide, and one that no rule reads."""
    labels = made(violence=(("toxic", "threat"),))
    with pytest.raises(ValueError, match="not finite"):
        labels.log_odds(np.array([[0.0, 1.0, bad]]))


def whole(**changes: Any) -> LabelMap:
    fields: dict[str, Any] = {
        "names": NAMES,
        "activation": "softmax",
        "columns": {"harmful": Rule(("toxic",)), "violence": Rule(("threat",))},
        "negative": "neutral",
    }
    return LabelMap(**(fields | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"names": ("toxic", "toxic", "threat")}, "name one twice"),
        ({"names": ("toxic",)}, "softmax over one label"),
        ({"columns": {"spam": Rule(("toxic",))}}, r"columns \['spam'\] are unknown"),
        ({"columns": {"violence": Rule(())}}, "violence has no label"),
        ({"columns": {"violence": Rule(("thraet",))}}, r"labels \['thraet'\] are not the model's"),
        ({"columns": {"violence": Rule(NAMES, "sum")}}, "would always be 1"),
        ({"columns": {"violence": Rule(("threat",))}}, r"labels \['toxic'\] go nowhere"),
        ({"negative": None, "ignored": ("neutral",), "columns": {"violence": Rule(("threat",))}},
         "nothing says `harmful`"),
        ({"activation": "sigmoid", "columns": {"harmful": Rule(("toxic", "threat"), "sum")}},
         "only labels of a softmax"),
    ],
)  # fmt: skip
def test_a_map_that_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    """Each mistake has its message; above all, no label is forgotten in silence."""
    with pytest.raises(ValueError, match=message):
        whole(**changes).check()


def test_a_map_that_fits_passes() -> None:
    """The one that the mistakes are made from."""
    whole().check()
