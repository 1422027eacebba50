"""What would other thresholds have decided? Decisions and labels, from Kafka or files -> a table.

Scores are on passes too, so each decision can be made again. What cannot be known: text behind a
block was never judged, so where a block is lost, nothing is said about what would have followed.
Intervals are Wilson's, 95 %, with the effective number of labels: weights 1/picked_with undo the
sampling, and cost labels. They hold for thresholds chosen before looking; a certificate is
another matter (docs/thresholds.md).
"""

import math
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table

from detectors.harms import COLUMNS, HARMFUL, OTHER, THRESHOLD_KEYS
from worker.decide import Judgement, rule
from worker.decode import decode_label
from worker.errors import Stop, Unreadable
from worker.events import Label, ThresholdRecord
from worker.feedback import SAME, outcome
from worker.follow import Follower
from worker.operate import read_latest
from worker.sampling import NOT_SCORED
from worker.settings import Settings
from worker.thresholds import InForce, Thresholds

_Z = 1.96  # standard deviations, 95 %
_CURVE = tuple(round(0.01 * step, 2) for step in range(5, 100))  # thresholds of the plot


class Made(msgspec.Struct, frozen=True):
    """What is read of a decision."""

    decision_id: str
    tenant: str
    harm: str | None
    scores: dict[str, float]
    harmful: float | None
    stage: str
    model: str

    def score_of(self, harm: str) -> float | None:
        """The score that is held against the harm's threshold."""
        return self.harmful if harm == OTHER else self.scores.get(harm)


class Says(NamedTuple):
    """What reviewers settled on about one decision and harm."""

    harmful: bool
    weight: float  # decisions that it stands for


class Estimate(NamedTuple):
    """A share of the traffic, estimated from labels."""

    value: float | None  # None: no label says anything
    low: float = 0.0
    high: float = 1.0
    labels: int = 0

    @classmethod
    def of(cls, weights: Iterable[tuple[bool, float]]) -> "Estimate":
        """From whether it holds, and the weight, of each labelled decision."""
        pairs = list(weights)
        whole = sum(weight for _, weight in pairs)
        if not pairs or whole <= 0.0:
            return cls(None)
        share = sum(weight for holds, weight in pairs if holds) / whole
        return cls(share, *wilson(share, _effective(pairs, whole, share)), len(pairs))


def _effective(pairs: Sequence[tuple[bool, float]], whole: float, share: float) -> float:
    """As many equally weighted labels would say as much.

    The lower of Kish's number and of the one that the variance of the ratio, linearised, is worth:
    rare picks may differ from frequent ones.
    """
    kish = whole * whole / sum(weight * weight for _, weight in pairs)
    variance = sum((weight * (holds - share)) ** 2 for holds, weight in pairs) / (whole * whole)
    return min(kish, share * (1.0 - share) / variance) if variance > 0.0 else kish


def wilson(share: float, count: float) -> tuple[float, float]:
    """The 95 % interval of a share seen in `count` trials (Wilson 1927)."""
    z2 = _Z * _Z
    middle = (share + z2 / (2.0 * count)) / (1.0 + z2 / count)
    spread = math.sqrt(share * (1.0 - share) / count + z2 / (4.0 * count * count))
    half = _Z * spread / (1.0 + z2 / count)
    return max(0.0, middle - half), min(1.0, middle + half)


class Row(NamedTuple):
    """One harm, as it was decided and as it would have been."""

    harm: str
    blocks: int
    then: int
    gained: int
    lost: int
    precision: Estimate
    precision_then: Estimate
    recall: Estimate
    recall_then: Estimate


class Labelled(NamedTuple):
    """A decision that reviewers have spoken of."""

    made: Made
    then: str | None  # the harm that it would have been blocked for
    says: Mapping[str, Says]  # by harm


def by_decision(labels: Iterable[Label], settings: Settings) -> dict[str, list[Label]]:
    """The labels that are a sample: no complaints, none of who is no reviewer of the tenant's."""
    found: dict[str, list[Label]] = {}
    for label in labels:
        reviewers = settings.tenant(label.tenant).learn.reviewers
        is_known = not reviewers or label.reviewer in reviewers
        if is_known and label.picked_with is not None and 0.0 < label.picked_with <= 1.0:
            found.setdefault(label.decision_id, []).append(label)
    return found


