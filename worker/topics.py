"""The topics that Tidegate reads and writes: created where missing, checked where not.

`llm.outputs`, `moderation.decisions` and `moderation.streams` must have the same number of
partitions: a decision goes to the partition of the deltas it judges. A wrong cleanup policy loses
state or keeps user text for ever. So both are errors, and never changed behind anybody's back.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import msgspec
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import NoError, TopicAlreadyExistsError, UnknownTopicOrPartitionError, for_code

from worker.errors import Stop
from worker.publish import client_settings
from worker.settings import Settings

Cleanup = Literal["delete", "compact"]

_MIB = 1024 * 1024
_SETTLE_S = 30.0  # how long a new topic may take until every broker knows it


class TopicSettings(Protocol):
    """What is needed of the settings: the topics' names."""

    @property
    def outputs_topic(self) -> str: ...  # noqa: D102
    @property
    def decisions_topic(self) -> str: ...  # noqa: D102
    @property
    def feedback_topic(self) -> str: ...  # noqa: D102
    @property
    def thresholds_topic(self) -> str: ...  # noqa: D102
    @property
    def review_topic(self) -> str: ...  # noqa: D102
    @property
    def dead_letters_topic(self) -> str: ...  # noqa: D102
    @property
    def streams_topic(self) -> str: ...  # noqa: D102
    @property
    def evidence_topic(self) -> str: ...  # noqa: D102


class TopicSpec(msgspec.Struct, frozen=True):
    """One topic as it should be."""

    name: str
    cleanup: Cleanup
    co_partitioned: bool = False
    partitions: int | None = None  # None: as many as `ensure_topics` is told
    configs: Mapping[str, str] = {}

    def all_configs(self, replication_factor: int) -> dict[str, str]:
        """The topic's settings at creation, by Kafka's names."""
        in_sync = 2 if replication_factor >= 3 else 1  # one of three replicas may be down
        own = {"cleanup.policy": self.cleanup, "min.insync.replicas": str(in_sync)}
        return own | dict(self.configs)


class TopicState(msgspec.Struct, frozen=True):
    """One topic as it is."""

    partitions: int
    cleanup: str  # "delete", "compact", or both with a comma between
    retention_ms: str = ""  # empty: not asked for


class TopicReport(msgspec.Struct, frozen=True):
    """What `ensure_topics` did."""

    created: tuple[str, ...]
    checked: tuple[str, ...]  # existed and are right
    partitions: int  # of each co-partitioned topic


