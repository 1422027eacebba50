"""How much memory does a worker take: with its models, with 10,000 open streams, after they end?

A real worker on a real broker. The streams are opened with a question and some 300 characters,
stay open while memory is read, and end; then the same again, to tell what stays from what the
allocator keeps for the next time.
"""

import argparse
import asyncio
import json
from typing import Any

import psutil
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

from bench import report
from bench.texts import replies
from bench.throughput import start_worker
from worker.local import local_services
from worker.settings import Settings
from worker.topics import desired_topics, ensure_topics

CLOSED_FOR_MS = 3_000
PARTITIONS = 12


async def send(settings: Settings, wave: int, count: int, seq: int, final: bool) -> None:
    """One delta for each of `count` streams."""
    producer = AIOKafkaProducer(bootstrap_servers=settings.bootstrap_servers, linger_ms=5)
    await producer.start()
    for number, (question, reply) in enumerate(replies(count, wave)):
        delta: dict[str, Any] = {
            "stream_id": f"{wave}/{number}", "seq": seq, "final": final,
            "delta": "" if final else reply[:300],
        }  # fmt: skip
        if seq == 0:
            delta["context"] = [{"role": "user", "content": question}]
        await producer.send(
            settings.outputs_topic, json.dumps(delta).encode(), partition=number % PARTITIONS
        )
    await producer.stop()


async def wait_finals(reader: AIOKafkaConsumer, count: int) -> None:
    finals = 0
    while finals < count:
        for batch in (await reader.getmany(timeout_ms=500)).values():
            finals += sum(b'"final":true' in (record.value or b"") for record in batch)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=10_000)
    parser.add_argument("--waves", type=int, default=3)
    arguments = parser.parse_args()
    figures: dict[str, float] = {}
    async with local_services(1) as services:
        settings = Settings(bootstrap_servers=services.bootstrap_servers)
        await ensure_topics(settings.bootstrap_servers, desired_topics(settings), PARTITIONS, 1)
        for name, detectors in (
            ("with models", settings.detectors),
            ("detectors constant", ("python:detectors.constant:Constant",)),
        ):
            chosen = settings.model_copy(update={"detectors": detectors, "group_id": name})
            await one_worker(name, chosen, arguments, figures)
    report.show(
        f"Worker RSS, MB; {arguments.streams} open streams",
        ("", "MB"),
        [(name, f"{value:,.0f}") for name, value in figures.items()],
    )
    report.close("memory", {"rss_mb": figures})


async def one_worker(
    name: str, settings: Settings, arguments: argparse.Namespace, figures: dict[str, float]
) -> None:
    """Waves of open streams; with the models one small wave, which warms them up."""
    worker = start_worker(
        settings, None, TIDEGATE_CLOSED_FOR_MS=str(CLOSED_FOR_MS), TIDEGATE_CACHE_ENTRIES="1000",
        TIDEGATE_AUTO_OFFSET_RESET="latest", TIDEGATE_GROUP_ID=settings.group_id,
    )  # fmt: skip
    process = psutil.Process(worker.pid)
    reader = AIOKafkaConsumer(
        settings.decisions_topic, bootstrap_servers=settings.bootstrap_servers,
        isolation_level="read_committed", auto_offset_reset="latest",
    )  # fmt: skip
    await reader.start()
    try:
        await asyncio.sleep(6)
        figures[f"{name}: idle"] = process.memory_info().rss / 1e6
        with_models = name == "with models"
        for wave in range(1 if with_models else arguments.waves):
            count = 300 if with_models else arguments.streams
            label = f"{name}-{wave}".__hash__()
            await send(settings, label, count, 0, False)
            await asyncio.sleep(10)
            if not with_models:
                figures[f"{name}: {count} streams open, wave {wave + 1}"] = (
                    process.memory_info().rss / 1e6
                )
            await send(settings, label, count, 1, True)
            await wait_finals(reader, count)
            await asyncio.sleep(CLOSED_FOR_MS / 1e3 + 8)
            figures[f"{name}: after {count} ended, wave {wave + 1}"] = (
                process.memory_info().rss / 1e6
            )
    finally:
        await reader.stop()
        worker.terminate()
        worker.wait(30)


if __name__ == "__main__":
    asyncio.run(main())
