"""What does the worker keep of the detectors' own speed? And how many tokens does it spend?

The same texts, in turn: (a) the detectors alone, encode and score from as many threads as the
worker uses; (b) the pipeline in process; (c) the whole way, Kafka to Kafka, in a worker process.
All on the same cores, caches off; (c) shares them with the broker.
"""

import argparse
import asyncio
import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

from bench import report
from bench.texts import replies
from bench.throughput import start_worker
from detectors.load import load_combination, load_detectors
from detectors.protocol import Detector, Passage
from worker import detect
from worker.local import local_services
from worker.pipeline import Pipeline
from worker.settings import Settings
from worker.topics import desired_topics, ensure_topics


def records(count: int, seed: int) -> list[bytes]:
    """Complete outputs, one delta each, with a question before them."""
    return [
        json.dumps({
            "stream_id": f"{seed}/{number}", "seq": 0, "delta": reply, "final": True,
            "context": [{"role": "user", "content": question}],
        }).encode()
        for number, (question, reply) in enumerate(replies(count, seed))
    ]  # fmt: skip


def passages_of(settings: Settings, values: list[bytes]) -> list[Passage]:
    """What the pipeline gives the detector for these records."""
    lane = Pipeline(settings, [_nothing()]).lane("bench", 0)
    found: list[Passage] = []
    for offset, value in enumerate(values):
        found += [
            Passage(segment.text, segment.before, segment.stream.conversation)
            for segment in lane.feed(offset, 0, None, value, 0.0, 0)
        ]
    return found


def _nothing() -> Detector:
    from detectors.constant import Constant

    return Constant()


def alone(settings: Settings, detectors: Sequence[Detector], passages: list[Passage]) -> float:
    """Segments a second."""
    combination = load_combination(settings.models, detectors)

    def one(passage: Passage) -> None:
        detect.judge(detectors, passage, combination)

    start = time.monotonic()
    with ThreadPoolExecutor(settings.infer_threads) as pool:
        list(pool.map(one, passages))
    return len(passages) / (time.monotonic() - start)


async def in_process(settings: Settings, detectors: Sequence[Detector], values: list[bytes]) -> Any:
    """Segments a second and tokens spent per token of text."""
    async with Pipeline(settings, detectors) as pipeline:
        lane = pipeline.lane("bench", 0)
        done = asyncio.Event()
        pipeline.on_output = lambda it: None if it.open_streams else done.set()
        start = time.monotonic()
        for offset, value in enumerate(values):
            pipeline.submit(lane, lane.feed(offset, 0, None, value, pipeline.clock(), 0))
        await done.wait()
        wall = time.monotonic() - start
        return lane.backlog / wall, pipeline.tokens_in / pipeline.tokens_of_text


async def through_kafka(settings: Settings, values: list[bytes]) -> float:
    """Segments a second of a running worker, from the first delta sent to the last decision."""
    producer = AIOKafkaProducer(bootstrap_servers=settings.bootstrap_servers, linger_ms=5)
    reader = AIOKafkaConsumer(
        settings.decisions_topic, bootstrap_servers=settings.bootstrap_servers,
        isolation_level="read_committed", auto_offset_reset="latest",
    )  # fmt: skip
    await producer.start()
    await reader.start()
    for partition in reader.assignment():
        await reader.position(partition)
    start = time.monotonic()
    for number, value in enumerate(values):
        await producer.send(settings.outputs_topic, value, partition=number % settings.partitions)
    await producer.flush()
    decisions = finals = 0
    while finals < len(values):
        for batch in (await reader.getmany(timeout_ms=500)).values():
            decisions += len(batch)
            finals += sum(b'"final":true' in (record.value or b"") for record in batch)
    wall = time.monotonic() - start
    await producer.stop()
    await reader.stop()
    return decisions / wall


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replies", type=int, default=400)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    rows: dict[str, list[float]] = {"alone": [], "pipeline": [], "kafka": [], "tokens": []}
    async with local_services(1) as services:
        # Never blocked, so that all three judge the same segments; held as long as it takes.
        settings = Settings(
            bootstrap_servers=services.bootstrap_servers, cache_entries=0, partitions=4,
            hold_timeout_ms=600_000, max_waiting_segments=100_000,
            tenants={"default": {"actions": dict.fromkeys(_ALL, "flag")}},
        )  # fmt: skip
        await ensure_topics(settings.bootstrap_servers, desired_topics(settings), 4, 1)
        detectors = load_detectors(settings.detectors, settings.models)
        worker = start_worker(
            settings, None, TIDEGATE_CACHE_ENTRIES="0", TIDEGATE_HOLD_TIMEOUT_MS="600000",
            TIDEGATE_MAX_WAITING_SEGMENTS="100000",
            TIDEGATE_TENANTS=json.dumps({"default": {"actions": dict.fromkeys(_ALL, "flag")}}),
        )  # fmt: skip
        try:
            await through_kafka(settings, records(20, 999))  # warm-up
            for run in range(arguments.runs):
                values = records(arguments.replies, run)
                passages = passages_of(settings, values)
                rows["alone"].append(alone(settings, detectors, passages))
                rows["kafka"].append(await through_kafka(settings, values))
                speed, tokens = await in_process(settings, detectors, values)
                rows["pipeline"].append(speed)
                rows["tokens"].append(tokens)
        finally:
            worker.terminate()
            worker.wait(30)
    shares = {
        name: [mine / alone for mine, alone in zip(rows[name], rows["alone"], strict=True)]
        for name in ("pipeline", "kafka")
    }
    report.show(
        f"The shipped detectors, {arguments.replies} replies a run, same texts",
        ("", "segments/s", "share of the detectors alone"),
        [
            ("detectors alone", report.spread(rows["alone"]), "1"),
            ("pipeline in process", report.spread(rows["pipeline"]), _shares(shares["pipeline"])),
            ("Kafka to Kafka", report.spread(rows["kafka"]), _shares(shares["kafka"])),
            ("tokens per token of text", _shares(rows["tokens"]), ""),
        ],
    )
    report.close("classifier", {"rows": rows, "shares": shares})


_ALL = (
    "violence", "hate_speech", "misinformation", "privacy_violation", "illegal_activity",
    "sexual_content", "other",
)  # fmt: skip


def _shares(values: list[float]) -> str:
    ordered = sorted(values)
    return f"{ordered[len(ordered) // 2]:.2f} ({ordered[0]:.2f}..{ordered[-1]:.2f})"


if __name__ == "__main__":
    asyncio.run(main())
