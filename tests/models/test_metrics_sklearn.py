"""Our figures against sklearn's. Needs the train extra."""

import numpy as np
import pytest

from training import metrics

pytestmark = pytest.mark.train


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("decimals", [1, 6])
def test_ranking_is_that_of_sklearn(seed: int, decimals: int) -> None:
    """With and without ties, weighted and not, to 1e-12."""
    from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

    chance = np.random.default_rng(seed)
    targets = (chance.random(200) < 0.3).astype(float)
    scores = (0.3 * targets + chance.random(200)).round(decimals)
    above = (scores > 0.6).astype(float)
    for weights in (None, chance.integers(0, 5, 200).astype(float)):
        expected = roc_auc_score(targets, scores, sample_weight=weights)
        assert metrics.auroc(targets, scores, weights) == pytest.approx(expected, abs=1e-12)
        expected = average_precision_score(targets, scores, sample_weight=weights)
        assert metrics.auprc(targets, scores, weights) == pytest.approx(expected, abs=1e-12)
        expected = f1_score(targets, above, sample_weight=weights)
        assert metrics.f1(targets, above, weights) == pytest.approx(expected, abs=1e-12)


def test_the_reliability_diagram_is_that_of_sklearn() -> None:
    """Same bins, same shares."""
    from sklearn.calibration import calibration_curve

    chance = np.random.default_rng(0)
    probabilities = chance.random(500)
    targets = (chance.random(500) < probabilities).astype(float)
    observed, predicted = calibration_curve(targets, probabilities, n_bins=metrics.BINS)
    found = metrics.reliability(targets, probabilities)
    assert found.observed == pytest.approx(observed)
    assert found.predicted == pytest.approx(predicted)
