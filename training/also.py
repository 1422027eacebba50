"""Rows beside the public packs: texts of our own, a user's own files, reviewers' labels."""

import gzip
import json
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from detectors.harms import HARMS, OTHER
from training.own_texts import own_rows
from training.rows import Row, row_of

_REQUIRED: Final = ("text", "harmful", "labels")


def own() -> list[Row]:
    """The rows of training/texts that training may see."""
    return [row for row in map(row_of, own_rows()) if not row.dev]


def own_held_out() -> list[Row]:
    """The rows of training/texts that no training sees; families of frames are whole in either."""
    return [row for row in map(row_of, own_rows()) if row.dev]


def read_files(paths: Sequence[Path]) -> list[Row]:
    """Rows of JSON Lines files, gzipped or not, in either of two forms.

    Records in the packs' schema need `text`, `harmful` and `labels`; the rest has defaults. Records
    of `moderation.review` and `moderation.feedback`, in one file or several, are joined by
    decision_id. ValueError names file, line and field.
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
    return [*rows, *_reviewed(reviews, labels)]


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
    """A row for each reviewed decision that has labels; reviewers who disagree cancel out."""
    votes: dict[str, dict[str, list[bool]]] = {}
    for label in labels:
        if label["decision_id"] in reviews:
            said = votes.setdefault(label["decision_id"], {})
            said.setdefault(label["harm"], []).append(bool(label["harmful"]))
    for decision_id, said in votes.items():
        settled = {harm: _majority(all_of) for harm, all_of in said.items()}
        known = {harm: vote for harm, vote in settled.items() if vote is not None}
        review = reviews[decision_id]
        harmful = 1 if any(known.values()) else known.get(OTHER)
        yield _checked(
            {
                "id": decision_id, "source": "reviewers", "text": review["text"],
                "context": review.get("context", []), "harmful": harmful,
                "labels": {harm: int(vote) for harm, vote in known.items() if harm in HARMS},
            },
            decision_id,
        )  # fmt: skip


def _majority(votes: Sequence[bool]) -> bool | None:
    against = len(votes) - sum(votes)
    return None if sum(votes) == against else sum(votes) > against
