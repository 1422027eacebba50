"""operate.py: an operator's word on a threshold."""

import io
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from rich.console import Console

from worker import operate
from worker.certify import in_force
from worker.decode import threshold_key
from worker.errors import Stop
from worker.events import ThresholdRecord
from worker.operate import approve, fix, hand_back, read_latest, reasons, reject, table
from worker.settings import Settings, TenantPolicy
from worker.thresholds import Thresholds


def record(**fields: Any) -> ThresholdRecord:
    plain: dict[str, Any] = {
        "tenant": "a", "harm": "violence", "threshold": 0.6, "previous": 0.7, "version": 3,
        "status": "proposed", "method": "certified", "model": "fake@000000", "labels": 412,
        "reason": "precision at 0.60 is at least 0.9", "since_ms": 5, "certified": 0.6,
    }  # fmt: skip
    return ThresholdRecord(**(plain | fields))


def test_an_approved_threshold_is_in_force_and_watched_from_now_on() -> None:
    """It keeps its evidence: method, model, certificate."""
    said = approve(record(declined=0.6), 1_000)
    assert (said.status, in_force(said), said.since_ms, said.declined) == (
        "applied",
        0.6,
        1_000,
        None,
    )
    assert (said.method, said.model, said.certified) == ("certified", "fake@000000", 0.6)


def test_a_rejected_threshold_is_remembered() -> None:
    """What was in force stays, and is watched on."""
    said = reject(record(), 1_000)
    assert (said.status, in_force(said), said.declined, said.since_ms) == ("applied", 0.7, 0.6, 5)


@pytest.mark.parametrize("word", [approve, reject])
def test_there_must_be_a_proposal(word: Any) -> None:
    """Nothing to approve is a mistake, not a success."""
    with pytest.raises(Stop, match="a/violence: nothing is proposed"):
        word(record(status="applied"), 1_000)


def test_a_fixed_threshold_holds_for_every_model() -> None:
    """Until it is handed back; then it stays until labels say otherwise."""
    said = fix(0.33)(record(), 1_000)
    assert (said.status, in_force(said), said.model, said.method) == (
        "applied",
        0.33,
        "",
        "operator",
    )
    assert said.previous == 0.7
    back = hand_back("fake@111111")(said, 2_000)
    assert (in_force(back), back.since_ms) == (0.33, 2_000)
    assert (back.method, back.model) == ("learn", "fake@111111")
    with pytest.raises(Stop, match="is not set by an operator"):
        hand_back("fake@111111")(back, 3_000)


def test_a_threshold_outside_0_to_1_is_refused() -> None:
    """Before anything is published."""
    for value in (-0.1, 1.1, float("nan")):
        with pytest.raises(Stop, match="must lie in"):
            fix(value)


def test_settings_beat_every_record() -> None:
    """Which is why a word on such a threshold is refused."""
    policy = TenantPolicy(thresholds={"violence": 0.2})
    thresholds = Thresholds({}, Settings(tenants={"a": policy}), "fake@000000")
    thresholds.apply(fix(0.9)(record(), 1_000))
    assert thresholds.of("a").values[0] == 0.2


async def test_what_was_deleted_is_no_latest(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tombstone takes its record away at once, as for the workers; broken ones change nothing."""
    kept, gone = record(), record(tenant="b")

    async def whole(*_: object) -> AsyncIterator[SimpleNamespace]:
        for said, value in (
            (kept, msgspec.json.encode(kept)), (gone, msgspec.json.encode(gone)),
            (kept, b"{broken"), (kept, b""), (gone, None),
        ):  # fmt: skip
            yield SimpleNamespace(key=threshold_key(said.tenant, said.harm), value=value, offset=0)

    monkeypatch.setattr(operate, "_whole", whole)
    assert await read_latest(Settings()) == {("a", "violence"): kept}


def test_the_table_names_what_is_proposed() -> None:
    """In force is what was before it."""
    made = table([record()], "Thresholds")
    cells = [next(iter(column.cells)) for column in made.columns]
    assert cells[:5] == ["a violence", "0.70", "0.60", "3", "certified"]


def test_nothing_is_cut_off_on_a_narrow_terminal() -> None:
    """Nor where output goes to a file, which counts as one."""
    long = record(
        recall=0.714, recall_low=0.5, recall_high=0.9,
        tenant="kids-of-europe", harm="privacy_violation", labels=412_345, labels_needed=12_345,
        version=1_234, reason="about 12345 more labels of other reviewers above 0.95 are needed",
    )  # fmt: skip
    narrow = Console(width=80, file=io.StringIO(), record=True)
    narrow.print(table([long], "Thresholds"), reasons([long]))
    shown = narrow.export_text()
    assert "…" not in shown
    for word in (
        "privacy_violation",
        "certified",
        "412345",
        "12345",
        "1234",
        "0.95",
        "0.71 (0.50..0.90)",
    ):
        assert word in shown
    assert max(map(len, shown.splitlines())) <= 80
