"""The fault run: three brokers, three workers, and everything killed at random moments.

More of it: TIDEGATE_FAULT_KILLS=200 TIDEGATE_FAULT_STREAMS=10000 TIDEGATE_FAULT_SEED=7 \
    python -m pytest -s tests/broker/test_faults.py
"""

import asyncio
import os
import random
import signal
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.broker.harness import (
    Bed,
    Load,
    Outcome,
    Tail,
    WorkerProcess,
    assert_equal,
    eventually,
    in_background,
    make_load,
    outcome,
    reference,
)
from worker.local import KafkaCluster, Valkey

KILLS = int(os.environ.get("TIDEGATE_FAULT_KILLS", "30"))
STREAMS = int(os.environ.get("TIDEGATE_FAULT_STREAMS", "2000"))
SEED = int(os.environ.get("TIDEGATE_FAULT_SEED") or random.SystemRandom().randrange(1 << 32))
BETWEEN_KILLS_S = 4.0  # on average
WORKERS = 3
QUIET_S = 90.0  # without a decision for so long the run has failed


class Plan(NamedTuple):
    """When what is killed, counted in kills of workers."""

    broker_down: int
    broker_up: int
    cache_down: int
    cache_up: int


def _say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)  # noqa: T201


@pytest.mark.timeout(600 + 20 * KILLS)
async def test_every_segment_is_decided_once_whatever_is_killed(
    kafka3: KafkaCluster, killable_valkey: Valkey, unique: str, tmp_path: Path
) -> None:
    """Workers, a broker and Redis die: every segment has one decision, that of a quiet run."""
    rng = random.Random(SEED)
    load = make_load(rng, STREAMS, open_at_once=150)
    rate = len(load.records) / (KILLS * BETWEEN_KILLS_S)
    _say(f"seed {SEED}: {STREAMS} streams, {len(load.records)} records, {KILLS} kills")
    bed = Bed(
        kafka3.bootstrap_servers, unique, tmp_path, partitions=12, replication_factor=3,
        score_ms=5, session_timeout_ms=6_000, heartbeat_interval_ms=1_000,
        request_timeout_ms=5_000, transaction_timeout_ms=10_000, rewind_records=300,
        redis_url=killable_valkey.url, cache_key="the key of the fault run", cache_entries=200,
    )  # fmt: skip
    start = time.monotonic()
    async with bed, Tail(kafka3.bootstrap_servers, bed.settings.decisions_topic) as tail:
        workers = [bed.start_worker() for _ in range(WORKERS)]
        await workers[0].has_loaded(1)
        async with in_background(bed.produce(load.records, per_second=rate)):
            await _kill_all_over(rng, bed, workers, tail, kafka3, killable_valkey)
        produced = time.monotonic()
        _say(f"all is produced; {tail.finals} of {STREAMS} streams are decided")
        await _decided(tail, load, bed)
        _say(f"all is decided, {time.monotonic() - produced:.1f} s later")
        log = await bed.read(bed.settings.outputs_topic)
        await eventually(lambda: _all_committed(bed, log), 120.0, "the offsets reach the log's end")
        died = [worker for worker in bed.workers if worker.died]
        assert not died, f"{died[0].log.name} ended by itself:\n{died[0].tail()}"
        found = await outcome(bed)
        _report(tail, found, start, produced, bed)
        assert_equal(found, await reference(bed.settings, log))
        assert len(found.dead_letters) >= load.unreadable


