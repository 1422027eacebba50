"""`tidegate moderate`: worker/offline.py and the command around it."""

import asyncio
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from detectors.protocol import Encoded, FloatArray
from tests import oracle
from tests.fakes import RowDetector, delta_records, row_of
from worker.errors import Stop
from worker.events import Decision
from worker.offline import MAX_LINE_BYTES, Line, Offline, read_lines
from worker.settings import HERE, Settings

RULES = oracle.Rules(12, 60, short_chars=3)
SETTINGS = Settings(
    min_segment_chars=12, max_segment_chars=60, short_chars=3, cache_entries=0,
    max_dead_letters_in_row=5,
)  # fmt: skip


class Uneven(RowDetector):
    """Takes any time for a batch, so that batches overtake each other."""

    def score(self, batch: Sequence[Encoded]) -> FloatArray:
        """(B, 7)"""
        time.sleep(random.random() * 0.01)
        return super().score(batch)


class Run:
    """Runs lines through `Offline` and keeps what comes out."""

    def __init__(self, settings: Settings = SETTINGS, detector: RowDetector | None = None) -> None:
        self.decisions: list[Decision] = []
        self.reports: list[tuple[int, str, str]] = []
        self.offline = Offline(
            settings, self.decisions.append, lambda *report: self.reports.append(report),
            detectors=[detector or RowDetector()],
        )  # fmt: skip

    def over(self, lines: Sequence[bytes], at_once: int = 7) -> "Run":
        """Judge the lines, so many of them coming at once."""
        asyncio.run(self.offline.run(_chunks(lines, at_once)))
        return self

    def of(self, stream_id: str) -> list[Decision]:
        """One stream's decisions."""
        return [decision for decision in self.decisions if decision.stream_id == stream_id]


async def _chunks(lines: Sequence[bytes], at_once: int) -> AsyncIterator[list[Line]]:
    numbered = [Line(number, line) for number, line in enumerate(lines, 1)]
    for begin in range(0, len(numbered), at_once):
        yield numbered[begin : begin + at_once]


def interleaved(count: int, seed: int = 1) -> tuple[dict[str, str], list[bytes]]:
    """Texts, and their deltas as lines in random order between streams."""
    chance = random.Random(seed)
    texts, queues = {}, []
    for number in range(count):
        words = [f"Word {number} {i}{chance.choice('.,!')} " for i in range(chance.randrange(30))]
        texts[f"s{number}"] = "".join(words)
        queues.append(delta_records(f"s{number}", words or [""]))
    lines = []
    while queues := [queue for queue in queues if queue]:
        lines.append(chance.choice(queues).pop(0))
    return texts, lines


def expected(text: str, rules: oracle.Rules = RULES) -> list[tuple[Any, ...]]:
    """What must be decided about a stream's text."""
    return [
        (e.start, e.end, e.verdict, e.released_to, e.final, e.harm)
        for e in oracle.expect(text, rules, row_of)
    ]


def seen(decisions: Sequence[Decision]) -> list[tuple[Any, ...]]:
    """The same parts of what was decided."""
    return [(d.start, d.end, d.verdict, d.released_to, d.final, d.harm) for d in decisions]


@pytest.mark.parametrize("lookahead", [0, 1, 2])
def test_same_output_however_it_runs(lookahead: int) -> None:
    """The decisions are the oracle's, their ids name the line, and their order is the same however
    the lines come and whichever batch is scored first: that in which segments were complete."""
    chosen = SETTINGS.model_copy(update={"lookahead_segments": lookahead, "infer_threads": 4})
    texts, lines = interleaved(60)
    runs = [Run(chosen, Uneven()).over(lines, at_once) for at_once in (1, 50, 10_000)]
    ids = [[decision.decision_id for decision in run.decisions] for run in runs]
    assert ids[0] == ids[1] == ids[2]
    rules = RULES._replace(lookahead_segments=lookahead)
    for stream_id, text in texts.items():
        assert seen(runs[0].of(stream_id)) == expected(text, rules)
    if not lookahead:
        order = [tuple(map(int, it.split("-")[-2:])) for it in ids[0]]
        assert order == sorted(order)
    for decision in runs[0].decisions:
        line = json.loads(lines[int(decision.decision_id.split("-")[2])])
        assert (line["stream_id"], line["seq"]) == (decision.stream_id, decision.seq)


