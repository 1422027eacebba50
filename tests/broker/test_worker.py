"""One worker or two on a real broker: stopped, killed, fed with rubbish, deserted by Redis."""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import pytest
from aiokafka import TopicPartition

from detectors import second as seconds
from tests.broker.harness import (
    FOR_EVER_MS,
    Bed,
    Input,
    Tail,
    assert_equal,
    comparable,
    delta,
    eventually,
    in_background,
    make_load,
    outcome,
    reference,
    until,
)
from tests.fakes import second_plan
from worker.decode import decode
from worker.errors import Unreadable
from worker.local import KafkaCluster, Valkey
from worker.publish import TransactionalOutlet
from worker.settings import HERE


async def test_sigterm_drains_commits_and_leaves(kafka: str, unique: str, tmp_path: Path) -> None:
    """SIGTERM under load: exit 0 in time, and the next worker goes on without deciding again."""
    load = make_load(random.Random(1), 150, open_at_once=40)
    async with Bed(
        kafka, unique, tmp_path, score_ms=20, session_timeout_ms=30_000, shutdown_timeout_ms=15_000
    ) as bed, Tail(kafka, bed.settings.decisions_topic) as tail:  # fmt: skip
        first = bed.start_worker()
        await first.has_loaded(bed.partitions)
        async with in_background(bed.produce(load.records, per_second=300)):
            await tail.has_finals(40)
            asked = time.monotonic()
            first.signal(signal.SIGTERM)
            assert await first.exit_code(15.0) == 0, first.tail()
            assert time.monotonic() - asked < 15.0
            second = bed.start_worker()
            await second.has_loaded(bed.partitions, timeout_s=25.0)  # less than a session
        await tail.has_finals(150)
        log = await bed.read(bed.settings.outputs_topic)
        assert_equal(await outcome(bed), await reference(bed.settings, log))
        sent = [r.value for r in await bed.read_decisions("read_uncommitted")]
        assert len(sent) == len(tail.records), "something was decided again"


async def test_sigterm_decides_what_was_read(kafka: str, unique: str, tmp_path: Path) -> None:
    """What a worker has read before SIGTERM it decides and publishes before it leaves."""
    records = [delta(f"s{n}", 0, f"Sentence {n} is judged slowly. " * 3, True) for n in range(150)]
    async with Bed(kafka, unique, tmp_path, partitions=1, score_ms=400) as bed:
        await bed.produce(records)
        async with Tail(kafka, bed.settings.decisions_topic) as tail:
            worker = bed.start_worker()
            await tail.has_records(1)
            worker.signal(signal.SIGTERM)
            assert tail.finals < 150, "too fast to show anything"
            assert await worker.exit_code(20.0) == 0
            await tail.has_finals(150, timeout_s=20.0)
        assert await bed.committed() == {0: 150}


async def test_sigterm_ends_a_worker_whatever_it_waits_for(unique: str, tmp_path: Path) -> None:
    """While it joins, and while the broker hangs, SIGTERM ends a worker in time, with exit 0."""
    with KafkaCluster(1) as cluster:
        servers = cluster.bootstrap_servers
        async with Bed(servers, unique, tmp_path, shutdown_timeout_ms=10_000) as bed:
            first = bed.start_worker()
            await first.has_loaded(bed.partitions)
            for pause_s in (1.0, 2.0, 3.0):
                joining = bed.start_worker()
                await asyncio.sleep(pause_s)
                joining.signal(signal.SIGTERM)
                assert await joining.exit_code(10.0) in {
                    0,
                    -signal.SIGTERM,
                }  # -15: while it imports
            records = make_load(random.Random(12), 100).records
            async with in_background(bed.produce(records, per_second=500)):
                await asyncio.sleep(1.0)
            await bed.produce([delta("one more", 0, "Some text. " * 9)])
            os.kill(cluster.pid(1), signal.SIGSTOP)
            first.signal(signal.SIGTERM)
            try:
                assert await first.exit_code(10.0) == 0, first.tail()
            finally:
                os.kill(cluster.pid(1), signal.SIGCONT)


