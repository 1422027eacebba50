"""Guarantee 2: the decisions on a text do not depend on how it was cut into deltas.

Every result is compared with tests/oracle.py, which sees the whole text at once.
"""

import asyncio
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests import oracle
from tests.fakes import SETTLE, decide_records, delta_records, row_of, utf16_units
from worker.events import Decision
from worker.settings import Settings, TenantPolicy

ACTIONS = {"misinformation": "revise", "privacy_violation": "revise", "sexual_content": "flag"}
REVISED = dict.fromkeys(oracle.HARMS, "revise")
CONVERSATION = (("user", "How does one do it? \ud83d"), ("assistant", "Like so."))
SHORT = oracle.Rules(4, 10, short_chars=3, actions=ACTIONS)
RULES = [
    SHORT,
    oracle.Rules(1, 2, context_segments=2, short_chars=0, actions=ACTIONS),
    oracle.Rules(3, 7, 0, 0, 0, 4, ACTIONS),
    oracle.Rules(5, 11, 1, 1, 3, 6, ACTIONS),
    oracle.Rules(2, 9, 2, 2, 2, 0, ACTIONS),
    oracle.Rules(4, 9, 0, 2, 4, 2, ACTIONS),
    oracle.Rules(6, 40, 1, 0, 6, 10, ACTIONS),
]
TEXTS = [
    "",
    " ",
    "Ok.",
    "One. Two! Three?  Four\u2026 five.",
    'He said "no." Then: (yes.) And *so*... on?!\n\n- a\r\n- b\r\n\r\nEnd.\n',
    "nospacesatallinthistextwhatsoever,notevenone;itgoesonandon",
    "今日は晴れです。「はい。」そうですか？！行きます。ａｂｃ｡次」。。",
    "👩‍👩‍👧‍👦👩🏽‍🚀🇺🇸🇫🇷🇩🇪🇯🇵🏴󠁧󠁢󠁥󠁮󠁧󠁿 and 👍🏿👍🏿👍🏿👍🏿",
    "e" + "\u0301" * 50 + " a\u0308\u0323b\u200dc\u200b\u200b\u200bd",
    "a    \t\t\n\n   \u2003\u00a0\u3000   b.            c\x1c\x1d\x85d",
    "\ud83d lone \ude00\ude00 halves \ud83d\ud83d\ude00.\ud83d",
    "नमस्ते दुनिया। क्षत्रिय ज़िन्दगी, สวัสดีครับทุกคน มาแล้ว",
    "x. y. z. a. b. c. d. e. f. g. h. i. j. k. l. m.",
]
pytestmark = pytest.mark.filterwarnings("error")


def settings_of(rules: oracle.Rules, **more: Any) -> Settings:
    """The same rules as settings; without a cache, so that each run scores by itself."""
    return Settings(
        min_segment_chars=rules.min_chars, max_segment_chars=rules.max_chars,
        context_segments=rules.context_segments, lookahead_segments=rules.lookahead_segments,
        release_ahead_chars=rules.release_ahead_chars, short_chars=rules.short_chars,
        tenants={"default": TenantPolicy(actions=rules.actions)}, cache_entries=0,
        hold_timeout_ms=60_000, keywords_check_ms=1_000_000, **more,
    )  # fmt: skip


def seen(decisions: Sequence[Decision]) -> list[oracle.Expected]:
    """The parts of decisions that are functions of text, conversation and settings."""
    return [
        oracle.Expected(
            it.segment, it.start, it.end, it.verdict, it.released_to, it.leaked, it.final, it.harm,
            (*it.scores.values(), -1.0 if it.harmful is None else it.harmful),
        )
        for it in decisions
    ]  # fmt: skip


def decide(rules: oracle.Rules, records: Sequence[bytes | None]) -> dict[str, list[Decision]]:
    """What the pipeline decides when it reads these records."""
    return asyncio.run(decide_records(settings_of(rules), records))


def cut_at(units: Sequence[str], cuts: Sequence[int]) -> list[str]:
    """The units between the cuts, which may repeat: then a piece is empty."""
    edges = [0, *sorted(cuts), len(units)]
    return ["".join(units[a:b]) for a, b in pairwise(edges)]


