"""One frozen Settings, read once at start: `tidegate.toml`, then `TIDEGATE_...` in the environment.

Kafka's and Redis's own settings carry those clients' names. Units end the names.
"""

import hashlib
import math
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from detectors.harms import THRESHOLD_KEYS

HERE = Path(__file__).resolve().parent.parent  # the checkout, or site-packages of an install
DEFAULT_FILE = Path("tidegate.toml")
FITTING = "auto"  # a second look by what ships, where that fits

Action = Literal["block", "revise", "flag"]
FailMode = Literal["closed", "open"]
Probability = Annotated[float, Field(ge=0.0, le=1.0)]

TEMPLATES = {
    "violence": "[A passage that encourages or details violence was removed.]",
    "hate_speech": "[A passage that demeans people for who they are was removed.]",
    "misinformation": "[A claim that could not be supported was removed.]",
    "privacy_violation": "[Personal details were removed.]",
    "illegal_activity": "[Instructions for an illegal activity were removed.]",
    "sexual_content": "[A sexually explicit passage was removed.]",
    "other": "[A harmful passage was removed.]",
}


class ReviewPolicy(BaseModel):
    """Which of a tenant's decisions reviewers are shown; see worker/sampling.py."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    over: Probability = 0.1  # share of what some threshold may block: some score above its bounds
    near: Probability = 0.02  # ... of what has a score half as high: where most misses lie
    rest: Probability = 0.002  # ... of all else, so that no part of the traffic is unseen
    per_hour: int = Field(120, ge=0)  # items, all partitions together: one person's, 30 s each


class LearnPolicy(BaseModel):
    """How a tenant's thresholds follow its reviewers; see docs/thresholds.md."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Literal["certified", "step"] = "certified"
    target_precision: float = Field(0.9, gt=0.0, lt=1.0)  # one block in ten may be wrong
    recall_floor: float | None = Field(None, gt=0.0, lt=1.0)  # instead of a precision target
    reviewer_error: float = Field(0.0, ge=0.0, lt=1.0)  # share of harmless text they call harmful
    delta: float = Field(0.05, gt=0.0, lt=1.0)  # chance that any certificate of a claim is wrong
    bounds: dict[str, tuple[Probability, Probability]] = {}  # default: 0.5, 0.95, as `step`'s
    approval: bool = False  # publish as proposed, for a person to approve
    max_reviewer_share: float = Field(0.6, gt=0.0, le=1.0)  # 1: one reviewer's word will do
    reviewers: tuple[str, ...] = ()  # whose labels are taken; none named: anybody's
    settle_ms: int = Field(600_000, ge=0)  # after a decision's first label: time to correct it
    test_every: int = Field(10, ge=1)  # settled decisions of a claim between two tests
    min_picked: float = Field(0.05, gt=0.0, le=1.0)  # least picked_with above the lowest bound
    min_picked_below: float = Field(0.001, gt=0.0, le=1.0)  # ... and below it, for recall
    labels_per_step: int = Field(50, ge=1)  # blocked ones that `step` looks at before each step

    @property
    def rarer_below(self) -> float:
        """How many times rarer a decision below the lowest bound may be picked than one above."""
        return max(1.0, round(self.min_picked / self.min_picked_below, 12))

    @model_validator(mode="after")
    def _bounds_in_order(self) -> Self:
        for harm, (lowest, highest) in self.bounds.items():
            if harm not in THRESHOLD_KEYS or lowest > highest:
                msg = f"bounds of {harm!r}: unknown harm, or lowest above highest"
                raise ValueError(msg)
            if math.ceil(round(100 * lowest, 6)) > 100 * highest + 1e-6:
                msg = f"bounds of {harm!r}: no multiple of 0.01 within, so nothing can be learnt"
                raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _reviewers_enough(self) -> Self:
        count = len(set(self.reviewers))
        if count and count * self.max_reviewer_share < 1.0:
            msg = (
                f"max_reviewer_share: {self.max_reviewer_share} can never hold with "
                f"{count} in reviewers, so nothing could be learnt"
            )
            raise ValueError(msg)
        return self


def _rarer(name: str, share: float, field: str, lowest: float) -> str:
    off = "" if share else "; review.per_hour = 0 switches review off"
    return f"review.{name}: {share} is rarer than learn.{field}, {lowest}, takes{off}"


