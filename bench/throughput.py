"""How many deltas a second does one worker process take, on one core, transactions on?

Detectors are replaced by a constant. The input lies in Kafka before the worker starts. The clock
starts when a tenth of the decisions is readable and stops with the last; it counts the deltas in
proportion. CPU seconds are the worker's own, in the same span.
"""

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import time
from typing import Any

import psutil
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

from bench import report
from worker.local import local_services
from worker.settings import Settings
from worker.topics import desired_topics, ensure_topics

WORDS = "the tide comes in and goes out again while people walk along a quiet shore talking".split()


def stream_records(stream_id: str, words: int, rng: random.Random) -> list[bytes]:
    """Deltas of one stream, a word each, a sentence end every dozen or so."""
    records = []
    for seq in range(words):
        word = rng.choice(WORDS) + (". " if rng.random() < 0.08 else " ")
        delta = {
            "stream_id": stream_id, "seq": seq, "delta": word, "final": seq == words - 1,
            "ts_ms": 1763740800000 + seq,
        }  # fmt: skip
        if seq == 0:
            delta["context"] = [{"role": "user", "content": "Tell me about the sea, please."}]
        records.append(json.dumps(delta).encode())
    return records


async def fill(settings: Settings, partitions: int, deltas: int, words: int, run: int) -> int:
    """Put `deltas` deltas of interleaved streams into the topic; how many streams."""
    producer = AIOKafkaProducer(
        bootstrap_servers=settings.bootstrap_servers, linger_ms=5, max_batch_size=1 << 19
    )
    await producer.start()
    rng = random.Random(run)
    streams = deltas // words
    open_at_once = 500
    for begin in range(0, streams, open_at_once):
        ids = range(begin, min(begin + open_at_once, streams))
        texts = {i: stream_records(f"run-{run}/{i}", words, rng) for i in ids}
        for seq in range(words):
            for i in ids:
                await producer.send(
                    settings.outputs_topic, texts[i][seq], key=f"run-{run}/{i}".encode(),
                    partition=i % partitions,
                )  # fmt: skip
    await producer.stop()
    return streams


def start_worker(settings: Settings, core: int | None, **extra: str) -> subprocess.Popen[bytes]:
    """A worker process, pinned to one core."""
    command = [sys.executable, "-m", "worker.cli", "run"]
    if core is not None:
        command = ["taskset", "-c", str(core), *command]
    environment = os.environ | {
        "TIDEGATE_BOOTSTRAP_SERVERS": settings.bootstrap_servers,
        "TIDEGATE_DETECTORS": json.dumps(settings.detectors), "TIDEGATE_LOG_LEVEL": "WARNING",
        **extra,
    }  # fmt: skip
    return subprocess.Popen(command, env=environment)


async def one_run(settings: Settings, partitions: int, deltas: int, words: int, run: int) -> Any:
    streams = await fill(settings, partitions, deltas, words, run)
    reader = AIOKafkaConsumer(
        settings.decisions_topic, bootstrap_servers=settings.bootstrap_servers,
        isolation_level="read_committed", auto_offset_reset="latest",
    )  # fmt: skip
    await reader.start()
    while len(reader.assignment()) < partitions:
        await asyncio.sleep(0.05)
    for partition in reader.assignment():
        await reader.position(partition)
    worker = start_worker(settings, core=0)
    process = psutil.Process(worker.pid)
    first = cpu_first = last = 0.0
    finals = decisions = before = peak = 0
    try:
        while finals < streams:
            for records in (await reader.getmany(timeout_ms=200)).values():
                decisions += len(records)
                finals += sum(b'"final":true' in (record.value or b"") for record in records)
                if not first and finals >= streams / 10:
                    first, cpu_first = time.monotonic(), sum(process.cpu_times()[:2])
                    before = decisions
            last = time.monotonic()
            peak = max(peak, process.memory_info().rss)
            if worker.poll() is not None:
                raise SystemExit("the worker ended early")
        cpu = sum(process.cpu_times()[:2]) - cpu_first
    finally:
        worker.terminate()
        worker.wait(30)
        await reader.stop()
    wall, counted = last - first, deltas * (decisions - before) / decisions
    return {"per_s": counted / wall, "per_cpu_s": counted / cpu, "decisions": decisions,
            "wall_s": wall, "rss_mb": peak / 1e6}  # fmt: skip


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--deltas", type=int, default=400_000)
    parser.add_argument("--words", type=int, default=200, help="deltas of a stream")
    parser.add_argument("--partitions", type=int, default=12)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    async with local_services(1) as services:
        settings = Settings(
            bootstrap_servers=services.bootstrap_servers,
            detectors=("python:detectors.constant:Constant",),
        )
        await ensure_topics(
            settings.bootstrap_servers, desired_topics(settings), arguments.partitions, 1
        )
        runs = [
            await one_run(settings, arguments.partitions, arguments.deltas, arguments.words, run)
            for run in range(arguments.runs)
        ]
    report.show(
        "One worker process on one core, detectors constant, transactions on",
        ("", "median (lowest..highest)"),
        [
            ("deltas/s, wall clock", report.spread([run["per_s"] for run in runs])),
            ("deltas per CPU second", report.spread([run["per_cpu_s"] for run in runs])),
            ("decisions", report.spread([run["decisions"] for run in runs])),
            ("worker RSS, MB", report.spread([run["rss_mb"] for run in runs])),
        ],
    )
    report.close("throughput", {"runs": runs})


if __name__ == "__main__":
    asyncio.run(main())
