"""A lane driven by hand: records in, judgements in any order, transactions that a kill undoes."""

import hashlib
import json
import random
from collections.abc import Sequence
from typing import Any

from worker.assemble import Segment
from worker.decide import Judgement
from worker.events import Decision, Review
from worker.settings import Settings
from worker.streams import Lane, Rules
from worker.thresholds import Thresholds


def settings(**overrides: Any) -> Settings:
    """Short segments, so that short texts have several."""
    short: dict[str, Any] = {"min_segment_chars": 20, "max_segment_chars": 60}
    return Settings(**(short | overrides))


def rules(chosen: Settings, partitions: int = 0) -> Rules:
    """Rules with plain thresholds; the tail is the text itself. partitions: 0 reviews nothing."""
    return Rules(
        chosen, Thresholds({}, chosen), "fake@000000", lambda tail, text: (tail + text)[-64:],
        partitions,
    )  # fmt: skip


def delta(stream_id: str, seq: int, text: str, final: bool = False, **fields: Any) -> bytes:
    """A record's value."""
    return json.dumps(
        {"stream_id": stream_id, "seq": seq, "delta": text, "final": final, **fields}
    ).encode()


def judge(segment: Segment, blocked: float = 0.03) -> Judgement:
    """A judgement that is a function of everything that the segment is judged with."""
    seen = repr((segment.text, segment.before, segment.tail, segment.following,
                 segment.stream.conversation))  # fmt: skip
    digest = hashlib.blake2b(seen.encode("utf-8", "surrogatepass"), digest_size=4).digest()
    share = int.from_bytes(digest, "little") / 2**32
    return Judgement((0.95 if share < blocked else share / 2, *[0.01] * 5, 0.3), "toxicity")


def essence(decision: Decision) -> tuple[Any, ...]:
    """What a decision says, without the clock."""
    return (
        decision.decision_id, decision.stream_id, decision.seq, decision.segment,
        decision.verdict, decision.start, decision.end, decision.released_to, decision.leaked,
        decision.final, decision.harm, tuple(decision.scores.items()), decision.harmful,
        decision.reason, decision.tenant, decision.channel,
    )  # fmt: skip


class Drive:
    """Feeds a log of records through lanes; `kill_share` of the transactions meet a kill."""

    def __init__(
        self, log: Sequence[bytes], chosen: Settings, seed: int = 0, kill_share: float = 0.0,
        partitions: int = 0,
    ) -> None:  # fmt: skip
        self._log = log
        self._rules = rules(chosen, partitions)
        self._random = random.Random(seed)
        self._kill_share = kill_share
        self._committed = self._buried_to = self._journal_end = 0
        self._journal: dict[str, tuple[int, bytes]] = {}
        self._now = 0.0
        self.published: list[Decision] = []
        self.reviews: list[Review] = []
        self.dead_letters: list[int] = []
        self.kills = self.snapshots = self.reread = 0
        self._start()

    def _start(self) -> None:
        self.lane = Lane("in", 0, self._rules)
        self._pending = self.lane.load(
            self._committed, self._journal, self._now, self._buried_to, self._journal_end
        )
        if self._random.random() < 0.5:  # what was restored may be settled before a record is read
            while self._pending:
                self._judge_one()
            self._transact(drain=False)

    def run(self) -> list[Decision]:
        """Everything that is published, in order. Ends when all is committed."""
        for _ in range(100 * len(self._log) + 1_000):
            self._now += 0.01
            at_end = self.lane.position >= len(self._log)
            if not at_end:
                self._feed()
            if self._pending and (at_end or self._random.random() < 0.5):
                self._judge_one()
            if at_end or self._random.random() < 0.2:
                self._transact(at_end)
            if at_end and not self._pending and self.lane.committed == len(self._log):
                return self.published
        raise AssertionError("the lane does not come to an end")

    def _feed(self) -> None:
        offset = self.lane.position
        self._pending += self.lane.feed(
            offset, 1_000 + offset, None, self._log[offset], self._now, 10**9
        )

    def _judge_one(self) -> None:
        segment = self._pending.pop(self._random.randrange(len(self._pending)))
        if segment.judgement is None:
            segment.judgement = judge(segment)
        if self.lane.holds(segment):
            self.lane.advance(segment.stream, self._now, 5)

    def _transact(self, drain: bool) -> None:
        """Publish what is due, unless a kill comes first or right behind."""
        output = self.lane.take(self._now, drain)
        if output is None:
            return
        if self._random.random() < self._kill_share:  # killed before the commit
            self._kill()
            return
        self.published += output.decisions
        self.reviews += output.reviews
        self.dead_letters += [letter.offset for letter in output.dead_letters]
        offsets = []
        for stream_id, record in output.journal:
            offsets.append(self._journal_end)
            self._journal.pop(stream_id, None)
            if record is not None:
                self._journal[stream_id] = (self._journal_end, record)
                self.snapshots += b'"snapshot"' in record
            self._journal_end += 1
        self._committed, self._buried_to = output.offset, output.buried_to
        needed = [offset for offset, _ in self._journal.values()]
        assert output.journal_from <= min(needed, default=self._journal_end)
        if self._random.random() < self._kill_share:  # killed after it
            self._kill()
            return
        self.lane.done(output, offsets)

    def _kill(self) -> None:
        self.kills += 1
        self.reread = max(self.reread, self.lane.position - self._committed)
        self._start()


def words(rng: random.Random, count: int) -> str:
    """Text with sentence ends, long words, line ends, marks and emoji in it."""
    parts = ["a", "bc ", "word ", "end. ", "\n", "x" * 30, "e\u0301", "。", "😀", " ", '!" ']
    return "".join(rng.choice(parts) for _ in range(count))


def pieces(rng: random.Random, text: str, longest: int = 12) -> list[str]:
    """The text, cut anywhere; sometimes with empty pieces, often with an empty last one."""
    cut = []
    while text:
        size = rng.randrange(0, longest)
        cut.append(text[:size])
        text = text[size:]
    return [*cut, ""] if rng.random() < 0.5 or not cut else cut


def interleaved(rng: random.Random, streams: int, longest: int = 120) -> list[bytes]:
    """The log of a partition: streams side by side, repeats, gaps filled late, broken records."""
    queues = {}
    for number in range(streams):
        cut = pieces(rng, words(rng, rng.randrange(longest)))
        name = f"s{number}"
        queues[name] = [
            delta(name, seq, text, seq == len(cut) - 1, tenant="t", context=[
                {"role": "user", "content": f"question {number}"}])
            for seq, text in enumerate(cut)
        ]  # fmt: skip
    log: list[bytes] = []
    while queues:
        name = rng.choice(list(queues))
        queue = queues[name]
        if len(queue) > 3 and rng.random() < 0.05:
            queue[0], queue[1] = queue[1], queue[0]
        record = queue.pop(0)
        log.append(record)
        if rng.random() < 0.05:
            log.append(record)
        if rng.random() < 0.02:
            log.append(b"{broken")
        if not queue:
            del queues[name]
            if rng.random() < 0.3:
                log.append(record)  # a late repeat, after the end
    return log
