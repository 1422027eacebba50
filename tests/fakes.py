"""Detectors that stand in for models. Settings name them `python:tests.fakes:HashDetector`."""

import asyncio
import hashlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from detectors.harms import COLUMNS
from detectors.logprob import Affine, HelperError
from detectors.prompts import PROMPTS
from detectors.protocol import Detector, Encoded, FloatArray, Passage, Window
from detectors.second import FORMAT, Band, Plan
from worker.events import Decision
from worker.pipeline import Pipeline
from worker.settings import Settings
from worker.streams import Lane

HARMFUL_SHARE = 0.03  # of all passages, about


class HashDetector:
    """Scores that depend on every character of text, context and conversation, and on nothing else.

    About three passages in a hundred score 0.95 for one harm, above every default threshold; the
    others stay below 0.5. TIDEGATE_TEST_SCORE_MS: how long a batch takes, so that a kill finds
    work in flight.
    """

    name = "toxicity"
    digest = "fa4e" * 8

    def __init__(self) -> None:
        self._score_s = float(os.environ.get("TIDEGATE_TEST_SCORE_MS", "1")) / 1e3

    @property
    def thresholds(self) -> dict[str, float]:
        """None of its own: the defaults hold."""
        return {}

    def encode(self, passages: Sequence[Passage]) -> list[Encoded]:
        """One window that holds the passage's digest."""
        return [_digested(passage) for passage in passages]

    def score(self, batch: Sequence[Encoded]) -> FloatArray:
        """(B, 7) scores read off the digests."""
        time.sleep(self._score_s)
        return np.stack([_scores(row.windows[0]) for row in batch])


class StuckDetector(HashDetector):
    """Blocks the event loop, from which the worker made it, with its first batch."""

    def __init__(self) -> None:
        super().__init__()
        self._loop = asyncio.get_running_loop()

    def score(self, batch: Sequence[Encoded]) -> FloatArray:
        """As HashDetector; but nobody will hear of it."""
        self._loop.call_soon_threadsafe(time.sleep, 60)
        return super().score(batch)


MARKER = "\N{SKULL}"


class MarkerDetector(HashDetector):
    """Violent is a segment with MARKER in it, whatever stands before it; all else is harmless."""

    digest = "3a4c" * 8

    def encode(self, passages: Sequence[Passage]) -> list[Encoded]:
        """One window that says whether the marker is there."""
        return [_counted(MARKER, passage) for passage in passages]

    def score(self, batch: Sequence[Encoded]) -> FloatArray:
        """(B, 7) 0.95 for violence and `harmful` where the marker is, else 0.01."""
        return _marked_rows(batch)


class KnifeDetector(HashDetector):
    """Violent is a segment with a knife in it; all else is harmless."""

    digest = "417e" * 8

    def encode(self, passages: Sequence[Passage]) -> list[Encoded]:
        """One window that says whether a knife is there."""
        return [_counted("knife", passage) for passage in passages]

    def score(self, batch: Sequence[Encoded]) -> FloatArray:
        """(B, 7) 0.95 for violence and `harmful` where the knife is, else 0.01."""
        return _marked_rows(batch)


class SaysDetector(HashDetector):
    """Violence, and `harmful`, is the number that a text names, as in "violence=0.62"."""

    digest = "5a15" * 8

    def encode(self, passages: Sequence[Passage]) -> list[Encoded]:
        """One window that holds the number's millionths."""
        return [_said(passage) for passage in passages]

    def score(self, batch: Sequence[Encoded]) -> FloatArray:
        """(B, 7) what the texts say, 0 for all other harms."""
        rows = np.zeros((len(batch), len(COLUMNS)))
        for row, encoded in zip(rows, batch, strict=True):
            row[[0, -1]] = encoded.windows[0].ids[0] / 1e6
        return rows


class AtHalfDetector(SaysDetector):
    """Brings the threshold that the bands of these tests are around."""

    @property
    def thresholds(self) -> dict[str, float]:
        """By THRESHOLD_KEYS."""
        return {"violence": 0.5}