async def _kill_all_over(
    rng: random.Random, bed: Bed, workers: list[WorkerProcess], tail: Tail, kafka: KafkaCluster,
    valkey: Valkey,
) -> None:  # fmt: skip
    """Kill workers at random moments, some respawned at once and some after their session ended.

    Now and then one is not killed but frozen until its partitions have moved.
    """
    plan = Plan(KILLS // 3, KILLS // 3 + 3, KILLS // 2, KILLS * 2 // 3)
    node = rng.choice(kafka.running)
    respawns: list[asyncio.Task[None]] = []
    for number in range(KILLS):
        await asyncio.sleep(rng.expovariate(1 / BETWEEN_KILLS_S))
        if number == plan.broker_down:
            kafka.kill(node)
            _say(f"broker {node} killed")
        if number == plan.broker_up:
            await asyncio.to_thread(kafka.restart, node)
            _say(f"broker {node} restarted")
        if number == plan.cache_down:
            valkey.kill()
            _say("valkey killed")
        if number == plan.cache_up:
            await asyncio.to_thread(valkey.restart)
            _say("valkey restarted")
        alive = [slot for slot, worker in enumerate(workers) if worker.running]
        if not alive:
            await asyncio.gather(*respawns)
            alive = [slot for slot, worker in enumerate(workers) if worker.running]
        slot = rng.choice(alive)
        if number % 6 == 5:
            respawns.append(asyncio.create_task(_freeze(workers[slot], rng.uniform(4, 10))))
            await asyncio.sleep(rng.uniform(0, 1))
            slot = rng.choice(alive)
        workers[slot].kill()
        pause_s = rng.choice((0.0, rng.uniform(0, 2), rng.uniform(6, 9)))
        _say(
            f"kill {number + 1}: {workers[slot].log.stem}, back in {pause_s:.1f} s; "
            f"{len(tail.records)} decisions, {tail.finals} streams"
        )
        respawns.append(asyncio.create_task(_respawn(bed, workers, slot, pause_s)))
    await asyncio.gather(*respawns)


async def _freeze(worker: WorkerProcess, pause_s: float) -> None:
    _say(f"{worker.log.stem} frozen for {pause_s:.1f} s")
    worker.signal(signal.SIGSTOP)
    await asyncio.sleep(pause_s)
    if worker.running:
        worker.signal(signal.SIGCONT)


async def _respawn(bed: Bed, workers: list[WorkerProcess], slot: int, pause_s: float) -> None:
    await asyncio.sleep(pause_s)
    workers[slot] = bed.start_worker()


async def _decided(tail: Tail, load: Load, bed: Bed) -> None:
    """Return when all streams are decided. Raises AssertionError where nothing moves any more."""
    while tail.finals < len(load.texts):
        before = len(tail.records)
        deadline = time.monotonic() + QUIET_S
        while len(tail.records) == before and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
        assert len(tail.records) > before, await _what_is_stuck(tail, load, bed)


async def _what_is_stuck(tail: Tail, load: Load, bed: Bed) -> str:
    ended = {record.key.decode() for record in tail.records if b'"final":true' in record.value}
    open_ones = set(load.texts) - ended
    log = await bed.read(bed.settings.outputs_topic)
    places = {(r.partition, r.key) for r in log if r.key and r.key.decode() in open_ones}
    hidden = await bed.read_decisions("read_uncommitted")
    return (
        f"{len(open_ones)} streams are not decided, such as {sorted(open_ones)[:5]}, in "
        f"partitions {sorted({partition for partition, _ in places})}; "
        f"committed {await bed.committed()}, ends {_ends(log)}, "
        f"{len(hidden)} decisions sent, {len(tail.records)} of them committed"
    )


def _ends(log: Sequence[Any]) -> dict[int, int]:
    return {record.partition: record.offset + 1 for record in log}


async def _all_committed(bed: Bed, log: Sequence[Any]) -> bool:
    """Whether nothing is needed any more: every offset is at its partition's end."""
    return await bed.committed() == _ends(log)


def _report(tail: Tail, found: Outcome, start: float, produced: float, bed: Bed) -> None:
    arrived = [at for at in tail.arrived if at <= produced]
    by_partition: dict[int, list[float]] = {}
    for record, at in zip(tail.records, tail.arrived, strict=True):
        by_partition.setdefault(record.partition, []).append(at)
    lost = sum(len(worker.events("lane.lost")) for worker in bed.workers)
    verdicts = [d["verdict"] for made in found.decisions.values() for d in made]
    _say(
        f"{len(found.decisions)} streams, {found.segments} segments, {verdicts.count('block')} "
        f"blocked, {verdicts.count('revise')} revised, {len(found.dead_letters)} dead letters; "
        f"{KILLS} kills in {time.monotonic() - start:.0f} s, {lost} lanes lost; no decision for at "
        f"most {_longest_gap(arrived):.1f} s, in one partition "
        f"{max(map(_longest_gap, by_partition.values())):.1f} s"
    )


def _longest_gap(moments: Sequence[float]) -> float:
    return max((b - a for a, b in pairwise(moments)), default=0.0)
