# mypy: disable-error-code="no-untyped-call"
# The reason: aiokafka types only some of its methods, and nearly every line here calls one.
"""The servers that tests and demo run on: they are real, they die when told, they leave nothing."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import redis.asyncio
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import ProducerFenced

from worker import local
from worker.local import KafkaCluster, LocalServiceError, Valkey, local_services
from worker.topics import TopicMismatchError, desired_topics, ensure_topics


async def create_topic(servers: str, name: str, partitions: int = 1, replicas: int = 1) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=servers)
    await admin.start()
    try:
        topic = NewTopic(name, partitions, replicas)
        response: Any = await admin.create_topics([topic])
        assert [error[1] for error in response.topic_errors] == [0]
    finally:
        await admin.close()


async def read(servers: str, topic: str, count: int, within_s: float = 60.0) -> list[bytes | None]:
    """The first `count` committed values of a topic, and any others that are there already."""
    consumer = AIOKafkaConsumer(
        topic,
        bootstrap_servers=servers,
        auto_offset_reset="earliest",
        isolation_level="read_committed",
    )
    await consumer.start()
    values: list[bytes | None] = []
    try:
        async with asyncio.timeout(within_s):
            while len(values) < count:
                batches = await consumer.getmany(timeout_ms=200)
                values += [record.value for batch in batches.values() for record in batch]
        batches = await consumer.getmany(timeout_ms=300)  # nothing more may follow
        return values + [record.value for batch in batches.values() for record in batch]
    finally:
        await consumer.stop()


def wait_until(holds: Callable[[], bool], within_s: float = 60.0) -> None:
    deadline = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)


async def test_round_trip(kafka: str, unique: str) -> None:
    """What is produced is consumed, in order within its partition."""
    await create_topic(kafka, unique)
    sent = [str(i).encode() for i in range(500)]
    async with AIOKafkaProducer(bootstrap_servers=kafka, linger_ms=2) as producer:
        await asyncio.gather(*[await producer.send(unique, value) for value in sent])
    assert await read(kafka, unique, len(sent)) == sent


async def test_read_committed(kafka: str, unique: str) -> None:
    """A read_committed consumer sees what a transaction committed and never what one aborted."""
    await create_topic(kafka, unique)
    async with AIOKafkaProducer(bootstrap_servers=kafka, transactional_id=unique) as producer:
        async with producer.transaction():
            await producer.send_and_wait(unique, b"before")
        await producer.begin_transaction()
        await producer.send_and_wait(unique, b"aborted")
        await producer.abort_transaction()
        async with producer.transaction():
            await producer.send_and_wait(unique, b"after")
    assert await read(kafka, unique, 2) == [b"before", b"after"]


async def test_fencing(kafka: str, unique: str) -> None:
    """A second producer with the same transactional.id fences the first, whose records vanish."""
    await create_topic(kafka, unique)
    first = AIOKafkaProducer(bootstrap_servers=kafka, transactional_id=unique)
    await first.start()
    await first.begin_transaction()
    await first.send_and_wait(unique, b"fenced")
    async with AIOKafkaProducer(bootstrap_servers=kafka, transactional_id=unique) as second:
        async with second.transaction():
            await second.send_and_wait(unique, b"kept")
        with pytest.raises(ProducerFenced):
            await first.commit_transaction()
    await first.stop()
    assert await read(kafka, unique, 1) == [b"kept"]


async def test_a_killed_node_costs_no_record(kafka3: KafkaCluster, unique: str) -> None:
    """Of three nodes one is SIGKILLed under a transactional producer and restarted: each record
    that was committed is there exactly once, and the node is in sync again."""
    servers = kafka3.bootstrap_servers
    await create_topic(servers, unique, replicas=3)
    sent = [str(i).encode() for i in range(30)]
    async with AIOKafkaProducer(
        bootstrap_servers=servers, transactional_id=unique, retry_backoff_ms=20
    ) as producer:
        for i, value in enumerate(sent):
            if i == 10:
                kafka3.kill(2)
                assert kafka3.running == [1, 3]
            if i == 20:
                await asyncio.to_thread(kafka3.wait_ready)  # two are a cluster, too
                kafka3.restart(2)
            async with producer.transaction():
                await producer.send_and_wait(unique, value)
    await asyncio.to_thread(kafka3.wait_ready)
    assert kafka3.running == [1, 2, 3]
    assert await read(servers, unique, len(sent)) == sent


async def test_services_leave_nothing_behind() -> None:
    """After the block neither a process nor a folder is left, not even when it raised."""
    pids: list[int] = []
    folders: list[Path] = []

    async def use_and_fail() -> None:
        async with local_services() as services:
            assert services.kafka is not None
            assert services.valkey is not None
            pids.extend([services.kafka.pid(1), services.valkey.pid])
            folders.append(services.kafka.log(1).parent.parent)
            assert all(map(psutil.pid_exists, pids))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await use_and_fail()
    assert not any(map(psutil.pid_exists, pids))
    assert not any(folder.exists() for folder in folders)


async def test_given_servers_are_used() -> None:
    """Where both addresses are given nothing is started."""
    async with local_services(bootstrap_servers="a:1", redis_url="redis://b:2") as services:
        assert services == ("a:1", "redis://b:2", None, None)


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_servers_end_with_their_parent(ending: signal.Signals, tmp_path: Path) -> None:
    """A parent that is killed, terminated or interrupted takes its servers and folders along."""
    script = (
        "import time; from worker.local import KafkaCluster, Valkey\n"
        "with Valkey() as v, KafkaCluster() as k:\n"
        "    print(v.pid, k.pid(1), flush=True); time.sleep(600)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=Path(local.__file__).parent.parent,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    ) as parent:
        assert parent.stdout is not None
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert len(pids) == 2
        assert len(list(tmp_path.iterdir())) == 2
        parent.send_signal(ending)
    wait_until(lambda: not any(map(_lives, pids)))
    wait_until(lambda: not list(tmp_path.iterdir()))


def _lives(pid: int) -> bool:
    """Whether the process runs; a zombie that nobody has reaped yet does not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_a_taken_port_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """When another process takes a port first, the server starts on other ones."""
    with Valkey() as other:
        taken = int(other.url.split(":")[2].split("/")[0])
        choices = [[taken], local.free_ports(1)]
        monkeypatch.setattr(local, "free_ports", lambda _: choices.pop(0))
        with Valkey() as server:
            assert server.url != other.url
    assert not choices


