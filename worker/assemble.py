"""Deltas of one stream -> segments: text, what stands before it, offsets. Pure.

Segments are a function of the text alone, however it was split into deltas (docs/guarantees.md).
All positions are code points of the stream's text.
"""

from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

from detectors.protocol import Turn
from detectors.segments import Limits, next_cut, scan_mark

if TYPE_CHECKING:
    from worker.decide import Judgement


def join_surrogates(high: str, text: str) -> str:
    """high + text, as one code point where text begins with the low half."""
    if text and "\udc00" <= text[0] <= "\udfff":
        point = 0x10000 + ((ord(high) - 0xD800) << 10) + (ord(text[0]) - 0xDC00)
        return chr(point) + text[1:]
    return high + text


class Segment:
    """A piece of a stream that gets one decision, and what it is judged with."""

    __slots__ = (
        "before", "born", "end", "epoch", "final", "following", "index", "judgement", "offset",
        "ordinal", "seq", "start", "stream", "tail", "text",
    )  # fmt: skip

    def __init__(
        self, stream: "Stream", index: int, start: int, text: str, before: str, tail: str,
        following: str, offset: int, ordinal: int, seq: int, final: bool, born: float,
    ) -> None:  # fmt: skip
        self.stream = stream
        self.index = index  # 0 for the stream's first
        self.start = start
        self.end = start + len(text)
        self.text = text
        self.before = before  # the context segments' text, right before `text`
        self.tail = tail  # visible characters right before `text`, for keywords
        self.following = following  # the code point after `text`, empty at the stream's end
        self.offset = offset  # input offset of the delta that completed the segment
        self.ordinal = ordinal  # 0 for the first segment which that delta completed
        self.seq = seq  # that delta's
        self.final = final
        self.born = born  # monotonic seconds
        self.epoch = stream.epoch
        self.judgement: Judgement | None = None


class Early(NamedTuple):
    """A delta that came before its turn."""

    offset: int
    text: str
    final: bool


