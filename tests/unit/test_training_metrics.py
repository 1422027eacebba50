"""Figures against values worked out by hand; tests/models has sklearn's."""

import numpy as np
import pytest

from training import metrics

TARGETS = np.array([1.0, 0.0, 1.0, 0.0])
SCORES = np.array([0.9, 0.8, 0.7, 0.1])


def test_auroc_counts_the_pairs_in_order() -> None:
    """Three of the four pairs of a harmful and a harmless row are the right way round."""
    assert metrics.auroc(TARGETS, SCORES) == 0.75


def test_a_tied_pair_counts_half() -> None:
    """Equal scores rank nothing: 0.5, whichever row comes first."""
    for targets in ([1.0, 0.0], [0.0, 1.0]):
        assert metrics.auroc(np.array(targets), np.array([0.3, 0.3])) == 0.5
        assert metrics.auprc(np.array(targets), np.array([0.3, 0.3])) == 0.5


def test_auprc_is_precision_where_recall_rises() -> None:
    """Half of the recall at precision 1, half at 2/3."""
    assert metrics.auprc(TARGETS, SCORES) == pytest.approx(1 / 2 + 2 / 3 / 2)


@pytest.mark.parametrize("targets", [[1.0, 1.0], [0.0, 0.0]])
def test_one_class_alone_has_no_ranking(targets: list[float]) -> None:
    """Nothing to compare gives NaN, not a perfect or a bad figure."""
    both = np.array(targets), np.array([0.2, 0.6])
    assert np.isnan(metrics.auroc(*both))
    assert np.isnan(metrics.auprc(*both))


def test_f1_of_one_hit_one_miss_one_false_block() -> None:
    """2 hits / (2 blocked + 2 harmful) with one hit is 1/2."""
    assert metrics.f1(TARGETS, np.array([1.0, 1.0, 0.0, 0.0])) == 0.5
    assert np.isnan(metrics.f1(np.zeros(4), np.ones(4)))


def test_calibration_error_weighs_bins_by_their_rows() -> None:
    """Bin 0.9..1: three rows at 0.95, two harmful; bin 0.1..0.2: one row at 0.15, harmless."""
    targets = np.array([1.0, 1.0, 0.0, 0.0])
    probabilities = np.array([0.95, 0.95, 0.95, 0.15])
    expected = 3 / 4 * abs(2 / 3 - 0.95) + 1 / 4 * 0.15
    assert metrics.calibration_error(targets, probabilities) == pytest.approx(expected)


def test_a_probability_of_one_is_in_the_last_bin() -> None:
    """The upper end belongs to it, so no row is lost."""
    found = metrics.reliability(np.array([1.0, 0.0]), np.array([1.0, 0.0]))
    assert found.counts.tolist() == [1, 0, 0, 0, 0, 0, 0, 0, 0, 1]
    assert (found.observed[0], found.observed[9]) == (0, 1)
    assert np.isnan(found.observed[4])


@pytest.mark.parametrize("statistic", [metrics.auroc, metrics.auprc, metrics.calibration_error])
def test_a_weight_of_two_is_a_row_twice(statistic: metrics.Ranking) -> None:
    """A bootstrap draw weighs rows instead of copying them; zero leaves a row out."""
    chance = np.random.default_rng(3)
    targets = (chance.random(60) < 0.4).astype(float)
    scores = chance.random(60).round(1)  # many ties
    times = chance.integers(0, 4, 60)
    copied = statistic(np.repeat(targets, times), np.repeat(scores, times), None)
    assert statistic(targets, scores, times.astype(float)) == pytest.approx(float(copied))


def test_draws_take_whole_prompts() -> None:
    """Rows on one prompt are drawn equally often, and each draw takes as many prompts as are."""
    groups = ["a", "b", "a", "c", "b", "a"]
    drawn = metrics.draws(groups, 50)
    assert drawn.shape == (50, 6)
    assert (drawn[:, 0] == drawn[:, 2]).all()
    assert (drawn[:, 1] == drawn[:, 4]).all()
    assert (drawn[:, 0] + drawn[:, 1] + drawn[:, 3] == 3).all()
    assert len({tuple(row) for row in drawn}) > 5


def test_rows_on_one_prompt_make_no_interval_narrower() -> None:
    """400 rows on 8 prompts say less than 400 rows on 400."""
    chance = np.random.default_rng(1)
    flags = np.repeat((chance.random(8) < 0.5).astype(float), 50)
    few = metrics.share_interval(flags, [str(i // 50) for i in range(400)])
    many = metrics.share_interval(flags, [str(i) for i in range(400)])
    assert few.value == many.value
    assert few.high - few.low > 3 * (many.high - many.low)


def test_nothing_blocked_is_not_sure_to_stay_so() -> None:
    """0 of 80 prompts: up to 4.5 % (exact, 95 %), not 0 to 0."""
    found = metrics.share_interval(np.zeros(80), [str(i) for i in range(80)])
    assert found.low == 0
    assert found.high == pytest.approx(0.0451, abs=1e-4)
    assert metrics.share_interval(np.ones(80), [str(i) for i in range(80)]).low < 0.96
