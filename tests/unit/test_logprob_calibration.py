"""Margins to probabilities: what each calibration finds and refuses."""

import math

import numpy as np
import pytest

from detectors.logprob import cross_entropy, probabilities
from detectors.logprob_calibration import batch, contextual, platt, temperature
from detectors.protocol import FloatArray


def sample(slope: float, intercept: float, count: int, spread: float = 3.0, seed: int = 0):  # type: ignore[no-untyped-def]
    """Margins and labels drawn from sigmoid(slope * margin + intercept)."""
    chance = np.random.default_rng(seed)
    margins = chance.normal(scale=spread, size=count)
    labels = (chance.random(count) < probabilities(slope * margins + intercept)).astype(int)
    return margins, labels


def loss(margins: FloatArray, labels: FloatArray, slope: float, intercept: float) -> float:
    """Cross-entropy against Platt's targets, from its definition."""
    high = (labels.sum() + 1) / (labels.sum() + 2)
    low = 1 / (len(labels) - labels.sum() + 2)
    targets = np.where(labels == 1, high, low)
    p = probabilities(slope * margins + intercept)
    return float(-(targets * np.log(p) + (1 - targets) * np.log(1 - p)).mean())


def test_platt_finds_what_made_the_labels() -> None:
    """With many examples slope and intercept come back, and no neighbour is better."""
    margins, labels = sample(0.4, -0.8, 20_000)
    found = platt(margins, labels)
    assert found.slope == pytest.approx(0.4, abs=0.03)
    assert found.intercept == pytest.approx(-0.8, abs=0.06)
    best = loss(margins, labels, found.slope, found.intercept)
    for slope, intercept in ((1e-3, 0), (-1e-3, 0), (0, 1e-3), (0, -1e-3)):
        assert loss(margins, labels, found.slope + slope, found.intercept + intercept) > best


@pytest.mark.parametrize("count", [50, 200, 500])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_platt_is_at_the_minimum_at_any_scale(count: int, scale: float) -> None:
    """Means a byte are thousandths of a nat, sums hundreds: the same probabilities come out."""
    margins, labels = sample(0.7, 0.5, count)
    plain, scaled = platt(margins, labels), platt(margins * scale, labels)
    assert scaled.slope * scale == pytest.approx(plain.slope, rel=1e-6)
    assert scaled.intercept == pytest.approx(plain.intercept, rel=1e-6)
    assert plain.apply(margins) == pytest.approx(scaled.apply(margins * scale), rel=1e-5, abs=1e-6)


def test_platt_far_from_zero() -> None:
    """Margins that all lie at -500 nats: the intercept takes them back."""
    margins, labels = sample(1.0, 0.0, 500)
    near, far = platt(margins, labels), platt(margins - 500, labels)
    assert far.apply(margins - 500) == pytest.approx(near.apply(margins), abs=1e-6)


def test_classes_that_separate_keep_a_finite_slope() -> None:
    """Platt's targets stop it before certainty: of 50 examples none is more than 27/28 sure."""
    margins = np.r_[np.full(25, -1.0), np.full(25, 1.0)]
    labels = np.r_[np.zeros(25), np.ones(25)].astype(int)
    for fit in (platt, temperature):
        p = probabilities(fit(margins, labels).apply(margins))
        assert p[-1] == pytest.approx(26 / 27, abs=1e-6)
        assert p[0] == pytest.approx(1 / 27, abs=1e-6)


def test_temperature_moves_no_verdict_and_lowers_the_loss() -> None:
    """Margins three times too sure: T is near 3, and every margin keeps its sign."""
    margins, labels = sample(1 / 3, 0.0, 5_000)
    found = temperature(margins, labels)
    assert 1 / found.slope == pytest.approx(3.0, rel=0.1)
    assert found.intercept == 0.0
    assert (np.sign(found.apply(margins)) == np.sign(margins)).all()
    after = cross_entropy(probabilities(found.apply(margins)).tolist(), labels)
    assert after < cross_entropy(probabilities(margins).tolist(), labels) - 0.05


@pytest.mark.parametrize("fit", [platt, temperature])
def test_what_cannot_calibrate_is_refused(fit) -> None:  # type: ignore[no-untyped-def]
    """Too few, one class, NaN, other labels, no spread, the wrong way round."""
    margins, labels = sample(1.0, 0.0, 100)
    with pytest.raises(ValueError, match="need as many"):
        fit(margins[:49], labels[:49])
    with pytest.raises(ValueError, match="need as many"):
        fit(margins, labels[:99])
    with pytest.raises(ValueError, match="one class"):
        fit(margins, np.zeros(100))
    with pytest.raises(ValueError, match="not finite"):
        fit(np.r_[margins[:99], math.nan], labels)
    with pytest.raises(ValueError, match="neither 0 nor 1"):
        fit(margins, labels * 2)
    with pytest.raises(ValueError, match="all margins are the same"):
        fit(np.ones(100), labels)
    with pytest.raises(ValueError, match="rank harmless above harmful"):
        fit(-margins, labels)


def test_contextual_makes_a_text_that_says_nothing_undecided() -> None:
    """One content-free text: its own probability becomes one half."""
    found = contextual([-7.5])
    assert (found.slope, found.intercept) == pytest.approx((1.0, 7.5))
    assert probabilities(found.apply(np.array([-7.5]))) == pytest.approx([0.5])


def test_contextual_is_the_papers_division() -> None:
    """Each class's probability over its mean on the content-free texts, normalised."""
    free = np.array([1.0, -0.5, 2.0])
    margins = np.array([0.3, -4.0, 6.0])
    mean = probabilities(free).mean()
    p = probabilities(margins)
    expected = (p / mean) / (p / mean + (1 - p) / (1 - mean))
    assert probabilities(contextual(free.tolist()).apply(margins)) == pytest.approx(expected)


def test_batch_centres_a_balanced_sample() -> None:
    """Prompts that prefer one class by 5 nats: after it the preference is gone."""
    chance = np.random.default_rng(1)
    margins = np.r_[chance.normal(-1, 0.3, 500), chance.normal(1, 0.3, 500)]
    found = batch((margins + 5).tolist())
    truth = np.r_[np.zeros(500), np.ones(500)]
    assert ((found.apply(margins + 5) >= 0) == truth).mean() > 0.95
    assert ((margins + 5 >= 0) == truth).mean() == 0.5


@pytest.mark.parametrize("fit", [contextual, batch])
def test_far_margins_do_not_overflow_and_nonsense_is_refused(fit) -> None:  # type: ignore[no-untyped-def]
    """Sums of -10,000 nats give -10,000, not infinity; nothing and NaN are errors."""
    assert fit([-1e4]).intercept == pytest.approx(1e4)
    for bad in ([], [math.nan], [1.0, math.inf]):
        with pytest.raises(ValueError, match="no margins, or one"):
            fit(bad)
