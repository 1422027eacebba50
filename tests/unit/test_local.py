"""What worker/local.py and worker/topics.py decide without a server."""

import hashlib
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from worker import local
from worker.local import Jar, LocalServiceError, fetch_kafka, free_ports, read_lock
from worker.topics import TopicSpec, TopicState, co_partitions, desired_topics, find_problems

CONTENT = b"a jar"
GOOD = Jar("group:thing:1.0", hashlib.sha256(CONTENT).hexdigest())


@pytest.fixture
def downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A lock file of one jar, an empty cache, and a registry whose downloads are listed."""
    lock = tmp_path / "kafka.lock.toml"
    lock.write_text(f'[jars]\n"{GOOD.coordinate}" = "{GOOD.sha256}"\n')
    monkeypatch.setenv("TIDEGATE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(local, "LOCK_FILE", lock)
    monkeypatch.setattr(local, "read_lock", lambda: read_lock(lock))
    monkeypatch.setattr("worker.local.time.sleep", lambda _: None)
    return registry(monkeypatch, [CONTENT] * 9)


def registry(monkeypatch: pytest.MonkeyPatch, contents: Sequence[bytes | Exception]) -> list[str]:
    """Answer downloads with these contents in turn; returns the list of what was asked for."""
    asked: list[str] = []

    def resolve(coordinate: str, repository: Path) -> Path:
        content = contents[len(asked)]
        asked.append(coordinate)
        if isinstance(content, Exception):
            raise content
        path = repository / "download"
        path.write_bytes(content)
        return path

    monkeypatch.setattr(local, "_resolve", resolve)
    return asked


def test_the_lock_file_pins_every_jar() -> None:
    """Each jar of the committed lock file has a version and a SHA-256; no address is in it."""
    jars = read_lock()
    assert f"org.apache.kafka:kafka_2.13:{local.KAFKA_VERSION}" in {j.coordinate for j in jars}
    assert all(re.fullmatch(r"[\w.-]+:[\w.-]+:[\w.-]+", jar.coordinate) for jar in jars)
    assert all(re.fullmatch(r"[0-9a-f]{64}", jar.sha256) for jar in jars)
    assert len({jar.file_name for jar in jars}) == len(jars)
    assert "://" not in local.LOCK_FILE.read_text(encoding="utf-8")


def test_the_cache_is_where_it_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """TIDEGATE_CACHE_DIR beats XDG_CACHE_HOME, which beats ~/.cache."""
    monkeypatch.delenv("TIDEGATE_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert local.cache_dir() == Path.home() / ".cache" / "tidegate"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert local.cache_dir() == Path("/xdg/tidegate")
    monkeypatch.setenv("TIDEGATE_CACHE_DIR", "/own")
    assert local.cache_dir() == Path("/own")


def test_a_jar_is_fetched_once(downloads: list[str]) -> None:
    """The second fetch finds the jar in the cache and asks nobody."""
    first, second = fetch_kafka(), fetch_kafka()
    assert first == second
    assert [path.read_bytes() for path in first] == [CONTENT]
    assert downloads == [GOOD.coordinate]


def test_a_damaged_jar_is_fetched_again(downloads: list[str]) -> None:
    """A cached jar that differs by a byte is replaced, not used."""
    fetch_kafka()[0].write_bytes(b"b jar")
    assert fetch_kafka()[0].read_bytes() == CONTENT
    assert len(downloads) == 2


def test_a_broken_download_is_tried_again(
    downloads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cut download and a failed one are repeated; only the right content reaches the cache."""
    del downloads
    asked = registry(monkeypatch, [b"a j", OSError("reset"), CONTENT])
    assert fetch_kafka()[0].read_bytes() == CONTENT
    assert len(asked) == 3


@pytest.mark.parametrize("answer", [b"another jar", OSError("no route")])
def test_what_cannot_be_verified_is_refused(
    downloads: list[str], monkeypatch: pytest.MonkeyPatch, answer: bytes | Exception
) -> None:
    """Wrong content or no network ends in an error that says what to do; the cache stays empty."""
    del downloads
    registry(monkeypatch, [answer] * 3)
    with pytest.raises(LocalServiceError, match="TIDEGATE_BOOTSTRAP_SERVERS"):
        fetch_kafka()
    assert list((local.cache_dir()).rglob("*.jar")) == []