def settle_labels(labels: Iterable[Label], made: Made) -> dict[str, Says]:
    """What reviewers settled on about a decision, by harm.

    A reviewer's last word counts; most of them decide, and a tie is harmless. Labels with another
    tenant or score than the decision's are forged. `picked_with` is believed: whether it is the
    review item's, the learner looks at.
    """
    votes: dict[str, dict[str, bool]] = {}
    weights: dict[str, float] = {}
    for label in labels:
        score = made.score_of(label.harm)
        if score is None or abs(score - label.score) > SAME or label.tenant != made.tenant:
            continue
        votes.setdefault(label.harm, {})[label.reviewer] = label.harmful
        weights[label.harm] = 1.0 / (label.picked_with or 1.0)
    return {harm: Says(bool(outcome(says)), weights[harm]) for harm, says in votes.items()}


class Backtest:
    """Adds decision after decision; what is kept are counts, and the labelled ones."""

    def __init__(
        self, settings: Settings, in_force: Callable[[str], InForce],
        other: Mapping[str, float], labels: Mapping[str, Sequence[Label]],
        tenant: str | None = None, model: str | None = None,
    ) -> None:  # fmt: skip
        """in_force: of a tenant, with `other` in the place of some. tenant, model: these alone."""
        self._settings = settings
        self._in_force = in_force
        self._other = other
        self._labels = labels
        self._tenant = tenant
        self._model = model
        self.decisions = 0
        self.models: Counter[str] = Counter()
        self.labelled: list[Labelled] = []
        self._seen: set[str] = set()
        self._now: Counter[str] = Counter()
        self._then: Counter[str] = Counter()
        self._gained: Counter[str] = Counter()
        self._lost: Counter[str] = Counter()

    def add(self, made: Made) -> None:
        """Decide it again."""
        if self._tenant not in {None, made.tenant}:
            return
        self.models[made.model] += 1
        if self._model not in {None, made.model}:
            return
        self.decisions += 1
        then = self._again(made)
        self._now[made.harm or ""] += 1
        self._then[then or ""] += 1
        if then != made.harm:
            self._gained[then or ""] += 1
            self._lost[made.harm or ""] += 1
        labels = self._labels.get(made.decision_id)
        if labels is not None and made.decision_id not in self._seen:
            self._seen.add(made.decision_id)
            self.labelled.append(Labelled(made, then, settle_labels(labels, made)))

    def _again(self, made: Made) -> str | None:
        """The harm that it would have been blocked, revised or flagged for."""
        if not made.scores or made.stage in NOT_SCORED:
            return made.harm  # no threshold decided it
        scores = {**made.scores, HARMFUL: made.harmful}
        row = tuple(math.nan if (it := scores.get(name)) is None else it for name in COLUMNS)
        policy = self._settings.tenant(made.tenant)
        return rule(Judgement(row, made.stage), self._changed(made.tenant), policy).harm

    def _changed(self, tenant: str) -> InForce:
        now = self._in_force(tenant)
        values = zip(THRESHOLD_KEYS, now.values, strict=True)
        return now._replace(values=tuple(self._other.get(harm, value) for harm, value in values))

    def rows(self) -> list[Row]:
        """The harms that something is known of, in their order."""
        return [
            self._row(harm) for harm in THRESHOLD_KEYS
            if self._now[harm] or self._then[harm] or harm in self._other
        ]  # fmt: skip

    def _row(self, harm: str) -> Row:
        told = [(it, it.says[harm]) for it in self.labelled if harm in it.says]
        return Row(
            harm, self._now[harm], self._then[harm], self._gained[harm], self._lost[harm],
            Estimate.of((s.harmful, s.weight) for it, s in told if it.made.harm == harm),
            Estimate.of((s.harmful, s.weight) for it, s in told if it.then == harm),
            Estimate.of((it.made.harm is not None, s.weight) for it, s in told if s.harmful),
            Estimate.of((it.then is not None, s.weight) for it, s in told if s.harmful),
        )  # fmt: skip

    def curve(self, harm: str) -> list[tuple[float, Estimate]]:
        """Precision of what lies above each threshold, from the strictest with a label down."""
        told = [
            (score, it.says[harm]) for it in self.labelled
            if harm in it.says and (score := it.made.score_of(harm)) is not None
        ]  # fmt: skip
        found = [
            (at, Estimate.of((s.harmful, s.weight) for score, s in told if score > at))
            for at in _CURVE
        ]
        return [(at, estimate) for at, estimate in found if estimate.value is not None]


