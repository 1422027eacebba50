"""Starting while brokers come and go."""

import asyncio

import pytest
from aiokafka import AIOKafkaConsumer
from aiokafka.errors import (
    KafkaConnectionError,
    KafkaError,
    KafkaTimeoutError,
    NodeNotReadyError,
    TopicAuthorizationFailedError,
)

from worker import follow
from worker.errors import Stop
from worker.follow import Follower, mends, reach
from worker.settings import Settings


class Brokers:
    """They fail as told, then serve."""

    def __init__(self, *failures: Exception) -> None:
        self.failures: list[Exception] = list(failures)
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
    assert beats


def test_it_beats_while_a_step_takes_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "_BEAT_S", 0.01)
    beats: list[float] = []

    async def slow() -> None:
        await asyncio.sleep(0.2)

    asyncio.run(reach(Settings(), slow, lambda: beats.append(0.0)))
    assert len(beats) >= 5


@pytest.mark.parametrize("failure", [TimeoutError(), ConnectionResetError()])
def test_what_is_no_kafka_error_is_waited_for_too(failure: Exception) -> None:
    brokers = Brokers(failure, failure)
    asyncio.run(reach(Settings(), brokers.step))
    assert brokers.calls == 3


async def test_no_broker_that_tells_the_topics_is_waited_for() -> None:
    """aiokafka has one error for everything here, and does not call it retriable."""
    found = Follower(Settings(), "moderation.thresholds")
    found._consumer = AIOKafkaConsumer(bootstrap_servers="127.0.0.1:9")
    with pytest.raises(KafkaConnectionError) as told:
        await found._cluster()
    assert mends(told.value)
    await found.close()


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
