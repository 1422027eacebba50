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
    "own_harmless_replies", "own_answers_crime", "own_answers_people", "own_answers_danger",
    "own_requests", "own_plain_crime", "own_plain_people", "own_plain_conduct", "own_plain_more",
    "own_plain_long", "own_borderline", "own_jailbreak", "own_assistant", "own_plain_prompts",
    "own_prompts_more", "own_plain_posts", "own_tales", "own_comedy", "own_sober",
    "own_against_hate", "own_threads", "own_pairs_crime", "own_pairs_people", "own_pairs_life",
)  # fmt: skip

_HEAD: Final = re.compile(
    r"(?P<sign>[+-])(?P<harms>[vhmpis]*)(?::(?P<kind>[cq]))?(?P<bound>!?) (?P<text>.+)"
)
_KINDS: Final = {None: "reply", "c": "comment", "q": "prompt"}
_BY_LETTER: Final = {harm[0]: harm for harm in HARMS}
_VARIANTS: Final = 3  # of a frame whose slots allow that many
_TURNABLE: Final = 420  # characters; a longer text says enough by itself
_LONGEST: Final = 900
_OPENINGS: Final = "openings"


class Frame(NamedTuple):
    """One hand-written text with slots, and the user's turns that it may answer."""

    source: str
    family: str
    kind: str
    harmful: bool
    harms: tuple[str, ...]
    questions: tuple[str, ...]  # of a reply
    bound: bool  # the label holds under these questions alone
    text: str


class Filled(NamedTuple):
    """A frame with its slots filled. turns_at: characters before the part that the label is of."""

    turns: tuple[str, ...]  # of user and assistant, in turn
    text: str
    turns_at: int


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
        harms=tuple(_BY_LETTER[letter] for letter in head["harms"]),
        questions=() if head["kind"] else questions,
        bound=bool(head["bound"]),
        text=head["text"].replace("\\n", "\n"),
    )


@cache
def _rows() -> tuple[dict[str, Any], ...]:
    openings = _read(_OPENINGS)
    seen: set[tuple[str, ...]] = set()
    found = []
    for source in SOURCES:
        of_source = _read(source)
        for frame in of_source:
            around = _around(frame, of_source, openings)
            fresh = [v for v in _variants(frame, around) if not _repeats(v, seen)]
            found += [_record(frame, number, filled) for number, filled in enumerate(fresh)]
    return tuple(found)


class _Around(NamedTuple):
    """What a text may stand behind, all of its split."""

    openings: list[Frame]  # ordinary answers to other questions
    twins: list[Frame]  # harmless answers to its own


def _around(frame: Frame, of_source: list[Frame], openings: list[Frame]) -> _Around:
    dev = in_dev(frame.family)
    twins = [
        other
        for other in of_source
        if (other.family, other.questions) == (frame.family, frame.questions)
        and other.kind == "reply" and other.text != frame.text
        and not (other.harmful or other.bound)
    ]  # fmt: skip
    return _Around([opening for opening in openings if in_dev(opening.family) == dev], twins)


def _read(name: str) -> list[Frame]:
    return list(frames(name, (TEXTS / f"{name}.txt").read_text(encoding="utf-8").splitlines()))


def _repeats(filled: Filled, seen: set[tuple[str, ...]]) -> bool:
    key = (*filled.turns, filled.text)
    known = key in seen
    seen.add(key)
    return known


def _variants(frame: Frame, around: _Around) -> Iterator[Filled]:
    """Each frame is its own seed, so that a new one leaves the texts of the others alone."""
    chance = random.Random(f"{frame.family}/{frame.kind}/{frame.text}")
    plain = list(_fillings(frame, chance))
    yield from plain
    if frame.source == "own_hate" and frame.kind != "prompt":
        yield _respelt(plain[0], chance)
    if frame.kind == "prompt" or "§" in frame.text:
        return
    longer = [] if frame.kind == "comment" else [_dressed(frame, chance)]
    if not frame.bound and len(frame.text) <= _TURNABLE:
        longer.append(_turned(frame, chance.choice(around.openings), chance))
        if frame.kind == "reply" and around.twins:
            longer.append(_behind_twins(frame, around.twins, chance))
    yield from (filled for filled in longer if len(filled.text) <= _LONGEST)


