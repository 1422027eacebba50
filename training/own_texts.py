"""Hand-written frames in `training/texts/` to labelled records, in the schema of the public packs.

texts/*.txt -> families of frames -> filled slots -> other spellings, openings -> records
Run as a module it writes them, one gzipped JSON Lines file a source.
"""

import argparse
import gzip
import json
import random
import re
from collections.abc import Iterable, Iterator
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, NamedTuple

from detectors.harms import HARMS
from training.own_slots import fill

TEXTS: Final = Path(__file__).with_name("texts")
SOURCES: Final = (
    "own_privacy", "own_misinformation", "own_illegal", "own_violence", "own_sexual", "own_hate",
    "own_self_harm_other", "own_lookalikes", "own_counterspeech", "own_refusals",
    "own_harmless_replies",
)  # fmt: skip

_HEAD: Final = re.compile(r"(?P<sign>[+-])(?P<harms>[vhmpis]*)(?::(?P<kind>[cq]))? (?P<text>.+)")
_KINDS: Final = {None: "reply", "c": "comment", "q": "prompt"}
_BY_LETTER: Final = {harm[0]: harm for harm in HARMS}
_VARIANTS: Final = 4  # of a frame whose slots allow that many
_TURNABLE: Final = 420  # characters; a longer text says enough by itself
_LONGEST: Final = 900
_OPENINGS: Final = "openings"


class Frame(NamedTuple):
    """One hand-written text with slots, and the user's turns that it may answer."""

    source: str
    family: str
    kind: str
    harmful: bool
    harms: frozenset[str]
    questions: tuple[str, ...]
    text: str


class Filled(NamedTuple):
    """A frame with its slots filled. harm_from: characters before the harm begins."""

    turns: tuple[str, ...]  # of user and assistant, in turn
    text: str
    harm_from: int


def own_rows() -> list[dict[str, Any]]:
    """Every record, in a fixed order. The same for the same texts, wherever this runs."""
    return [dict(record) for record in _rows()]


def frames(source: str, lines: Iterable[str]) -> Iterator[Frame]:
    """The frames of one file. ValueError names the line that cannot be read."""
    family, fresh = "", True
    questions: list[str] = []
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line or line.startswith("#"):
            continue
        if line.startswith("["):
            family, questions = line.strip("[]"), []
        elif line.startswith("? "):
            questions = [line[2:]] if fresh else [*questions, line[2:]]
            fresh = False
        else:
            fresh = True
            yield _frame(source, family, tuple(questions), line, number)


def in_dev(family: str) -> bool:
    """A family lies in one split as a whole: its texts share their words."""
    return int(sha256(family.encode()).hexdigest(), 16) % 10 == 0


def main() -> None:
    """Write one file a source."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("runs/own_texts"))
    folder: Path = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    for source, records in _by_source(own_rows()).items():
        (folder / f"{source}.jsonl.gz").write_bytes(_packed(records))
        print(f"{source}: {len(records)} rows")


def _by_source(records: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    return {
        source: [record for record in records if record["source"] == source] for source in SOURCES
    }


def _packed(records: list[dict[str, Any]]) -> bytes:
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    return gzip.compress(lines.encode(), mtime=0)  # a time in it would make each run differ


def _frame(source: str, family: str, questions: tuple[str, ...], line: str, number: int) -> Frame:
    head = _HEAD.fullmatch(line)
    if head is None or not family or (head["sign"] == "-" and head["harms"]):
        raise ValueError(f"{source}, line {number}: neither family, question nor text: {line[:60]}")
    return Frame(
        source=source,
        family=f"{source}/{family}",
        kind=_KINDS[head["kind"]],
        harmful=head["sign"] == "+",
        harms=frozenset(_BY_LETTER[letter] for letter in head["harms"]),
        questions=questions,
        text=head["text"].replace("\\n", "\n"),
    )


@cache
def _rows() -> tuple[dict[str, Any], ...]:
    openings = [(frame, in_dev(frame.family)) for frame in _read(_OPENINGS)]
    seen: set[tuple[str, ...]] = set()
    found = []
    for source in SOURCES:
        for frame in _read(source):
            split = in_dev(frame.family)
            mine = [opening for opening, dev in openings if dev == split]
            fresh = [v for v in _variants(frame, mine) if not _repeats(v, seen)]
            found += [_record(frame, number, filled) for number, filled in enumerate(fresh)]
    return tuple(found)


def _read(name: str) -> list[Frame]:
    return list(frames(name, (TEXTS / f"{name}.txt").read_text(encoding="utf-8").splitlines()))


def _repeats(filled: Filled, seen: set[tuple[str, ...]]) -> bool:
    key = (*filled.turns, filled.text)
    known = key in seen
    seen.add(key)
    return known


def _variants(frame: Frame, openings: list[Frame]) -> Iterator[Filled]:
    """Each frame is its own seed, so a new frame changes no other frame's texts."""
    chance = random.Random(f"{frame.family}/{frame.kind}/{frame.text}")
    plain = list(_fillings(frame, chance))
    yield from plain
    if frame.source == "own_hate" and frame.kind != "prompt":
        yield _respelt(plain[0], chance)
    if frame.kind != "prompt" and len(plain[-1].text) <= _TURNABLE and plain[-1].harm_from == 0:
        turned = _turned(plain[-1], chance.choice(openings), chance)
        if len(turned.text) <= _LONGEST:
            yield turned


