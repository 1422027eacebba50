"""The streams of one partition: deltas in, segments out; judgements in, decisions out. Pure.

A Lane is all that one worker holds for one input partition. What `take` returns is published in
one transaction, so it is computed in one step: decisions, journal and offset of the same instant.
"""

import json
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import msgspec
import orjson

from detectors.protocol import Turn
from detectors.segments import Limits
from worker.assemble import Early, Resume, Segment, Stream
from worker.decide import Judgement, Ruling, combine, rule
from worker.decode import decode
from worker.errors import Stop, Unreadable
from worker.events import DeadLetter, Decision, Delta, Review, Revision, Timing, TurnRecord
from worker.offsets import OpenOffsets
from worker.sampling import Pick, Picker
from worker.settings import TEMPLATES, Settings
from worker.thresholds import Thresholds

MAX_EARLY_CHARS = 200_000  # of deltas that wait for a missing one; a snapshot holds them
MAX_SNAPSHOT_BYTES = 7 << 19  # 3.5 MiB; the journal's records may have 4
DEAD_LETTER_QUIET_S = 0.5  # a run of unreadable records is over after so long without another
_TOMBSTONES = 500  # a transaction
_ROLE_CHARS = 64  # a role is a word
_MOST_BYTES = 6  # of a character in JSON: an escape
_CUT_BYTES = 100  # of a segment in a snapshot, beside its text: five numbers at most
_PICKS = ""  # journal key of what was picked for review: no stream's id is empty
_LONE_SURROGATES = re.compile("[\ud800-\udfff]")  # judged as U+FFFD, and no UTF-8 holds them


class Rules(NamedTuple):
    """What decisions are made with; shared by all lanes of a worker."""

    settings: Settings
    thresholds: Thresholds
    model: str  # the detectors' names and digests, as decisions name them
    next_tail: Callable[[str, str], str]  # Keywords.next_tail
    partitions: int = 0  # of the input topic, which share the review budget; 0: none is picked


class Closed(NamedTuple):
    """A stream that has ended: its late deltas are ignored for a while."""

    closed_ms: int
    through: int  # highest input offset seen of it


class Output(NamedTuple):
    """What one transaction publishes."""

    decisions: list[Decision]
    reviews: list[Review]  # of these decisions
    dead_letters: list[DeadLetter]
    journal: list[tuple[str, bytes | None]]  # stream id, record; None is a tombstone
    offset: int  # to commit
    journal_from: int  # lowest journal offset that still matters, as far as known
    buried_to: int  # dead letters of input offsets below are published


