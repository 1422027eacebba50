"""A real Kafka and a real Valkey for the tests. They fail, and never skip, where one won't start.

TIDEGATE_BOOTSTRAP_SERVERS and TIDEGATE_REDIS_URL name servers to use instead (compose, a cluster).
Tests that kill nodes ask for `kafka3` or `killable_valkey`, which are always our own.
The fixtures are plain functions: none depends on an event loop, so each test may have its own.
"""

import os
import uuid
from collections.abc import Iterator

import pytest

from worker.local import KafkaCluster, Valkey, prepare_kafka


@pytest.fixture(scope="session")
def prepared_kafka() -> None:
    """Kafka's jars, and a recorded start: many nodes start in one run of these tests."""
    prepare_kafka()


@pytest.fixture(scope="session")
def kafka(request: pytest.FixtureRequest) -> Iterator[str]:
    """bootstrap_servers of one node that all tests share: use topics and groups of your own."""
    if servers := os.environ.get("TIDEGATE_BOOTSTRAP_SERVERS"):
        yield servers
        return
    request.getfixturevalue("prepared_kafka")
    with KafkaCluster(1) as cluster:
        yield cluster.bootstrap_servers


@pytest.fixture(scope="module")
def kafka3(request: pytest.FixtureRequest) -> Iterator[KafkaCluster]:
    """Three nodes, replication 3, min ISR 2: kill one, and restart it before the test ends."""
    request.getfixturevalue("prepared_kafka")
    with KafkaCluster(3) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def valkey() -> Iterator[str]:
    """redis_url of one server that all tests share: use keys of your own."""
    if url := os.environ.get("TIDEGATE_REDIS_URL"):
        yield url
        return
    with Valkey() as server:
        yield server.url


@pytest.fixture
def killable_valkey() -> Iterator[Valkey]:
    """A server for this test alone."""
    with Valkey() as server:
        yield server


@pytest.fixture
def unique() -> str:
    """A name that no other test or run uses, for topics, groups and keys."""
    return f"t{uuid.uuid4().hex[:12]}"
