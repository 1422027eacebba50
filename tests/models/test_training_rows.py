"""Labels and parts: what training reads into a row, and that no prompt is on both sides."""

import random
from typing import Any

import pytest

from detectors.harms import COLUMNS, HARMS
from detectors.protocol import Turn
from training import also, rows, sets, sources, windows
from training.rows import Row


def row(**fields: Any) -> Row:
    defaults: dict[str, Any] = {
        "id": "x/1",
        "source": "gptfuzz",
        "kind": "reply",
        "conversation": (),
        "text": "text",
        "targets": (0.0,) * 7,
        "weights": (1.0,) * 7,
        "group": "0",
        "dev": False,
    }
    return Row(**(defaults | fields))


def record(**fields: Any) -> dict[str, Any]:
    labels = dict.fromkeys(HARMS) | fields.pop("labels", {})
    return {"source": "gptfuzz", "kind": "reply", "harmful": None, "labels": labels} | fields


def weights(**fields: Any) -> dict[str, float]:
    return rows._labels(record(**fields))[1]


def test_harmless_reads_as_free_of_every_harm_but_falsehood() -> None:
    """A harmless text may still be wrong."""
    found = weights(harmful=0)
    assert found.pop("misinformation") == 0.0
    assert set(found.values()) == {1.0}


def test_a_request_or_a_sound_answer_weighs_little_against_falsehood() -> None:
    """It is weak evidence, so it has a small weight."""
    assert 0 < weights(harmful=0, kind="prompt")["misinformation"] < 1
    assert 0 < weights(harmful=0, source="medquad")["misinformation"] < 1


def test_harmful_alone_says_nothing_of_the_types() -> None:
    """Unlabelled harms of a harmful text stay unknown."""
    found = weights(harmful=1)
    assert found.pop("harmful") == 1.0
    assert set(found.values()) == {0.0}


def test_a_weak_one_is_no_label_and_a_weak_zero_is_one() -> None:
    """Half of the weak ones that were read were none."""
    assert weights(weak={"harmful": 1})["harmful"] == 0.0
    assert weights(weak={"harmful": 0})["harmful"] == 1.0


def test_no_prompt_is_in_two_parts() -> None:
    """Rows on one prompt go to one part, whichever split and source they come from."""
    chance = random.Random(0)
    many = [
        row(
            id=str(i),
            source=chance.choice(["gptfuzz", "jailbreakbench", "dices", "jailjudge_mini"]),
            group=str(chance.randrange(2000)),
            dev=chance.random() < 0.1,
        )
        for i in range(3000)
    ]
    parts = rows.split(many)
    groups = [{r.group for r in part} for part in parts]
    assert all(groups)
    for i, one in enumerate(groups):
        for other in groups[i + 1 :]:
            assert not one & other


def test_no_dev_row_is_trained_on_and_no_held_out_source() -> None:
    """`split` of the data and the list of sources both hold."""
    many = [row(id=str(i), group=str(i), dev=i % 2 == 0) for i in range(400)]
    many += [row(id=source, source=source, group=source) for source in sources.LEFT_OUT]
    parts = rows.split(many)
    assert parts.fit
    assert not any(r.dev or r.source in sources.LEFT_OUT for r in parts.fit)
    assert {r.source for r in parts.unseen} == sources.UNSEEN
    assert {r.source for r in parts.unknown} == sources.CALIBRATING


def test_what_is_reported_chooses_nothing() -> None:
    """Calibration and thresholds see no row, no prompt and no source of sources left out that is
    reported; our own texts among them are those that no training sees."""
    chance = random.Random(0)
    names = ["gptfuzz", "or_bench_hard", "arena_hard", "gbv_counterspeech"]
    names += sorted(sources.LEFT_OUT)
    many = [
        row(
            id=str(i),
            source=chance.choice(names),
            group=str(chance.randrange(900)),
            dev=True,
            text="A long text. " * 40,
        )
        for i in range(3000)
    ]
    parts = rows.split(many)
    chosen, shown = sets.calibrating(parts, also.own_held_out(), 40), sets.shown(parts, 40)
    seen = {r.group for some in chosen for r in some}
    assert all(chosen)
    assert all(shown)
    assert not seen & {r.group for some in shown for r in some}
    assert not {r.source for some in chosen for r in some} & sources.UNSEEN
    own = [r for some in chosen for r in some if r.source.startswith("own_")]
    assert own
    assert all(r.dev for r in own)
    assert not {r.id for r in own} & {r.id for r in also.own()}


