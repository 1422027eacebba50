"""The project's own labelled texts: the form of the files, and what comes out of them."""

import itertools
import json
import random
import re
import sys
import time
from collections import defaultdict
from hashlib import sha256
from pathlib import Path

import pytest

from detectors.harms import HARMS
from training import own_texts, rows
from training.own_slots import fill
from training.own_texts import SOURCES, frames, own_rows

FIELDS = {
    "id", "source", "licence", "quality", "context", "text", "kind", "harmful", "labels", "split",
    "group", "family", "turns_at",
}  # fmt: skip


def test_every_record_has_the_schema() -> None:
    """Fields, types and values are those of the public packs, and all six labels are known."""
    for record in own_rows():
        assert set(record) == FIELDS
        assert record["licence"] == "Apache-2.0"
        assert record["kind"] in {"reply", "comment", "prompt"}
        assert record["harmful"] in {0, 1}
        assert tuple(record["labels"]) == HARMS
        assert set(record["labels"].values()) <= {0, record["harmful"]}
        roles = [turn["role"] for turn in record["context"]]
        assert roles == ["user", "assistant", "user"][: len(roles)]
        assert len(roles) != 2
        assert all(turn["content"].strip() for turn in record["context"])
        last = record["context"][-1]["content"] if record["context"] else record["text"]
        assert record["group"] == sha256(last.encode()).hexdigest()[:10]


def test_ids_differ_and_no_text_stands_twice_in_one_conversation() -> None:
    """An id names one record, and a pair of conversation and text is there once."""
    records = own_rows()
    pairs = {json.dumps([record["context"], record["text"]]) for record in records}
    assert len({record["id"] for record in records}) == len(pairs) == len(records)


def test_no_slot_or_mark_is_left_in_a_text() -> None:
    """Every text is filled, of a length that a reply has, and has no marks of the files in it."""
    for record in own_rows():
        said = [record["text"], *(turn["content"] for turn in record["context"])]
        assert not [text for text in said if re.search(r"[§\x00]|\{[a-z_]+\d?\}|\\n|\|\| ", text)]
        assert 10 <= len(record["text"]) <= 900
        assert 0 <= record["turns_at"] < len(record["text"])


def test_the_same_files_give_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs at different times, with nothing kept between, write equal files, one a source."""
    written = []
    hours = itertools.count(step=3600)
    monkeypatch.setattr(time, "time", lambda: float(next(hours)))
    for folder in (tmp_path / "a", tmp_path / "b"):
        own_texts._rows.cache_clear()
        monkeypatch.setattr(sys, "argv", ["own_texts", "--out", str(folder)])
        own_texts.main()
        written.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert written[0] == written[1]
    assert set(written[0]) == {f"{source}.jsonl.gz" for source in SOURCES}


def test_training_reads_the_written_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader of the public packs takes them, every column known."""
    monkeypatch.setattr(sys, "argv", ["own_texts", "--out", str(tmp_path)])
    own_texts.main()
    read = rows.read(tmp_path)
    assert len(read) == len(own_rows())
    assert all(row.weights == (1.0,) * 7 for row in read)
    assert set(rows.licences(tmp_path)) == set(SOURCES)


def test_no_family_question_or_text_lies_in_both_splits() -> None:
    """What dev measures was not trained on: not the frame, its twins, its question or opening."""
    splits: dict[tuple[str, str], set[str]] = defaultdict(set)
    for record in own_rows():
        splits["family", record["family"]].add(record["split"])
        splits["text", record["text"]].add(record["split"])
        asked = [turn["content"] for turn in record["context"] if turn["role"] == "user"]
        splits["question", (asked or [record["text"]])[-1]].add(record["split"])
        if record["turns_at"]:
            splits["before", record["text"][: record["turns_at"]]].add(record["split"])
    assert not {key for key, found in splits.items() if len(found) > 1}


@pytest.mark.parametrize("source", SOURCES)
def test_each_source_is_in_both_splits(source: str) -> None:
    """Every source has rows to train on and rows of other families to measure."""
    split = [record["split"] for record in own_rows() if record["source"] == source]
    assert split.count("train") > 100
    assert split.count("dev") >= 10


def test_harmless_texts_are_at_least_half_and_every_harm_is_there() -> None:
    """Of each harm there are positives in replies, with a conversation and without."""
    records = own_rows()
    assert sum(record["harmful"] for record in records) <= len(records) / 2
    replies = [record for record in records if record["kind"] == "reply"]
    for harm in HARMS:
        positive = [record for record in replies if record["labels"][harm]]
        assert len(positive) >= 50
        assert {bool(record["context"]) for record in positive} == {True, False}


def test_turned_texts_are_harmful_and_harmless() -> None:
    """Where a text follows an ordinary beginning, the change alone decides nothing."""
    turned = [record["harmful"] for record in own_rows() if record["turns_at"] > 0]
    assert 0.25 <= sum(turned) / len(turned) <= 0.75


