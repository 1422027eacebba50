"""The records on the topics, as typed values. Unknown fields are ignored when reading."""

from typing import Annotated, Literal

import msgspec

Channel = Literal["text", "tool", "thinking"]
Verdict = Literal["allow", "block", "revise"]

MAX_ID_CHARS = 512
_Id = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_ID_CHARS)]
_Seq = Annotated[int, msgspec.Meta(ge=0, le=2**53)]


class TurnRecord(msgspec.Struct, frozen=True):
    """A turn of the conversation, as it stands in a delta."""

    role: str
    content: str


class Delta(msgspec.Struct, frozen=True):
    """A piece of one model output. The first of a stream carries context, tenant and channel."""

    stream_id: _Id
    seq: _Seq
    delta: str
    final: bool
    context: tuple[TurnRecord, ...] = ()
    tenant: _Id = "default"
    channel: Channel = "text"
    ts_ms: int | None = None  # not read: Kafka's own timestamp counts


class Revision(msgspec.Struct, frozen=True):
    """A proposed replacement for `text[start:end]` of the stream."""

    text: str
    start: int
    end: int
    method: str
    harmful: float | None  # the proposal's own score; None where it was not judged


class Timing(msgspec.Struct, frozen=True):
    """Milliseconds that a segment spent in each step."""

    queue: float = 0.0
    prefilter: float = 0.0
    tokenise: float = 0.0
    infer: float = 0.0
    total: float = 0.0


class Decision(msgspec.Struct, frozen=True):
    """What may be shown of a stream after one more segment was judged.

    start, end, released_to, leaked: code points of the stream's text as received.
    scores: calibrated, 0..1, by harm; empty where nothing could be judged (then `harmful` is None).
    """

    decision_id: str
    stream_id: str
    tenant: str
    channel: str
    seq: int
    segment: int
    verdict: Verdict
    start: int
    end: int
    released_to: int
    leaked: int
    final: bool
    harm: str | None
    scores: dict[str, float]
    harmful: float | None
    stage: str  # keyword, cache, short, policy, or the detector that settled it
    reason: str
    policy: str
    thresholds_version: int
    model: str
    revision: Revision | None
    ts_ms: int
    timing_ms: Timing


class DeadLetter(msgspec.Struct, frozen=True):
    """A record that could not be read, whole, with the reason."""

    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    reason: str
    field: str = ""