def _fillings(frame: Frame, chance: random.Random) -> Iterator[Filled]:
    """With a question and without; more where slots make texts that differ."""
    known: set[str] = set()
    for number in range(_VARIANTS):
        turns, text = _filled(frame, chance)
        if text in known and not (number == 1 and turns):
            continue
        known.add(text)
        if number == 1:  # the second stands alone, so that the question decides nothing
            turns = ()
        yield Filled(turns, text.replace("§", ""), max(text.find("§"), 0))


def _filled(frame: Frame, chance: random.Random) -> tuple[tuple[str, ...], str]:
    """Question and answer share their slots: the same person is asked for and told of."""
    question = chance.choice(frame.questions) if frame.questions else ""
    whole = fill(f"{question}\x00{frame.text}", chance)
    asked, _, text = whole.partition("\x00")
    return tuple(asked.split(" || ")) if asked else (), text


def _turned(filled: Filled, opening: Frame, chance: random.Random) -> Filled:
    """The text as the last part of an ordinary answer to an ordinary question."""
    asked, begun = _filled(opening, chance)
    before = begun + ("\n\n" if "\n" in begun else chance.choice((" ", " ", "\n\n", "\n")))
    return Filled(asked, before + filled.text, len(before))


_LEET: Final = str.maketrans({"a": "4", "e": "3", "i": "1", "o": "0", "s": "5", "t": "7"})


def _respelt(filled: Filled, chance: random.Random) -> Filled:
    """As people spell to hide from filters, or in haste. Harmless texts too: it is no harm."""
    words = filled.text.split(" ")
    spell = chance.choice((_spaced, _leet, _swapped, _dropped))
    chosen = {at for at, word in enumerate(words) if len(word) > 3 and chance.random() < 0.45}
    respelt = [spell(word, chance) if at in chosen else word for at, word in enumerate(words)]
    return filled._replace(text=" ".join(respelt))


def _spaced(word: str, chance: random.Random) -> str:
    return chance.choice((" ", ".", "-")).join(word)


def _leet(word: str, _: random.Random) -> str:
    return word.translate(_LEET)


def _swapped(word: str, chance: random.Random) -> str:
    at = chance.randrange(1, len(word) - 1)
    return word[:at] + word[at + 1] + word[at] + word[at + 2 :]


def _dropped(word: str, chance: random.Random) -> str:
    at = chance.randrange(1, len(word) - 1)
    return word[:at] + chance.choice(("", "*")) + word[at + 1 :]


def _record(frame: Frame, number: int, filled: Filled) -> dict[str, Any]:
    digest = sha256(f"{frame.family}/{frame.kind}/{frame.text}".encode()).hexdigest()[:12]
    users = filled.turns[::2]
    return {
        "id": f"{frame.source}/{digest}/{number}",
        "source": frame.source,
        "licence": "Apache-2.0",
        "quality": "silver",  # labelled by construction
        "context": [
            {"role": "assistant" if at % 2 else "user", "content": turn}
            for at, turn in enumerate(filled.turns)
        ],
        "text": filled.text,
        "kind": frame.kind,
        "harmful": int(frame.harmful),
        "labels": {harm: int(harm in frame.harms) for harm in HARMS},
        "split": "dev" if in_dev(frame.family) else "train",
        "group": sha256((users[-1] if users else filled.text).encode()).hexdigest()[:10],
        "family": frame.family,
        "harm_from": filled.harm_from,
    }


if __name__ == "__main__":
    main()