def test_numbers_belong_to_nobody() -> None:
    """Phones are 555-01xx, mail domains are kept for examples, cards fail their check digit."""
    texts = [record["text"] for record in own_rows()]
    everything = "\n".join(texts)
    for phone in re.findall(r"(?<!\d)555[- ]\d{4}", everything):
        assert phone[4:6] == "01"
    for domain in re.findall(r"@([a-z.]+\.[a-z]+)", everything):
        assert domain.endswith((".example", "example.com", "example.org"))
    for card in re.findall(r"\b4\d{3} \d{4} \d{4} \d{4}\b", everything):
        assert card == "4242 4242 4242 4242" or not _valid(card.replace(" ", ""))


def _valid(number: str) -> bool:
    """Whether the last digit is the right one."""
    doubled = [int(digit) * (2 if at % 2 == 0 else 1) for at, digit in enumerate(number)]
    return sum(digit // 10 + digit % 10 for digit in doubled) % 10 == 0


def test_a_file_is_read_by_its_signs() -> None:
    """Questions hold until the next text has followed; signs give label, kind and harms."""
    lines = [
        "[a]",
        "? One?",
        "? Two?",
        "+vh Bad.",
        "-:c Good.",
        "? Three?",
        "- Fine.",
        "[b]",
        "- No.",
    ]
    found = list(frames("own_x", lines))
    assert [frame.questions for frame in found] == [
        ("One?", "Two?"),
        (),  # a post answers nobody
        ("Three?",),
        (),
    ]
    assert [frame.harmful for frame in found] == [True, False, False, False]
    assert found[0].harms == ("violence", "hate_speech")
    assert [frame.kind for frame in found] == ["reply", "comment", "reply", "reply"]
    assert [frame.family for frame in found] == ["own_x/a"] * 3 + ["own_x/b"]


@pytest.mark.parametrize("line", ["Text.", "+x Text.", "-v Text.", "+v:z Text.", "+v"])
def test_a_line_that_says_nothing_is_refused(line: str) -> None:
    """A slip in the files never becomes a label."""
    with pytest.raises(ValueError, match="line 2"):
        list(frames("own_x", ["[a]", line]))


def test_a_slot_is_the_same_everywhere_and_its_number_makes_another() -> None:
    """One person keeps name and pronoun through a text; a number asks for somebody else."""
    for seed in range(50):
        text = fill("{name}/{first}/{He}/{town}/{town2}/{Town}", random.Random(seed))
        name, first, he, town, town2, again = text.split("/")
        assert name.startswith(f"{first} ")
        assert he in {"She", "He"}
        assert town == again != town2


def test_an_unknown_slot_is_refused() -> None:
    """A slip in a slot's name stops the run and is named."""
    with pytest.raises(KeyError, match="twon"):
        fill("In {twon}.", random.Random(1))


def test_each_file_of_texts_is_a_source() -> None:
    """No file is forgotten, and each source that the texts' guide promises has one."""
    assert {path.stem for path in own_texts.TEXTS.glob("own_*.txt")} == set(SOURCES)
    assert len(SOURCES) == 34


def test_a_text_whose_label_hangs_on_its_question_keeps_it() -> None:
    """With `!` no variant loses the question, gets another or serves as somebody's beginning."""
    lines = ["[a]", "? Where does {first} live?", "+p! At {address}.", "-! In {town}.", "- No."]
    opening = list(frames("openings", ["[b]", "? Bread?", "- Flour."]))
    leak, elsewhere, refusal = found = list(frames("own_privacy", lines))
    around = own_texts._Around(opening, found)
    asked = [filled.turns for filled in own_texts._variants(leak, around)]
    assert len(asked) >= 3
    assert all(len(turns) == 1 and turns[0].startswith("Where does ") for turns in asked)
    assert () in [filled.turns for filled in own_texts._variants(refusal, around)]
    assert elsewhere not in own_texts._around(refusal, found, opening).twins


def test_harmless_hate_look_alikes_are_misspelt_as_well() -> None:
    """Spelling alone says nothing: texts with and without hate have the same odd variants."""
    odd = [
        record["harmful"]
        for record in own_rows()
        if record["source"] == "own_hate" and re.search(r"[a-z][0-9*][a-z]", record["text"])
    ]
    assert odd.count(0) >= 20
    assert odd.count(1) >= 20


def test_nothing_sexual_stands_beside_a_word_for_a_minor() -> None:
    """No sexual row, its conversation and opening included, speaks of the young or of school."""
    young = re.compile(
        r"child|\bkids?\b|\bgirls?\b|\bboys?\b|teen|young|youth|minor|school|daughter|\bsons?\b"
        r"|pupil|student|toddler|baby\b|\bclass(es|room)?\b",
        re.IGNORECASE,
    )
    sexual = [record for record in own_rows() if record["labels"]["sexual_content"]]
    assert sexual
    for record in sexual:
        said = [record["text"], *(turn["content"] for turn in record["context"])]
        assert not [text for text in said if young.search(text)]