# -- sources --------------------------------------------------------------------------------------


_made = msgspec.json.Decoder(Made)


def read_lines(file: Path) -> Iterator[bytes]:
    """The lines that hold something. Raises Stop where the file cannot be read."""
    try:
        with file.open("rb") as lines:
            yield from (line for line in lines if line.strip())
    except OSError as error:
        raise Stop(f"{file}: {error.strerror}") from error


def decode_made(value: bytes | None) -> Made | None:
    """What is needed of a decision; None where it is none."""
    try:
        return _made.decode(value or b"")
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def decode_labels(values: Iterable[bytes | None]) -> Iterator[Label]:
    """The labels among them."""
    for value in values:
        try:
            yield decode_label(value)
        except Unreadable:
            continue


async def read_topic(settings: Settings, topic: str, since_ms: int) -> AsyncIterator[bytes | None]:
    """Values of a topic's records from that moment on, up to its present end."""
    follower = Follower(settings, topic)
    await follower.open()
    try:
        await follower.seek_to_time(since_ms)
        async for records in follower.to_end():
            for record in records:
                yield record.value
    finally:
        await follower.close()


class Sources(NamedTuple):
    """Where decisions and labels come from; None: from Kafka."""

    decisions: Path | None
    labels: Path | None
    since_ms: int


async def run(
    settings: Settings, shipped: Mapping[str, float], own_model: str, wanted: Sequence[str],
    sources: Sources, tenant: str | None, model: str | None,
) -> tuple[Backtest, dict[str, float]]:  # fmt: skip
    """Decide everything again, and under which thresholds. Raises Stop, KafkaError.

    wanted: as in `violence=0.6`; where there are none, what is proposed for the tenant.
    model: whose decisions; by default those of `own_model`, which brings `shipped`.
    """
    thresholds = Thresholds(shipped, settings, model or own_model)
    latest = await read_latest(settings) if sources.decisions is None else {}
    for record in latest.values():
        thresholds.apply(record)
    other = parse_thresholds(wanted)
    if not wanted:
        tenant, other = _proposed(latest.values(), tenant)
    labels = by_decision(decode_labels(await _label_values(settings, sources)), settings)
    backtest = Backtest(settings, thresholds.of, other, labels, tenant, model or own_model)
    if sources.decisions is not None:
        for line in read_lines(sources.decisions):
            _add(backtest, line)
    else:
        async for value in read_topic(settings, settings.decisions_topic, sources.since_ms):
            _add(backtest, value)
    if not backtest.decisions:
        raise Stop(f"no decision of {model or own_model}; there are: {_counted(backtest.models)}")
    return backtest, other


async def _label_values(settings: Settings, sources: Sources) -> list[bytes | None]:
    if sources.labels is not None:
        return list(read_lines(sources.labels))
    if sources.decisions is not None:
        return []
    return [it async for it in read_topic(settings, settings.feedback_topic, sources.since_ms)]


def parse_thresholds(wanted: Iterable[str]) -> dict[str, float]:
    """`violence=0.6` and so on. Raises Stop."""
    found = {}
    for text in wanted:
        harm, _, value = text.partition("=")
        if harm not in THRESHOLD_KEYS:
            raise Stop(f"unknown harm {harm!r}; there are: {', '.join(THRESHOLD_KEYS)}")
        try:
            found[harm] = float(value)
        except ValueError:
            raise Stop(f"{text!r}: write it as {harm}=0.6") from None
        if not 0.0 <= found[harm] <= 1.0:
            raise Stop(f"{text!r}: a threshold lies in 0..1")
    return found


