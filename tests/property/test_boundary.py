"""Guarantee 1: what a gateway shows never holds a character of a segment judged harmful.

A gateway that shows `text[:released_to]`, as far as the text has come, watches every moment.
"""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detectors.protocol import Detector, Encoded, FloatArray, Passage
from tests import oracle
from tests.fakes import SETTLE, RowDetector, decide_records, delta_records, row_of
from tests.property.test_splits import (
    ACTIONS,
    any_rules,
    settings_of,
    several,
)
from worker.events import Decision
from worker.settings import Settings


class Gateway:
    """Shows as much as it may, at once, and remembers what it has shown."""

    def __init__(self) -> None:
        self.text = ""
        self._come = 0  # code points that may be counted on
        self.released_to = 0
        self.shown = 0  # code points
        self.harmful: list[tuple[int, int]] = []
        self.leaks: list[tuple[int, int]] = []  # shown too early; as the decision has it

    def sent(self, piece: str, final: bool) -> None:
        """More text has come."""
        self.text = oracle.as_received(self.text + piece)
        waits = not final and "\ud800" <= self.text[-1:] <= "\udbff"  # for its low half
        self._come = len(self.text) - waits
        self._show()

    def decided(self, decision: Decision) -> None:
        """A decision has come."""
        if decision.verdict != "allow":
            early = max(0, min(self.shown, decision.end) - decision.start)
            self.leaks.append((early, decision.leaked))
            self.harmful.append((decision.start, decision.end))
        self.released_to = decision.released_to
        self._show()

    def _show(self) -> None:
        self.shown = max(self.shown, min(self._come, self.released_to))

    @property
    def shown_harmful(self) -> int:
        """Characters of harmful segments that were shown."""
        return sum(max(0, min(self.shown, end) - start) for start, end in self.harmful)


class Watched:
    """Streams, each with a gateway that sees its text and its decisions when they come."""

    def __init__(self, streams: Sequence[Sequence[str]], ticket: Callable[[], bool], **first: Any):
        self.gateways = {f"s{i}": Gateway() for i in range(len(streams))}
        self._streams = streams
        self._pauses = ticket
        self._first = first

    def records(self) -> Iterator[bytes | None]:
        """The records of all streams in turn; each gateway sees what has just been sent."""
        queues = {
            f"s{i}": list(zip(pieces, delta_records(f"s{i}", pieces, **self._first), strict=True))
            for i, pieces in enumerate(self._streams)
        }
        while any(queues.values()):
            for stream_id, queue in queues.items():
                if queue:
                    piece, record = queue.pop(0)
                    self.gateways[stream_id].sent(piece, final=not queue)
                    yield record
                if self._pauses():
                    yield SETTLE

    def run(
        self, settings: Settings, detector: Detector | None = None
    ) -> dict[str, list[Decision]]:
        """Send everything through a pipeline."""
        return asyncio.run(
            decide_records(
                settings, self.records(), detector,
                lambda decision: self.gateways[decision.stream_id].decided(decision),
            )
        )  # fmt: skip


@given(several, any_rules(), st.randoms(use_true_random=False))
@settings(max_examples=200, deadline=None)
def test_nothing_harmful_is_shown(
    streams: list[list[str]], rules: oracle.Rules, random: Any
) -> None:
    """Whatever is sent and however it is read, `leaked` is the number of characters of the segment
    that were shown too early, and without release_ahead_chars that is none."""
    watched = Watched(streams, lambda: bool(random.random() < 0.5))
    decided = watched.run(settings_of(rules))
    for stream_id, gateway in watched.gateways.items():
        assert all(early == leaked for early, leaked in gateway.leaks)
        assert gateway.shown_harmful == sum(leaked for _, leaked in gateway.leaks)
        if not rules.release_ahead_chars:
            assert gateway.shown_harmful == 0
        if decided[stream_id][-1].verdict == "allow" and not gateway.harmful:
            assert gateway.shown == len(gateway.text)  # and nothing harmless is held in the end


