"""Which rows the evaluation looks at: the same ones each time, more of them for a larger sample."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Final, NamedTuple

from detectors.harms import HARMFUL
from training import rows, sources
from training.measure import SURE
from training.rows import Parts, Row

_UNSEEN, _PASSING, _LONG, _STAND_IN = 3, 2, 8, 8  # times the sample: there are few such sources
_LONG_CHARS: Final = 400  # of a reply, some two segments


class StandIn(NamedTuple):
    """A source that nobody trains on, in the place of a public benchmark of the same kind."""

    place: str  # what it stands in for
    column: str = HARMFUL  # whose label counts


STAND_INS: Final = {
    "beavertails_even": StandIn("preference-style answers"),
    "saferlhf_mini": StandIn("preference-style answers"),
    "salad_vlm_replies": StandIn("jailbreak answers"),
    "do_not_answer": StandIn("answers to borderline prompts"),
    "or_bench_replies": StandIn("answers to borderline prompts"),
    "dynacounter": StandIn("counter-speech"),
    "toxicchat_train": StandIn("general prompts"),
    "tweeteval_hate": StandIn("hate posts", "hate_speech"),
    "alpaca_eval": StandIn("long harmless answers"),
}
LOOK_ALIKES: Final = frozenset({"or_bench_hard", "or_bench_80k_sample", "cyberseceval_frr"})


class Sets(NamedTuple):
    """Rows by what they are for. No prompt of `fit` is in any but itself."""

    fit: list[Row]  # what may be trained on, all of it
    calibrate: list[Row]  # the floor's calibration and thresholds, as the export makes ours
    calibrate_harmless: list[Row]
    report: list[Row]
    unseen: list[Row]
    long_harmless: list[Row]  # of report and unseen; some are in those two as well
    stand_ins: list[Row]


class Shown(NamedTuple):
    """Rows that figures are made on, and nothing else is."""

    report: list[Row]  # of sources that were trained on
    unseen: list[Row]  # of whole sources left out
    long_harmless: list[Row]  # of both; some are in those two as well
    look_alikes: list[Row]  # likewise


def read(data: Path, sample: int) -> Sets:
    """sample: rows of each source of `report`; others in proportion. Raises FileNotFoundError."""
    parts = rows.split(rows.read(data / "permissive"))
    rows_shown, chosen = shown(parts, sample), calibrating(parts, (), sample)
    return Sets(
        fit=parts.fit,
        calibrate=[*chosen.known, *chosen.unknown],
        calibrate_harmless=chosen.long_harmless,
        report=rows_shown.report,
        unseen=rows_shown.unseen,
        long_harmless=rows_shown.long_harmless,
        stand_ins=_stand_ins(data / "noncommercial", parts, sample),
    )


def shown(parts: Parts, sample: int) -> Shown:
    """sample: rows of each source of `report`; others in proportion."""
    both = (*parts.report, *parts.unseen)
    harmless = [row for row in both if row.targets[-1] == 0 and row.weights[-1] >= SURE]
    return Shown(
        report=_some(parts.report, sample),
        unseen=_some(parts.unseen, _UNSEEN * sample),
        long_harmless=_some(filter(is_long_harmless, both), _LONG * sample),
        look_alikes=_some(_of(harmless, sources.LOOK_ALIKES), _PASSING * sample),
    )


class Calibrating(NamedTuple):
    """Rows that calibration, weights and thresholds are made on; none is trained on or reported."""

    known: list[Row]  # of sources that were trained on
    unknown: list[Row]  # of whole sources left out
    long_harmless: list[Row]  # these three are to pass
    look_alikes: list[Row]
    counter_speech: list[Row]


def calibrating(parts: Parts, own: Iterable[Row], sample: int) -> Calibrating:
    """sample: rows of each known source; others in proportion. own: dev rows of our own texts."""
    both = [*parts.calibrate, *parts.unknown]
    harmless = [row for row in (*both, *own) if row.targets[-1] == 0 and row.weights[-1] >= SURE]
    return Calibrating(
        known=_some(parts.calibrate, sample),
        unknown=_some(parts.unknown, _UNSEEN * sample),
        long_harmless=_some(filter(is_long_harmless, both), _LONG * sample),
        look_alikes=_as_public(_some(_of(harmless, sources.LOOK_ALIKES), _PASSING * sample)),
        counter_speech=_as_public(_some(_of(harmless, sources.COUNTER_SPEECH), _PASSING * sample)),
    )


def _as_public(some: list[Row]) -> list[Row]:
    """No more of our own texts than of other people's: a model that was trained on their author
    passes them more easily, and many of them would keep a limit from ever being reached."""
    own = [row for row in some if row.source.startswith("own_")]
    public = [row for row in some if not row.source.startswith("own_")]
    return [*public, *own[: len(public)]]


def _of(some: Iterable[Row], names: frozenset[str]) -> Iterator[Row]:
    return (row for row in some if row.source in names)


def is_long_harmless(row: Row) -> bool:
    """Whether it is a long reply of a source of harmless ones, and labelled so."""
    return (
        row.source in sources.LONG_HARMLESS
        and len(row.text) >= _LONG_CHARS
        and row.kind == "reply"
        and row.targets[-1] == 0
        and row.weights[-1] >= SURE
    )


def distinct(some: Iterable[Row]) -> list[Row]:
    """Each row once."""
    return list({row.id: row for row in some}.values())


def _stand_ins(folder: Path, parts: Parts, sample: int) -> list[Row]:
    """Rows on prompts that nothing was trained or chosen on. Nothing, where the folder is not
    there."""
    if not folder.is_dir():
        return []
    used = {row.group for part in (parts.fit, parts.calibrate, parts.unknown) for row in part}
    found = (row for row in rows.read(folder) if row.source in STAND_INS)
    return _some((row for row in found if row.group not in used), _STAND_IN * sample)


def _some(members: Iterable[Row], most: int) -> list[Row]:
    """At most so many of each source; the first by a hash, so a larger sample keeps them all."""
    by_source: dict[str, list[Row]] = defaultdict(list)
    for row in members:
        by_source[row.source].append(row)
    ordered = (sorted(group, key=_hash) for _, group in sorted(by_source.items()))
    return [row for group in ordered for row in group[:most]]


def _hash(row: Row) -> bytes:
    return sha256(f"evaluate/{row.id}".encode()).digest()
