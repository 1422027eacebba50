"""Rows beside the public packs: texts of our own, a user's own files, reviewers' labels."""

import gzip
import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from detectors.harms import HARMS, OTHER
from detectors.segments import DEFAULT_LIMITS
from training.own_texts import own_rows
from training.rows import Parts, Row, row_of

_REQUIRED: Final = ("text", "harmful", "labels")
_UNCUT: Final = DEFAULT_LIMITS.min_chars - 1  # characters in which no segment ends


def own() -> list[Row]:
    """The rows of training/texts that training may see."""
    return [row for row in map(row_of, own_rows()) if not row.dev]


def own_held_out() -> list[Row]:
    """The rows of training/texts that no training sees; families of frames are whole in either."""
    return [row for row in map(row_of, own_rows()) if row.dev]


def read_files(paths: Sequence[Path]) -> list[Row]:
    """Rows of JSON Lines files, gzipped or not, in either of two forms, that training may see.

    Records in the packs' schema need `text`, `harmful` and `labels`; the rest has defaults, and
    those of the split "dev" are left out. Records of `moderation.review` and `moderation.feedback`,
    in one file or several, are joined by decision_id. ValueError names file, line and field.
    """
    rows: list[Row] = []
    reviews: dict[str, dict[str, Any]] = {}
    labels: list[dict[str, Any]] = []
    for path in paths:
        for number, record in enumerate(_records(path), start=1):
            if "reviewer" in record:
                labels.append(record)
            elif "decision_id" in record:
                reviews[record["decision_id"]] = record
            else:
                rows.append(_checked(record, f"{path.name}:{number}"))
    return [row for row in [*rows, *_reviewed(reviews, labels)] if not row.dev]


def apart(rows: Iterable[Row], parts: Parts) -> list[Row]:
    """Those whose prompt is in no part that calibrates or is reported."""
    held_out = {row.group for part in parts[1:] for row in part}
    return [row for row in rows if row.group not in held_out]


def _records(path: Path) -> Iterator[dict[str, Any]]:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path.name}:{number}: not JSON: {error}") from error
            if not isinstance(record, dict):
                raise ValueError(f"{path.name}:{number}: not an object")  # noqa: TRY004 - input's
            yield record


def _checked(record: dict[str, Any], where: str) -> Row:
    for field in _REQUIRED:
        if field not in record:
            raise ValueError(f"{where}: field {field!r} is missing")
    unknown = sorted(set(record["labels"]) - set(HARMS))
    if unknown:
        raise ValueError(f"{where}: labels: unknown harm {unknown[0]!r}")
    asked = [turn["content"] for turn in record.get("context", ()) if turn["role"] == "user"]
    digest = sha256((asked[-1] if asked else record["text"]).encode()).hexdigest()
    defaults = {
        "id": where, "source": "user", "kind": "reply", "context": [], "split": "train",
        "group": digest[:10],
    }  # fmt: skip
    labels = dict.fromkeys(HARMS) | record["labels"]
    return row_of(defaults | record | {"labels": labels})


def _reviewed(
    reviews: dict[str, dict[str, Any]], labels: Iterable[dict[str, Any]]
) -> Iterator[Row]:
    """A row for each reviewed decision that has labels; reviewers who disagree cancel out.

    A label without `picked_with` is a complaint, which proves nothing (worker/feedback.py).
    """
    votes: dict[str, dict[str, dict[str, bool]]] = {}  # by decision, harm and reviewer
    for label in labels:
        if label["decision_id"] in reviews and label.get("picked_with") is not None:
            said = votes.setdefault(label["decision_id"], {})
            said.setdefault(label["harm"], {})[label["reviewer"]] = bool(label["harmful"])
    for decision_id, said in votes.items():
        settled = {harm: _majority(by_reviewer.values()) for harm, by_reviewer in said.items()}
        yield _labelled(decision_id, reviews[decision_id], settled)


def _labelled(decision_id: str, review: dict[str, Any], settled: dict[str, bool | None]) -> Row:
    """The segment with what was judged with it. settled: by harm, None of a tie."""
    tied = None in settled.values()
    harmful = 1 if any(settled.values()) else None if tied else settled.get(OTHER)
    before = review.get("before", "")
    if harmful != 1:  # all windows of such a row count as harmless, and `before` has no label
        before = _last_words(before)
    return _checked(
        {
            "id": decision_id, "source": "reviewers", "text": before + review["text"],
            "turns_at": len(before), "context": review.get("context", []), "harmful": harmful,
            "labels": {
                harm: int(vote) for harm, vote in settled.items()
                if harm in HARMS and vote is not None
            },
        },
        decision_id,
    )  # fmt: skip


def _last_words(before: str) -> str:
    """So few that the segment which they begin ends behind them."""
    last = before[-_UNCUT:]
    return last if len(before) <= _UNCUT else last.partition(" ")[2] or last


def _majority(said: Collection[bool]) -> bool | None:
    against = len(said) - sum(said)
    return None if sum(said) == against else sum(said) > against