class Stream:
    """One open stream: the text that is not settled yet, and what its next segment needs."""

    __slots__ = (
        "_base", "_buffer", "_carry", "_cut_last", "_marks", "_scan", "_tail", "channel",
        "context_key", "conversation", "cut", "decided", "decided_end", "decided_last",
        "decided_marks", "early", "epoch", "finished", "frozen", "gap_since", "index",
        "last_offset", "last_seq",
        "last_timestamp_ms", "limits", "next_seq", "next_tail", "outbox",
        "released_to", "resume", "seen", "stream_id", "tenant", "through",
    )  # fmt: skip

    def __init__(
        self, stream_id: str, tenant: str, channel: str, conversation: tuple[Turn, ...],
        limits: Limits, next_tail: Any, offset: int, epoch: int,
    ) -> None:  # fmt: skip
        self.stream_id = stream_id
        self.tenant = tenant
        self.channel = channel
        self.conversation = conversation
        self.context_key: bytes | None = None  # of the score cache, computed once
        self.limits = limits
        self.next_tail = next_tail  # (tail, text) -> tail after text
        self.epoch = epoch

        self._buffer = ""  # text from _base on
        self._base = 0
        self._carry = ""  # a high surrogate that waits for its low half
        self._scan = 0
        self._marks: deque[int] = deque(maxlen=max(1, limits.context_segments))
        self._tail = ""
        self._cut_last = (-1, -1)  # offset and ordinal of the last segment that was cut
        self.cut = 0  # where the pending text starts
        self.index = 0  # of the next segment to be cut
        self.finished = False  # the final segment was cut

        self.next_seq = 0
        self.early: dict[int, Early] = {}
        self.gap_since: float | None = None  # monotonic seconds
        self.seen = 0.0  # monotonic seconds of the last delta
        self.last_timestamp_ms = 0  # Kafka's, of the last delta
        self.last_offset = offset  # of the last delta in sequence
        self.last_seq = 0
        self.through = offset  # highest offset seen of this stream

        self.outbox: deque[Segment] = deque()  # cut, not settled; oldest first
        self.decided = 0  # segments settled
        self.decided_end = 0
        self.decided_marks: tuple[int, ...] = ()  # starts of the context segments before it
        self.decided_last = (offset, -1)  # offset and ordinal of the last settled segment
        self.released_to = 0
        self.frozen = False  # a revision was proposed: released_to stays
        self.resume: Resume | None = None  # set while text is rebuilt after a restart

    @property
    def received(self) -> int:
        """Code points received in sequence."""
        return self._base + len(self._buffer)

    def append(self, text: str, final: bool, offset: int, seq: int, now: float) -> list[Segment]:
        """Take the next delta's text; the segments that it completes, oldest first."""
        self.last_offset, self.last_seq = offset, seq
        if self._carry:
            text = join_surrogates(self._carry, text)
            self._carry = ""
        if text and not final and "\ud800" <= text[-1] <= "\udbff":
            self._carry, text = text[-1], text[:-1]
        self._buffer += text
        if self.resume is not None and not self._resumed(self.resume):
            return []
        return self._segments(final, now)

    def close(self, now: float) -> list[Segment]:
        """End the stream as it stands: the segments that remain, the last of them final."""
        if self._carry:
            self._buffer, self._carry = self._buffer + self._carry, ""
        return self._segments(True, now)

    def abandon(self, now: float) -> Segment:
        """End the stream unjudged, as one last segment over the text that has no segment yet."""
        if self.resume is not None:  # the text before a restart did not come again
            self._buffer, self._base, self._carry = "", self.resume.end, ""
            self._start_at(self.resume)
        self._buffer, self._carry = self._buffer + self._carry, ""
        segment = self._cut(self.received - self.cut, True, now)
        self.finished = True
        return segment

    def _segments(self, final: bool, now: float) -> list[Segment]:
        out: list[Segment] = []
        while (length := self._next_cut()) > 0:
            out.append(self._cut(length, False, now))
        if final:
            out.append(self._cut(self.received - self.cut, True, now))
            self.finished = True
        return out

    def _next_cut(self) -> int:
        if len(self._buffer) - (self.cut - self._base) <= self.limits.min_chars:
            return 0
        at = self.cut - self._base
        pending = self._buffer[at : at + self.limits.max_chars + 1]
        length = next_cut(pending, self.limits, self._scan)
        self._scan = 0 if length else scan_mark(pending)
        return length

    def _cut(self, length: int, final: bool, now: float) -> Segment:
        """Cut `length` pending code points off as the next segment."""
        at = self.cut - self._base
        text = self._buffer[at : at + length]
        before_from = self._before_from()
        # A delta may complete several segments, and a restart lie between them.
        ordinal = self._cut_last[1] + 1 if self.last_offset == self._cut_last[0] else 0
        segment = Segment(
            stream=self, index=self.index, start=self.cut, text=text,
            before=self._buffer[before_from - self._base : at], tail=self._tail,
            following=self._buffer[at + length : at + length + 1], offset=self.last_offset,
            ordinal=ordinal, seq=self.last_seq, final=final, born=now,
        )  # fmt: skip
        self._tail = self.next_tail(self._tail, text)
        self._marks.append(self.cut)
        self.cut += length
        self.index += 1
        self._cut_last = (self.last_offset, ordinal)
        self.outbox.append(segment)
        self._trim()
        return segment

    def _trim(self) -> None:
        """Forget text that no later segment is judged with and no snapshot needs."""
        keep = min(self._before_from(), self._keep_from())
        if keep > self._base:
            self._buffer = self._buffer[keep - self._base :]
            self._base = keep

    def _before_from(self) -> int:
        return self._marks[0] if self._marks and self.limits.context_segments else self.cut

    def _keep_from(self) -> int:
        return self.decided_marks[0] if self.decided_marks else self.decided_end

    def settled(self, segment: Segment) -> None:
        """Note that the outbox's first segment has its decision."""
        self.outbox.popleft()
        self.decided = segment.index + 1
        self.decided_end = segment.end
        marks = (*self.decided_marks, segment.start)
        self.decided_marks = marks[-max(1, self.limits.context_segments) :]
        self.decided_last = (segment.offset, segment.ordinal)

    def _resumed(self, resume: "Resume") -> bool:
        """Whether the text that was decided before the restart is all here again."""
        if self.received <= resume.end:  # a cut is only made when a code point after it is there
            return False
        self._tail = self.next_tail("", self._buffer[: resume.end - self._base])
        self._start_at(resume)
        return True

    def _start_at(self, resume: "Resume") -> None:
        self.cut, self.index = resume.end, resume.decided
        self._marks.extend(resume.marks)
        self.decided, self.decided_end, self.decided_marks = (
            resume.decided, resume.end, resume.marks,
        )  # fmt: skip
        self.decided_last = resume.last
        self._cut_last = resume.last
        self.released_to, self.frozen = resume.released_to, resume.frozen
        self.resume = None
        self._trim()

    def progress(self) -> "Resume":
        """What a restart needs to go on behind the last settled segment."""
        if self.resume is not None:
            return self.resume
        return Resume(
            self.decided, self.decided_end, self.decided_marks, self.decided_last,
            self.released_to, self.frozen,
        )  # fmt: skip

    def snapshot(self) -> dict[str, Any]:
        """The stream as a JSON object: what `restore` needs beside the progress."""
        base = self._keep_from()
        return {
            "tenant": self.tenant, "channel": self.channel,
            "conversation": [list(turn) for turn in self.conversation],
            "base": base, "text": self._buffer[base - self._base :], "carry": self._carry,
            "tail": self.outbox[0].tail if self.outbox else self._tail,
            "cuts": [[s.start, s.end, s.offset, s.seq, s.final] for s in self.outbox],
            "next_seq": self.next_seq, "last": [self.last_offset, self.last_seq],
            "timestamp_ms": self.last_timestamp_ms, "finished": self.finished,
            "through": self.through,
            "early": [[seq, *early] for seq, early in sorted(self.early.items())],
        }  # fmt: skip

    def restore(self, snapshot: dict[str, Any], progress: "Resume", now: float) -> list[Segment]:
        """Fill this new stream from a snapshot; the segments that were cut but not settled."""
        self._base, self._buffer = snapshot["base"], snapshot["text"]
        self._carry, self._tail = snapshot["carry"], snapshot["tail"]
        self.next_seq = snapshot["next_seq"]
        self.last_timestamp_ms = snapshot["timestamp_ms"]
        self.through = snapshot["through"]
        self.early = {seq: Early(*rest) for seq, *rest in snapshot["early"]}
        self.seen = now
        self.gap_since = now if self.early else None
        self._start_at(progress)
        segments = []
        for start, end, offset, seq, final in snapshot["cuts"]:
            self.last_offset, self.last_seq = offset, seq
            segments.append(self._cut(end - start, final, now))
        self.last_offset, self.last_seq = snapshot["last"]
        self.finished = snapshot["finished"]
        return segments


class Resume(NamedTuple):
    """How far a stream was decided."""

    decided: int  # segments
    end: int  # of the last of them
    marks: tuple[int, ...]  # starts of the context segments before `end`
    last: tuple[int, int]  # input offset and ordinal of the last of them
    released_to: int
    frozen: bool
