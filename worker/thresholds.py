"""Thresholds in force per tenant, read by decide. Pure: records are handed in."""

from collections.abc import Mapping
from typing import NamedTuple

from detectors.harms import DEFAULT_THRESHOLDS, THRESHOLD_KEYS
from worker.events import ThresholdRecord
from worker.settings import Settings


class InForce(NamedTuple):
    """Thresholds of one tenant, in the order of THRESHOLD_KEYS, and their version."""

    values: tuple[float, ...]  # (7,) a score above, not equal, counts
    version: int  # 0: as shipped and set; else the newest learnt update's


class Thresholds:
    """Shipped with the model < learnt from labels < set by the operator for a tenant."""

    def __init__(self, shipped: Mapping[str, float], settings: Settings, model: str = "") -> None:
        self._model = model
        self._shipped = {**DEFAULT_THRESHOLDS, **shipped}
        self._settings = settings
        self._learnt: dict[tuple[str, str], tuple[float, int]] = {}
        self._in_force: dict[str, InForce] = {}

    def of(self, tenant: str) -> InForce:
        """What is in force for `tenant` now."""
        found = self._in_force.get(tenant)
        if found is None:
            if len(self._in_force) >= 10_000:  # tenant names come from outside
                self._in_force.clear()
            found = self._in_force[tenant] = self._compute(tenant)
        return found

    def update(self, tenant: str, harm: str, threshold: float, version: int) -> None:
        """Put a learnt threshold in force. Raises ValueError on an unknown harm or value."""
        if harm not in THRESHOLD_KEYS or not 0.0 <= threshold <= 1.0:
            msg = f"threshold {threshold} of {harm!r}: unknown harm or outside 0..1"
            raise ValueError(msg)
        self._learnt[tenant, harm] = (threshold, version)
        self._in_force.clear()

    def apply(self, record: ThresholdRecord) -> bool:
        """Put in force what the record says; whether it was news. Raises ValueError.

        What another model's scores were held against says nothing about this one's. Versions only
        rise: an old record read again changes nothing.
        """
        if record.model not in {"", self._model}:
            return False
        known = self._learnt.get((record.tenant, record.harm))
        if known is not None and record.version <= known[1]:
            return False
        value = record.threshold if record.status == "applied" else record.previous
        self.update(record.tenant, record.harm, value, record.version)
        return True

    def forget(self, tenant: str, harm: str) -> None:
        """Nothing is learnt of it: as a worker would find that starts now."""
        self._learnt.pop((tenant, harm), None)
        self._in_force.clear()

    def unlearnt(self, tenant: str) -> tuple[float, ...]:
        """(7,) as shipped and set by the operator, whatever was learnt since."""
        set_by_operator = self._settings.tenant(tenant).thresholds
        return tuple(set_by_operator.get(harm, self._shipped[harm]) for harm in THRESHOLD_KEYS)

    def lowered(self, tenant: str) -> bool:
        """Whether the operator set one of the tenant's thresholds below the shipped one."""
        set_by_operator = self._settings.tenant(tenant).thresholds
        return any(value < self._shipped[harm] for harm, value in set_by_operator.items())

    def _compute(self, tenant: str) -> InForce:
        set_by_operator = self._settings.tenant(tenant).thresholds
        values, versions = [], [0]
        for harm in THRESHOLD_KEYS:
            learnt = self._learnt.get((tenant, harm))
            if learnt is not None:
                versions.append(learnt[1])
            value = self._shipped[harm] if learnt is None else learnt[0]
            values.append(set_by_operator.get(harm, value))
        return InForce(tuple(values), max(versions))