async def test_closed_streams_stay_closed_across_a_kill(
    kafka: str, unique: str, tmp_path: Path
) -> None:
    """Late deltas of an ended stream make no decision, though its worker was killed."""
    load = make_load(random.Random(2), 60, open_at_once=20, unreadable_share=0)
    async with Bed(kafka, unique, tmp_path) as bed:
        async with Tail(kafka, bed.settings.decisions_topic) as tail:
            bed.start_worker()
            await bed.produce(load.records)
            await tail.has_finals(60)
            bed.workers[0].kill()
            await bed.produce(random.Random(3).sample(load.records, 100))  # late repeats
            await bed.produce(delta(name, 0, "From the start. " * 9, True) for name in load.texts)
            bed.start_worker()
            await bed.produce([delta("another", 0, "Something new.", True)])
            await tail.has_finals(61)
            await asyncio.sleep(1.0)
        log = await bed.read(bed.settings.outputs_topic)
        assert_equal(await outcome(bed), await reference(bed.settings, log))


async def test_long_stream_is_spilled_and_goes_on_after_kills(
    kafka: str, unique: str, tmp_path: Path
) -> None:
    """A long stream pins no offset: a killed worker's successor reads little, decides the same."""
    rewind = 200
    text = " ".join(f"Sentence number {n} of a very long answer." for n in range(600))
    pieces = [text[at : at + 13] for at in range(0, len(text), 13)]
    long_one = [
        delta("long", n, piece, context=[{"role": "user", "content": "Go on"}])
        for n, piece in enumerate(pieces)
    ]
    load = make_load(random.Random(4), 200, open_at_once=30)
    records = _merged(load.records, [*long_one, delta("long", len(pieces), "", True)])
    loaded: list[int] = []
    async with Bed(kafka, unique, tmp_path, partitions=1, rewind_records=rewind) as bed:
        async with Tail(kafka, bed.settings.decisions_topic) as tail:
            worker = bed.start_worker()
            async with in_background(bed.produce(records, per_second=500)):
                for enough in (100, 400, 700, 1_000):
                    await tail.has_records(enough)
                    worker.kill()
                    worker = bed.start_worker()
                    await worker.has_loaded(1)
                    loaded.append(worker.events("lane.loaded")[0]["offset"])
            await tail.has_finals(201)
        log = await bed.read(bed.settings.outputs_topic)
        expected = await reference(bed.settings, log)
        assert_equal(await outcome(bed), expected)
    first = next(r.offset for r in log if r.key == b"long")
    assert loaded[-1] > first + rewind, f"started again at {loaded}, though nothing older is needed"
    assert loaded == sorted(loaded)


def _merged(one: list[Input], other: list[Input]) -> list[Input]:
    """Both, each in its order, evenly interleaved."""
    places = [(n / len(one), 0, record) for n, record in enumerate(one)]
    places += [(n / len(other), 1, record) for n, record in enumerate(other)]
    return [record for _, _, record in sorted(places, key=lambda place: place[:2])]


async def test_stopped_worker_that_wakes_publishes_nothing(
    kafka: str, unique: str, tmp_path: Path
) -> None:
    """Woken after its partitions moved, a worker is fenced, publishes nothing, and serves again."""
    load = make_load(random.Random(5), 300, open_at_once=60)
    async with Bed(kafka, unique, tmp_path, score_ms=50) as bed:
        async with Tail(kafka, bed.settings.decisions_topic) as tail:
            sleeper = bed.start_worker()
            await sleeper.has_loaded(bed.partitions)
            async with in_background(bed.produce(load.records, per_second=400)):
                await tail.has_finals(20)
                sleeper.signal(signal.SIGSTOP)
                other = bed.start_worker()
                await other.has_loaded(bed.partitions)
                await tail.has_finals(80)
                before = len(await bed.read_decisions("read_uncommitted"))
                sleeper.signal(signal.SIGCONT)
                await until(
                    lambda: len(sleeper.events("partitions.assigned")) > 1, 30.0, "it joins again"
                )
            await tail.has_finals(300)
            other.signal(signal.SIGTERM)
            assert await other.exit_code(15.0) == 0
            await bed.produce([delta(f"new{n}", 0, "Say something.", True) for n in range(20)])
            await tail.has_finals(320)
        assert before > 0
        log = await bed.read(bed.settings.outputs_topic)
        assert_equal(await outcome(bed), await reference(bed.settings, log))
        assert sleeper.running


