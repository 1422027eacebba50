"""streams.py: what a spilled stream's journal record holds, and how large it may become."""

import json
import random
from collections import Counter

import pytest

from detectors.protocol import Turn
from tests.lanes import Drive, delta, essence, interleaved, judge, rules, settings
from worker import streams
from worker.assemble import Segment
from worker.events import Decision
from worker.settings import ReviewPolicy, Settings, TenantPolicy
from worker.streams import MAX_SNAPSHOT_BYTES, Lane, latest_turns
from worker.topics import desired_topics

INPUT_BYTES = 2 << 20  # of a record, as topics.py makes the input topic
EVERY = ReviewPolicy(over=0.8, near=0.6, rest=0.4, per_hour=10**9)


class Taken:
    """A lane and what it has committed: a restart reads the journal and the log from the offset."""

    def __init__(self, chosen: Settings | None = None) -> None:
        self.rules = rules(chosen or Settings(rewind_records=5, context_segments=1))
        self.lane = Lane("in", 0, self.rules)
        self.log: list[bytes] = []
        self.journal: dict[str, tuple[int, bytes]] = {}
        self.committed = self._end = 0
        self.pending: list[Segment] = []
        self.published: list[Decision] = []

    def feed(self, *values: bytes) -> None:
        """Append records to the log and read them."""
        for value in values:
            self.log.append(value)
            self._read()

    def _read(self) -> None:
        offset = self.lane.position
        self.pending += self.lane.feed(offset, 1_000, None, self.log[offset], 0.0, 10**9)

    def pass_by(self) -> None:
        """More records of another stream than `rewind_records`."""
        name = f"other{len(self.log)}"
        self.feed(*(delta(name, seq, "x", seq == 9) for seq in range(10)))
        self.judge(name)

    def judge(self, stream_id: str = "s", most: int = 10**9) -> None:
        """Judge so many of the stream's segments that wait."""
        wanted = [it for it in self.pending if it.stream.stream_id == stream_id][:most]
        for segment in wanted:
            self.pending.remove(segment)
            segment.judgement = judge(segment, blocked=0.0)
            if self.lane.holds(segment):
                self.lane.advance(segment.stream, 0.0, 5)

    def publish(self) -> None:
        """A transaction, if one is due."""
        output = self.lane.take(0.0, drain=True)
        if output is None:
            return
        for stream_id, record in output.journal:
            self.journal.pop(stream_id, None)
            if record is not None:
                self.journal[stream_id] = (self._end, record)
            self._end += 1
        self.published += output.decisions
        self.committed = output.offset
        self.lane.done(output, range(self._end - len(output.journal), self._end))

    def restart(self) -> None:
        """Forget what was not published; read again up to where the log ends."""
        self.lane = Lane("in", 0, self.rules)
        self.pending = self.lane.load(self.committed, self.journal, 0.0, 0, self._end)
        while self.lane.position < len(self.log):
            self._read()

    def ends(self) -> list[int]:
        """Of the published decisions of stream `s`, in order."""
        return [it.end for it in self.published if it.stream_id == "s"]

    def snapshot(self) -> object:
        """Of stream `s`, as it was journalled."""
        return json.loads(self.journal["s"][1]).get("snapshot")


def as_json(value: object) -> object:
    return json.loads(json.dumps(value))


