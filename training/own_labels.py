"""Labels of our own for public texts that bring none: `training/labels/SOURCE.tsv`.

A line is a row's id without its source, and a label: 0 harmless, 1 harmful, then the letters of its
harms. `P` before the id is for the user's turn that the row answers, `.N` behind it for turn N of
the conversation, from 0. Such a turn becomes a row of its own, of SOURCE_requests or, where the
model has it, of SOURCE_turns. Labels alone are kept here, the texts come with the data.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final

from detectors.harms import HARMS
from training import sources

LABELS: Final = Path(__file__).with_name("labels")
_LINE: Final = re.compile(r"(?P<row>P?\d+|\d+\.\d+)\t(?P<label>0|1[vhmpis]*)")
_BY_LETTER: Final = {harm[0]: harm for harm in HARMS}


def labelled(records: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The records of one source, with our labels where they have none; before a row, the turns of
    its conversation that are labelled, or the request where it is harmless because of the source.
    A turn is held out with the row's prompt."""
    asked: set[str] = set()
    for record in records:
        source, number = record["source"], record["id"].rpartition("/")[2]
        known = _labels(source)
        request = known.get(f"P{number}")
        if source in sources.ORDINARY and record["context"] and record["group"] not in asked:
            request = "0"
            asked.add(record["group"])
        if request:
            yield _turn(record, len(record["context"]) - 1) | _said(request)
        for turn in range(len(record["context"])):
            if f"{number}.{turn}" in known:
                yield _turn(record, turn) | _said(known[f"{number}.{turn}"])
        if number in known and record["harmful"] is None:
            yield record | _said(known[number])
        else:
            yield record


def _turn(record: Mapping[str, Any], at: int) -> dict[str, Any]:
    """A turn of the record's conversation as a row: its last one by the record's own number."""
    turn, number = record["context"][at], record["id"].rpartition("/")[2]
    asks = turn["role"] == "user"
    source = f"{record['source']}_{'requests' if asks else 'turns'}"
    of_turn = "" if at == len(record["context"]) - 1 else f".{at}"
    return {
        **record, "id": f"{source}/{number}{of_turn}", "source": source,
        "kind": "prompt" if asks else "reply", "context": record["context"][:at],
        "text": turn["content"],
    }  # fmt: skip


def _said(label: str) -> dict[str, Any]:
    """A harm that is not named stays unknown, unless the text is harmless (training/rows.py)."""
    named = {_BY_LETTER[letter] for letter in label[1:]}
    harms = {harm: 1 if harm in named else None for harm in HARMS}
    return {"harmful": int(label[0]), "labels": harms}


@cache
def _labels(source: str) -> Mapping[str, str]:
    """Label by id. ValueError names the line that cannot be read."""
    path = LABELS / f"{source}.tsv"
    if not path.exists():
        return {}
    found = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        match = _LINE.fullmatch(line)
        if match is None:
            raise ValueError(f"{path.name}:{number}: need an id, a tab, and 0 or 1 with letters")
        found[match["row"]] = match["label"]
    return found