async def test_partition_taken_twice_is_fenced(kafka: str, unique: str, tmp_path: Path) -> None:
    """Whoever holds an older producer of a partition cannot commit, and starts from what is."""
    load = make_load(random.Random(6), 120, open_at_once=30)
    async with Bed(kafka, unique, tmp_path, partitions=1) as bed:
        async with Tail(kafka, bed.settings.decisions_topic) as tail:
            worker = bed.start_worker()
            await worker.has_loaded(1)
            async with in_background(bed.produce(load.records, per_second=300)):
                await tail.has_finals(20)
                thief = TransactionalOutlet(
                    bed.settings, TopicPartition(bed.settings.outputs_topic, 0)
                )
                await thief.open()  # what a second owner does first
                await until(lambda: bool(worker.events("lane.lost")), 20.0, "it is fenced")
                await thief.close()
            assert worker.events("lane.lost")[0]["cause"] == "fenced"
            await tail.has_finals(120)
        log = await bed.read(bed.settings.outputs_topic)
        assert_equal(await outcome(bed), await reference(bed.settings, log))


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
async def test_members_come_and_go_under_load(
    kafka: str, unique: str, tmp_path: Path, static: bool
) -> None:
    """A second worker joins, each restarts in turn, one leaves: one decision for each segment."""
    load = make_load(random.Random(7), 300, open_at_once=60)
    names: list[dict[str, Any]] = [
        {"group_instance_id": f"w{n}"} if static else {} for n in range(2)
    ]
    async with Bed(kafka, unique, tmp_path, score_ms=5) as bed:
        async with Tail(kafka, bed.settings.decisions_topic) as tail:
            workers = [bed.start_worker(**names[0])]
            await workers[0].has_loaded(bed.partitions)
            async with in_background(bed.produce(load.records, per_second=250)):
                workers.append(bed.start_worker(**names[1]))
                await workers[1].has_loaded(2)
                await asyncio.sleep(1.0)
                for slot in (0, 1):
                    workers[slot].signal(signal.SIGTERM)
                    assert await workers[slot].exit_code(15.0) == 0, workers[slot].tail()
                    workers[slot] = bed.start_worker(**names[slot])
                    await workers[slot].has_loaded(2)
                workers[1].signal(signal.SIGTERM)
                assert await workers[1].exit_code(15.0) == 0
            await tail.has_finals(300)
        log = await bed.read(bed.settings.outputs_topic)
        assert_equal(await outcome(bed), await reference(bed.settings, log))
        if static:
            joined = workers[0].events("partitions.assigned")
            assert joined, "the restarted member was given nothing"


# --- bad input -----------------------------------------------------------------------------------

_SEEDS = (
    {"stream_id": "f", "seq": 0, "delta": "Some text. ", "final": False},
    {"stream_id": "f", "seq": 1, "delta": "\ud83d", "final": False, "tenant": "t",
     "channel": "tool"},
    {"stream_id": "f", "seq": 2, "delta": "x" * 500, "final": True,
     "context": [{"role": "user", "content": "Hi"}], "ts_ms": 17},
)  # fmt: skip
_ODD: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**53, 2**53 + 1, 2**70, 1e308, 1.5, "", "x", "\ud800", "\x00", [], {},
    [[]], [{"role": "user"}], [{"role": 1, "content": 2}], {"a": {"b": []}}, "text", "thinking",
    float("nan"), float("inf"),
)  # fmt: skip


def _fuzz(rng: random.Random, number: int) -> Input:
    """A record that is broken in one of many ways, or by chance is not."""
    fields: dict[str, Any] = dict(rng.choice(_SEEDS))
    fields["stream_id"] = f"fuzz{rng.randrange(2_000)}"
    fields["seq"] = rng.choice((0, 0, 1, 2, 3, 7, 300))
    kind = rng.randrange(10)
    if kind < 4:
        fields[rng.choice(list(fields))] = rng.choice(_ODD)
    if kind == 4:
        del fields[rng.choice(list(fields))]
    if kind == 5:
        fields["more"] = rng.choice(_ODD)
    written = json.dumps(fields).encode()
    value: bytes | None = written
    if kind == 6:
        at = rng.randrange(len(written))
        value = written[:at] + rng.randbytes(rng.randrange(4)) + written[at + rng.randrange(4) :]
    if kind == 7:
        value = rng.choice((None, b"", b"[" * 20_000, b'{"stream_id":' * 3_000, rng.randbytes(40)))
    if number % 5_000 == 0:
        huge = {"stream_id": f"huge{number}", "delta": "word " * 80_000, "final": True}
        value = json.dumps({**_SEEDS[0], **huge}).encode()
    key = rng.choice((None, b"", b"\xff\xfe", str(number % 97).encode()))
    stream_id = _stream_of(value)  # what is readable belongs to one partition
    place = number if stream_id is None else zlib.crc32(stream_id.encode())
    return Input(key, value, place % 4)


