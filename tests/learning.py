"""A ledger driven by hand: reviewed decisions, labels in several partitions, kills."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from detectors.harms import DEFAULT_THRESHOLDS
from worker.events import Label, ThresholdRecord
from worker.feedback import Judged
from worker.ledger import Entry, Ledger, Mark
from worker.merge import Merge
from worker.settings import LearnPolicy, ReviewPolicy, Settings, TenantPolicy

MODEL = "fake@000000"
ALL = ReviewPolicy(over=1.0, near=1.0, rest=1.0)
PARTITIONS = 3
_entries = msgspec.json.Decoder(Entry)


def settings(**learn: Any) -> Settings:
    """Tests after each decision, which is settled 50 ms after its first label."""
    quick: dict[str, Any] = {"settle_ms": 50, "test_every": 1, "min_picked": 0.5,
        "min_picked_below": 0.5, "target_precision": 0.7,
    }  # fmt: skip
    policy = TenantPolicy(learn=LearnPolicy(**(quick | learn)), review=ALL)
    return Settings(tenants={"default": policy})


def judged(number: int, score: float, **fields: Any) -> Judged:
    """A decision that was picked, with this score of violence."""
    scores = dict.fromkeys(list(DEFAULT_THRESHOLDS)[:-1], 0.0) | {"violence": score}
    harm = "violence" if score > DEFAULT_THRESHOLDS["violence"] else None
    plain = Judged(
        f"in-0-{number}-0", f"s{number}", "t", MODEL, "toxicity", harm, scores, score,
        number, 1.0, 1.0,
    )  # fmt: skip
    return plain._replace(**fields)


def label(of: Judged, harmful: bool, reviewer: str = "r", **fields: Any) -> bytes:
    """A label's record."""
    sound = Label(
        of.decision_id, of.stream_id, "violence", of.scores["violence"], harmful, reviewer,
        of.tenant, of.picked_with,
    )  # fmt: skip
    return msgspec.json.encode(msgspec.to_builtins(sound) | fields)


class History:
    """Decisions, and the log of their labels: timestamp and value by partition."""

    def __init__(
        self, rng: random.Random, decisions: int, right: float = 0.99, later: float | None = None
    ) -> None:
        """right, later: share of harmful ones in the first half and in the second."""
        self.decisions = [judged(n, rng.choice((0.55, 0.65, 0.97, 0.99))) for n in range(decisions)]
        self.log: list[list[tuple[int, bytes]]] = [[] for _ in range(PARTITIONS)]
        at_ms = 1_000
        for number, it in enumerate(self.decisions):
            share = right if later is None or 2 * number < decisions else later
            harmful = rng.random() < share
            for reviewer in rng.sample(("ann", "bob", "cem", "dora"), rng.randrange(1, 4)):
                at_ms += rng.randrange(8)
                self._say(rng, at_ms, label(it, harmful, reviewer))
                if rng.random() < 0.05:
                    self._say(rng, at_ms + rng.randrange(30), label(it, not harmful, reviewer))
            if rng.random() < 0.05:
                self._say(rng, at_ms, label(it, harmful, score=0.123))
            if rng.random() < 0.03:
                self._say(rng, at_ms, b"{")
            if rng.random() < 0.05:
                self._say(rng, at_ms, label(it, False, f"user{at_ms}", picked_with=None))
        for partition in self.log:  # a clock is set back now and then
            partition.sort(key=lambda record: record[0] + (record[0] % 7 == 0) * 40)

    def _say(self, rng: random.Random, at_ms: int, value: bytes) -> None:
        self.log[rng.randrange(PARTITIONS)].append((at_ms, value))


class Drive:
    """Feeds a history through ledgers; some of their transactions meet a kill."""

    def __init__(
        self, history: History, chosen: Settings, seed: int = 0, kill_share: float = 0.0,
        shipped: Mapping[str, float] | None = None,
    ) -> None:  # fmt: skip
        self._history = history
        self._settings = chosen
        self._random = random.Random(seed)
        self._kill_share = kill_share
        self._shipped = shipped or {}
        self.entries: list[bytes] = []
        self.thresholds: list[ThresholdRecord] = []
        self.dead_letters: list[tuple[int, int, str]] = []
        self.kills = 0
        self._start()

    def _start(self) -> None:
        self.ledger = Ledger(self._settings, self._shipped, MODEL)
        for entry in self.entries:
            self.ledger.replay(_entries.decode(entry))
        self.ledger.replayed()
        for it in self._history.decisions:
            self.ledger.see_review(it)
        for number, it in enumerate(self._history.decisions):
            self.ledger.see_decision(0, number, it if it.harm else None)
        places = self.ledger.feedback
        self._merge = Merge(PARTITIONS, {it: place.at_ms for it, place in places.items()})
        self._next = [places[p].offset if p in places else 0 for p in range(PARTITIONS)]

    def run(self) -> list[ThresholdRecord]:
        """Everything that is published, in order."""
        end_ms = max(at for partition in self._history.log for at, _ in partition) + 10_000
        for _ in range(100_000):
            at_end = self._feed()
            quiet = {
                partition: end_ms
                for partition, log in enumerate(self._history.log)
                if self._next[partition] == len(log)
            }
            horizon = self._merge.horizon(quiet)
            for raw in self._merge.ready(horizon, self._random.randrange(1, 30)):
                self.ledger.hear(raw, is_last_try=True)
            waiting = sum(map(self._merge.waiting, range(PARTITIONS)))
            if not waiting:
                self.ledger.settle(horizon)
            self._transact()
            if at_end and not waiting and self.ledger.clock_ms >= end_ms - 1:
                return self.thresholds
        raise AssertionError("the ledger does not come to an end")

    def _feed(self) -> bool:
        """Read on, at another pace in each partition; whether everything is read."""
        for partition, log in enumerate(self._history.log):
            for _ in range(self._random.randrange(20)):
                offset = self._next[partition]
                if offset < len(log):
                    at_ms, value = log[offset]
                    self._merge.feed(partition, offset, at_ms, None, value, 10**15)
                    self._next[partition] += 1
        return self._next == [len(log) for log in self._history.log]

    def _transact(self) -> None:
        output = self.ledger.take()
        if output is None:
            return
        if self._random.random() < self._kill_share:  # before the commit
            self._kill()
            return
        assert isinstance(output.entries[-1], Mark)
        self.entries += map(msgspec.json.encode, output.entries)
        self.thresholds += output.thresholds
        self.dead_letters += [(it.partition, it.offset, it.reason) for it in output.dead_letters]
        if self._random.random() < self._kill_share:  # after it
            self._kill()

    def _kill(self) -> None:
        self.kills += 1
        self._start()


def done(entries: Sequence[bytes]) -> list[bytes]:
    """What was done, without the marks, which say how much at once."""
    return [entry for entry in entries if b'"kind":"mark"' not in entry]
