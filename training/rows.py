"""Labelled rows on disk to rows with targets, split by prompt."""

import gzip
import json
from collections.abc import Iterable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, NamedTuple

from detectors.harms import COLUMNS, HARMFUL, HARMS
from detectors.protocol import Turn
from training import sources
from training.own_labels import labelled

_TYPED_ELSEWHERE: Final = 0.3  # weight of "not the other five" where one category was given
_BENIGN_MISINFORMATION: Final = 0.3  # weight of "says nothing false" of an ordinary good answer


class Row(NamedTuple):
    """One labelled text. targets: (7,) 0..1; weights: (7,) 0 where nothing is known."""

    id: str
    source: str
    kind: str
    conversation: tuple[Turn, ...]
    text: str
    targets: tuple[float, ...]
    weights: tuple[float, ...]
    group: str
    dev: bool
    turns_at: int = 0  # characters before the part that the label is of


class Parts(NamedTuple):
    """No prompt (`group`) is in two parts; the last two are whole sources left out of `fit`."""

    fit: list[Row]
    calibrate: list[Row]  # calibration and thresholds are chosen here
    report: list[Row]  # and measured here
    unseen: list[Row]  # and here
    unknown: list[Row]  # sources that join `calibrate`, so that it holds for unknown ones


def read(folder: Path) -> list[Row]:
    """Rows of every source in `folder` that has a label. FileNotFoundError where none is."""
    files = sorted(folder.glob("*.jsonl.gz"))
    if not files:
        raise FileNotFoundError(f"no *.jsonl.gz in {folder}")
    rows = (row_of(record) for path in files for record in labelled(_records(path)))
    return [row for row in rows if any(row.weights) and row.text.strip()]


def licences(folder: Path) -> dict[str, str]:
    """Source to licence, as the rows have it."""
    first = (next(_records(path)) for path in sorted(folder.glob("*.jsonl.gz")))
    return {record["source"]: record["licence"] for record in first}


def provenance(folder: Path) -> dict[str, Any]:
    """What a manifest says of the rows that it learnt from, each source with its licence."""
    untrained = sources.UNUSED | sources.LEFT_OUT
    return {
        "licence": "Apache-2.0",
        "data": {s: licence for s, licence in licences(folder).items() if s not in untrained},
        "held_out_sources": sorted(sources.LEFT_OUT),
    }


def split(rows: Iterable[Row]) -> Parts:
    """The five parts. A dev row whose prompt was trained on goes nowhere."""
    by_use = [row for row in rows if row.source not in sources.UNUSED]
    unseen = [row for row in by_use if row.source in sources.UNSEEN]
    reported = {row.group for row in unseen}
    left_out = [row for row in by_use if row.source in sources.CALIBRATING]
    unknown = [row for row in left_out if row.group not in reported]
    seen = [row for row in by_use if row.source not in sources.LEFT_OUT]
    held_out = reported | {row.group for row in left_out}
    fit = [
        row
        for row in seen
        if not row.dev and not _fraction(row.group, "held") < 0.08 and row.group not in held_out
    ]
    trained = {row.group for row in fit}
    rest = [row for row in seen if row.group not in trained and row.group not in held_out]
    calibrate = [row for row in rest if _fraction(row.group, "half") < 0.5]
    report = [row for row in rest if _fraction(row.group, "half") >= 0.5]
    return Parts(fit, calibrate, report, unseen, unknown)


def _fraction(group: str, salt: str) -> float:
    """A number in 0..1 that depends on the prompt alone."""
    return int(sha256(f"{salt}/{group}".encode()).hexdigest()[:8], 16) / 0x1_0000_0000


def _records(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def row_of(record: dict[str, Any]) -> Row:
    """A record of the packs' schema with targets and weights."""
    targets, weights = _labels(record)
    return Row(
        id=record["id"],
        source=record["source"],
        kind=record["kind"],
        conversation=tuple(Turn(turn["role"], turn["content"]) for turn in record["context"]),
        text=record["text"],
        targets=tuple(targets[column] for column in COLUMNS),
        weights=tuple(weights[column] for column in COLUMNS),
        group=record["group"],
        dev=record["split"] == "dev",
        turns_at=record.get("turns_at", 0),
    )


def _labels(record: dict[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """Targets and weights by column: what the source says, then what follows from it."""
    said = dict(record["labels"])
    said[HARMFUL] = _harmful(record)
    targets = {column: float(said[column] or 0) for column in COLUMNS}
    weights = {column: float(said[column] is not None) for column in COLUMNS}
    for harm in HARMS:
        if said[harm] is None:
            weights[harm] = _inferred_weight(record, said, harm)
    return targets, weights


def _harmful(record: dict[str, Any]) -> int | None:
    harmful: int | None = record["harmful"]
    if harmful is None and record.get("weak", {}).get("harmful") == 0:
        return 0  # a weak 1 is no label: half of those read were none
    return harmful


def _inferred_weight(record: dict[str, Any], said: dict[str, Any], harm: str) -> float:
    """How far an unlabelled harm may be read as absent."""
    if said[HARMFUL] == 0:
        if harm != "misinformation":
            return 1.0
        asks = record["kind"] == "prompt"  # a question claims nothing
        return _BENIGN_MISINFORMATION if asks or record["source"] in sources.SOUND else 0.0
    if record["source"] in sources.ONE_CATEGORY and any(said[other] for other in HARMS):
        return _TYPED_ELSEWHERE
    return 0.0