@pytest.mark.timeout(600)
async def test_rubbish_is_accounted_for_and_good_streams_go_on(
    kafka: str, unique: str, tmp_path: Path
) -> None:
    """Each of 100,000 fuzzed records is a dead letter, a part of a decision or a repeat."""
    rng = random.Random(8)
    good = make_load(rng, 200, open_at_once=20, unreadable_share=0)
    fuzzed = [_fuzz(rng, number) for number in range(100_000)]
    records = _merged(fuzzed, good.records)
    async with Bed(
        kafka, unique, tmp_path, score_ms=0, max_dead_letters_in_row=1_000_000,
        idle_timeout_ms=8_000, gap_timeout_ms=4_000,
    ) as bed:  # fmt: skip
        await bed.produce(records)
        async with Tail(kafka, bed.settings.decisions_topic) as tail:
            worker = bed.start_worker()
            await until(lambda: set(good.texts) <= _ended(tail), 240.0, "the good streams end")
            log = await bed.read(bed.settings.outputs_topic)
            assert len(log) == len(records)
            ends = {r.partition: r.offset + 1 for r in log}

            async def committed() -> bool:
                return await bed.committed() == ends

            await eventually(committed, 120.0, "every record is passed")
        assert worker.running, worker.tail()
        found = await outcome(bed)
        expected = await reference(bed.settings, log)
        assert found.dead_letters == expected.dead_letters
        for stream_id in good.texts:
            assert found.decisions[stream_id] == expected.decisions[stream_id]
        # Fuzzed streams end by time, which decides for itself: but each is decided to an end.
        named = {_stream_of(r.value) for r in log} - {None}
        assert named == set(found.decisions)
        assert all(made[-1]["final"] for made in found.decisions.values())


def _stream_of(value: bytes | None) -> str | None:
    try:
        return decode(value).stream_id
    except Unreadable:
        return None


def _ended(tail: Tail) -> set[str]:
    return {r.key.decode() for r in tail.records if b'"final":true' in r.value}


async def test_too_many_unreadable_in_a_row_stop_the_worker(
    kafka: str, unique: str, tmp_path: Path
) -> None:
    """The worker ends non-zero and says why; nothing is committed past the run's beginning."""
    async with Bed(kafka, unique, tmp_path, partitions=1, max_dead_letters_in_row=50) as bed:
        async with Tail(kafka, bed.settings.decisions_topic) as tail:
            worker = bed.start_worker()
            good = [delta(f"s{n}", 0, "A good one. " * 9, True) for n in range(10)]
            await bed.produce(good)
            await tail.has_finals(10)
            rubbish = [Input(b"k", b"{rubbish")] * 60
            await bed.produce(rubbish, per_second=60)  # several polls and transactions
            assert await worker.exit_code(20.0) == 1
            assert "51 unreadable records in a row" in worker.tail()
            assert "max_dead_letters_in_row" in worker.tail()
            assert (await bed.committed()).get(0, 0) <= 10
            assert await bed.read(bed.settings.dead_letters_topic) == []
            second = bed.start_worker()
            assert await second.exit_code(20.0) == 1, "the run is still there"
            third = bed.start_worker(max_dead_letters_in_row=100)
            await bed.produce([delta("after", 0, "It goes on. " * 9, True)])
            await tail.has_finals(11)
            assert third.running
        log = await bed.read(bed.settings.outputs_topic)
        assert_equal(await outcome(bed), await reference(bed.settings.model_copy(
            update={"max_dead_letters_in_row": 100}), log))  # fmt: skip


# --- Redis ---------------------------------------------------------------------------------------


