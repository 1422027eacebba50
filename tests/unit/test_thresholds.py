"""thresholds.py: which threshold is in force."""

import pytest

from detectors.harms import DEFAULT_THRESHOLDS, THRESHOLD_KEYS
from worker.settings import Settings, TenantPolicy
from worker.thresholds import Thresholds


def of(thresholds: Thresholds, tenant: str, harm: str) -> float:
    return thresholds.of(tenant).values[THRESHOLD_KEYS.index(harm)]


def test_model_without_thresholds_starts_at_the_defaults() -> None:
    """The contract's figures, version 0."""
    thresholds = Thresholds({}, Settings())
    assert thresholds.of("default").values == tuple(DEFAULT_THRESHOLDS.values())
    assert thresholds.of("default").version == 0


def test_order_of_precedence() -> None:
    """Shipped < learnt < set by the operator; only the tenant that a label came from moves."""
    policy = TenantPolicy(thresholds={"hate_speech": 0.5})
    thresholds = Thresholds({"violence": 0.6}, Settings(tenants={"a": policy}))
    assert of(thresholds, "b", "violence") == 0.6
    thresholds.update("b", "violence", 0.65, 7)
    thresholds.update("a", "hate_speech", 0.9, 8)
    assert (of(thresholds, "b", "violence"), thresholds.of("b").version) == (0.65, 7)
    assert of(thresholds, "c", "violence") == 0.6
    assert of(thresholds, "a", "hate_speech") == 0.5


@pytest.mark.parametrize(("harm", "value"), [("spam", 0.5), ("violence", 1.5)])
def test_nonsense_is_refused(harm: str, value: float) -> None:
    """An unknown harm or a value outside 0..1 changes nothing."""
    with pytest.raises(ValueError, match="unknown harm or outside"):
        Thresholds({}, Settings()).update("a", harm, value, 1)