class SaysHelper:
    """A language model that finds a text as harmful as it says, as in "second=0.31"; else 0.5.

    A token is a character. With the calibration slope 1, intercept 0 the number is the P_pos.
    "second=down" is what it has no answer to.
    """

    digest = "5ec0" * 8
    made = ended = 0  # of all there are in this process
    _harmful = tuple(prompt for classes in PROMPTS.values() for prompt in classes.harmful)

    def __init__(self) -> None:
        self.asked: list[list[str]] = []  # prompts, by call
        SaysHelper.made += 1

    def close(self) -> None:
        """Nothing but the count."""
        SaysHelper.ended += 1

    def __call__(self, prompts: list[str]) -> list[list[float]]:
        """Log-probs that are the same for every character of a prompt."""
        self.asked.append(prompts)
        if any("second=down" in prompt for prompt in prompts):
            raise HelperError("down")
        return [self._row(prompt) for prompt in prompts]

    def split(self, prefix: str, prompt: str) -> int:
        """As many as the prefix has characters."""
        return len(prefix)

    def _row(self, prompt: str) -> list[float]:
        half = math.log(p / (1 - p)) / 2 if 0 < (p := _number("second", prompt, 0.5)) < 1 else 0.0
        return [-10.0 + (half if prompt.startswith(self._harmful) else -half)] * len(prompt)


def second_plan(**changes: Any) -> Plan:
    """A band of 0.1 on both sides around the threshold of violence, for SaysDetector."""
    fields: dict[str, Any] = {
        "format": FORMAT,
        "encoders": (SaysDetector.digest,),
        "calibration": {"violence": Affine(1.0, 0.0)},
        "band": {"violence": Band(0.1, 0.1)},
    }
    return Plan(**(fields | changes))


def _number(name: str, text: str, default: float = 0.0) -> float:
    found = re.search(rf"{name}=([0-9.]+[0-9])", text)
    return float(found[1]) if found else default


def _said(passage: Passage) -> Encoded:
    ids = np.array([round(1e6 * _number("violence", passage.text))], dtype=np.int64)
    return Encoded((Window(ids, np.zeros_like(ids)),), tokens=1, text_tokens=1)


def _counted(word: str, passage: Passage) -> Encoded:
    ids = np.array([word in passage.text], dtype=np.int64)
    return Encoded((Window(ids, np.zeros_like(ids)),), tokens=1, text_tokens=1)


def _marked_rows(batch: Sequence[Encoded]) -> FloatArray:
    rows = np.full((len(batch), len(COLUMNS)), 0.01)
    for row, encoded in zip(rows, batch, strict=True):
        if encoded.windows[0].ids[0]:
            row[[0, -1]] = 0.95
    return rows


def _digested(passage: Passage) -> Encoded:
    hasher = hashlib.blake2b(digest_size=16)
    for turn in passage.conversation:
        for part in turn:
            _add(hasher, part)
    _add(hasher, passage.before)
    _add(hasher, passage.text)
    ids = np.frombuffer(hasher.digest(), dtype=np.uint8).astype(np.int64)  # (16,)
    return Encoded((Window(ids, np.zeros_like(ids)),), tokens=len(ids), text_tokens=len(ids))


def _add(hasher: "hashlib.blake2b", part: str) -> None:
    coded = part.encode("utf-8", "surrogatepass")
    hasher.update(len(coded).to_bytes(8, "little"))
    hasher.update(coded)


def _scores(window: Window) -> FloatArray:
    """(7,) columns as in harms.COLUMNS; the last, `harmful`, is the highest."""
    row = window.ids[: len(COLUMNS)] / 255 * 0.4  # (7,)
    picked = int(window.ids[8]) * 256 + int(window.ids[9])
    if picked / 65_536 < HARMFUL_SHARE:
        row[picked % (len(COLUMNS) - 1)] = 0.95
    row[-1] = row[:-1].max()
    return np.asarray(row, dtype=np.float64)


