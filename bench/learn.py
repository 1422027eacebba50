"""How long does a learner take to know a million labels again, and in how much memory?

Their ledger lies in Kafka. The clock starts when a learner takes the lead, fencing included, and
stops when it is ready to take the next label. CPU seconds are this process's own.
"""

import argparse
import asyncio
import random
import time
from collections.abc import Iterator

import msgspec
import psutil
from aiokafka import AIOKafkaProducer

from bench import report
from detectors.harms import HARMS
from worker.feedback import Judged
from worker.follow import Follower
from worker.learn import Term
from worker.ledger import Entry, Heard, Ledger, Mark
from worker.local import local_services
from worker.settings import Settings
from worker.topics import desired_topics, ensure_topics

MODEL = "toxicity@ab12cd"
TENANTS, REVIEWERS = 10, 20


def entries(labels: int) -> Iterator[Entry]:
    """A ledger as a learner would have written it, a mark for every 500 labels."""
    rng = random.Random(1)
    for number in range(labels):
        score, harm = round(rng.random(), 4), rng.choice(HARMS)
        judged = Judged(
            f"llm.outputs-3-{number}-0", f"chat-{number}/turn-1/0", f"tenant-{number % TENANTS}",
            MODEL, "toxicity", harm if score > 0.7 else None, {harm: score}, None, number * 10,
            0.1, 0.1,
        )  # fmt: skip
        reviewer = f"r-{rng.randrange(REVIEWERS)}"
        yield Heard(number * 10, reviewer, harm, rng.random() < score, False, judged)
        if number % 500 == 499:
            yield Mark(number * 10)


async def fill(settings: Settings, labels: int) -> float:
    """Write the ledger; bytes of one label."""
    producer = AIOKafkaProducer(
        bootstrap_servers=settings.bootstrap_servers, linger_ms=5, max_batch_size=1 << 19
    )
    await producer.start()
    encoder, size = msgspec.json.Encoder(), 0
    for entry in entries(labels):
        value = encoder.encode(entry)
        size += len(value)
        await producer.send(settings.evidence_topic, value, partition=0)
    await producer.stop()
    return size / labels


async def read_only(settings: Settings) -> float:
    """Seconds that Kafka alone takes to hand the ledger out."""
    follower = Follower(settings, settings.evidence_topic)
    await follower.open()
    start = time.monotonic()
    async for _ in follower.to_end():
        pass
    await follower.close()
    return time.monotonic() - start


async def rebuild(settings: Settings) -> dict[str, float]:
    """Take the lead once."""
    process = psutil.Process()
    before, cpu, start = process.memory_info().rss, time.process_time(), time.monotonic()
    async with Term(settings, Ledger(settings, {}, MODEL)):
        return {
            "wall_s": time.monotonic() - start, "cpu_s": time.process_time() - cpu,
            "rss_mb": (process.memory_info().rss - before) / 1e6,
        }  # fmt: skip


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--labels", type=int, default=1_000_000)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    async with local_services(1) as services:
        settings = Settings(bootstrap_servers=services.bootstrap_servers)
        await ensure_topics(settings.bootstrap_servers, desired_topics(settings), 12, 1)
        size = await fill(settings, arguments.labels)
        reading = await read_only(settings)
        runs = [await rebuild(settings) for _ in range(arguments.runs)]
    report.show(
        f"{arguments.labels:,} labels of {TENANTS} tenants by {REVIEWERS} reviewers, known again",
        ("", "median (lowest..highest)"),
        [
            ("seconds until it leads", report.spread([run["wall_s"] for run in runs])),
            ("its CPU seconds", report.spread([run["cpu_s"] for run in runs])),
            ("seconds of reading alone", f"{reading:.1f}"),
            ("memory more than before, MB, first run", f"{runs[0]['rss_mb']:.0f}"),
            ("bytes of a label in the ledger", f"{size:.0f}"),
        ],
    )
    report.close("learn", {"labels": arguments.labels, "reading_s": reading, "runs": runs})


if __name__ == "__main__":
    asyncio.run(main())
