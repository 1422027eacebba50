"""moderation.thresholds -> thresholds in force, while the worker runs.

Every partition is read to its end before the first segment is judged. After that records are
applied as they come, between two decisions: nothing pauses. A record that makes no sense is logged
and counted, and changes nothing.
"""

import time
from typing import Any

import structlog

from worker import metrics
from worker.decode import decode_threshold
from worker.errors import Unreadable
from worker.follow import Follower
from worker.settings import Settings
from worker.thresholds import Thresholds

log = structlog.get_logger()


class Updates:
    """Keeps `thresholds` as the topic says."""

    def __init__(self, settings: Settings, thresholds: Thresholds) -> None:
        self._follower = Follower(settings, settings.thresholds_topic)
        self._thresholds = thresholds

    async def open(self) -> None:
        """Apply all that is there. Raises Stop where the topic is missing, KafkaError."""
        await self._follower.open()
        count = 0
        async for records in self._follower.to_end():
            for record in records:
                count += self._apply(record)
        log.info("thresholds.read", applied=count)

    async def follow(self) -> None:
        """Apply what comes, for ever."""
        while True:
            for record in await self._follower.poll():
                self._apply(record)

    async def close(self, bound_s: float) -> None:
        """Let go, within the bound."""
        await self._follower.close(bound_s)

    def _apply(self, record: Any) -> bool:
        try:
            applied = apply(self._thresholds, record.key, record.value)
        except Unreadable as error:
            metrics.THRESHOLDS.labels("unreadable").inc()
            log.warning(
                "threshold.unreadable", reason=error.reason, field=error.field,
                partition=record.partition, offset=record.offset,
            )  # fmt: skip
            return False
        metrics.THRESHOLDS.labels("applied" if applied else "ignored").inc()
        late_ms = time.time_ns() // 1_000_000 - record.timestamp
        log.info(
            "threshold.applied" if applied else "threshold.ignored",
            partition=record.partition, offset=record.offset, late_ms=late_ms,
        )  # fmt: skip
        return applied


def apply(thresholds: Thresholds, key: bytes | None, value: bytes | None) -> bool:
    """Put one record in force; whether it was news. Raises Unreadable."""
    if value is None:  # somebody has deleted it: as a worker would find that starts now
        tenant, _, harm = (key or b"").decode("utf-8", "replace").rpartition("/")
        thresholds.forget(tenant, harm)
        return True
    return thresholds.apply(decode_threshold(key, value))