def _proposed(
    latest: Iterable[ThresholdRecord], tenant: str | None
) -> tuple[str, dict[str, float]]:
    """Whose proposals there are, and what is proposed. Raises Stop."""
    found = [it for it in latest if it.status == "proposed" and tenant in {None, it.tenant}]
    tenants = sorted({it.tenant for it in found})
    if not tenants:
        raise Stop("nothing is proposed; say which thresholds, as in --threshold violence=0.6")
    if len(tenants) > 1:
        raise Stop(f"{', '.join(tenants)} have proposals; name one with --tenant")
    return tenants[0], {it.harm: it.threshold for it in found}


def _counted(models: Counter[str]) -> str:
    return ", ".join(f"{count} of {name or 'no model'}" for name, count in models.most_common())


def _add(backtest: Backtest, value: bytes | None) -> None:
    made = decode_made(value)
    if made is not None:
        backtest.add(made)


# -- out ------------------------------------------------------------------------------------------


def table(backtest: Backtest) -> Group:
    """A row a harm of what is blocked, and one of how right that is; 80 characters hold both."""
    return Group(_blocks(backtest), _shares(backtest))


def _blocks(backtest: Backtest) -> Table:
    made = _table(f"{backtest.decisions:,} decisions again")
    for name in ("blocked", "then", "gained", "lost"):
        made.add_column(name, justify="right", no_wrap=True)
    for row in backtest.rows():
        made.add_row(row.harm, *map(str, (row.blocks, row.then, row.gained, row.lost)))
    return made


def _shares(backtest: Backtest) -> Table:
    """What was decided, and under it what would have been."""
    made = _table("of them, by labels (95 %)")
    for name in ("", "labels", "precision", "recall"):
        made.add_column(name, justify="right", no_wrap=True)
    for row in backtest.rows():
        for harm, name, precision, recall in (
            (row.harm, "now", row.precision, row.recall),
            ("", "then", row.precision_then, row.recall_then),
        ):
            made.add_row(harm, name, str(precision.labels), _shown(precision), _shown(recall))
    return made


def _table(title: str) -> Table:
    made = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    made.add_column("harm", no_wrap=True)
    return made


def _shown(estimate: Estimate) -> str:
    if estimate.value is None:
        return "-"
    return f"{estimate.value:.2f} ({estimate.low:.2f}..{estimate.high:.2f})"


def as_json(backtest: Backtest) -> Iterator[bytes]:
    """One line a harm."""
    for row in backtest.rows():
        yield msgspec.json.encode(
            {name: it._asdict() if isinstance(it, Estimate) else it
             for name, it in row._asdict().items()}
        )  # fmt: skip


def plot(backtest: Backtest, other: Mapping[str, float], file: Path) -> None:
    """Precision against threshold as a PNG, a panel for each harm with labels. Raises Stop."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise Stop("a plot needs matplotlib: pip install 'tidegate[plot]'") from None
    curves = {harm: curve for harm in THRESHOLD_KEYS if (curve := backtest.curve(harm))}
    if not curves:
        raise Stop("no label speaks of these decisions: nothing to plot")
    figure = Figure(figsize=(4.0 * len(curves), 3.2), layout="constrained")
    axes = figure.subplots(1, len(curves), squeeze=False, sharey=True)[0]
    for axis, (harm, curve) in zip(axes, curves.items(), strict=True):
        _panel(axis, harm, curve, other.get(harm))
    axes[0].set_ylabel("precision of what is above it, 95 %")
    figure.savefig(file, format="png", dpi=120)


def _panel(axis: Any, harm: str, curve: list[tuple[float, Estimate]], then: float | None) -> None:
    at = [threshold for threshold, _ in curve]
    axis.fill_between(
        at, [it.low for _, it in curve], [it.high for _, it in curve], alpha=0.2, linewidth=0
    )
    axis.plot(at, [it.value for _, it in curve])
    if then is not None:
        axis.axvline(then, linestyle="--", color="0.4")
    axis.set(title=f"{harm}, {curve[0][1].labels} labels", xlabel=_under(then), ylim=(0.0, 1.02))


def _under(then: float | None) -> str:
    return "threshold" if then is None else f"threshold (dashed: {then:g}, asked about)"