class TopicMismatchError(Stop):
    """Topics are not as they must be; one line for each problem, with what to do about it."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


def desired_topics(settings: TopicSettings) -> list[TopicSpec]:
    """The seven topics of the contract, `llm.outputs` first, and the learner's ledger.

    Sizes: a delta may carry a conversation of more than 1 MB. A dead letter is such a record
    whole, with headers; a review item and a stream's state hold it and more.
    """
    return [
        TopicSpec(settings.outputs_topic, "delete", co_partitioned=True, configs=_size(2)),
        TopicSpec(settings.decisions_topic, "delete", co_partitioned=True, configs=_size(2)),
        TopicSpec(settings.feedback_topic, "delete"),
        # One partition: few records, and everybody reads all of them, in one order.
        TopicSpec(settings.thresholds_topic, "compact", partitions=1),
        TopicSpec(settings.review_topic, "delete", configs=_size(4)),
        TopicSpec(settings.dead_letters_topic, "delete", configs=_size(4)),
        TopicSpec(settings.streams_topic, "compact", co_partitioned=True, configs=_STREAMS),
        TopicSpec(settings.evidence_topic, "delete", partitions=1, configs=_FOR_EVER),
    ]


def _size(mib: int) -> dict[str, str]:
    return {"max.message.bytes": str(mib * _MIB)}


# Evidence that expires would be gathered anew, and every certificate have a second chance to err.
_FOR_EVER = {"retention.ms": "-1", "retention.bytes": "-1"}

# State is read back whole at each start, so it is kept small: only closed segments are compacted.
_STREAMS = _size(4) | {
    "segment.bytes": str(16 * _MIB),
    "segment.ms": "60000",  # 1 min
    "min.cleanable.dirty.ratio": "0.1",  # 0.5 by default, so twice the state at worst
    "delete.retention.ms": "3600000",  # 1 h: longer than any restore, which must see tombstones
}


def find_problems(
    specs: Sequence[TopicSpec], existing: Mapping[str, TopicState], partitions: int
) -> list[str]:
    """What is wrong with the existing topics, a sentence each with its remedy; pure."""
    problems = []
    expected = co_partitions(specs, existing, partitions)
    lead = next((s.name for s in specs if s.co_partitioned and s.name in existing), "")
    for spec in specs:
        state = existing.get(spec.name)
        if state is None:
            continue
        if spec.co_partitioned and state.partitions != expected:
            problems.append(
                f"{spec.name}: has {state.partitions} partitions, {lead} has {expected}; they must "
                f"have the same number. While nothing runs, raise the smaller one with "
                f"kafka-topics.sh --alter --topic ... --partitions N, or delete {spec.name} and "
                "run `tidegate topics` again."
            )
        if set(state.cleanup.replace(" ", "").split(",")) != {spec.cleanup}:
            problems.append(
                f"{spec.name}: cleanup.policy is {state.cleanup}, must be {spec.cleanup}. Run "
                f"kafka-configs.sh --alter --topic {spec.name} "
                f"--add-config cleanup.policy={spec.cleanup}."
            )
        kept = spec.configs.get("retention.ms")
        if kept and state.retention_ms not in {"", kept}:
            problems.append(
                f"{spec.name}: retention.ms is {state.retention_ms}, must be {kept}. Run "
                f"kafka-configs.sh --alter --topic {spec.name} --add-config retention.ms={kept}."
            )
    return problems


def co_partitions(
    specs: Sequence[TopicSpec], existing: Mapping[str, TopicState], partitions: int
) -> int:
    """The partition count of the co-partitioned topics: the first existing one's, or `partitions`.

    A gateway may have made `llm.outputs` with a count of its own; the others follow it.
    """
    shared = (existing[s.name].partitions for s in specs if s.co_partitioned and s.name in existing)
    return next(shared, partitions)


async def create_topics(settings: Settings) -> TopicReport:
    """Create or check everything that the settings name. Raises as `ensure_topics`."""
    admin = AIOKafkaAdminClient(**client_settings(settings))
    try:
        await admin.start()
        return await ensure_topics(
            admin, desired_topics(settings), settings.partitions, settings.replication_factor
        )
    finally:
        await admin.close()


async def ensure_topics(
    kafka: AIOKafkaAdminClient | str,
    specs: Sequence[TopicSpec],
    partitions: int,
    replication_factor: int,
) -> TopicReport:
    """Create the missing topics and check the others; nothing is created while one is wrong.

    kafka: a started admin client, or `host:port,...` without TLS. partitions: of topics that name
    no number, unless the co-partitioned ones exist already with another. Returns when every new
    topic has its leaders. Raises TopicMismatchError, Stop where the broker refuses one, and
    aiokafka's KafkaError where it cannot be reached.
    """
    if isinstance(kafka, str):
        admin = AIOKafkaAdminClient(bootstrap_servers=kafka, client_id="tidegate-topics")
        try:
            await admin.start()
            return await ensure_topics(admin, specs, partitions, replication_factor)
        finally:
            await admin.close()
    existing = await _existing(kafka, [spec.name for spec in specs])
    _refuse_problems(specs, existing, partitions)
    created: tuple[str, ...] = ()
    shared = [spec for spec in specs if spec.co_partitioned]
    if shared and not any(spec.name in existing for spec in shared):
        # Alone and first: where a gateway makes it right now, the others follow its count.
        created = await _create(kafka, shared[:1], partitions, replication_factor)
        existing |= await _wait_for(kafka, shared[:1])
    count = co_partitions(specs, existing, partitions)
    missing = [spec for spec in specs if spec.name not in existing]
    created += await _create(kafka, missing, count, replication_factor)
    if created or missing:  # somebody else may have made one in between, and differently
        _refuse_problems(specs, await _wait_for(kafka, specs), count)
    checked = tuple(spec.name for spec in specs if spec.name not in created)
    return TopicReport(created, checked, count)


def _refuse_problems(
    specs: Sequence[TopicSpec], existing: Mapping[str, TopicState], partitions: int
) -> None:
    if problems := find_problems(specs, existing, partitions):
        raise TopicMismatchError(problems)


async def _create(
    admin: AIOKafkaAdminClient, specs: Sequence[TopicSpec], partitions: int, replicas: int
) -> tuple[str, ...]:
    """Create the topics; returns the names of those that did not exist. Raises Stop."""
    if not specs:
        return ()
    new = [
        NewTopic(
            spec.name,
            spec.partitions or partitions,
            replicas,
            topic_configs=spec.all_configs(replicas),
        )
        for spec in specs
    ]
    response: Any = await admin.create_topics(new)  # its class depends on the broker's version
    created = []
    for name, code, *message in response.topic_errors:
        error = for_code(code)
        if error is NoError:
            created.append(name)
        elif error is not TopicAlreadyExistsError:
            detail = message[0] if message and message[0] else error.__name__
            raise Stop(f"{name}: the broker would not create it: {detail}")
    return tuple(created)


async def _wait_for(
    admin: AIOKafkaAdminClient, specs: Sequence[TopicSpec]
) -> dict[str, TopicState]:
    """The topics' states as soon as all are there with leaders. Raises Stop after 30 s."""
    deadline = time.monotonic() + _SETTLE_S
    names = [spec.name for spec in specs]
    while len(states := await _existing(admin, names)) < len(names):
        if time.monotonic() > deadline:
            absent = sorted(set(names) - set(states))
            raise Stop(f"{absent[0]}: created, but has no leader after {_SETTLE_S:.0f} s")
        await asyncio.sleep(0.05)
    return states


async def _existing(admin: AIOKafkaAdminClient, names: Sequence[str]) -> dict[str, TopicState]:
    """Those of the topics that exist and have a leader for each partition."""
    found = {
        topic["topic"]: len(topic["partitions"])
        for topic in await admin.describe_topics()
        if topic["topic"] in names and _has_leaders(topic)
    }
    if not found:
        return {}
    configs = await _configs(admin, list(found))
    return {name: TopicState(found[name], *configs[name]) for name in found if name in configs}


def _has_leaders(topic: Mapping[str, Any]) -> bool:
    return bool(topic["partitions"]) and all(p["leader"] >= 0 for p in topic["partitions"])


async def _configs(admin: AIOKafkaAdminClient, names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """cleanup.policy and retention.ms of each; without those that the broker does not know yet."""
    wanted = {"cleanup.policy": "", "retention.ms": ""}
    resources = [ConfigResource(ConfigResourceType.TOPIC, name, wanted) for name in names]
    found: dict[str, tuple[str, str]] = {}
    responses: list[Any] = await admin.describe_configs(resources)
    for response in responses:
        for code, message, _, name, entries in response.resources:
            error = for_code(code)
            if error is NoError:
                values = {entry[0]: entry[1] for entry in entries}
                found[name] = (values["cleanup.policy"], values.get("retention.ms", ""))
            elif error is not UnknownTopicOrPartitionError:
                raise Stop(f"{name}: its settings cannot be read: {message or error.__name__}")
    return found
