"""bench/thresholds.py: the simulation counts as the product does; and a small run of it."""

import math

import msgspec
import pytest

from bench.thresholds import (
    CLAIM,
    SCENARIOS,
    Histories,
    Method,
    Scenario,
    Shown,
    measure,
    midpoints,
)
from worker.certify import propose, shipped
from worker.events import Label, ThresholdRecord
from worker.feedback import Accepted, Evidence, Judged

BY_NAME = {it.name: it for it in SCENARIOS}


class Product:
    """One history of the simulation, told to the product as records."""

    def __init__(self, world: Histories, history: int) -> None:
        self.world, self.history = world, history
        self.evidence = Evidence(lambda _: world.policy)
        self.record = shipped(*CLAIM, 0.74, 0)
        self.evidence.in_force(self.record)

    def tell(self, number: int, shown: Shown) -> list[ThresholdRecord]:
        """The records that one label leads to."""
        score, share = (
            float(midpoints[shown.cells[self.history]]),
            float(shown.shares[self.history]),
        )
        judged = Judged(
            f"d{number}", "s", CLAIM.tenant, CLAIM.model, "toxicity", None, {CLAIM.harm: score},
            score, number, share, self.world.scenario.least,
        )  # fmt: skip
        label = Label(
            decision_id=f"d{number}", stream_id="s", tenant=CLAIM.tenant, harm=CLAIM.harm,
            score=score, harmful=bool(shown.harmful[self.history]), picked_with=share,
            reviewer=f"r{shown.reviewers[self.history]}",
        )  # fmt: skip
        assert self.evidence.add(label, judged, number) == Accepted(True)
        found = []
        for claim in self.evidence.settle(number):
            tally = self.evidence.snapshot(claim)
            record = propose(tally, self.world.policy, self.record, number)
            if record is not None:
                self.record = record
                self.evidence.in_force(record)
                found.append(record)
        return found


def essence(record: ThresholdRecord) -> tuple[object, ...]:
    return (
        record.version, record.threshold, record.status, record.certified, record.epoch,
        record.since_ms, record.labels, record.labels_needed, record.alarm, record.reason,
    )  # fmt: skip


@pytest.mark.parametrize("method", ["certified", "step"])
@pytest.mark.parametrize("name", ["badly calibrated", "stratified sampling"])
def test_the_simulation_counts_as_the_product_does(name: str, method: Method) -> None:
    """Label by label it publishes the records that `Evidence` and `propose` lead to."""
    world = Histories(BY_NAME[name], method, histories=4, seed=2)
    products = [Product(world, history) for history in range(4)]
    published = 0
    for number in range(1, 901):
        shown = world.shown()
        told = [it.tell(number, shown) for it in products]
        mine: list[list[ThresholdRecord]] = [[] for _ in products]
        for history in world.label(shown):
            record = propose(world.tally(history), world.policy, world.records[history], number)
            if record is not None:
                mine[history].append(record)
                world.publish(history, record)
        assert [[essence(it) for it in some] for some in mine] == [
            [essence(it) for it in some] for some in told
        ]
        published += sum(map(len, told))
    assert published > 20


@pytest.mark.parametrize("name", ["at the edge", "hostile reviewer"])
def test_certificates_are_wrong_in_at_most_delta_of_all_histories(name: str) -> None:
    """Where precision is just below the target everywhere; and with one reviewer hostile."""
    found = measure(BY_NAME[name], "certified", histories=200, labels=500)
    most = 0.05 + 2 * math.sqrt(0.05 * 0.95 / 200)
    assert found.wrong_certificate <= most * 200
    assert found.wrong_in_force <= most * 200


def test_the_simulation_sees_what_is_wrong() -> None:
    """Unprotected, the hostile reviewer gets wrong certificates; `step` knows no target at all."""
    unprotected = measure(BY_NAME["hostile, unprotected"], "certified", histories=60, labels=1500)
    assert unprotected.wrong_certificate > 0.15 * 60
    step = measure(BY_NAME["badly calibrated"], "step", histories=60, labels=500)
    assert step.wrong_in_force > 0.15 * 60
    assert step.wrong_certificate == 0


def test_scenarios_are_what_they_say() -> None:
    """True precision above some candidates."""
    edge = BY_NAME["at the edge"].precision(0)
    assert edge[50:96] == pytest.approx(0.895)
    dip = BY_NAME["dip"].precision(0)
    assert dip[95] > 0.9 > dip[85]
    assert dip[50] > 0.9
    drifting: Scenario = BY_NAME["drifting"]
    assert drifting.precision(0)[74] > 0.9 > drifting.precision(2_000)[74]
    assert msgspec.structs.asdict(shipped(*CLAIM, 0.74, 0))["threshold"] == 0.74
