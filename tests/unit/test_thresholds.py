"""thresholds.py: which threshold is in force; decode.py, updates.py: how records change it."""

from typing import Any

import msgspec
import pytest

from detectors.harms import DEFAULT_THRESHOLDS, THRESHOLD_KEYS
from worker.decode import decode_threshold
from worker.errors import Unreadable
from worker.events import ThresholdRecord
from worker.settings import Settings, TenantPolicy
from worker.thresholds import Thresholds
from worker.updates import apply


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


def record(**fields: Any) -> ThresholdRecord:
    """One as the learner writes it."""
    plain: dict[str, Any] = {
        "tenant": "a", "harm": "violence", "threshold": 0.6, "previous": 0.7, "version": 1,
        "method": "certified", "model": "fake@000000",
    }  # fmt: skip
    return ThresholdRecord(**(plain | fields))


def written(**fields: Any) -> bytes:
    return msgspec.json.encode(record(**fields))


def in_force() -> Thresholds:
    return Thresholds({}, Settings(), "fake@000000")


def test_an_applied_record_is_in_force_and_names_its_version() -> None:
    """For its tenant and harm alone."""
    thresholds = in_force()
    assert apply(thresholds, b"a/violence", written(version=4))
    assert (of(thresholds, "a", "violence"), thresholds.of("a").version) == (0.6, 4)
    assert of(thresholds, "a", "hate_speech") == DEFAULT_THRESHOLDS["hate_speech"]
    assert (of(thresholds, "b", "violence"), thresholds.of("b").version) == (0.7, 0)


def test_a_proposal_leaves_what_was_in_force() -> None:
    """Compaction has removed the record before it: `previous` says what that was."""
    thresholds = in_force()
    apply(thresholds, b"a/violence", written(status="proposed", previous=0.65, version=5))
    assert (of(thresholds, "a", "violence"), thresholds.of("a").version) == (0.65, 5)


def test_versions_only_rise() -> None:
    """A record that is read again, or came late, changes nothing."""
    thresholds = in_force()
    apply(thresholds, b"a/violence", written(threshold=0.6, version=2))
    assert not apply(thresholds, b"a/violence", written(threshold=0.9, version=1))
    assert not apply(thresholds, b"a/violence", written(threshold=0.9, version=2))
    assert of(thresholds, "a", "violence") == 0.6


def test_a_threshold_of_another_model_is_not_applied() -> None:
    """Its scores mean something else; one that names no model holds for all."""
    thresholds = in_force()
    assert not apply(thresholds, b"a/violence", written(model="fake@111111"))
    assert of(thresholds, "a", "violence") == 0.7
    assert apply(thresholds, b"a/violence", written(model=""))


def test_a_deleted_record_leaves_what_was_shipped() -> None:
    """A worker that starts now would not see it either."""
    thresholds = in_force()
    apply(thresholds, b"a/violence", written())
    apply(thresholds, b"a/violence", None)
    assert (of(thresholds, "a", "violence"), thresholds.of("a").version) == (0.7, 0)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        (b"a/violence", b"{", "not JSON"),
        (b"a/violence", b"\xff", "not JSON"),
        (b"a/violence", b"[]", "Expected `object`"),
        (b"a/violence", b'{"tenant": "a"}', "missing required field"),
        (b"a/violence", written(threshold=1.5), "outside 0..1"),
        (b"a/violence", written(previous=-0.1), "outside 0..1"),
        (b"a/violence", written(version=0), "versions begin"),
        (b"a/spam", written(harm="spam"), "unknown harm"),
        (b"b/violence", written(), "not tenant/harm"),
        (None, written(), "not tenant/harm"),
        (b"a/violence", written(status="maybe").replace(b"maybe", b"perhaps"), "Invalid enum"),
        (b"a/violence", b'{"a":' * 5_000, "nested too deeply"),
    ],
)
def test_bad_records_are_unreadable(key: bytes | None, value: bytes, reason: str) -> None:
    """They say why, and nothing is put in force."""
    thresholds = in_force()
    with pytest.raises(Unreadable, match=reason):
        apply(thresholds, key, value)
    assert thresholds.of("a").version == 0
    with pytest.raises(Unreadable):
        decode_threshold(key, value)