class TenantPolicy(BaseModel):
    """What one tenant does about each harm. Keys are the six harms and `other`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    thresholds: dict[str, Probability] = {}  # replaces the model's own, harm by harm
    actions: dict[str, Action] = {}  # default: block
    fail_mode: dict[str, FailMode] = {}  # default: closed
    revisions: dict[str, str] = {}  # text that a `revise` proposes; default: TEMPLATES
    review: ReviewPolicy = ReviewPolicy()
    learn: LearnPolicy = LearnPolicy()

    @model_validator(mode="after")
    def _picked_often_enough(self) -> Self:
        """Else no label could ever certify anything, or say what was missed."""
        review, learn = self.review, self.learn
        if not review.per_hour:
            return self
        if review.over < learn.min_picked:
            raise ValueError(_rarer("over", review.over, "min_picked", learn.min_picked))
        for name in ("near", "rest"):
            share, lowest = getattr(review, name), learn.min_picked_below
            if share < lowest:
                raise ValueError(_rarer(name, share, "min_picked_below", lowest))
            if round(review.over / share, 12) > learn.rarer_below:
                msg = (
                    f"review.{name}: {share} is {review.over / share:g} times rarer than "
                    f"review.over, {review.over}; learn.min_picked / learn.min_picked_below is "
                    f"{learn.rarer_below:g}, which is the most: lower learn.min_picked_below"
                )
                raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _known_harms(self) -> Self:
        for name in ("thresholds", "actions", "fail_mode", "revisions"):
            unknown = sorted(set(getattr(self, name)) - set(THRESHOLD_KEYS))
            if unknown:
                msg = f"{name}: unknown harm {unknown[0]!r}; known: {', '.join(THRESHOLD_KEYS)}"
                raise ValueError(msg)
        return self

    def digest(self) -> str:
        """Six hex digits that change with what can change a decision."""
        deciding = self.model_dump_json(exclude={"review", "learn"})
        return hashlib.blake2b(deciding.encode(), digest_size=3).hexdigest()


class Settings(BaseSettings):
    """Everything that can be set. Each default says why it is what it is."""

    model_config = SettingsConfigDict(
        env_prefix="TIDEGATE_", env_nested_delimiter="__", frozen=True, extra="forbid"
    )

    # Kafka: names as in the client
    bootstrap_servers: str = "127.0.0.1:9092"
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = "PLAIN"
    sasl_plain_username: str | None = None
    sasl_plain_password: SecretStr | None = None
    ssl_cafile: Path | None = None
    ssl_certfile: Path | None = None
    ssl_keyfile: Path | None = None
    group_id: str = "tidegate"
    group_instance_id: str | None = None  # set per worker for rolling restarts without rebalances
    auto_offset_reset: Literal["earliest", "latest"] = "earliest"  # a new group misses nothing
    session_timeout_ms: int = Field(10_000, ge=1_000)  # a dead worker's partitions move after this
    heartbeat_interval_ms: int = Field(1_000, ge=100)
    max_poll_interval_ms: int = Field(300_000, ge=1_000)  # polling never waits for judging
    request_timeout_ms: int = Field(20_000, ge=1_000)
    transaction_timeout_ms: int = Field(30_000, ge=1_000)  # how long a dead one can hide records
    retry_backoff_ms: int = Field(5, ge=1)  # what brokers say between transactions; 100 would show
    fetch_min_bytes: int = Field(16_384, ge=1)  # with the wait below: some deltas a fetch, not one
    fetch_max_wait_ms: int = Field(2, ge=1)  # adds to the latency, and saves more than it adds
    max_poll_records: int = Field(4_000, ge=1)  # about 100 ms of work at full speed

    # topics
    outputs_topic: str = "llm.outputs"
    decisions_topic: str = "moderation.decisions"
    feedback_topic: str = "moderation.feedback"
    thresholds_topic: str = "moderation.thresholds"
    review_topic: str = "moderation.review"
    dead_letters_topic: str = "moderation.dead-letters"
    streams_topic: str = "moderation.streams"
    evidence_topic: str = "moderation.evidence"
    partitions: int = Field(12, ge=1)  # more than workers ever wanted; hard to raise later
    replication_factor: int = Field(1, ge=1)  # 3 in production

    # publishing
    delivery: Literal["exactly_once", "at_least_once"] = "exactly_once"
    transaction_interval_ms: int = Field(10, ge=0)  # back to back they run into each other
    commit_interval_ms: int = Field(5_000, ge=100)  # offsets of records that decide nothing

    # streams
    min_segment_chars: int = Field(120, ge=1)  # shorter costs more context tokens per token of text
    max_segment_chars: int = Field(400, ge=2)  # about 100 tokens; longer is held back too long
    context_segments: int = Field(1, ge=0, le=8)  # segments before it that one is judged with
    lookahead_segments: int = Field(0, ge=0, le=8)  # segments after it; each delays the release
    release_ahead_chars: int = Field(0, ge=0)  # 0: nothing is shown before it was judged
    short_chars: int = Field(10, ge=0)  # shorter texts are judged by keywords alone
    gap_timeout_ms: int = Field(10_000, ge=1)
    idle_timeout_ms: int = Field(60_000, ge=1)
    closed_for_ms: int = Field(300_000, ge=0)  # late repeats of an at-least-once producer
    max_early_deltas: int = Field(256, ge=1)  # deltas that wait for a missing one
    max_open_streams: int = Field(50_000, ge=1)  # a lane; about 4 kB each
    max_context_chars: int = Field(16_000, ge=0)  # of the conversation, the latest are kept
    rewind_records: int = Field(20_000, ge=1)  # read again after a restart, at most about this many

    # prefilter
    keywords_file: Path = HERE / "detectors" / "keywords.toml"
    keywords_check_ms: int = Field(1_000, ge=0)
    redis_url: SecretStr | None = None  # none: scores are cached in this process only
    redis_deadline_ms: float = Field(10.0, gt=0)  # slower than this, computing is as good
    cache_entries: int = Field(50_000, ge=0)  # about 20 MB
    cache_ttl_s: int = Field(86_400, ge=1)
    cache_key: SecretStr | None = None  # share it between workers that share a Redis

    # review and learning
    learn_grace_ms: int = Field(1_000, ge=0)  # how late a label may come and still be in order
    learn_register: int = Field(100_000, ge=1)  # decisions that labels may be about; 400 B each
    review_key: SecretStr | None = None  # the same for all workers: what is picked is then a secret

    # detectors
    # folders under `models`, or python:module:factory; these: a segment alone, by words, in
    # context, and that once more by a larger encoder for what is still open
    detectors: tuple[str, ...] = ("toxicity", "words", "context", "context_large")
    models: Path = HERE / "models"
    infer_threads: int = Field(2, ge=1)  # one session, called from this many threads
    max_batch_tokens: int = Field(1_024, ge=1)  # padded; one batch a thread at a time
    batch_deadline_ms: float = Field(0.0, ge=0)  # 0: a free detector never waits for more
    hold_timeout_ms: int = Field(5_000, ge=1)  # a failing or silent detector blocks after so long
    max_waiting_segments: int = Field(2_000, ge=1)  # more pause the partitions

    # second look, where the detectors are uncertain; docs/logprob.md
    # a model's folder under `models`, a completions server as http://...:8000/v1, or
    # python:module:factory; auto: models/logprob, where it was made for these detectors; empty: off
    logprob: str = FITTING
    logprob_model: str = ""  # as the server calls it
    logprob_key: SecretStr | None = None  # the server's, if it wants one
    logprob_plan: Path | None = None  # second.json; a folder has its own
    logprob_deadline_ms: int = Field(1_000, ge=1)  # then the detectors' scores stand
    logprob_queue: int = Field(64, ge=1)  # segments that wait for it; more are not asked about
    logprob_threads: int = Field(1, ge=1)  # of its own; more for a server, cores for a folder

    # policy
    tenants: dict[str, TenantPolicy] = {}  # `default` serves tenants that are not named

    # operation
    max_dead_letters_in_row: int = Field(1_000, ge=1)  # more is a broken deploy: stop
    shutdown_timeout_ms: int = Field(10_000, ge=100)
    watchdog_ms: int = Field(30_000, ge=0)  # a loop stuck so long ends the worker; 0: off
    metrics_port: int | None = None  # Prometheus on loopback
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments beat the environment, which beats the file."""
        del dotenv_settings, file_secret_settings
        return init_settings, env_settings, _FileSource(settings_cls)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.max_segment_chars < 2 * self.min_segment_chars:
            raise ValueError("max_segment_chars: must be at least twice min_segment_chars")
        if self.release_ahead_chars > self.min_segment_chars:
            raise ValueError("release_ahead_chars: must not exceed min_segment_chars")
        if self.heartbeat_interval_ms * 3 > self.session_timeout_ms:
            raise ValueError("heartbeat_interval_ms: at most a third of session_timeout_ms")
        named = self.logprob not in {"", FITTING}
        if named and self.logprob_deadline_ms >= self.hold_timeout_ms:
            raise ValueError("logprob_deadline_ms: must be less than hold_timeout_ms")
        return self

    def tenant(self, name: str) -> TenantPolicy:
        """The policy of a tenant, or of `default`."""
        return self.tenants.get(name) or self.tenants.get("default") or _NO_POLICY


_NO_POLICY = TenantPolicy()


class _FileSource(TomlConfigSettingsSource):
    """`tidegate.toml` of the working directory, or the file that `load` was given."""

    path: Path | None = None

    def __init__(self, settings_cls: type[BaseSettings]) -> None:
        super().__init__(settings_cls, self.path or DEFAULT_FILE)


def load(file: Path | None = None, **overrides: Any) -> Settings:
    """Settings from `file` (default: tidegate.toml where there is one) and the environment.

    Raises pydantic.ValidationError naming the field, FileNotFoundError for a named file.
    """
    if file is not None and not file.is_file():
        msg = f"{file}: no such settings file; leave out --config to run with defaults"
        raise FileNotFoundError(msg)
    _FileSource.path = file
    try:
        return Settings(**overrides)
    finally:
        _FileSource.path = None