def test_of_what_has_to_pass_other_peoples_texts_are_at_least_half() -> None:
    """Our own are easier for a model that learnt from their author."""
    many = [row(id=str(i), source="gbv_counterspeech", group=str(i), dev=True) for i in range(30)]
    chosen = sets.calibrating(rows.split(many), also.own_held_out(), 40)
    own = [r for r in chosen.counter_speech if r.source == "own_counterspeech"]
    assert 0 < len(own) == len(chosen.counter_speech) - len(own)
    assert not chosen.look_alikes  # of these there is no public one here


def test_windows_hold_what_stands_before_them_whole_or_not_at_all() -> None:
    """As the worker gives it: a word cut in two would tell harmless windows from harmful ones."""
    text = "A sentence of some words that says little of note. " * 40
    some = [row(id=str(n), text=text, targets=(n % 2,) * 7, weights=(1.0,) * 7) for n in range(60)]
    whole = {passage.before for passage in windows.judged(some[0])}
    found = windows.samples(some, random.Random(3))
    assert {s.targets[0] for s in found if s.passage.before} == {0, 1}
    assert {s.passage.before for s in found} <= whole


def test_only_texts_that_stood_alone_turn_up_behind_other_peoples_answers() -> None:
    """A short answer may be harmful behind its own question alone."""
    asked = (Turn("user", "May I?"),)
    plain = row(id="p", source="arena_hard", kind="reply", text="An ordinary answer. " * 9,
                conversation=asked)  # fmt: skip
    both = [
        row(id=f"{n}{kind}", kind=kind, conversation=asked if kind == "reply" else (),
            text=f"{kind}: surely yes, you may go on with it now.", targets=(n,) * 7,
            weights=(1.0,) * 7)
        for n in (0, 1) for kind in ("reply", "comment")
    ]  # fmt: skip
    turned = [s for s in windows.samples([plain, *both], random.Random(3)) if s.source == "turned"]
    assert {s.targets[0] for s in turned} == {0, 1}
    assert all(s.passage.text.startswith("comment") for s in turned)


def test_a_short_reply_is_no_long_harmless_one() -> None:
    """Four hundred characters are long; fewer say nothing about long replies."""
    found = [sets.is_long_harmless(row(source="arena_hard", text="x" * n)) for n in (399, 400)]
    assert found == [False, True]


def test_a_mix_takes_so_many_rows_of_a_source_and_no_more() -> None:
    """Of each its own cap, of our own texts fewer, of those in plain words twice these."""
    names = {"bbq": 350, "surge_toxicity": 700, "own_privacy": 250, "own_borderline": 500}
    many = [row(id=f"{name}/{n}", source=name) for name in names for n in range(900)]
    found = [r.source for r in windows.capped(many, random.Random(1))]
    assert {name: found.count(name) for name in names} == names


def test_both_groups_of_sources_left_out_have_every_kind() -> None:
    """Five each, and none in both."""
    assert len(sources.CALIBRATING) == len(sources.UNSEEN) == 5
    assert not sources.CALIBRATING & sources.UNSEEN


@pytest.mark.parametrize("seed", range(5))
def test_segments_join_to_the_text_within_their_bounds(seed: int) -> None:
    """Nothing is lost, and no segment is longer than the worker's."""
    chance = random.Random(seed)
    text = "".join(chance.choice("ab. \n!") * chance.randrange(1, 30) for _ in range(300))
    found = [passage.text for passage in windows.judged(row(text=text))]
    assert "".join(found) == text
    assert all(len(segment) <= 400 for segment in found)


def test_a_harmful_opening_is_no_window_of_harm() -> None:
    """The words "Sure, here is" do not carry the label of what follows it."""
    harmful = row(text="Sure, here is. " * 60, targets=(1.0,) * 7)
    for passage in windows._harmful_windows(harmful):
        assert len(passage.before) + len(passage.text) >= 300


def test_columns_are_those_of_the_scores() -> None:
    """Targets stand in the order that the detector's columns have."""
    targets, _ = rows._labels(record(harmful=1, labels={"violence": 1}))
    assert list(targets) == list(COLUMNS)
    assert targets["violence"] == 1.0
