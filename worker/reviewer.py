"""A reviewer for the demo: knows what each sample should be, and labels what comes up for review.

Real labels through real topics: `tidegate learn` takes them, and the workers follow. The policy is
not one for production: one reviewer's word does, and two right blocks lower a threshold.
"""

import json
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import msgspec
from aiokafka import AIOKafkaProducer

from worker.decode import decode_threshold
from worker.errors import Unreadable
from worker.events import Label, Review, ThresholdRecord
from worker.follow import Follower
from worker.publish import client_settings, finish
from worker.settings import Settings, TenantPolicy

TENANT = "demo"
_REVIEW = {"over": 1.0, "near": 1.0, "rest": 1.0, "per_hour": 10_000}
_LEARN = {
    "method": "step", "labels_per_step": 2, "settle_ms": 0, "test_every": 1,
    "max_reviewer_share": 1.0,
}  # fmt: skip
_reviews = msgspec.json.Decoder(Review)


def environment(policy: TenantPolicy) -> dict[str, str]:
    """Settings of the demo's workers and learner: the tenant, with `policy` but for learning."""
    own = policy.model_dump(mode="json", exclude={"review", "learn"})
    return {
        f"TIDEGATE_TENANTS__{TENANT.upper()}": json.dumps(
            {**own, "review": _REVIEW, "learn": _LEARN}
        ),
        "TIDEGATE_LEARN_GRACE_MS": "100",
    }


class Reviewer:
    """Labels blocked segments, and tells of thresholds that move. Use as a context manager."""

    def __init__(
        self, settings: Settings, should: Callable[[str], str | None],
        learnt: Callable[[ThresholdRecord], None],
    ) -> None:  # fmt: skip
        """should: the verdict that a stream deserves; None: it is no sample."""
        self._settings = settings
        self._should = should
        self._learnt = learnt
        self._topics = Follower(settings, settings.review_topic, settings.thresholds_topic)
        self._producer = AIOKafkaProducer(**client_settings(settings))
        self.labels = 0

    async def __aenter__(self) -> Self:
        await self._topics.open()
        self._topics.seek(await self._topics.ends())  # servers that ran before hold older items
        await self._producer.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        await self._topics.close()
        await finish(self._producer.stop(), 2.0)

    async def work(self) -> None:
        """For ever."""
        while True:
            for record in await self._topics.poll():
                if record.topic == self._settings.review_topic:
                    await self._review(record)
                else:
                    self._tell(record)

    async def _review(self, record: Any) -> None:
        item = _reviews.decode(record.value)
        should = self._should(item.stream_id)
        if should is None or item.harm is None:  # of passes nobody says which harm was missed
            return
        score = item.harmful if item.harm == "other" else item.scores[item.harm]
        label = Label(
            item.decision_id, item.stream_id, item.harm, score or 0.0, should == "block", "author",
            item.tenant, item.picked_with,
        )  # fmt: skip
        self.labels += 1
        await self._producer.send_and_wait(
            self._settings.feedback_topic, msgspec.json.encode(label), key=item.stream_id.encode()
        )

    def _tell(self, record: Any) -> None:
        try:
            found = decode_threshold(record.key, record.value or b"")
        except Unreadable:
            return
        if found.tenant == TENANT and found.threshold != found.previous:
            self._learnt(found)
