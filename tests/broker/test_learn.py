"""Labels to thresholds on a real broker: a live worker follows; learners are killed, doubled."""

import asyncio
import json
import os
import random
import signal
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from detectors.harms import DEFAULT_THRESHOLDS
from tests.broker.harness import (
    Bed,
    Input,
    Tail,
    WorkerProcess,
    delta,
    eventually,
    in_background,
    until,
)
from tests.fakes import SaysDetector
from worker.detect import model_id
from worker.events import Decision, Review, ThresholdRecord
from worker.feedback import Judged
from worker.ledger import Entry, Heard, Ledger
from worker.merge import Merge
from worker.sampling import Picker
from worker.settings import LearnPolicy, ReviewPolicy, TenantPolicy

KILLS = int(os.environ.get("TIDEGATE_LEARN_KILLS", "20"))
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
            await eventually(lambda: has_heard(it, 251), 60.0, "every label is taken")
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
    """With `approval` nothing moves by itself; a backtest says what the proposal would change;
    approved, it does, while a learner leads; one that is fixed can be handed back; history tells
    it all, in order."""
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
            (row,) = map(json.loads, it.command("backtest", "--json").splitlines())
            scores = [label["score"] for label in labels]
            blocked, then = (
                sum(score > at for score in scores) for at in (0.7, proposed.threshold)
            )
            assert (row["harm"], row["blocks"], row["then"]) == ("violence", blocked, then)
            assert (row["gained"], row["lost"]) == (then - blocked, 0)
            assert row["precision_then"]["value"] == row["recall_then"]["value"] == 1.0
            assert row["precision_then"]["labels"] == then
            assert row["recall"]["low"] < row["recall"]["value"] < 1.0
            it.command("thresholds", "approve", "default", "violence")
            it.command("thresholds", "set", "default", "hate_speech", "0.42")
            refused = it.command("thresholds", "set", "default", "violence", "learn", code=1)
            assert "default/violence: is not set by an operator" in refused
            it.command("thresholds", "set", "default", "hate_speech", "learn")
            await until(
                lambda: len(worker.events("threshold.applied")) >= len(thresholds.records), 10.0,
                "the worker applies them",
            )  # fmt: skip
            await it.produce([said("after", 0.6)])
            await reviews.has_records(251)
            last = review_all(reviews.records, rng)[-1:]
            await it.produce(map(as_input, last), topic=names.feedback_topic)
            await learner.has_led(2)  # it was fenced, and has found the operator's words
            await eventually(lambda: has_heard(it, 251), 120.0, "the last label is taken")
        found = [json.loads(line) for line in it.command(
            "thresholds", "history", "--json").splitlines() if line.startswith("{")]  # fmt: skip
        published = [json.loads(record.value) for record in thresholds.records]
        assert found[: len(published)] == published  # labels may lead to one more meanwhile
        assert [t["version"] for t in found] == list(range(1, len(found) + 1))
        words = found[proposed.version :][:3]
        assert [(t["harm"], t["threshold"], t["method"]) for t in words] == [
            ("violence", proposed.threshold, "certified"), ("hate_speech", 0.42, "operator"),
            ("hate_speech", 0.42, "learn"),
        ]  # fmt: skip
        assert {t["status"] for t in words} == {"applied"}
        assert [t["model"] for t in words[1:]] == ["", proposed.model]
        assert len(published) >= words[-1]["version"]
        (after,) = [r for r in map(json.loads, (r.value for r in reviews.records))
                    if r["stream_id"] == "after"]  # fmt: skip
        assert (after["verdict"], after["thresholds_version"]) == ("block", words[-1]["version"])
        assert len(labelled := await heard(it)) == 251
        assert len({entry.judged.decision_id for entry in labelled}) == 251


async def learnt_alone(it: Bed) -> tuple[list[Heard], list[ThresholdRecord], set[tuple[int, int]]]:
    """What one learner that nothing disturbs makes of the same topics, without a broker: labels
    that count, thresholds, dead letters."""
    names = it.settings
    detector = SaysDetector()
    ledger = Ledger(names, detector.thresholds, model_id((detector,)))
    for record in await it.read(names.review_topic):
        review = msgspec.json.decode(record.value, type=Review)
        ledger.see_review(Judged.of(review, review.least))
    merge, labels = Merge(it.partitions), await it.read(names.feedback_topic)
    for record in labels:
        merge.feed(
            record.partition, record.offset, record.timestamp, record.key, record.value, 2**60
        )
    for raw in merge.ready(2**60, len(labels)):
        ledger.hear(raw, is_last_try=True)
    ledger.settle(2**50)
    output = ledger.take(drain=True)
    assert output is not None
    letters = {(letter.partition, letter.offset) for letter in output.dead_letters}
    return [e for e in output.entries if isinstance(e, Heard)], output.thresholds, letters


