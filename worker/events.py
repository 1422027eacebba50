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


class Review(Decision, frozen=True):
    """A decision that reviewers are asked about, and what was judged."""

    text: str  # the segment
    before: str  # the text right before it, judged with it
    context: tuple[TurnRecord, ...]
    picked_with: float  # probability of being picked, above 0
    least: float  # what any decision that a threshold could block would have been picked with


class Label(msgspec.Struct, frozen=True):
    """What a reviewer says of one decision and harm; without `picked_with`: a complaint."""

    decision_id: _Id
    stream_id: _Id
    harm: str
    score: float  # the decision's, of this harm; of `harmful` for `other`
    harmful: bool
    reviewer: _Id
    tenant: _Id = "default"
    picked_with: float | None = None  # as in the review item
    ts_ms: int | None = None  # not read: Kafka's own timestamp counts


class ThresholdRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The latest word on one tenant's threshold of one harm.

    In force is `threshold` where `status` is applied, `previous` where it is proposed.
    """

    tenant: str
    harm: str
    threshold: float
    previous: float
    version: int
    status: Literal["applied", "proposed"] = "applied"
    method: str  # certified, step, or operator
    target_precision: float | None = None
    delta: float | None = None
    level: float | None = None  # what labels have to show for that, reviewers' errors included
    labels: int = 0  # settled decisions counted in this epoch
    reason: str = ""
    ts_ms: int = 0
    model: str = ""  # holds for decisions of this model alone; empty: for all
    labels_needed: int | None = None  # None: nothing to certify, or no number would do
    walked_from: float | None = None  # the first candidate: the walk to `certified` began here
    certified: float | None = None  # the end of the walk: all candidates up to here are certified
    certified_before: float | None = None  # the same of earlier epochs, to fall back to
    epoch: int = 0  # drift alarms before this
    epoch_ms: int = 0  # decisions settled up to here count for no certificate
    since_ms: int = 0  # the threshold in force is watched from here on
    learnt_from: str = ""  # the model whose labels have shown all that; an operator's word stays
    alarm: bool = False  # this record answers one
    declined: float | None = None  # an operator said no to it: not proposed again
    precision: float | None = None  # of what lies above the threshold in force, estimated
    recall: float | None = None
    recall_low: float | None = None
    recall_high: float | None = None
    recall_floor: float | None = None


class DeadLetter(msgspec.Struct, frozen=True):
    """A record that could not be read, whole, with the reason."""

    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    reason: str
    field: str = ""
