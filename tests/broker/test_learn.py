"""Labels to thresholds on a real broker: a live worker follows; learners are killed, doubled."""

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from tests.broker.harness import Bed, Input, Tail, delta, eventually, until
from worker.events import ThresholdRecord
from worker.ledger import Entry, Heard
from worker.settings import LearnPolicy, ReviewPolicy, TenantPolicy

REVIEWERS = ("ann", "bob", "cem", "dora")
# As few labels as may be: everything is reviewed, and four right answers in five will do.
LEARN: dict[str, Any] = {
    "target_precision": 0.7, "settle_ms": 0, "test_every": 1, "min_picked": 0.5,
    "min_picked_below": 0.5,
}  # fmt: skip
ALL = {"over": 1.0, "near": 1.0, "rest": 1.0, "per_hour": 10**6}


def tenants(**learn: Any) -> dict[str, Any]:
    """Settings of the one tenant."""
    TenantPolicy(review=ReviewPolicy(**ALL), learn=LearnPolicy(**(LEARN | learn)))
    return {"default": {"review": ALL, "learn": LEARN | learn}}


def bed(kafka: str, unique: str, folder: Path, **settings: Any) -> Bed:
    plain: dict[str, Any] = {
        "detectors": ["python:tests.fakes:SaysDetector"], "tenants": tenants(),
        "learn_grace_ms": 300,
    }  # fmt: skip
    return Bed(kafka, unique, folder, **(plain | settings))


def said(stream_id: str, score: float) -> Input:
    """A complete output whose one segment has this score of violence."""
    return delta(stream_id, 0, f"Somebody says violence={score} here.", True)


def spread(rng: random.Random, count: int, prefix: str = "s") -> list[Input]:
    """Outputs with scores from low to high, half of them above every candidate."""
    scores = (0.1, 0.3, 0.55, 0.65, 0.8, 0.97, 0.98, 0.99)
    return [said(f"{prefix}{n}", rng.choice(scores)) for n in range(count)]


def label(item: dict[str, Any], harmful: bool, reviewer: str, **fields: Any) -> dict[str, Any]:
    """What a reviewer says of a review item."""
    return {
        "decision_id": item["decision_id"], "stream_id": item["stream_id"],
        "tenant": item["tenant"], "harm": "violence", "score": item["scores"]["violence"],
        "harmful": harmful, "reviewer": reviewer, "picked_with": item["picked_with"], **fields,
    }  # fmt: skip


def as_input(fields: dict[str, Any], at_ms: int | None = None) -> Input:
    return Input(fields["stream_id"].encode(), json.dumps(fields).encode(), None, at_ms)


def review_all(items: Iterable[Any], rng: random.Random) -> list[dict[str, Any]]:
    """Labels of everything: harmful is what scores above 0.5."""
    found = [json.loads(record.value) for record in items]
    return [label(item, item["scores"]["violence"] > 0.5, rng.choice(REVIEWERS)) for item in found]


def thresholds_of(records: Iterable[Any]) -> list[ThresholdRecord]:
    return [msgspec.json.decode(record.value, type=ThresholdRecord) for record in records]


async def heard(it: Bed) -> list[Heard]:
    """The labels that count, in the order in which they were taken."""
    found = [
        msgspec.json.decode(r.value, type=Entry) for r in await it.read(it.settings.evidence_topic)
    ]
    return [entry for entry in found if isinstance(entry, Heard)]


async def has_heard(it: Bed, count: int) -> bool:
    return len(await heard(it)) >= count


