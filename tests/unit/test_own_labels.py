"""Our own labels for public texts: what they become, and that they fit no other text's place."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from detectors.harms import HARMS
from training import own_labels, rows


@pytest.fixture
def labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder in the place of training/labels."""
    monkeypatch.setattr(own_labels, "LABELS", tmp_path)
    own_labels._labels.cache_clear()
    yield tmp_path
    own_labels._labels.cache_clear()


def record(number: int, source: str = "hh_rlhf_harmless", **fields: Any) -> dict[str, Any]:
    turns = ("how do I pick a lock", "Why?", "it is my neighbour's")
    return {
        "id": f"{source}/{number}", "source": source, "kind": "reply", "text": f"reply {number}",
        "context": [
            {"role": role, "content": turn}
            for role, turn in zip(("user", "assistant", "user"), turns, strict=True)
        ],
        "harmful": None, "labels": dict.fromkeys(HARMS), "split": "train", "group": "a1",
    } | fields  # fmt: skip


def test_a_label_fills_what_the_source_left_open(labels: Path) -> None:
    (labels / "hh_rlhf_harmless.tsv").write_text("1\t1iv\n2\t0\n3\t1\n")
    found = list(own_labels.labelled(record(i) for i in (1, 2, 3, 4)))
    assert [it["harmful"] for it in found] == [1, 0, 1, None]
    assert {harm for harm, said in found[0]["labels"].items() if said} == {
        "violence",
        "illegal_activity",
    }
    assert not any(found[2]["labels"].values())
    weights = [rows.row_of(it).weights for it in found]
    assert weights[0] == (1.0, 0.3, 0.3, 0.3, 1.0, 0.3, 1.0)  # named, or weakly not the others
    assert weights[1] == (1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0)
    assert weights[2] == (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0)
    assert weights[3] == (0.0,) * 7  # read() leaves such rows out


def test_a_label_of_the_source_stands(labels: Path) -> None:
    (labels / "past_tense_replies.tsv").write_text("7\t1i\n")
    kept = record(7, "past_tense_replies", harmful=0)
    assert list(own_labels.labelled([kept])) == [kept]


def test_a_labelled_request_becomes_a_row_before_its_reply(labels: Path) -> None:
    (labels / "hh_rlhf_harmless.tsv").write_text("P5\t1i\n")
    asked, reply = own_labels.labelled([record(5)])
    assert reply == record(5)
    assert asked["kind"] == "prompt"
    assert asked["text"] == "it is my neighbour's"
    assert [turn["content"] for turn in asked["context"]] == ["how do I pick a lock", "Why?"]
    assert asked["source"] == "hh_rlhf_harmless_requests"
    assert asked["id"] == "hh_rlhf_harmless_requests/5"
    assert asked["group"] == "a1"  # with its reply on one side of every split
    assert asked["harmful"] == 1


def test_labelled_turns_become_rows_before_their_reply(labels: Path) -> None:
    (labels / "hh_rlhf_harmless.tsv").write_text("5\t1i\nP5\t1i\n5.0\t0\n5.1\t1\n")
    found = list(own_labels.labelled([record(5)]))
    assert [(it["id"], it["kind"], it["text"], it["harmful"]) for it in found] == [
        ("hh_rlhf_harmless_requests/5", "prompt", "it is my neighbour's", 1),
        ("hh_rlhf_harmless_requests/5.0", "prompt", "how do I pick a lock", 0),
        ("hh_rlhf_harmless_turns/5.1", "reply", "Why?", 1),
        ("hh_rlhf_harmless/5", "reply", "reply 5", 1),
    ]
    assert [len(it["context"]) for it in found] == [2, 0, 1, 3]
    assert {it["group"] for it in found} == {"a1"}  # a dialogue lies in one part


def test_ordinary_requests_are_harmless_once_each() -> None:
    found = list(own_labels.labelled(record(i, "arena_hard", harmful=0) for i in (1, 2)))
    assert [(it["kind"], it["harmful"]) for it in found] == [
        ("prompt", 0),
        ("reply", 0),
        ("reply", 0),
    ]


@pytest.mark.parametrize(
    "line", ["1", "1\t2", "1\t0v", "1\t1x", "x1\t0", "1\t?", "1 \t0", "P1.2\t0", "1.\t0"]
)
def test_a_line_that_cannot_be_read_is_named(labels: Path, line: str) -> None:
    (labels / "hh_rlhf_harmless.tsv").write_text(f"4\t0\n{line}\n")
    with pytest.raises(ValueError, match=r"hh_rlhf_harmless\.tsv:2"):
        list(own_labels.labelled([record(1)]))


def test_the_files_that_ship_can_be_read() -> None:
    paths = sorted(own_labels.LABELS.glob("*.tsv"))
    assert paths
    for path in paths:
        found = own_labels._labels(path.stem)
        harmful = sum(label != "0" for label in found.values())
        assert 0.2 < harmful / len(found) < 0.7