def test_kafka_says_why_it_does_not_start() -> None:
    """A failed start shows the end of the node's log, and leaves nothing behind."""
    cluster = KafkaCluster(properties={"num.io.threads": "none"})
    with pytest.raises(LocalServiceError, match=r"num\.io\.threads"):
        cluster.start()
    with pytest.raises(LocalServiceError, match="not running"):
        _ = cluster.bootstrap_servers


async def test_valkey_forgets_and_comes_back(killable_valkey: Valkey) -> None:
    """A killed Valkey refuses connections; restarted it answers on the same address, empty."""
    url = killable_valkey.url
    async with redis.asyncio.from_url(url) as client:
        await client.set("key", "value")
        assert await client.get("key") == b"value"
        killable_valkey.kill()
        with pytest.raises(redis.ConnectionError):
            await client.get("key")
        killable_valkey.restart()
        assert killable_valkey.url == url
        assert await client.get("key") is None


async def test_shared_valkey(valkey: str, unique: str) -> None:
    """The shared server answers on its address."""
    async with redis.asyncio.from_url(valkey) as client:
        assert await client.set(unique, "1", ex=60)


def topic_names(prefix: str) -> SimpleNamespace:
    kinds = (
        "outputs", "decisions", "feedback", "thresholds", "review", "dead_letters", "streams",
        "evidence",
    )  # fmt: skip
    return SimpleNamespace(**{f"{kind}_topic": f"{prefix}.{kind}" for kind in kinds})


async def test_topics_are_created_once(kafka: str, unique: str) -> None:
    """The first call creates all topics, the second finds every one of them right."""
    specs = desired_topics(topic_names(unique))
    first = await ensure_topics(kafka, specs, 3, 1)
    second = await ensure_topics(kafka, specs, 3, 1)
    assert (len(first.created), first.checked) == (8, ())
    assert (second.created, len(second.checked)) == ((), 8)
    async with AIOKafkaProducer(bootstrap_servers=kafka, max_request_size=4 << 20) as producer:
        await producer.send_and_wait(f"{unique}.streams", b"x" * (3 << 20), key=b"key")


async def test_topics_follow_the_inputs(kafka: str, unique: str) -> None:
    """Where llm.outputs exists, the co-partitioned topics get its partition count."""
    await create_topic(kafka, f"{unique}.outputs", partitions=5)
    report = await ensure_topics(kafka, desired_topics(topic_names(unique)), 3, 1)
    assert report.partitions == 5
    assert report.checked == (f"{unique}.outputs",)


async def test_wrong_topics_are_refused(kafka: str, unique: str) -> None:
    """Another partition count or cleanup policy stops the start, naming the topic; none is made."""
    await create_topic(kafka, f"{unique}.outputs", partitions=5)
    await create_topic(kafka, f"{unique}.decisions", partitions=4)
    await create_topic(kafka, f"{unique}.thresholds")
    specs = desired_topics(topic_names(unique))
    with pytest.raises(TopicMismatchError) as error:
        await ensure_topics(kafka, specs, 5, 1)
    decisions, thresholds = error.value.problems
    assert decisions.startswith(f"{unique}.decisions: has 4 partitions, {unique}.outputs has 5")
    assert thresholds.startswith(f"{unique}.thresholds: cleanup.policy is delete, must be compact")