async def test_redis_costs_speed_never_a_decision(
    kafka: str, unique: str, tmp_path: Path, killable_valkey: Valkey
) -> None:
    """Redis gone from the start, frozen, killed: the decisions are those without any Redis."""
    url = killable_valkey.url
    load = make_load(random.Random(9), 300, open_at_once=60)
    third = len(load.records) // 3
    killable_valkey.kill()
    async with Bed(kafka, unique, tmp_path, redis_url=url, cache_key="k" * 32) as bed:
        worker = bed.start_worker()
        await bed.produce(load.records[:third], per_second=400)
        await asyncio.to_thread(killable_valkey.restart)
        async with in_background(bed.produce(load.records[third : 2 * third], per_second=400)):
            await asyncio.sleep(1.0)
            _freeze(killable_valkey, signal.SIGSTOP)
        _freeze(killable_valkey, signal.SIGCONT)
        async with in_background(bed.produce(load.records[2 * third :], per_second=400)):
            await asyncio.sleep(1.0)
            killable_valkey.kill()
        async with Tail(kafka, bed.settings.decisions_topic) as tail:
            await tail.has_finals(300)
        assert worker.running
        log = await bed.read(bed.settings.outputs_topic)
        assert_equal(await outcome(bed), await reference(bed.settings, log))


def _freeze(valkey: Valkey, number: signal.Signals) -> None:
    os.kill(valkey.pid, number)


# --- delivery, time, watchdog --------------------------------------------------------------------


async def test_at_least_once_loses_nothing(kafka: str, unique: str, tmp_path: Path) -> None:
    """Without transactions a kill may repeat decisions, equal in all, but lose none."""
    load = make_load(random.Random(10), 200, open_at_once=40)
    async with Bed(kafka, unique, tmp_path, delivery="at_least_once", score_ms=5) as bed:
        async with Tail(kafka, bed.settings.decisions_topic) as tail:
            worker = bed.start_worker()
            await worker.has_loaded(bed.partitions)
            async with in_background(bed.produce(load.records, per_second=300)):
                for enough in (200, 600):
                    await tail.has_records(enough)
                    worker.kill()
                    worker = bed.start_worker()
            await until(lambda: len(_ended(tail)) >= 200, 60.0, "all streams end")
        log = await bed.read(bed.settings.outputs_topic)
        expected = await reference(bed.settings, log)
        wanted = {d["decision_id"]: d for made in expected.decisions.values() for d in made}
        found = [comparable(json.loads(r.value)) for r in await bed.read_decisions()]
        assert {d["decision_id"] for d in found} == set(wanted)
        assert all(d == wanted[d["decision_id"]] for d in found)
        letters = [dict(r.headers) for r in await bed.read(bed.settings.dead_letters_topic)]
        places = {(int(h["partition"]), int(h["offset"])) for h in letters}
        assert places == set(expected.dead_letters)


async def test_silent_and_broken_streams_are_closed(
    kafka: str, unique: str, tmp_path: Path
) -> None:
    """Idle streams are judged and closed, gaps close with a block, also after a kill."""
    text = "One sentence that is long enough to be a segment. "
    async with Bed(
        kafka, unique, tmp_path, idle_timeout_ms=4_000, gap_timeout_ms=2_000,
        detectors=["python:detectors.constant:Constant"],
    ) as bed, Tail(kafka, bed.settings.decisions_topic) as tail:  # fmt: skip
        worker = bed.start_worker()
        await worker.has_loaded(bed.partitions)
        await bed.produce([
            delta("silent", 0, text * 3), delta("silent", 1, "And"),
            delta("gap", 0, text * 2 + "Held"), delta("gap", 2, " never shown.", True),
        ])  # fmt: skip
        await tail.has_records(4)
        worker.kill()
        bed.start_worker()
        await tail.has_finals(2)
        await bed.produce([delta("gap", 1, " back"), delta("silent", 2, " more", True),
                           delta("other", 0, text, True)])  # fmt: skip
        await tail.has_finals(3)
        decisions = (await outcome(bed)).decisions
    assert [d["verdict"] for d in decisions["silent"]] == ["allow"] * 4
    assert decisions["silent"][-1]["end"] == len(text * 3 + "And")
    gap = decisions["gap"][-1]
    assert (gap["verdict"], gap["reason"], gap["released_to"]) == ("block", "gap", len(text * 2))
    assert [d["final"] for d in decisions["gap"]] == [False, False, True]