class BadWord(RowDetector):
    """Harmful is what holds BAD; BROKEN raises, NAN is no score, all else is fine."""

    def encode(self, passages: Sequence[Passage]) -> list[Encoded]:
        """A window that says which."""
        encoded = super().encode(passages)
        for passage, row in zip(passages, encoded, strict=True):
            row.windows[0].ids[:7] = [10] * 7
            if "BAD" in passage.text:
                row.windows[0].ids[:7] = [950, 10, 10, 10, 10, 10, 950]
            if "BROKEN" in passage.text:
                row.windows[0].ids[0] = -1
            if "NAN" in passage.text:
                row.windows[0].ids[0] = -2
        return encoded

    def score(self, batch: Sequence[Encoded]) -> FloatArray:
        """(B, 7)"""
        rows: FloatArray = np.stack([row.windows[0].ids[:7] / 1_000 for row in batch])
        if (rows[:, 0] == -0.001).any():
            raise RuntimeError("broken")
        return np.where(rows == -0.002, np.nan, rows)


SENTENCE = "Calm words go here, {}. "


@pytest.mark.parametrize("ahead", [0, 1, 7, 12])
@pytest.mark.parametrize("lookahead", [0, 1, 2])
@pytest.mark.parametrize("where", range(6))
def test_leaked_is_exact(where: int, lookahead: int, ahead: int) -> None:
    """With a gateway that is always up to date, `leaked` is exactly what it has shown of the
    segment: release_ahead_chars, or the whole of a shorter last one; nothing of the first."""
    rules = oracle.Rules(
        12, 40, context_segments=2, lookahead_segments=lookahead, release_ahead_chars=ahead
    )
    words = ["fine"] * 5
    text = "".join(SENTENCE.format("BAD" if i == where else word) for i, word in enumerate(words))
    text += "BAD end"[: 7 if where == 5 else 3].replace("BAD", "BAD" if where == 5 else "end")
    watched = Watched([list(text)], lambda: True)
    blocked = watched.run(
        settings_of(
            rules,
        ),
        BadWord(),
    )["s0"][-1]
    gateway = watched.gateways["s0"]
    first = max(0, where - lookahead)  # it is judged with the harmful one
    assert (blocked.verdict, blocked.segment, blocked.final) == ("block", first, True)
    expected = 0 if first == 0 else min(ahead, blocked.end - blocked.start)
    assert gateway.leaks == [(expected, expected)]
    assert gateway.shown == blocked.start + expected


class Cause(NamedTuple):
    """Something that makes a segment harmful, and how the decision names it."""

    words: str
    stage: str
    reason: str
    harm: str | None = None


BY_KEYWORD = "hate_speech 1.000 above 0.800"
CAUSES = {
    "model": Cause("BAD", "toxicity", "violence 0.950 above 0.700", "violence"),
    "keyword": Cause("zorgblat", "keyword", BY_KEYWORD, "hate_speech"),
    "spelling": Cause("z\u200b0RGb\u00adlat", "keyword", BY_KEYWORD, "hate_speech"),
    "exception": Cause("BROKEN", "policy", "unavailable"),
    "no number": Cause("NAN", "policy", "unavailable"),
}


@pytest.fixture
def keywords(tmp_path: Path) -> Path:
    """A list of two terms."""
    path = tmp_path / "keywords.toml"
    path.write_text('[hate_speech]\nblock = ["zorgblat", "frob nix"]\n')
    return path


@pytest.mark.parametrize("where", [0, 2, 4])
@pytest.mark.parametrize("cause", CAUSES.values(), ids=CAUSES)
def test_whatever_the_cause(cause: Cause, where: int, keywords: Path) -> None:
    """A model, a keyword, an exception, NaN, a score from the cache: nothing of it is shown."""
    rules = oracle.Rules(12, 60)
    text = "".join(SENTENCE.format(cause.words if i == where else i) for i in range(5))
    watched = Watched([list(text), [text, ""]], lambda: True)
    chosen = settings_of(rules, keywords_file=keywords).model_copy(
        update={"hold_timeout_ms": 800, "cache_entries": 100}
    )
    for stream_id, decisions in watched.run(chosen, BadWord()).items():
        gateway, blocked = watched.gateways[stream_id], decisions[-1]
        assert gateway.text[blocked.start : blocked.end].count(cause.words) == 1
        assert (blocked.reason, blocked.harm) == (cause.reason, cause.harm)
        assert blocked.stage in (cause.stage, "cache" if cause.stage == "toxicity" else cause.stage)
        assert (gateway.shown, blocked.leaked) == (blocked.start, 0)
        assert [it.verdict for it in decisions] == ["allow"] * where + ["block"]