def test_what_is_open_at_the_end() -> None:
    """Streams without a final delta are judged as they stand; one that misses a part is blocked."""
    words = ["One sentence here. ", "Another one there. ", "A third."]
    lines = [record for name in "ab" for record in delta_records(name, words)[:-1]]
    gap = delta_records("gap", words)
    run = Run().over([*lines, gap[0], gap[2], *delta_records("whole", words)])
    for name in "ab":
        assert seen(run.of(name)) == expected("".join(words[:2]))
    assert [(d.verdict, d.reason, d.final) for d in run.of("gap")][-1] == ("block", "gap", True)
    assert run.of("gap")[-1].end == len(words[0])
    assert seen(run.of("whole")) == expected("".join(words))


def test_late_repeats_are_nothing() -> None:
    """Repeated deltas, and deltas of a stream that has ended, decide nothing more."""
    lines = delta_records("s", ["One sentence here. ", "Another one there. ", "A third."])
    once = Run().over(lines)
    again = Run().over([lines[0], *lines, *lines[1:], *lines])
    assert seen(again.decisions) == seen(once.decisions)


def test_unreadable_lines() -> None:
    """Each is reported with its number and a reason without its text, and the rest is judged."""
    good = delta_records("s", ["One sentence here. ", "And another there."])
    bad = [b'{"stream_id": "s", "seq": "secret"}', b"secret", b"\xff\xfe", b"[" * 100_000]
    run = Run().over([good[0], *bad, good[1], b"x" * (MAX_LINE_BYTES + 1)])
    assert [number for number, _, _ in run.reports] == [2, 3, 4, 5, 7]
    assert run.reports[0][1:] == ("Expected `int`, got `str`", "seq")
    assert "longer than" in run.reports[-1][1]
    assert "secret" not in str(run.reports)
    assert (run.offline.lines, run.offline.unreadable) == (7, 5)
    assert run.decisions[-1].final
    assert {d.stream_id for d in run.decisions} == {"s"}


def test_too_many_unreadable_lines() -> None:
    """More than max_dead_letters_in_row stop the run, after what was complete is written."""
    good = delta_records("s", ["One sentence here. ", "And another there."])
    run = Run()
    with pytest.raises(BaseExceptionGroup) as raised:
        run.over([*good, *[b"nothing"] * 6, *delta_records("late", ["x"])], at_once=100)
    stop = raised.value.exceptions[0]
    assert isinstance(stop, Stop)
    assert "up to line 8" in str(stop)
    assert len(run.reports) == 6
    assert {decision.stream_id for decision in run.decisions} == {"s"}
    assert run.decisions[-1].final


def test_memory_is_bounded() -> None:
    """Few segments wait at once, and of 3,000 ended streams nothing but their last ids stays."""
    run = Run(SETTINGS.model_copy(update={"max_waiting_segments": 40}))
    most = 0

    def write(decision: Decision) -> None:
        nonlocal most
        most = max(most, len(run.offline._order), len(run.offline._order._made))

    run.offline._write = write
    lines = [
        line for i in range(3_000) for line in delta_records(f"s{i}", [f"Text {i} here. "] * 3)
    ]
    run.over(lines, at_once=5_000)
    lane = run.offline._lane
    assert 0 < most < 60
    assert run.offline.streams == 3_000
    assert not run.offline._order._cut
    assert (lane.open_streams, lane.closed_streams) == (0, 3_000)
    assert not lane._journal_offsets
    lane.forget_closed(10)
    assert lane.closed_streams == 10


def test_more_open_streams_than_allowed() -> None:
    """Beyond max_open_streams those silent longest end as they stand."""
    run = Run(SETTINGS.model_copy(update={"max_open_streams": 10}))
    run.over([delta_records(f"s{i}", [f"Text {i} here. ", ""])[0] for i in range(30)])
    assert [decision.stream_id for decision in run.decisions] == [f"s{i}" for i in range(30)]
    assert all(decision.final for decision in run.decisions)


def test_lines() -> None:
    """Lines are numbered as an editor does, blank ones and a byte order mark left out, and one that
    is far too long is cut off."""
    long = b"y" * (3 * MAX_LINE_BYTES)
    whole = b"\xef\xbb\xbfa\r\n\n  \n" + long + b"\nlast"

    class Slow:
        def __init__(self) -> None:
            self.at = 0

        def read(self, size: int, /) -> bytes:
            piece = whole[self.at : self.at + min(size, 50_021)]
            self.at += len(piece)
            return piece

    lines = [line for chunk in read_lines(Slow()) for line in chunk]
    assert [line.number for line in lines] == [1, 4, 5]
    assert (lines[0].value, lines[2].value) == (b"a\r", b"last")
    assert MAX_LINE_BYTES < len(lines[1].value) < MAX_LINE_BYTES + 200_000


# -- the command ----------------------------------------------------------------------------------


