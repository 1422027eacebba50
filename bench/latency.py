"""From the delta that completes a segment to its decision, readable under read_committed.

Broker, worker, producer and reader share this machine. Detectors are replaced by a constant,
transactions are on. A segment is complete when the code point after its last one is there, or the
stream has ended: `seq` of its decision names that delta, and the clock starts when it is handed to
a producer that does not linger, as the gate's. The broker has its full compiler and runs under the
same load for some minutes first, as one in production has: a cold one takes twice as long.
"""

import argparse
import asyncio
import json
import random
import time
from collections.abc import Sequence
from typing import NamedTuple

import uvloop
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

from bench import report
from bench.throughput import start_worker, stream_records
from worker.local import local_services
from worker.settings import Settings
from worker.topics import desired_topics, ensure_topics

_SETTLING_S = 4.0  # of each run: its clients and streams are new
STREAMS = 120  # open at once; at 1,000 deltas/s each gets 8 a second


async def produce(
    producer: AIOKafkaProducer, settings: Settings, rate: int, seconds: float, name: str,
    partitions: int, sent: dict[tuple[str, int], float],
) -> None:  # fmt: skip
    """Send deltas at an even rate; note when each was handed to the client."""
    rng = random.Random(1)
    queues: dict[str, list[bytes]] = {}
    names = iter(f"{name}-{n}" for n in range(10**9))
    begin = time.monotonic()
    count = 0
    while (now := time.monotonic()) - begin < seconds:
        due = int((now - begin) * rate)
        while count < due:
            count += 1
            if len(queues) < STREAMS:
                stream_id = next(names)
                queues[stream_id] = stream_records(stream_id, 100, rng)[::-1]
            else:
                stream_id = rng.choice(list(queues))
            record = queues[stream_id].pop()
            sent[stream_id, 99 - len(queues[stream_id])] = time.monotonic()
            await producer.send(
                settings.outputs_topic, record, key=stream_id.encode(),
                partition=hash(stream_id) % partitions,
            )  # fmt: skip
            if not queues[stream_id]:
                del queues[stream_id]
        await asyncio.sleep(0.002)


async def read(
    reader: AIOKafkaConsumer, sent: dict[tuple[str, int], float], found: list[float], skip: float
) -> None:
    """Note each decision's age when it becomes readable; the first `skip` seconds are warm-up."""
    begin = time.monotonic()
    while True:
        batches = await reader.getmany(timeout_ms=1000)
        now = time.monotonic()
        for records in batches.values():
            for record in records:
                decision = json.loads(record.value or b"{}")
                at = sent.get((decision["stream_id"], decision["seq"]))
                if at is not None and now - begin > skip:
                    found.append((now - at) * 1e3)


class Run(NamedTuple):
    """One run: its decisions' ages, ms, and the per cent of the cores that others took."""

    ages: list[float]
    stolen: float


async def one_run(
    settings: Settings, arguments: argparse.Namespace, run: int, seconds: float
) -> Run:
    producer = AIOKafkaProducer(bootstrap_servers=settings.bootstrap_servers)
    reader = AIOKafkaConsumer(
        settings.decisions_topic, bootstrap_servers=settings.bootstrap_servers,
        isolation_level="read_committed", auto_offset_reset="latest",
    )  # fmt: skip
    await producer.start()
    await reader.start()
    sent: dict[tuple[str, int], float] = {}
    found: list[float] = []
    report.stolen()  # from here on
    reading = asyncio.create_task(read(reader, sent, found, _SETTLING_S))
    await produce(
        producer, settings, arguments.rate, seconds + _SETTLING_S,
        f"latency-{run}", arguments.partitions, sent,
    )  # fmt: skip
    await asyncio.sleep(1)
    reading.cancel()
    await producer.stop()
    await reader.stop()
    return Run(found, report.stolen())


def row(name: str, runs: Sequence[Run], share: float) -> tuple[str, str]:
    return name, report.spread([report.percentile(run.ages, share) for run in runs])


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", type=int, default=1_000, help="deltas a second")
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--warm-up", type=float, default=150, help="seconds before the first run")
    parser.add_argument("--partitions", type=int, default=12)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    async with local_services(1, long_lived=True) as services:
        settings = Settings(
            bootstrap_servers=services.bootstrap_servers,
            detectors=("python:detectors.constant:Constant",),
        )
        await ensure_topics(
            settings.bootstrap_servers, desired_topics(settings), arguments.partitions, 1
        )
        worker = start_worker(settings, core=None)
        try:
            await asyncio.sleep(4)
            await one_run(settings, arguments, 0, arguments.warm_up)
            runs = [
                await one_run(settings, arguments, run + 1, arguments.seconds)
                for run in range(arguments.runs)
            ]
        finally:
            worker.terminate()
            worker.wait(30)
    report.show(
        f"Completing delta sent to decision readable, ms, {arguments.rate} deltas/s",
        ("", "median (lowest..highest) of runs"),
        [
            row("p50", runs, 0.5),
            row("p99", runs, 0.99),
            row("highest", runs, 1.0),
            (
                "% of the cores taken by other machines",
                report.spread([run.stolen for run in runs]),
            ),
        ],
    )
    report.close(
        "latency",
        {
            "p50_ms": [report.percentile(run.ages, 0.5) for run in runs],
            "p99_ms": [report.percentile(run.ages, 0.99) for run in runs],
            "decisions": [len(run.ages) for run in runs],
            "stolen_percent": [run.stolen for run in runs],
        },
    )


if __name__ == "__main__":
    uvloop.run(main())
