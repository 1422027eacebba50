"""One worker or two on a real broker: stopped, killed, fed with rubbish, deserted by Redis."""

import asyncio
import random
import signal
import time
from pathlib import Path

from tests.broker.harness import (
    Bed,
    Tail,
    assert_equal,
    delta,
    in_background,
    make_load,
    outcome,
    reference,
)


async def test_sigterm_drains_commits_and_leaves(kafka: str, unique: str, tmp_path: Path) -> None:
    """SIGTERM under load: exit 0 in time, and the next worker goes on without deciding again."""
    load = make_load(random.Random(1), 150, open_at_once=40)
    async with Bed(
        kafka, unique, tmp_path, score_ms=20, session_timeout_ms=30_000, shutdown_timeout_ms=8_000
    ) as bed, Tail(kafka, bed.settings.decisions_topic) as tail:  # fmt: skip
        first = bed.start_worker()
        await first.has_loaded(bed.partitions)
        async with in_background(bed.produce(load.records, per_second=300)):
            await tail.has_finals(40)
            asked = time.monotonic()
            first.signal(signal.SIGTERM)
            assert await first.exit_code(8.0) == 0, first.tail()
            took_s = time.monotonic() - asked
            assert took_s < 8.0
            second = bed.start_worker()
            await second.has_loaded(bed.partitions, timeout_s=25.0)  # less than a session
        await tail.has_finals(150)
        log = await bed.read(bed.settings.outputs_topic)
        assert_equal(await outcome(bed), await reference(bed.settings, log))
        sent = [r.value for r in await bed.read_decisions("read_uncommitted")]
        assert len(sent) == len(tail.records), "something was decided again"
    print(f"\nsigterm: left in {took_s:.2f} s")  # noqa: T201


async def test_closed_streams_stay_closed_across_a_kill(
    kafka: str, unique: str, tmp_path: Path
) -> None:
    """Late deltas of an ended stream make no decision, though the worker that ended it was killed."""
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
    """One long stream pins no offset: a killed worker's successor reads little, decides the same."""
    rng = random.Random(4)
    long_text = " ".join(f"Sentence number {n} of a very long answer." for n in range(600))
    long_deltas = [delta("long", n, long_text[at : at + 13], context=[{"role": "user", "content": "Go on"}])
                   for n, at in enumerate(range(0, len(long_text), 13))]  # fmt: skip
    end = delta("long", len(long_deltas), "", True)
    load = make_load(rng, 200, open_at_once=30)
    step = len(long_deltas) / len(load.records)
    records, used = [], 0
    for number, record in enumerate(load.records):
        records.append(record)
        upto = int((number + 1) * step)
        records += long_deltas[used:upto]
        used = upto
    records += [*long_deltas[used:], end]
    async with Bed(kafka, unique, tmp_path, partitions=1, rewind_records=200) as bed:
        async with Tail(kafka, bed.settings.decisions_topic) as tail:
            worker = bed.start_worker()
            async with in_background(bed.produce(records, per_second=500)):
                for enough in (60, 200, 350, 500):
                    await tail.has_records(enough)
                    worker.kill()
                    worker = bed.start_worker()
                    await worker.has_loaded(1)
                    event = worker.events("lane.loaded")[0]
                    print("\nloaded", event["offset"], event["journal"], event["open_segments"])  # noqa: T201
            await tail.has_finals(201)
        log = await bed.read(bed.settings.outputs_topic)
        expected = await reference(bed.settings, log)
        assert_equal(await outcome(bed), expected)