async def test_feedback_moves_a_live_workers_threshold(
    kafka: str, unique: str, tmp_path: Path
) -> None:
    """Reviewed decisions certify a lower threshold; the worker's next decision is made with it, and
    names it; a worker that starts later has read it before its first decision."""
    rng = random.Random(1)
    async with bed(kafka, unique, tmp_path) as it:
        names = it.settings
        async with (
            Tail(kafka, names.decisions_topic) as decisions,
            Tail(kafka, names.review_topic) as reviews,
            Tail(kafka, names.thresholds_topic) as thresholds,
        ):
            worker, learner = it.start_worker(), it.start_learner()
            await worker.has_loaded(it.partitions)
            await it.produce([*spread(rng, 250), said("before", 0.6)])
            await reviews.has_records(251)
            await learner.has_led()
            labels = review_all(reviews.records, rng)
            await it.produce(map(as_input, labels), topic=names.feedback_topic)
            await until(
                lambda: any(t.threshold < 0.6 for t in thresholds_of(thresholds.records)), 60.0,
                "a lower threshold is published",
            )  # fmt: skip
            learnt = thresholds_of(thresholds.records)[-1]
            await until(
                lambda: len(worker.events("threshold.applied")) >= len(thresholds.records), 10.0,
                "the worker applies it",
            )  # fmt: skip
            await it.produce([said("after", 0.6)])
            await decisions.has_finals(252)
            learner.kill()
            worker.kill()
            again = it.start_worker()
            await again.has_loaded(it.partitions)
            await it.produce([said("later", 0.6)])
            await decisions.has_finals(253)
        made = {d["stream_id"]: d for d in map(json.loads, (r.value for r in decisions.records))}
        assert (made["before"]["verdict"], made["before"]["thresholds_version"]) == ("allow", 0)
        for name in ("after", "later"):
            assert made[name]["verdict"] == "block", made[name]
            assert made[name]["thresholds_version"] == learnt.version
        assert learnt.status == "applied"
        assert learnt.model == made["after"]["model"]
        letters = await it.read(names.dead_letters_topic)
        assert not letters


async def test_a_proposal_waits_for_an_operator(kafka: str, unique: str, tmp_path: Path) -> None:
    """With `approval` nothing moves by itself; approved, it does, while a learner leads; a fixed
    threshold stays; history tells it all, in order."""
    rng = random.Random(2)
    async with bed(kafka, unique, tmp_path, tenants=tenants(approval=True)) as it:
        names = it.settings
        async with (
            Tail(kafka, names.review_topic) as reviews,
            Tail(kafka, names.thresholds_topic) as thresholds,
        ):
            worker, learner = it.start_worker(), it.start_learner()
            await it.produce(spread(rng, 250))
            await reviews.has_records(250)
            await learner.has_led()
            labels = review_all(reviews.records, rng)
            await it.produce(map(as_input, labels), topic=names.feedback_topic)
            await until(
                lambda: any(t.status == "proposed" for t in thresholds_of(thresholds.records)),
                60.0, "a threshold is proposed",
            )  # fmt: skip
            proposed = thresholds_of(thresholds.records)[-1]
            assert proposed.threshold < proposed.previous == 0.7
            assert "0.70" in it.command("thresholds", "list")
            refused = it.command("thresholds", "approve", "default", "privacy_violation", code=1)
            assert "nothing is proposed" in refused
            it.command("thresholds", "approve", "default", "violence")
            it.command("thresholds", "set", "default", "hate_speech", "0.42")
            await until(
                lambda: len(worker.events("threshold.applied")) >= len(thresholds.records), 10.0,
                "the worker applies them",
            )  # fmt: skip
            await it.produce([said("after", 0.6)])
            await reviews.has_records(251)
            last = review_all(reviews.records, rng)[-1:]
            await it.produce(map(as_input, last), topic=names.feedback_topic)
            await learner.has_led(2)  # it was fenced, and has found the operator's words
            await eventually(lambda: has_heard(it, 251), 30.0, "the last label is taken")
        found = [json.loads(line) for line in it.command(
            "thresholds", "history", "--json").splitlines() if line.startswith("{")]  # fmt: skip
        published = [json.loads(record.value) for record in thresholds.records]
        assert found == published
        assert [t["version"] for t in found] == list(range(1, len(found) + 1))
        assert [(t["harm"], t["status"], t["threshold"]) for t in found[-2:]] == [
            ("violence", "applied", proposed.threshold), ("hate_speech", "applied", 0.42)
        ]  # fmt: skip
        (after,) = [r for r in map(json.loads, (r.value for r in reviews.records))
                    if r["stream_id"] == "after"]  # fmt: skip
        assert (after["verdict"], after["thresholds_version"]) == ("block", len(found))
        assert len(labelled := await heard(it)) == 251
        assert len({entry.judged.decision_id for entry in labelled}) == 251