ENV = {
    **{k: v for k, v in os.environ.items() if not k.startswith("TIDEGATE_")},
    "PYTHONPATH": str(HERE), "TIDEGATE_DETECTORS": '["python:tests.fakes:RowDetector"]',
    "TIDEGATE_MIN_SEGMENT_CHARS": "12", "TIDEGATE_MAX_SEGMENT_CHARS": "60",
    "TIDEGATE_SHORT_CHARS": "3", "TIDEGATE_MAX_DEAD_LETTERS_IN_ROW": "5",
}  # fmt: skip
COMMAND = [sys.executable, "-m", "worker.cli", "moderate"]


def run_command(
    *arguments: str, given: bytes = b"", cwd: Path | None = None
) -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run(
        [*COMMAND, *arguments], input=given, capture_output=True, env=ENV, timeout=120, cwd=cwd,
        check=False,
    )  # fmt: skip


def test_file_and_stdin_give_the_same(tmp_path: Path) -> None:
    """From a file to a file and from stdin to stdout: the same decisions, byte for byte apart from
    the times; unreadable lines are told on stderr as JSON, and the run succeeds."""
    texts, lines = interleaved(20)
    given = b"\n".join([*lines[:5], b"{nonsense", *lines[5:]])
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(given)
    piped = run_command(given=given, cwd=tmp_path)
    filed = run_command("--input", str(source), "--output", str(target), cwd=tmp_path)
    assert (piped.returncode, filed.returncode, filed.stdout) == (0, 0, b"")
    told = [json.loads(line) for line in piped.stderr.splitlines()]
    assert told == [{"line": 6, "reason": "not JSON"}, {"lines": len(lines) + 1, "unreadable": 1}]
    records = [[json.loads(line) for line in out.splitlines()]
               for out in (piped.stdout, target.read_bytes())]  # fmt: skip
    for record in (*records[0], *records[1]):
        assert record.pop("ts_ms") > 0
        assert record.pop("timing_ms")["total"] >= 0
    assert records[0] == records[1]
    assert {record["stream_id"] for record in records[0]} == set(texts)


def test_scores_only(tmp_path: Path) -> None:
    """One line a stream: the highest score of each harm over its segments, and the last verdict."""
    texts, lines = interleaved(12)
    done = run_command("--scores-only", given=b"\n".join(lines), cwd=tmp_path)
    found = {it["stream_id"]: it for it in map(json.loads, done.stdout.splitlines())}
    assert set(found) == set(texts)
    for stream_id, text in texts.items():
        decided = oracle.expect(text, RULES, row_of)
        line = found[stream_id]
        assert list(line) == ["stream_id", "scores", "harmful", "verdict"]
        row = [max(column) for column in zip(*(e.row for e in decided), strict=True)]
        assert [*line["scores"].values(), line["harmful"]] == row
        assert line["verdict"] == decided[-1].verdict


def test_decisions_come_before_the_input_ends(tmp_path: Path) -> None:
    """Fed by a pipe that stays open, decisions come as soon as they are made."""
    process = subprocess.Popen(
        COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ENV, cwd=tmp_path
    )
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        for name in ("first", "second"):
            process.stdin.write(delta_records(name, ["A whole text."])[0] + b"\n")
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["stream_id"] == name
        process.stdin.close()
        assert process.wait(30) == 0


def test_a_reader_that_leaves(tmp_path: Path) -> None:
    """When the reader of the output has seen enough, as `head` has, the command ends in silence."""
    lines = [line for i in range(3_000) for line in delta_records(f"s{i}", ["A whole text. " * 9])]
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))
    with subprocess.Popen(
        [*COMMAND, "--input", "in.jsonl"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENV,
        cwd=tmp_path,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert (process.wait(60), process.stderr.read()) == (0, b"")


def test_failures_say_what_to_do(tmp_path: Path) -> None:
    """A missing input, an output that cannot be written or is the input, lines that are no deltas:
    one message, and an exit status that is not 0."""
    source = tmp_path / "in.jsonl"
    source.write_bytes(b"\n".join([b"nonsense"] * 20))
    missing = run_command("--input", "nowhere.jsonl", cwd=tmp_path)
    same = run_command("--input", "in.jsonl", "--output", "in.jsonl", cwd=tmp_path)
    full = run_command(
        "--output", "/dev/full", given=delta_records("s", ["Text."])[0], cwd=tmp_path
    )
    garbage = run_command("--input", "in.jsonl", cwd=tmp_path)
    for done, words in [
        (missing, b"does not exist"), (same, b"name another output"), (full, b"No space"),
        (garbage, b"up to line 6"),
    ]:  # fmt: skip
        assert done.returncode != 0
        assert words in done.stderr
        assert b"Traceback" not in done.stderr
    assert source.read_bytes().startswith(b"nonsense")