async def test_backlog_closes_nobody(kafka: str, unique: str, tmp_path: Path) -> None:
    """A delta that waits in the log is not missing, however slowly the log is read."""
    load = make_load(random.Random(11), 100, open_at_once=30)
    half = len(load.records) // 2
    async with Bed(
        kafka, unique, tmp_path, gap_timeout_ms=300, score_ms=150, max_poll_records=50,
        max_waiting_segments=20,
    ) as bed, Tail(kafka, bed.settings.decisions_topic) as tail:  # fmt: skip
        worker = bed.start_worker(gap_timeout_ms=FOR_EVER_MS)
        await bed.produce(load.records[:half])
        await asyncio.sleep(2.0)
        worker.kill()
        await bed.produce(load.records[half:])
        bed.start_worker()
        await tail.has_finals(100)
        log = await bed.read(bed.settings.outputs_topic)
        assert_equal(await outcome(bed), await reference(bed.settings, log))


def test_stuck_event_loop_ends_the_process() -> None:
    """The watchdog ends a process whose loop is stuck, non-zero; not one whose loop turns."""
    program = (
        "import sys, time; from worker import watchdog\n"
        "beats = [time.monotonic()]\n"
        "watchdog.start(lambda: beats[0], 3_000)\n"
        "for _ in range(80): time.sleep(0.05); beats[0] = time.monotonic()\n"
        "print('alive', flush=True); time.sleep(60)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=HERE, capture_output=True, timeout=45, check=False
    )
    assert ended.returncode == 70
    assert b"alive" in ended.stdout
    assert b"event loop stuck" in ended.stderr


async def test_worker_whose_loop_is_stuck_is_replaced(
    kafka: str, unique: str, tmp_path: Path
) -> None:
    """A detector that blocks the event loop costs its worker the life, and no decision."""
    records = [delta(f"s{n}", 0, f"Sentence {n} says enough to judge.", True) for n in range(20)]
    async with Bed(kafka, unique, tmp_path) as bed:
        async with Tail(kafka, bed.settings.decisions_topic) as tail:
            stuck = bed.start_worker(
                detectors=["python:tests.fakes:StuckDetector"], watchdog_ms=1_000
            )
            await stuck.has_loaded(bed.partitions)
            await bed.produce(records)
            assert await stuck.exit_code(20.0) == 70
            bed.start_worker()
            await tail.has_finals(20)
        log = await bed.read(bed.settings.outputs_topic)
        assert_equal(await outcome(bed), await reference(bed.settings, log))


async def test_a_second_look_settles_what_is_uncertain_through_a_kill(
    kafka: str, unique: str, tmp_path: Path
) -> None:
    """Its answers decide, each segment once, as undisturbed; without one the verdict says so."""
    seconds.write(tmp_path / "second.json", second_plan())
    texts = {
        f"s{n}": f"violence=0.{first} second={said}, says answer number {n}."
        for n, (first, said) in enumerate(
            [("65", "0.9"), ("75", "0.1"), ("20", "0.9"), ("65", "down")] * 40
        )
    }
    expected = [
        ("block", "logprob"), ("allow", "logprob"), ("allow", "toxicity"), ("allow", "toxicity")
    ]  # fmt: skip
    records = [delta(name, 0, text, True) for name, text in texts.items()]
    async with Bed(
        kafka, unique, tmp_path, detectors=["python:tests.fakes:SaysDetector"],
        logprob="python:tests.fakes:SaysHelper", logprob_plan=str(tmp_path / "second.json"),
        logprob_deadline_ms=60_000, logprob_queue=1_000,
        tenants={"default": {"thresholds": {"other": 1.0}}},
    ) as bed, Tail(kafka, bed.settings.decisions_topic) as tail:  # fmt: skip
        first = bed.start_worker()
        await first.has_loaded(bed.partitions)
        async with in_background(bed.produce(records, per_second=40)):
            await tail.has_finals(40)
            first.kill()
            bed.start_worker()
        await tail.has_finals(len(texts))
        made: dict[str, Any] = {}
        for record in tail.records:
            decision = json.loads(record.value)
            assert made.setdefault(decision["stream_id"], decision) is decision, "decided twice"
    for n, (verdict, stage) in enumerate(expected * 40):
        decision = made[f"s{n}"]
        assert (decision["verdict"], decision["stage"]) == (verdict, stage)
        assert decision["reason"].endswith("; logprob unavailable") is (n % 4 == 3)
        assert "+logprob@" in decision["model"]