def test_two_fetch_at_once(downloads: list[str]) -> None:
    """Of two that fetch at the same time one downloads, and both get the whole jar."""
    results: list[list[Path]] = []
    threads = [threading.Thread(target=lambda: results.append(fetch_kafka())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert downloads == [GOOD.coordinate]


def test_ports_are_different_and_not_for_clients() -> None:
    """Ports differ from each other and lie below those of outgoing connections."""
    ports = free_ports(50)
    assert len(set(ports)) == 50
    assert max(ports) < 32_768


def test_kafka_ids_can_be_arguments() -> None:
    """An id has Kafka's 22 characters and never looks like an option."""
    ids = [local._kafka_uuid() for _ in range(500)]
    assert all(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]{21}", text) for text in ids)


# --- topics --------------------------------------------------------------------------------------


IN, OUT = TopicSpec("in", "delete", co_partitioned=True), TopicSpec("out", "delete")
STATE = TopicSpec("state", "compact", co_partitioned=True, configs={"retention.ms": "-1"})


def test_the_contract_s_topics() -> None:
    """Inputs, decisions, streams share partitions; state topics are compacted; evidence stays."""
    kinds = (
        "outputs", "decisions", "feedback", "thresholds", "review", "dead_letters", "streams",
        "evidence",
    )  # fmt: skip
    specs = desired_topics(SimpleNamespace(**{f"{kind}_topic": kind for kind in kinds}))
    assert {spec.name for spec in specs} == set(kinds)
    shared = {spec.name for spec in specs if spec.co_partitioned}
    compacted = {spec.name for spec in specs if spec.cleanup == "compact"}
    assert shared == {"outputs", "decisions", "streams"}
    assert compacted == {"thresholds", "streams"}
    (evidence,) = (spec for spec in specs if spec.name == "evidence")
    assert (evidence.partitions, evidence.configs["retention.ms"]) == (1, "-1")


def test_a_dead_letter_fits() -> None:
    """The largest delta fits into dead letters, review and state with room for what is added."""
    kinds = (
        "outputs", "decisions", "feedback", "thresholds", "review", "dead_letters", "streams",
        "evidence",
    )  # fmt: skip
    specs = desired_topics(SimpleNamespace(**{f"{kind}_topic": kind for kind in kinds}))
    size = {s.name: int(s.configs.get("max.message.bytes", 1_048_588)) for s in specs}
    assert size["outputs"] > 1_500_000
    assert min(size["dead_letters"], size["review"], size["streams"]) >= 2 * size["outputs"]


@pytest.mark.parametrize(("replicas", "in_sync"), [(1, "1"), (2, "1"), (3, "2")])
def test_one_replica_of_three_may_be_down(replicas: int, in_sync: str) -> None:
    """min.insync.replicas is 2 of 3, and 1 where more would stop the topic at the first death."""
    assert STATE.all_configs(replicas)["min.insync.replicas"] == in_sync
    assert STATE.all_configs(replicas)["cleanup.policy"] == "compact"


def test_right_topics_have_no_problems() -> None:
    """Missing topics are no problem, nor is another count where nothing is co-partitioned."""
    existing = {"in": TopicState(6, "delete"), "out": TopicState(99, "delete")}
    assert find_problems([IN, OUT, STATE], existing, 12) == []
    assert co_partitions([IN, OUT, STATE], existing, 12) == 6
    assert co_partitions([IN, OUT, STATE], {}, 12) == 12


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (TopicState(5, "compact"), "state: has 5 partitions, in has 6"),
        (TopicState(6, "delete"), "state: cleanup.policy is delete, must be compact"),
        (TopicState(6, "compact,delete"), "state: cleanup.policy is compact,delete"),
        (TopicState(6, "compact", "604800000"), "state: retention.ms is 604800000, must be -1"),
    ],
)
def test_wrong_topics_are_named(state: TopicState, words: str) -> None:
    """Each problem names the topic, what it is and what it must be, and how to mend it."""
    (problem,) = find_problems([IN, STATE], {"in": TopicState(6, "delete"), "state": state}, 6)
    assert words in problem
    assert "--alter" in problem