async def check_against_undisturbed(it: Bed) -> list[ThresholdRecord]:
    """The same labels, in the same order, for the same thresholds; each once; the history."""
    expected, thresholds, letters = await learnt_alone(it)
    await eventually(lambda: has_heard(it, len(expected)), 180.0, f"{len(expected)} labels count")
    assert await heard(it) == expected
    found = thresholds_of(await it.read(it.settings.thresholds_topic))
    assert found == thresholds
    buried = [dict(letter.headers) for letter in await it.read(it.settings.dead_letters_topic)]
    places = [(int(it["partition"]), int(it["offset"])) for it in buried]
    assert sorted(places) == sorted(letters), "a dead letter is missing, or there twice"
    return found


async def review_topic_filled(it: Bed, rng: random.Random, count: int) -> list[dict[str, Any]]:
    """Outputs, decided by a worker that is gone when this returns; labels of all of them."""
    async with Tail(it.bootstrap_servers, it.settings.review_topic) as reviews:
        worker = it.start_worker()
        await it.produce(spread(rng, count))
        await reviews.has_records(count, timeout_s=120.0)
        worker.kill()
        return review_all(reviews.records, rng)


def with_nonsense(rng: random.Random, labels: Sequence[dict[str, Any]]) -> list[Input]:
    """The labels, some wrong, some twice, some forged, and some that nobody can read."""
    out: list[Input] = []
    for fields in labels:
        wrong = rng.random() < 0.05
        out.append(as_input(fields | {"harmful": fields["harmful"] ^ wrong}))
        chance = rng.random()
        if chance < 0.05:
            out.append(out[-1])
        elif chance < 0.08:
            out.append(as_input(fields | {"score": 0.123}))
        elif chance < 0.10:
            out.append(as_input(fields | {"decision_id": "made-up"}))
        elif chance < 0.12:
            out.append(Input(b"key", b"{nope"))
    return out


async def test_learner_killed_again_and_again(kafka: str, unique: str, tmp_path: Path) -> None:
    """Killed 20 times while labels come: the thresholds, record by record, are those of a learner
    that nothing disturbs; no label counts twice, none is lost."""
    rng = random.Random(3)
    # A static member takes its place again at once: kills follow each other quickly.
    async with bed(
        kafka, unique, tmp_path, group_instance_id="learner", learn_grace_ms=3_000,
        tenants=tenants(settle_ms=200, test_every=5),
    ) as it:  # fmt: skip
        labels = with_nonsense(rng, await review_topic_filled(it, rng, KILLS * 40))
        produce = it.produce(labels, per_second=KILLS * 40 / 60, topic=it.settings.feedback_topic)
        async with in_background(produce):
            for _ in range(KILLS):
                learner = it.start_learner()
                await learner.has_led(timeout_s=120.0)
                await asyncio.sleep(rng.uniform(0.0, 2.0))
                learner.kill()
        last = it.start_learner()
        await last.has_led(timeout_s=120.0)
        found = await check_against_undisturbed(it)
        assert any(record.threshold < record.previous for record in found)
        assert last.running


async def test_two_learners_publish_nothing_twice(kafka: str, unique: str, tmp_path: Path) -> None:
    """One leads, one stands by. The leader is frozen until the other leads, and woken: what it had
    in hand it cannot publish."""
    rng = random.Random(4)
    async with bed(
        kafka, unique, tmp_path, learn_grace_ms=3_000, tenants=tenants(settle_ms=200, test_every=5)
    ) as it:
        labels = with_nonsense(rng, await review_topic_filled(it, rng, 400))
        learners = [it.start_learner(), it.start_learner()]
        produce = it.produce(labels, per_second=20, topic=it.settings.feedback_topic)
        await until(lambda: bool(leading(learners)), 120.0, "one leads")
        async with in_background(produce):
            for _ in range(2):
                (leader,) = leading(learners)
                other = next(learner for learner in learners if learner is not leader)
                before = len(other.events("learner.leads"))
                leader.signal(signal.SIGSTOP)
                await other.has_led(before + 1, timeout_s=60.0)
                leader.signal(signal.SIGCONT)
                await asyncio.sleep(4.0)
        await check_against_undisturbed(it)
        assert all(learner.running for learner in learners)
        assert any(learner.events("learner.lost") for learner in learners), "nothing was at stake"


def leading(learners: Sequence[WorkerProcess]) -> list[WorkerProcess]:
    """The one that took the lead last."""
    led = [(it.events("learner.leads")[-1]["at"], n) for n, it in enumerate(learners)
           if it.events("learner.leads")]  # fmt: skip
    return [learners[max(led)[1]]] if led else []