def _fillings(frame: Frame, chance: random.Random) -> Iterator[Filled]:
    """With a question and, unless the label hangs on it, without; more where slots allow it."""
    known: set[str] = set()
    for number in range(_VARIANTS):
        filled = _filled(frame, frame.text, chance)
        alone = number == 1 and not frame.bound
        if filled.text in known and not (alone and filled.turns):
            continue
        known.add(filled.text)
        yield filled._replace(turns=()) if alone else filled


def _filled(frame: Frame, text: str, chance: random.Random) -> Filled:
    """Question and answer share their slots: the same person is asked for and told of."""
    question = chance.choice(frame.questions) if frame.questions else ""
    asked, _, text = fill(f"{question}\x00{text}", chance).partition("\x00")
    text = chance.choice((_contracted, _expanded))(text)
    turns = tuple(asked.split(" || ")) if asked else ()
    return Filled(turns, text.replace("§", ""), max(text.find("§"), 0))


def _turned(frame: Frame, opening: Frame, chance: random.Random) -> Filled:
    """The text as the last part of an ordinary answer to an ordinary question."""
    return _filled(opening, f"{opening.text}{_gap(opening.text, chance)}§{frame.text}", chance)


def _behind_twins(frame: Frame, twins: list[Frame], chance: random.Random) -> Filled:
    """The text behind one or two harmless answers to the same question."""
    before = chance.sample(twins, min(len(twins), chance.choice((1, 2))))
    begun = "".join(f"{twin.text}{_gap(twin.text, chance)}" for twin in before)
    return _filled(frame, f"{begun}§{frame.text}", chance)


def _gap(before: str, chance: random.Random) -> str:
    return "\n\n" if "\n" in before else chance.choice((" ", " ", "\n\n", "\n"))


def _dressed(frame: Frame, chance: random.Random) -> Filled:
    """With the polite words that models put around anything, harmful or not."""
    first, last = chance.choice(_polite("lead")), chance.choice(_polite("close"))
    first, last = chance.choice(((first, ""), ("", last), (first, last)))
    gap = chance.choice((" ", "\n\n"))
    return _filled(frame, gap.join(part for part in (first, frame.text, last) if part), chance)


_LONG_FORMS: Final = re.compile(r"\b([Dd]o|[Dd]oes|[Dd]id|[Ii]s|[Aa]re|[Ww]as|[Hh]as) not\b")
_SHORT_FORMS: Final = re.compile(r"\b([Dd]o|[Dd]oes|[Dd]id|[Ii]s|[Aa]re|[Ww]as|[Hh]as)n't\b")


def _contracted(text: str) -> str:
    return _LONG_FORMS.sub(r"\1n't", text).replace("will not", "won't").replace("cannot", "can't")


def _expanded(text: str) -> str:
    """By chance one or the other, so that no habit of writing goes with a label."""
    return _SHORT_FORMS.sub(r"\1 not", text).replace("won't", "will not").replace("can't", "cannot")


@cache
def _polite(part: str) -> tuple[str, ...]:
    lines = (TEXTS / "polite.txt").read_text(encoding="utf-8").splitlines()
    return tuple(line.partition(": ")[2] for line in lines if line.startswith(f"{part}: "))


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
    digest = sha256(repr(frame).encode()).hexdigest()[:12]
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
        "kind": "reply" if filled.turns else frame.kind,  # a post that ends an answer is part of it
        "harmful": int(frame.harmful),
        "labels": {harm: int(harm in frame.harms) for harm in HARMS},
        "split": "dev" if in_dev(frame.family) else "train",
        "group": sha256((users[-1] if users else filled.text).encode()).hexdigest()[:10],
        "family": frame.family,
        "turns_at": filled.turns_at,
    }


if __name__ == "__main__":
    main()