class RowDetector:
    """Scores each passage by `row_of`; `batches` says what was scored together.

    tests/oracle.py uses the same function, so that whatever else a segment was judged with shows.
    """

    name = "toxicity"
    digest = "0b5e55ed" * 8

    def __init__(self) -> None:
        self.batches: list[int] = []

    @property
    def thresholds(self) -> dict[str, float]:
        """None of its own: the defaults hold."""
        return {}

    def encode(self, passages: Sequence[Passage]) -> list[Encoded]:
        """One window whose length is the passage's, its row in the first seven tokens."""
        return [_with_row(passage) for passage in passages]

    def score(self, batch: Sequence[Encoded]) -> FloatArray:
        """(B, 7) the rows that `encode` put there."""
        self.batches.append(len(batch))
        return np.stack([row.windows[0].ids[: len(COLUMNS)] / 1_000 for row in batch])


def row_of(text: str, before: str, conversation: Sequence[tuple[str, str]]) -> tuple[float, ...]:
    """(7,) thousandths that depend on every character. Three in ten name a harm, some of them at
    its threshold exactly, some only in the last column."""
    hasher = hashlib.blake2b(digest_size=16)
    for part in (text, before, *(part for turn in conversation for part in turn)):
        _add(hasher, part)
    digest = hasher.digest()
    row = [byte / 500 for byte in digest[: len(COLUMNS)]]  # below 0.52
    kind, harm = digest[8], digest[9] % len(COLUMNS)
    if kind < 60:
        row[harm] = 0.95
    elif kind < 80:
        row[harm] = (0.70, 0.80, 0.60, 0.90, 0.85, 0.75, 0.90)[harm]
    row[-1] = max(row) if kind < 70 else row[-1]
    return tuple(round(score, 3) for score in row)


def _with_row(passage: Passage) -> Encoded:
    row = [round(1_000 * it) for it in row_of(*passage)]
    ids = np.asarray(row + [0] * len(passage.text), dtype=np.int64)
    return Encoded((Window(ids, np.zeros_like(ids)),), tokens=len(ids), text_tokens=len(ids))


# -- streams through a pipeline ------------------------------------------------------------------

SETTLE = None  # among the records: wait until everything fed so far is judged


def utf16_units(text: str) -> list[str]:
    """The text's UTF-16 units, each as a code point: where a producer may cut it."""
    coded = text.encode("utf-16-le", "surrogatepass")
    return [chr(coded[i] + 256 * coded[i + 1]) for i in range(0, len(coded), 2)]


def delta_records(
    stream_id: str, pieces: Sequence[str], *, ascii_only: bool = True, **first: Any
) -> list[bytes]:
    """The pieces as records of one stream, the last of them final. first: fields of the first."""
    records = []
    for seq, piece in enumerate(pieces):
        final = seq == len(pieces) - 1
        fields = {"stream_id": stream_id, "seq": seq, "delta": piece, "final": final}
        halves = any("\ud800" <= char <= "\udfff" for char in piece)
        fields |= first if seq == 0 else {}
        written = json.dumps(fields, ensure_ascii=ascii_only or halves)
        records.append(written.encode())
    return records


async def decide_records(
    settings: Settings, records: Iterable[bytes | None],
    detector: Detector | tuple[Detector, ...] | None = None,
    on_decision: Callable[[Decision], None] = lambda _: None,
) -> dict[str, list[Decision]]:  # fmt: skip
    """The decisions of each stream when one lane is fed these records, one after the other."""
    decided: dict[str, list[Decision]] = {}
    detectors = detector if isinstance(detector, tuple) else (detector or RowDetector(),)
    async with Pipeline(settings, detectors) as pipeline:

        def collect(lane: Lane) -> None:
            output = lane.take(pipeline.clock())
            assert output is not None
            for decision in output.decisions:
                decided.setdefault(decision.stream_id, []).append(decision)
                on_decision(decision)
            lane.done(output, range(len(output.journal)))

        pipeline.on_output = collect
        lane = pipeline.lane("llm.outputs", 0)
        for offset, record in enumerate(records):
            if record is SETTLE:
                await _settled(pipeline)
            else:
                pipeline.submit(lane, lane.feed(offset, 0, None, record, pipeline.clock(), 0))
        await _settled(pipeline)
    return decided


async def _settled(pipeline: Pipeline) -> None:
    while pipeline.waiting:
        await asyncio.sleep(0.0002)
