"""Starting while brokers come and go."""

import asyncio

import pytest
from aiokafka.errors import (
    KafkaConnectionError,
    KafkaError,
    KafkaTimeoutError,
    NodeNotReadyError,
    TopicAuthorizationFailedError,
)

from worker import follow
from worker.errors import Stop
from worker.follow import mends, reach
from worker.settings import Settings


class Brokers:
    """They fail as told, then serve."""

    def __init__(self, *failures: KafkaError) -> None:
        self.failures = list(failures)
        self.calls = 0

    async def step(self) -> None:
        self.calls += 1
        if self.failures:
            raise self.failures.pop(0)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "_START_AGAIN_S", 0.0)


def test_a_broker_that_dies_under_a_step_is_waited_for() -> None:
    timed_out = KafkaTimeoutError("Failed to get offsets by times in 5000 ms")
    brokers = Brokers(timed_out, NodeNotReadyError(), KafkaConnectionError(), timed_out)
    beats: list[int] = []
    asyncio.run(reach(Settings(), brokers.step, lambda: beats.append(brokers.calls)))
    assert brokers.calls == 5
    assert beats == [1, 2, 3, 4]


def test_a_refusal_ends_at_once_and_names_the_brokers() -> None:
    brokers = Brokers(TopicAuthorizationFailedError("moderation.outputs"))
    settings = Settings(bootstrap_servers="127.0.0.1:9")
    with pytest.raises(Stop, match=r"no broker at 127\.0\.0\.1:9 serves us.*moderation\.outputs"):
        asyncio.run(reach(settings, brokers.step))
    assert brokers.calls == 1


def test_waiting_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "_START_S", -1.0)
    brokers = Brokers(KafkaTimeoutError())
    with pytest.raises(Stop, match="KafkaTimeoutError"):
        asyncio.run(reach(Settings(), brokers.step))


def test_what_mends() -> None:
    assert mends(KafkaTimeoutError())
    assert mends(TimeoutError())
    assert not mends(KafkaError())
    assert not mends(AssertionError())