def test_known_scores_block_too(keywords: Path) -> None:
    """The second stream with a harmful text is settled by the cache, and blocks as the first."""
    text = SENTENCE.format("fine") + SENTENCE.format("BAD")
    chosen = settings_of(oracle.Rules(12, 60), keywords_file=keywords)
    watched = Watched([[text], [text]], lambda: True)
    decided = watched.run(chosen.model_copy(update={"cache_entries": 100}), BadWord())
    assert [it.stage for it in decided["s1"]] == ["cache", "cache"]
    assert [it.verdict for it in decided["s1"]] == ["allow", "block"]
    assert watched.gateways["s0"].shown == watched.gateways["s1"].shown == decided["s1"][1].start


def test_a_gap_shows_nothing_more(keywords: Path) -> None:
    """Behind a delta that never came nothing is released, however much follows."""
    records = delta_records("s", [SENTENCE.format(i) for i in range(9)])
    del records[3]
    chosen = settings_of(oracle.Rules(12, 60), keywords_file=keywords, max_early_deltas=4)
    decisions = asyncio.run(decide_records(chosen, records, BadWord()))["s"]
    received = 3 * len(SENTENCE.format(0))
    assert [it.verdict for it in decisions[:-1]] == ["allow"] * (len(decisions) - 1)
    assert (decisions[-1].verdict, decisions[-1].reason) == ("block", "gap")
    assert decisions[-1].released_to <= decisions[-1].start <= decisions[-1].end == received


@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize("term", ["zorgblat", "frob  nix", "FROB-\u200bnix"])
def test_terms_over_borders(term: str, lookahead: int, keywords: Path) -> None:
    """At every place over a border between segments, a term blocks the segment that holds its last
    character, and with lookahead_segments the one with its first as well."""
    rules = oracle.Rules(10, 24, lookahead_segments=lookahead)
    texts = ["x" * length + f"--{term}--" + "y" * 30 for length in range(50)]
    watched = Watched([[text] for text in texts], lambda: False)
    decided = watched.run(settings_of(rules, keywords_file=keywords), BadWord())
    over_border = 0
    for number, text in enumerate(texts):
        gateway, blocked = watched.gateways[f"s{number}"], decided[f"s{number}"][-1]
        begin = text.index(term)
        bounds = oracle.segment_bounds(text, 10, 24)
        holds_last = next(b for b in bounds if b[0] < begin + len(term) <= b[1])
        holds_first = next(b for b in bounds if b[0] <= begin < b[1])
        over_border += holds_first != holds_last
        assert blocked.verdict == "block"
        hidden = holds_first if lookahead else holds_last
        if lookahead and bounds.index(holds_first) < bounds.index(holds_last) - 1:
            continue
        previous = bounds[max(0, bounds.index(holds_last) - lookahead)]
        assert (blocked.start, blocked.end) == previous
        assert gateway.shown == previous[0] <= hidden[0]
    assert over_border > 3


def test_oracle_agrees_about_revisions() -> None:
    """A revision freezes `released_to` at its start, and later harmless segments do not move it."""
    actions = dict.fromkeys(oracle.HARMS, "revise")
    rules = oracle.Rules(12, 60, release_ahead_chars=5, actions=actions)
    text = "".join(SENTENCE.format("BAD" if i in (2, 4) else i) for i in range(7))
    watched = Watched([list(text)], lambda: True)
    decisions = watched.run(settings_of(rules), BadWord())["s0"]
    first = text.index(SENTENCE[:4], 2 * len(SENTENCE.format(0)))
    verdicts = ["allow", "allow", "revise", "allow", "revise", "allow", "allow"]
    assert [it.verdict for it in decisions] == verdicts
    assert [it.leaked for it in decisions] == [0, 0, 5, 0, 0, 0, 0]
    assert {it.released_to for it in decisions[2:]} == {first}
    assert watched.gateways["s0"].shown == first + 5


def test_the_fake_finds_harm() -> None:
    """The rows that the properties rest on name every verdict often enough."""
    verdicts = [oracle.verdict_of(row_of(f"text {i}", "", ()), ACTIONS) for i in range(1_000)]
    assert {harm for _, harm in verdicts} == {None, *oracle.HARMS}
    assert all(sum(v == it for v, _ in verdicts) > 50 for it in ("allow", "block", "revise"))