async def test_updates_reach_a_busy_worker_within_a_second(
    kafka: str, unique: str, tmp_path: Path
) -> None:
    """200 updates while segments are judged: 99 in 100 are in force within 1 s, decisions go on
    meanwhile, and what makes no sense changes nothing."""
    rng = random.Random(5)
    async with bed(kafka, unique, tmp_path) as it:
        worker = it.start_worker()
        await worker.has_loaded(it.partitions)
        load = [said(f"load{n}", rng.random()) for n in range(1_500)]
        async with Tail(kafka, it.settings.decisions_topic) as decisions:
            async with in_background(it.produce(load, per_second=50)):
                await decisions.has_records(1)
                for version in range(1, 201):
                    bad = Input(b"default/violence", b'{"threshold": 2}')
                    good = threshold(version, 0.5 + version / 1_000)
                    await it.produce([bad, good], topic=it.settings.thresholds_topic)
                    await asyncio.sleep(0.05)
            await decisions.has_finals(1_500)
        await until(lambda: len(worker.events("threshold.applied")) >= 200, 30.0, "all are applied")
        applied = worker.events("threshold.applied")
        assert len(applied) == 200
        assert len(worker.events("threshold.unreadable")) == 200
        late_ms = sorted(event["late_ms"] for event in applied)
        print(f"late by {late_ms[100]} ms (p50), {late_ms[197]} ms (p99), {late_ms[-1]} ms at most")  # noqa: T201
        assert late_ms[197] < 1_000
        made = [json.loads(record.value) for record in decisions.records]
        versions = {d["thresholds_version"] for d in made}
        assert len(versions) > 50, "the worker applies them between decisions"
        for d in made:
            version = d["thresholds_version"]
            limit = 0.5 + version / 1_000 if version else 0.7
            assert (d["verdict"] == "block") == (d["scores"]["violence"] > limit), d


def threshold(version: int, value: float) -> Input:
    record = ThresholdRecord(
        tenant="default", harm="violence", threshold=value, previous=value, version=version,
        method="operator",
    )  # fmt: skip
    return Input(b"default/violence", msgspec.json.encode(record))


async def test_a_missing_topic_is_named(kafka: str, unique: str, tmp_path: Path) -> None:
    """Learner and worker end at once, saying what to do; nothing is created by asking."""
    async with bed(kafka, unique, tmp_path) as it:
        missing = f"{unique}.nowhere"
        for process, names in (
            (it.start_worker(thresholds_topic=missing), "thresholds"),
            (it.start_learner(evidence_topic=missing), "evidence"),
        ):
            assert await process.exit_code(60.0) == 1, names
            assert f"topic {missing} is missing" in process.tail()
            assert "tidegate topics" in process.tail()


async def test_review_items_are_published_once_whatever_is_killed(
    kafka: str, unique: str, tmp_path: Path
) -> None:
    """A worker is killed again and again: for each decision that is picked there is one item, and
    it is the decision; nothing else is there."""
    rng = random.Random(6)
    shares = ALL | {"over": 0.8, "near": 0.6, "rest": 0.5}
    policy = {"default": {"review": shares, "learn": LEARN | {"min_picked_below": 0.3}}}
    async with bed(kafka, unique, tmp_path, tenants=policy, group_instance_id="worker") as it:
        load = spread(rng, 600)
        async with Tail(kafka, it.settings.decisions_topic) as decisions:
            async with in_background(it.produce(load, per_second=40)):
                for _ in range(5):
                    worker = it.start_worker()
                    await worker.has_loaded(1)
                    await asyncio.sleep(rng.uniform(0.0, 1.0))
                    worker.kill()
            it.start_worker()
            await decisions.has_finals(600)
        picker = Picker(it.settings, 0, 1)
        made = [msgspec.json.decode(r.value, type=Decision) for r in await it.read_decisions()]
        values = tuple(DEFAULT_THRESHOLDS.values())
        picks = {d.decision_id: picker.pick(d, values) for d in made}
        items = await it.read(it.settings.review_topic)
        found = [msgspec.json.decode(record.value, type=Review) for record in items]
        expected = {name: pick for name, pick in picks.items() if pick is not None}
        assert sorted(item.decision_id for item in found) == sorted(expected)
        assert 200 < len(found) < 500
        by_id = {d.decision_id: msgspec.to_builtins(d) for d in made}
        for item in found:
            assert (item.picked_with, item.least) == expected[item.decision_id]
            assert by_id[item.decision_id].items() <= msgspec.to_builtins(item).items()
            assert item.text.startswith("Somebody says")