@pytest.mark.parametrize(
    ("piece", "bytes_each"),
    [
        ("😀", 4),
        ("ж", 2),
        ("字", 3),
        ("a", 1),
        ('"', 2),
        ("\n", 2),
        ("x\ud800", 7),
        ("😀\udc00", 10),
    ],
    ids=["emoji", "cyrillic", "cjk", "ascii", "quotes", "lines", "halves", "half-and-emoji"],
)
def test_what_an_input_record_holds_fits_into_the_journal(piece: str, bytes_each: int) -> None:
    """A delta as large as the input topic takes is spilled, and read back as it was: in UTF-8 it
    is no longer than it came. Lone surrogates, which have no UTF-8, stay the escapes they were."""
    text = piece * ((INPUT_BYTES - 1_000) // bytes_each)
    fields = {"stream_id": "s", "seq": 0, "delta": text, "final": False}
    value = json.dumps(fields, ensure_ascii=False).encode(errors="backslashreplace")
    assert INPUT_BYTES - 2_000 < len(value) <= INPUT_BYTES
    it = Taken()
    it.feed(value)
    it.pass_by()
    it.publish()
    assert len(value) < len(it.journal["s"][1]) <= MAX_SNAPSHOT_BYTES
    assert it.committed == it.lane.position  # nothing holds the offset back
    before = it.lane._streams["s"]
    told = (as_json(before.snapshot()), before.progress(), before.conversation)
    it.restart()
    after = it.lane._streams["s"]
    assert (as_json(after.snapshot()), after.progress(), after.conversation) == told
    assert "".join(segment.text for segment in it.pending) == text[: after.cut]


def test_the_journal_takes_the_largest_snapshot() -> None:
    """With the key and what Kafka puts around a record."""
    chosen = Settings()
    (journal,) = (it for it in desired_topics(chosen) if it.name == chosen.streams_topic)
    assert int(journal.configs["max.message.bytes"]) > MAX_SNAPSHOT_BYTES + 4 * 512 + 1_000


def test_text_with_and_without_lone_surrogates_is_read_back() -> None:
    """Text, a half that waits for the other, early deltas, conversation, the keyword tail."""
    for half in ("", "\ud83d"):
        it = Taken(settings(rewind_records=5))
        context = [{"role": "user", "content": f'ж😀"\\u0041\\{half}'}]
        it.feed(delta("s", 0, f"字 and ж\\{half} é \x7f\u2028", context=context))
        it.feed(delta("s", 1, f"more{half}"), delta("s", 3, f"early 😀{half}\\"))
        it.pass_by()
        it.publish()
        before = it.lane._streams["s"]
        told = (as_json(before.snapshot()), before.conversation, before.early)
        it.restart()
        after = it.lane._streams["s"]
        assert (as_json(after.snapshot()), after.conversation, after.early) == told
        assert (b"\\ud83d" in it.journal["s"][1]) == bool(half)
        assert "字 and ж".encode() in it.journal["s"][1]


def test_roles_are_bounded_like_what_was_said() -> None:
    """A role is a word; whatever stands there, a conversation keeps its bound."""
    (turn,) = latest_turns([Turn("ж" * 700_000, "x")], 16_000)
    assert turn == Turn("ж" * 64, "x")
    for turns in ([Turn("ж" * 64, "")] * 9_000, [Turn("", "")] * 90_000):
        kept = latest_turns(turns, 16_000)
        assert len(kept) <= 16_000
        assert sum(len(role) + len(said) for role, said in kept) <= 16_000 + 64
    usual = [Turn("user", "a" * 100), Turn("assistant", "b" * 100)]
    assert latest_turns(usual, 200) == tuple(usual)


def test_a_stream_too_large_for_the_journal_holds_the_offset_until_it_is_decided() -> None:
    """The others' decisions are published meanwhile; a kill costs a longer way back alone."""
    it = Taken()
    it.feed(delta("s", 0, "😀" * 1_000_000), delta("s", 1, "😀"))
    it.pass_by()
    it.publish()
    assert it.committed == 0
    assert "s" not in it.journal
    assert Counter(d.stream_id for d in it.published) == {"other2": 1}
    it.judge(most=100)
    it.publish()
    assert len(it.ends()) == 100
    assert it.snapshot() is None  # how far it was decided, without text
    it.judge(most=300)
    it.publish()
    assert it.snapshot() is not None  # now it fits
    assert it.committed == it.lane.position
    it.restart()
    it.judge()
    it.publish()
    assert it.ends() == sorted(set(it.ends()))
    assert it.ends()[-1] > 999_000


def test_a_spilled_stream_that_grows_waits_with_its_decisions() -> None:
    """Its last snapshot stays in force, and the offset where that one needs it, so that a kill
    finds both; other streams go on."""
    it = Taken()
    it.feed(delta("s", 0, "😀" * 2_000))
    it.pass_by()
    it.publish()
    assert it.snapshot() is not None
    needed = it.committed
    it.feed(delta("s", 1, "😀" * 1_200_000), delta("s", 2, "😀"))
    it.judge(most=10)
    it.pass_by()
    for _ in range(2):
        it.publish()
        assert it.ends() == []
        assert it.committed == needed
        assert len({d.stream_id for d in it.published}) == 2
        assert all(len(record) <= MAX_SNAPSHOT_BYTES for _, record in it.journal.values())
        it.restart()
        assert not it.lane.has_output
        it.judge(most=20)
    it.judge()
    it.publish()
    assert it.ends() == sorted(set(it.ends()))
    assert it.ends()[0] <= 400
    assert it.ends()[-1] > 1_200_000
    assert it.committed == it.lane.position


@pytest.mark.parametrize(("most", "some"), [(0, False), (400, True), (500, True)])
def test_kills_change_no_decision_whatever_fits(
    monkeypatch: pytest.MonkeyPatch, most: int, some: bool
) -> None:
    """With room for no snapshot, or for some: every segment has its decision once, in order, and
    a review is published with its decision."""
    held = snapshots = 0
    plain = Lane._entry

    def counted(lane: Lane, stream_id: str) -> bytes | None:
        nonlocal held
        record = plain(lane, stream_id)
        held += record is None
        return record

    monkeypatch.setattr(Lane, "_entry", counted)
    for seed in range(12):
        log = interleaved(random.Random(seed), streams=8)
        chosen = settings(
            rewind_records=5, commit_interval_ms=100, tenants={"t": TenantPolicy(review=EVERY)}
        )
        monkeypatch.setattr(streams, "MAX_SNAPSHOT_BYTES", 1 << 20)
        undisturbed = Drive(log, chosen, seed, partitions=1)
        expected = undisturbed.run()
        monkeypatch.setattr(streams, "MAX_SNAPSHOT_BYTES", most)
        disturbed = Drive(log, chosen, seed, 0.1, partitions=1)
        found = disturbed.run()
        assert sorted(map(essence, found)) == sorted(map(essence, expected))
        for stream_id in {decision.stream_id for decision in found}:
            of_stream = [it for it in found if it.stream_id == stream_id]
            assert [it.segment for it in of_stream] == list(range(len(of_stream)))
        reviewed = sorted(it.decision_id for it in disturbed.reviews)
        assert reviewed == sorted(it.decision_id for it in undisturbed.reviews) != []
        snapshots += disturbed.snapshots
    assert (held > 0, snapshots > 0) == (some, some)