class Lane:
    """Streams, closed ids, decisions not yet published, and offsets of one partition."""

    def __init__(self, topic: str, partition: int, rules: Rules, epoch: int = 0) -> None:
        self.topic = topic
        self.partition = partition
        self.epoch = epoch
        self.position = 0  # next input offset to read
        self.committed = 0  # last offset committed
        self._rules = rules
        settings = rules.settings
        self._limits = Limits(
            settings.min_segment_chars, settings.max_segment_chars, settings.context_segments
        )
        self._streams: OrderedDict[str, Stream] = OrderedDict()  # longest silent first
        self._gapped: dict[str, Stream] = {}
        self._resumes: dict[str, dict[str, Any]] = {}  # journalled, deltas not read again yet
        self._closed: OrderedDict[str, Closed] = OrderedDict()  # oldest first
        self._open = OpenOffsets()
        self._ready: list[Decision] = []
        self._reviews: list[Review] = []
        self._picker = Picker(settings, partition, rules.partitions) if rules.partitions else None
        self._dead: list[DeadLetter] = []
        self._dead_run = 0  # unreadable records without a good one between
        self._dead_last = 0.0  # monotonic seconds
        self._changed: dict[str, None] = {}  # streams to journal, in order
        self._spilled: set[str] = set()
        self._too_large: dict[str, int] = {}  # to spill, before so many segments are decided
        self._journal_offsets: OrderedDict[str, int] = OrderedDict()
        self._buried_to = 0  # dead letters of offsets below are published
        self._journal_end = 0  # no journal offset that matters is below, where none is known
        self._log_ms = 0  # Kafka's clock, as far as the log was read
        self._commit_due = 0.0  # monotonic seconds

    # -- records in ---------------------------------------------------------------------------

    def feed(
        self, offset: int, timestamp_ms: int, key: bytes | None, value: bytes | None,
        now: float, wall_ms: int,
    ) -> list[Segment]:  # fmt: skip
        """Take the next record; the segments that it completes. Raises Stop."""
        self.position = offset + 1
        try:
            delta = decode(value)
        except Unreadable as error:
            letter = DeadLetter(
                self.topic, self.partition, offset, key, value, error.reason, error.field
            )
            self._bury(letter, now)
            return []
        return self.feed_delta(delta, offset, timestamp_ms, now, wall_ms)

    def feed_delta(
        self, delta: Delta, offset: int, timestamp_ms: int, now: float, wall_ms: int
    ) -> list[Segment]:
        """Take the next record's delta; the segments that it completes."""
        self.position = offset + 1
        self._dead_run = 0
        stamp = min(timestamp_ms, wall_ms)  # a clock that runs ahead must not expire anything
        self._log_ms = max(self._log_ms, stamp)
        stream = self._streams.get(delta.stream_id)
        if stream is None:
            stream = self._opened(delta.stream_id, offset, stamp)
            if stream is None:
                return []
        return self._advance(stream, delta, offset, timestamp_ms, now)

    def _bury(self, letter: DeadLetter, now: float) -> None:
        if letter.offset >= self._buried_to:
            self._dead.append(letter)
            self._dead_last = now
        self._dead_run += 1
        if self._dead_run > self._rules.settings.max_dead_letters_in_row:
            msg = (
                f"{self.topic}-{self.partition}: {self._dead_run} unreadable records in a row up "
                f"to offset {letter.offset}, the last because: {letter.reason}. Those that came "
                "without a pause are neither published nor committed. Mend the producer, or raise "
                "max_dead_letters_in_row."
            )
            raise Stop(msg)

    def _opened(self, stream_id: str, offset: int, stamp: int) -> Stream | None:
        """A new stream, or one to rebuild; None where it has ended."""
        closed = self._closed.get(stream_id)
        if closed is not None:
            if stamp <= closed.closed_ms + self._rules.settings.closed_for_ms:
                self._closed[stream_id] = closed._replace(through=offset)
                return None
            del self._closed[stream_id]  # its id is used again, against the contract
        stream = self._new(stream_id, offset)
        entry = self._resumes.pop(stream_id, None)
        if entry is not None:
            stream.resume = _resume(entry)
        self._open.need(stream_id, offset)
        return stream

    def _new(self, stream_id: str, offset: int) -> Stream:
        stream = Stream(
            stream_id, "default", "text", (), self._limits, self._rules.next_tail, offset,
            self.epoch,
        )  # fmt: skip
        self._streams[stream_id] = stream
        return stream

    def _advance(
        self, stream: Stream, delta: Delta, offset: int, timestamp_ms: int, now: float
    ) -> list[Segment]:
        """Put the delta in its place. Repeats and what an ended stream sends are nothing."""
        stream.through = max(offset, stream.through)  # a snapshot may be ahead of the re-reading
        if stream.finished or delta.seq < stream.next_seq:
            return []
        # Kafka's stamp as it is: cut to the wall clock it would not replay the same way.
        silent_ms = timestamp_ms - (stream.last_timestamp_ms or timestamp_ms)
        # What is rebuilt was decided past this silence, when the timeout may have been longer.
        if silent_ms > self._rules.settings.idle_timeout_ms and stream.resume is None:
            return self._lost(stream, now) if stream.early else stream.close(now)
        stream.last_timestamp_ms = max(timestamp_ms, stream.last_timestamp_ms)
        stream.seen = now
        self._streams.move_to_end(stream.stream_id)
        if delta.seq > stream.next_seq:
            return self._early(stream, delta, offset, now)
        if delta.seq == 0:
            self._begin(stream, delta)
        stream.next_seq += 1
        segments = stream.append(delta.delta, delta.final, offset, delta.seq, now)
        if stream.early:
            segments += self._catch_up(stream, now)
        return segments

    def _begin(self, stream: Stream, delta: Delta) -> None:
        """Context, tenant and channel are those of the stream's first delta."""
        stream.tenant, stream.channel = delta.tenant, delta.channel
        stream.conversation = latest_turns(
            [Turn(turn.role, turn.content) for turn in delta.context],
            self._rules.settings.max_context_chars,
        )

    def _early(self, stream: Stream, delta: Delta, offset: int, now: float) -> list[Segment]:
        """A delta whose predecessor is missing waits; too many of them end the stream."""
        stream.early.setdefault(delta.seq, Early(offset, delta.delta, delta.final))
        if stream.gap_since is None:
            stream.gap_since = now
            self._gapped[stream.stream_id] = stream
        chars = sum(len(early.text) for early in stream.early.values())
        if len(stream.early) > self._rules.settings.max_early_deltas or chars > MAX_EARLY_CHARS:
            return self._lost(stream, now)
        return []

    def _catch_up(self, stream: Stream, now: float) -> list[Segment]:
        segments: list[Segment] = []
        while not stream.finished and (early := stream.early.pop(stream.next_seq, None)):
            segments += stream.append(early.text, early.final, early.offset, stream.next_seq, now)
            stream.next_seq += 1
        stream.gap_since = now
        if stream.finished or not stream.early:
            stream.early.clear()
            stream.gap_since = None
            self._gapped.pop(stream.stream_id, None)
        return segments

    def _lost(self, stream: Stream, now: float) -> list[Segment]:
        """A part of the stream never came: end it, blocked, behind what is still being judged."""
        stream.early.clear()
        self._gapped.pop(stream.stream_id, None)
        if stream.resume is not None:  # the delta read last may have named a decision before
            stream.last_offset = stream.resume.last[0]
        segment = stream.abandon(now)
        segment.judgement = Judgement(None, "policy", "gap", forced=True)
        return [segment]

    # -- time ---------------------------------------------------------------------------------

    def tick(self, now: float, wall_ms: int, caught_up: bool) -> list[Segment]:
        """End what has been silent or incomplete for too long; the segments that remain.

        caught_up: nothing in the log is unread. Without it no stream is idle.
        """
        settings = self._rules.settings
        segments: list[Segment] = []
        for stream in list(self._gapped.values()):
            since = stream.gap_since
            if since is not None and (now - since) * 1e3 > settings.gap_timeout_ms and caught_up:
                segments += self._lost(stream, now)
        if caught_up:
            self._log_ms = max(self._log_ms, wall_ms)
            segments += self._idle(now)
        excess = len(self._streams) - settings.max_open_streams
        if excess > 0:  # those that have ended, undecided, make room by themselves
            excess -= sum(stream.finished for stream in self._streams.values())
        while excess > 0:
            ended = self.end_silent(now)
            segments += ended
            excess -= bool(ended)
        return segments

    def _idle(self, now: float) -> list[Segment]:
        segments: list[Segment] = []
        timeout_s = self._rules.settings.idle_timeout_ms / 1e3
        for stream in list(islice(self._streams.values(), 1_000)):
            if now - stream.seen <= timeout_s:
                break
            segments += self.end_silent(now)
        segments += self._vanished(now)
        return segments

    def end_silent(self, now: float) -> list[Segment]:
        """End the stream that has been silent longest, as it stands."""
        stream_id, stream = next(iter(self._streams.items()))
        self._streams.move_to_end(stream_id)
        stream.seen = now
        if stream.finished:
            return []
        if stream.early or stream.resume is not None:
            return self._lost(stream, now)
        return stream.close(now)

    def _vanished(self, now: float) -> list[Segment]:
        """Streams that the journal calls open, and none of whose deltas is in the log any more."""
        segments: list[Segment] = []
        for stream_id, entry in list(self._resumes.items()):
            del self._resumes[stream_id]
            stream = self._new(stream_id, entry["last"][0])
            stream.tenant, stream.channel = entry["tenant"], entry["channel"]
            stream.resume = _resume(entry)
            self._open.need(stream_id, self.position)
            segments += self._lost(stream, now)
        return segments

    # -- judgements in ------------------------------------------------------------------------

    def advance(self, stream: Stream, now: float, wall_ms: int) -> None:
        """Decide the stream's segments in order, as far as they are judged."""
        ahead = self._rules.settings.lookahead_segments
        while stream.outbox:
            window = list(islice(stream.outbox, ahead + 1))
            if len(window) <= ahead and not stream.finished:
                return
            judgements = [it.judgement for it in window if it.judgement is not None]
            if len(judgements) < len(window):
                return
            own = judgements[: self._limits.context_segments + 1]  # the windows that it lies in
            if not self._decide(stream, window[0], combine(own), now, wall_ms):
                return

    def _decide(
        self, stream: Stream, segment: Segment, judgement: Judgement, now: float, wall_ms: int
    ) -> bool:
        """Make the decision; whether the stream goes on."""
        rules = self._rules
        in_force = rules.thresholds.of(stream.tenant)
        policy = rules.settings.tenant(stream.tenant)
        ruling = rule(judgement, in_force, policy)
        leaked = self._release(stream, segment, ruling)
        ends = segment.final or ruling.verdict == "block"
        decision = Decision(
            decision_id=f"{self.topic}-{self.partition}-{segment.offset}-{segment.ordinal}",
            stream_id=stream.stream_id, tenant=stream.tenant, channel=stream.channel,
            seq=segment.seq, segment=segment.index, verdict=ruling.verdict,
            start=segment.start, end=segment.end, released_to=stream.released_to,
            leaked=leaked, final=ends, harm=ruling.harm, scores=ruling.scores,
            harmful=ruling.harmful, stage=ruling.stage, reason=ruling.reason,
            policy=f"{stream.tenant}@{policy.digest()}",
            thresholds_version=in_force.version, model=rules.model,
            revision=_revision(ruling, segment, policy.revisions), ts_ms=wall_ms,
            timing_ms=_timing(judgement, now - segment.born),
        )  # fmt: skip
        self._ready.append(decision)
        self._pick(decision, segment, in_force.values)
        stream.settled(segment)
        self._changed[stream.stream_id] = None
        if ends:
            self._close(stream, wall_ms)
        return not ends

    def _pick(self, decision: Decision, segment: Segment, thresholds: Sequence[float]) -> None:
        """Have the decision reviewed, if the dice say so."""
        pick = self._picker.pick(decision, thresholds) if self._picker else None
        if pick is not None:
            self._reviews.append(_review(decision, segment, pick))
            self._changed[_PICKS] = None

    def _release(self, stream: Stream, segment: Segment, ruling: Ruling) -> int:
        """Move `released_to`; the number of the segment's code points that were shown too early."""
        if ruling.verdict == "allow":
            if not stream.frozen:
                ahead = 0 if segment.final else self._rules.settings.release_ahead_chars
                stream.released_to = segment.end + ahead
            return 0
        leaked = max(0, min(stream.released_to, segment.end) - segment.start)
        stream.released_to = min(stream.released_to, segment.start)
        stream.frozen = True
        return leaked

    def _close(self, stream: Stream, wall_ms: int) -> None:
        stream_id = stream.stream_id
        stream.finished = True
        stream.outbox.clear()
        self._streams.pop(stream_id, None)
        self._gapped.pop(stream_id, None)
        self._spilled.discard(stream_id)
        self._too_large.pop(stream_id, None)
        self._open.release(stream_id)
        self._closed[stream_id] = Closed(wall_ms, stream.through)

    # -- output -------------------------------------------------------------------------------

    @property
    def has_output(self) -> bool:
        """Whether there is something that should be published now."""
        return bool(self._ready)

    @property
    def due(self) -> bool:
        """Whether offsets or dead letters wait for their time."""
        return bool(self._ready or self._dead or self._changed) or self._behind()

    @property
    def backlog(self) -> int:
        """Decisions not published yet."""
        return len(self._ready)

    def holds(self, segment: Segment) -> bool:
        """Whether the segment's stream is open here, so that its judgement is wanted."""
        return self._streams.get(segment.stream.stream_id) is segment.stream

    @property
    def judging(self) -> bool:
        """Whether a segment is cut and waits for its judgement, not only for later segments."""
        return any(
            segment.judgement is None
            for stream in self._streams.values()
            for segment in stream.outbox
        )

    def drop(self) -> None:
        """Forget every stream: judgements that are still on their way change nothing."""
        self._streams.clear()
        self._gapped.clear()
        self._resumes.clear()
        self._ready.clear()
        self._reviews.clear()

    @property
    def open_streams(self) -> int:
        """Streams that have not ended."""
        return len(self._streams)

    @property
    def closed_streams(self) -> int:
        """Ended streams that are still remembered."""
        return len(self._closed)

    def forget_closed(self, keep: int) -> None:
        """Remember only the `keep` streams that ended last: for input that has no clock."""
        while len(self._closed) > keep:
            self._closed.popitem(last=False)

    def take(self, now: float, drain: bool = False) -> Output | None:
        """What the next transaction publishes; None where nothing is due."""
        letters = self._take_dead_letters(now, drain)
        self._spill()
        due = drain or now >= self._commit_due
        entries = [(stream_id, self._entry(stream_id)) for stream_id in self._changed]
        held = {stream_id for stream_id, record in entries if record is None}
        journal: list[tuple[str, bytes | None]] = [it for it in entries if it[0] not in held]
        decisions = [it for it in self._ready if it.stream_id not in held]
        if not (decisions or letters or journal or (due and self._behind())):
            return None
        self._commit_due = now + self._rules.settings.commit_interval_ms / 1e3
        journal += self._expired()
        journal += self._picks_over()
        reviews = [it for it in self._reviews if it.stream_id not in held]
        self._ready = [it for it in self._ready if it.stream_id in held]
        self._reviews = [it for it in self._reviews if it.stream_id in held]
        self._changed = dict.fromkeys(it for it in self._changed if it in held)
        if letters:
            self._buried_to = letters[-1].offset + 1
        journal_from = next(iter(self._journal_offsets.values()), self._journal_end)
        return Output(
            decisions, reviews, letters, journal, self._offset(), journal_from, self._buried_to
        )

    def done(self, output: Output, journal_offsets: Iterable[int]) -> None:
        """The transaction is committed; its journal records lie at these offsets."""
        self.committed = output.offset
        for (stream_id, record), offset in zip(output.journal, journal_offsets, strict=True):
            self._journal_end = offset
            if record is None:
                self._journal_offsets.pop(stream_id, None)
            else:
                self._journal_offsets[stream_id] = offset
                self._journal_offsets.move_to_end(stream_id)

    def _take_dead_letters(self, now: float, drain: bool) -> list[DeadLetter]:
        over = self._dead_run == 0 or drain or now - self._dead_last > DEAD_LETTER_QUIET_S
        if not over:
            return []
        letters, self._dead = self._dead, []
        return letters

    def _offset(self) -> int:
        # A stream restored from a snapshot may need less than what is still to be read of others.
        lowest = min(self.position, self._open.lowest(self.position))
        return min(lowest, self._dead[0].offset) if self._dead else lowest

    def _spill(self) -> None:
        """Free the committed offset from streams that hold it far back."""
        far = self.position - self._rules.settings.rewind_records
        while self._open.lowest(self.position) < far:
            stream_id = self._open.oldest()
            if stream_id is None or self._streams[stream_id].resume is not None:
                return  # its text is not all here yet
            if self._snapshot(stream_id) is None:
                return  # until more of its text is decided
            self._spilled.add(stream_id)
            self._changed[stream_id] = None
            self._open.need(stream_id, self.position)

    def _entry(self, stream_id: str) -> bytes | None:
        """The stream's journal record, or that of the picks; None while it would be too large."""
        if stream_id == _PICKS and self._picker is not None:
            return orjson.dumps(self._picker.state)
        closed = self._closed.get(stream_id)
        if closed is not None:
            return orjson.dumps({"closed_ms": closed.closed_ms, "through": closed.through})
        stream = self._streams[stream_id]
        if stream_id not in self._spilled or stream.resume is not None:
            return orjson.dumps(_progress(stream))
        # A later record replaces an earlier one, so a spilled stream's are snapshots from now on.
        # One that has grown too large leaves the last in force, and waits with its decisions: the
        # offset stays where that one needs it, and what is judged next makes it smaller.
        record = self._snapshot(stream_id)
        if record is not None:
            self._open.need(stream_id, self.position)
        return record

    def _snapshot(self, stream_id: str) -> bytes | None:
        """The record of a stream that needs nothing before the position; None where it is larger
        than a journal takes, which would stop this worker and each that follows it."""
        stream = self._streams[stream_id]
        if stream.decided < self._too_large.get(stream_id, 0):
            return None
        entry = _progress(stream)
        entry |= {"needed_from": self.position, "snapshot": stream.snapshot()}
        record = _json(entry)
        excess = len(record) - MAX_SNAPSHOT_BYTES
        if excess <= 0:
            return record
        # It takes 20 ms to learn this, so not again before enough can have gone.
        of_a_segment = _MOST_BYTES * self._limits.max_chars + _CUT_BYTES
        self._too_large[stream_id] = stream.decided + -(-excess // of_a_segment)
        return None

    def _behind(self) -> bool:
        """Whether the offset has moved, or something can be forgotten, without any decision."""
        oldest = next(iter(self._closed.values()), None)
        return self._offset() != self.committed or (oldest is not None and self._is_over(oldest))

    def _is_over(self, closed: Closed) -> bool:
        """Whether no late delta of it has to be ignored any more, and no restart reads it again."""
        kept_ms = self._rules.settings.closed_for_ms
        return closed.closed_ms + kept_ms < self._log_ms and closed.through < self.committed

    def _expired(self) -> list[tuple[str, bytes | None]]:
        """Tombstones of closed streams that no late delta can be ignored for any more."""
        gone: list[tuple[str, bytes | None]] = []
        for stream_id, closed in islice(self._closed.items(), _TOMBSTONES):
            if not self._is_over(closed):
                break
            if stream_id not in self._changed:
                gone.append((stream_id, None))
        for stream_id, _ in gone:
            del self._closed[stream_id]
        return gone

    def _picks_over(self) -> list[tuple[str, bytes | None]]:
        """A tombstone once the hour of the count is over: an old record would make a restart read
        the journal from there."""
        if self._picker is None or not self._picker.is_fresh:
            return []
        return [(_PICKS, None)] if _PICKS in self._journal_offsets else []

    # -- after a restart ----------------------------------------------------------------------

    def load(
        self, committed: int, journal: Mapping[str, tuple[int, bytes]], now: float,
        buried_to: int = 0, journal_end: int = 0,
    ) -> list[Segment]:  # fmt: skip
        """Take over where the last owner left off; the segments that it had cut, not decided.

        committed: the group's offset. journal: stream id -> (journal offset, record), the latest
        of each, in the order of their offsets; nothing at or above journal_end.
        """
        self.position = self.committed = committed
        self._buried_to, self._journal_end = buried_to, journal_end
        segments: list[Segment] = []
        for stream_id, (offset, record) in journal.items():
            entry = json.loads(record)
            self._journal_offsets[stream_id] = offset
            if stream_id == _PICKS:
                if self._picker is not None:
                    self._picker.restore(entry)
            elif "closed_ms" in entry:
                self._closed[stream_id] = Closed(entry["closed_ms"], entry["through"])
            elif "snapshot" in entry:
                segments += self._restore(stream_id, entry, now)
            else:
                self._resumes[stream_id] = entry
        return segments

    def _restore(self, stream_id: str, entry: dict[str, Any], now: float) -> list[Segment]:
        snapshot = entry["snapshot"]
        stream = self._new(stream_id, entry["needed_from"])
        stream.tenant, stream.channel = snapshot["tenant"], snapshot["channel"]
        stream.conversation = tuple(Turn(*turn) for turn in snapshot["conversation"])
        self._spilled.add(stream_id)
        self._open.need(stream_id, entry["needed_from"])
        segments = stream.restore(snapshot, _resume(entry), now)
        if stream.early:
            self._gapped[stream_id] = stream
        return segments


def latest_turns(turns: list[Turn], max_chars: int) -> tuple[Turn, ...]:
    """The conversation's end: whole turns from the last one back, the first cut in front.

    A turn counts as its content, or as its role where that is longer: no turn is free.
    """
    kept: list[Turn] = []
    for turn in reversed(turns):
        if max_chars <= 0:
            break
        role = turn.role[:_ROLE_CHARS]
        kept.append(Turn(role, turn.content[-max_chars:]))
        max_chars -= max(1, len(turn.content), len(role))
    return tuple(reversed(kept))


def _progress(stream: Stream) -> dict[str, Any]:
    return {"tenant": stream.tenant, "channel": stream.channel, **stream.progress()._asdict()}


def _json(entry: Mapping[str, Any]) -> bytes:
    """As UTF-8: escapes would make text two or three times as long."""
    try:
        return orjson.dumps(entry)
    except orjson.JSONEncodeError:  # a lone surrogate: Python's escape of it is JSON's too
        return json.dumps(entry, ensure_ascii=False).encode(errors="backslashreplace")


def _resume(entry: Mapping[str, Any]) -> Resume:
    return Resume(
        entry["decided"], entry["end"], tuple(entry["marks"]), (entry["last"][0], entry["last"][1]),
        entry["released_to"], entry["frozen"],
    )  # fmt: skip


def _revision(ruling: Ruling, segment: Segment, templates: Mapping[str, str]) -> Revision | None:
    """A template for the harm; a model writes better ones, judged, some day."""
    if ruling.verdict != "revise" or ruling.harm is None:
        return None
    text = templates.get(ruling.harm, TEMPLATES[ruling.harm])
    return Revision(text, segment.start, segment.end, "template", None)


def _review(decision: Decision, segment: Segment, pick: Pick) -> Review:
    turns = (TurnRecord(_plain(role), _plain(said)) for role, said in segment.stream.conversation)
    return Review(
        **msgspec.structs.asdict(decision), text=_plain(segment.text),
        before=_plain(segment.before), context=tuple(turns), **pick._asdict(),
    )  # fmt: skip


def _plain(text: str) -> str:
    return _LONE_SURROGATES.sub("\ufffd", text)


def _timing(judgement: Judgement, total_s: float) -> Timing:
    return Timing(
        round(judgement.queue_ms, 3), round(judgement.prefilter_ms, 3),
        round(judgement.tokenise_ms, 3), round(judgement.infer_ms, 3), round(total_s * 1e3, 3),
    )  # fmt: skip