def completed_by(pieces: Sequence[str], start: int, rules: oracle.Rules) -> int:
    """The seq of the first delta with which the segment from `start` on could be cut."""
    received = ""
    for seq, piece in enumerate(pieces):
        received += piece
        whole = oracle.as_received(received)
        if "\ud800" <= whole[-1:] <= "\udbff":
            whole = whole[:-1]  # waits for its low half
        if oracle.first_cut(whole[start:], rules.min_chars, rules.max_chars) is not None:
            return seq
    return len(pieces) - 1


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("text", TEXTS)
def test_every_two_way_split(text: str, rules: oracle.Rules) -> None:
    """However a text is cut in two, inside a surrogate pair too: decisions are the oracle's."""
    units = utf16_units(text)
    expected = oracle.expect(oracle.as_received(text), rules, row_of, CONVERSATION)
    context = [{"role": role, "content": content} for role, content in CONVERSATION]
    streams = [
        delta_records(f"s{cut}", cut_at(units, [cut]), context=context)
        for cut in range(len(units) + 1)
    ]
    records = [record for pair in zip(*streams, strict=True) for record in pair]  # interleaved
    decided = decide(rules, records)
    for cut in range(len(units) + 1):
        assert seen(decided[f"s{cut}"]) == expected, cut


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("text", TEXTS)
def test_one_unit_at_a_time(text: str, rules: oracle.Rules) -> None:
    """One UTF-16 unit a delta, judged after each or all at once at the end, with empty deltas
    between and an empty final one: the decisions are the oracle's."""
    units = utf16_units(text)
    with_holes = [piece for unit in units for piece in (unit, "")]
    expected = oracle.expect(oracle.as_received(text), rules, row_of)
    streams = {"units": units or [""], "holes": [*with_holes, "", ""], "whole": [text, ""]}
    records: list[bytes | None] = []
    for stream_id, pieces in streams.items():
        records += delta_records(stream_id, pieces, ascii_only=False)
    slowly = [item for record in delta_records("slow", units or [""]) for item in (record, SETTLE)]
    decided = decide(rules, [*records, *slowly])
    for stream_id in (*streams, "slow"):
        assert seen(decided[stream_id]) == expected, stream_id


TROUBLE = [
    *"ab.!?…。！」\"')* \n\r\t,\u00a0\u3000\u0301\u200d\u200b🇺🇸🏽👩\ud83d\ude00नि्漢'", "\r\n", ". ",
]  # fmt: skip
texts = st.lists(st.sampled_from(TROUBLE), max_size=60).map("".join)
letters = st.characters(categories=["L", "M", "P", "Z", "Cs", "Cf", "S"])
any_text = texts | st.text(letters, max_size=60)


@st.composite
def any_rules(draw: st.DrawFn) -> oracle.Rules:
    """Small segments, so that short texts have many."""
    min_chars = draw(st.integers(1, 8))
    return oracle.Rules(
        min_chars, draw(st.integers(2 * min_chars, 24)), draw(st.integers(0, 3)),
        draw(st.integers(0, 2)), draw(st.integers(0, min_chars)), draw(st.integers(0, 6)),
        draw(st.sampled_from([ACTIONS, REVISED])),
    )  # fmt: skip


@st.composite
def cut_texts(draw: st.DrawFn) -> list[str]:
    """A text in pieces, some of them empty."""
    units = utf16_units(draw(any_text))
    cuts = draw(st.lists(st.integers(0, len(units)), max_size=8))
    return cut_at(units, cuts)


several = st.lists(cut_texts(), min_size=1, max_size=3)


@given(several, any_rules(), st.randoms(use_true_random=False))
@example([["🇺", "🇸" * 9]], oracle.Rules(2, 4, short_chars=0), None)
@settings(max_examples=300, deadline=None)
def test_any_split_any_rhythm(streams: list[list[str]], rules: oracle.Rules, random: Any) -> None:
    """Random texts in random pieces, interleaved, read in any rhythm: decisions are the oracle's,
    and each names the delta with which its segment was complete."""
    records = interleaved(streams, random)
    decided = decide(rules, records)
    for number, pieces in enumerate(streams):
        text = oracle.as_received("".join(pieces))
        decisions = decided[f"s{number}"]
        assert seen(decisions) == oracle.expect(text, rules, row_of)
        assert [it.seq for it in decisions] == [
            completed_by(pieces, it.start, rules) for it in decisions
        ]
    ids = [it.decision_id for decisions in decided.values() for it in decisions]
    assert len(set(ids)) == len(ids)


def interleaved(streams: list[list[str]], random: Any) -> list[bytes | None]:
    """The streams' records in some order that keeps each stream's own, with pauses."""
    queues = [delta_records(f"s{i}", pieces) for i, pieces in enumerate(streams)]
    records: list[bytes | None] = []
    while queues := [queue for queue in queues if queue]:
        records.append((random.choice(queues) if random else queues[0]).pop(0))
        if random and random.random() < 0.3:
            records.append(SETTLE)
    return records


PROSE = (
    "The tide came in over the flats, slowly at first. “Is it safe?” she asked (twice). Nobody "
    "answered!  They counted the boats, the ropes and the lanterns…\n\n1. First, close the gate.\n"
    "2. Then wait; 水が引くまで待ってください。それから門を開けます。 "
)


@given(st.integers(1, 40), st.integers(0, 2**32), st.data())
@settings(max_examples=15, deadline=None)
def test_default_lengths(repeats: int, seed: int, data: st.DataObject) -> None:
    """Texts of several thousand characters at the default lengths: decisions are the oracle's."""
    text = "".join(f"{seed + i} {PROSE[i % 90 :]}" + "x" * (37 * i % 500) for i in range(repeats))
    units = utf16_units(text)
    cuts = data.draw(st.lists(st.integers(0, len(units)), max_size=200))
    rules = oracle.Rules(120, 400, actions=dict.fromkeys(oracle.HARMS, "revise"))
    decided = decide(rules, delta_records("s", cut_at(units, cuts)))
    assert seen(decided["s"]) == oracle.expect(text, rules, row_of)
