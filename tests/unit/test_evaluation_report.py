"""What the evaluation's tables say, on rows worked out by hand."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detectors.harms import COLUMNS, DEFAULT_THRESHOLDS
from training import report, rows, sets, tables
from training.metrics import Interval
from training.rows import Row
from training.scores import Judged, judge
from training.sets import Sets
from training.systems import FLOOR, SERVED, System, main_of
from training.tables import Table

VIOLENCE, HARMFUL = 0, 6


def row(number: int, **fields: Any) -> Row:
    defaults: dict[str, Any] = {
        "id": f"s/{number}", "source": "s", "kind": "reply", "conversation": (), "text": "x" * 50,
        "targets": (0.0,) * 7, "weights": (1.0,) * 7, "group": str(number), "dev": True,
    }  # fmt: skip
    return Row(**(defaults | fields))


def judged(*given: tuple[float, float, float]) -> Judged:
    """Rows of (harmful?, score of violence, score of harmful); violence is labelled as harmful."""
    some = [row(i, targets=(target, *(0.0,) * 5, target)) for i, (target, *_) in enumerate(given)]
    segments = [np.array([[violence, *[0.0] * 5, any_]]) for _, violence, any_ in given]
    return judge(some, segments, DEFAULT_THRESHOLDS)


# thresholds: violence 0.70, harmful 0.90
FOUR = judged((1, 0.8, 0.6), (1, 0.1, 0.4), (0, 0.75, 0.2), (0, 0.0, 0.5))


def test_a_verdict_counts_every_harm_and_the_ranking_only_its_column() -> None:
    """Both violent scores block; by `harmful`, three of four pairs are in order."""
    found = report.line(FOUR)
    assert (found.positives, found.negatives) == (2, 2)
    assert found.auroc.value == 0.75
    assert (found.precision, found.recall) == (0.5, 0.5)
    assert found.f1.value == 0.5
    assert found.false_blocks.value == 0.5


def test_a_column_by_itself_has_its_own_threshold() -> None:
    """No score of `harmful` is above 0.90, so nothing is blocked by it."""
    found = report.line(FOUR, HARMFUL, verdict=False)
    assert found.recall == 0
    assert math.isnan(found.precision)
    assert found.false_blocks.value == 0
    assert report.line(FOUR, VIOLENCE, verdict=False).recall == 0.5


def test_an_inferred_label_does_not_judge() -> None:
    """A weight below 1 trains; here it is left out, on either side."""
    some = [row(0, targets=(1.0,) * 7), row(1), row(2, weights=(0.3,) * 7)]
    scores = [np.full((1, 7), score) for score in (0.9, 0.1, 0.99)]
    found = report.line(judge(some, scores, DEFAULT_THRESHOLDS))
    assert (found.positives, found.negatives) == (1, 1)
    assert found.auroc.value == 1


def test_a_column_that_is_not_judged_has_no_figures() -> None:
    """A baseline that knows no violence gets no violence figure, not a bad one."""
    some = [row(0, targets=(1.0,) * 7), row(1)]
    scores = [np.full((1, 7), np.nan)] * 2
    found = report.line(judge(some, scores, DEFAULT_THRESHOLDS), VIOLENCE, verdict=False)
    assert (found.positives, found.negatives) == (1, 1)
    assert all(math.isnan(value) for value in found.short[2:])


def chosen(some: Sequence[Row]) -> Sets:
    stand_ins = [row for row in some if row.source in sets.STAND_INS]
    return Sets([], [], [], list(some), list(some), list(some), stand_ins)


def everything(names: Sequence[str]) -> tuple[list[System], Sets]:
    """Systems that score 40 rows of three sources, two of them stand-ins."""
    chance = np.random.default_rng(0)
    sources = ("alpaca_eval", "or_bench_hard", "tweeteval_hate")
    some = [
        row(
            i, source=sources[i % 3], kind=("reply", "prompt", "comment")[i % 3],
            targets=(float(i % 2),) * 7, group=str(i // 2), text="One. " * (10 + 30 * (i % 4)),
        )
        for i in range(40)
    ]  # fmt: skip
    known = {r.id: chance.random((2, 7)) * 0.9 + 0.1 * r.targets[0] for r in some}
    return [System(name, DEFAULT_THRESHOLDS, known) for name in names], chosen(some)


def test_every_table_has_every_system_and_reads_as_json() -> None:
    """Each table is as wide as its header, shows on both media, and its JSON has no NaN."""
    names = ["toxicity int8", SERVED, FLOOR]
    systems, some = everything(names)
    found = list(report.tables(systems, some, 40))
    assert len(found) == 10
    for table in found:
        wide = [cells for cells in table.rows if len(cells) > 1]
        assert wide, table.title
        assert {len(cells) for cells in wide} == {len(table.header)}
        assert len(set(table.header)) == len(table.header), "a figure would be lost in JSON"
        json.dumps(tables.plain(table), allow_nan=False)
        assert tables.markdown(table).count("\n|") == len(table.rows) + 2
    assert {cells[0] for cells in found[0].rows if len(cells) > 1} == set(names)
    harms = {cells[0] for cells in found[4].rows if len(cells) == 1}
    assert harms == set(COLUMNS)


def test_stand_ins_of_one_place_are_shown_together_and_apart() -> None:
    """F1 beside that of blocking everything: 2/3 of rows of which half are harmful."""
    some = [
        row(i, source=("beavertails_even", "saferlhf_mini")[i // 4], targets=(float(i % 2),) * 7)
        for i in range(8)
    ]
    known = {r.id: np.full((1, 7), 0.95 * r.targets[0]) for r in some}
    table = report.stand_ins([System("perfect", DEFAULT_THRESHOLDS, known)], chosen(some))
    headings = [cells[0] for cells in table.rows if len(cells) == 1]
    assert headings == [
        "preference-style answers (beavertails_even, saferlhf_mini)",
        "preference-style answers: beavertails_even", "preference-style answers: saferlhf_mini",
    ]  # fmt: skip
    f1 = {cells[0]: cells[5].value for cells in table.rows[:3] if len(cells) > 1}
    assert f1 == {"perfect": 1.0, "blocking everything": pytest.approx(2 / 3)}
    assert [cells[1:3] for cells in table.rows if len(cells) > 1][::2] == [(4, 4), (2, 2), (2, 2)]


def test_the_models_together_come_right_before_what_is_served() -> None:
    """They are what the long tables and the plots show."""
    systems, _ = everything(["a int8", "b int8", "a int8 + b int8", SERVED, "a fp32"])
    assert main_of(systems).name == "a int8 + b int8"


def test_a_system_without_a_row_is_not_shown_where_it_would_flatter() -> None:
    """False blocks are compared on the same texts only: who lacks one is left out."""
    systems, some = everything(["toxicity int8", SERVED])
    fewer = dict(list(systems[0].known.items())[:-1])
    table = report.false_blocks([systems[0]._replace(known=fewer), systems[1]], some)
    assert SERVED in {cells[0] for cells in table.rows}
    assert "toxicity int8" not in {cells[0] for cells in table.rows[:4]}


def test_texts_that_are_not_there_have_no_heading() -> None:
    """As long harmless replies of sources left out, where all of those calibrate."""
    systems, some = everything(["toxicity int8", SERVED])
    headings = [cells[0] for cells in report.false_blocks(systems, some).rows if len(cells) == 1]
    fewer = some._replace(long_harmless=[])
    left = [cells[0] for cells in report.false_blocks(systems, fewer).rows if len(cells) == 1]
    assert len(headings) == len(left) + 2


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.9174, ".917"), (1.0, "1.000"), (0.0, ".000"), (0.9996, "1.000"), (float("nan"), "-"),
        (1234, "1,234"), (None, "-"), (Interval(0.5, 0.25, 1.0), ".500 [.250, 1.000]"),
        (Interval(0.5, float("nan"), float("nan")), ".500"),
    ],
)  # fmt: skip
def test_a_figure_is_written_in_three_digits(value: object, text: str) -> None:
    """No zero before the point, so that columns are narrow."""
    assert tables.cell(value) == text


def test_markdown_marks_headings_and_numbers() -> None:
    """A row of one cell is a bold heading over the whole width."""
    table = Table("T", ("a", "b"), [("part",), ("x", 0.5)], "A note.")
    assert tables.markdown(table) == (
        "## T\n\n| a | b |\n| --- | ---: |\n| **part** |  |\n| x | .500 |\n\nA note."
    )


def test_a_larger_sample_keeps_the_smaller_one() -> None:
    """So that kept scores stay of use, and the order of the rows does not matter."""
    some = [row(i, source=f"s{i % 2}") for i in range(60)]
    few, more = sets._some(some, 5), sets._some(reversed(some), 20)
    assert len(few) == 10
    assert len(more) == 40
    assert {r.id for r in few} < {r.id for r in more}


def test_stand_ins_leave_out_prompts_of_training_and_of_choices(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And sources that stand in for nothing."""
    named = [row(i, source="beavertails_even", group=str(i)) for i in range(6)]
    other = [row(9, source="liar")]
    monkeypatch.setattr(rows, "read", lambda _: [*named, *other])
    used = [[row(0, group=group)] for group in "245"]
    parts = rows.Parts(fit=used[0], calibrate=used[1], report=[], unseen=[], unknown=used[2])
    found = sets._stand_ins(Path(__file__).parent, parts, 40)
    assert sorted(r.group for r in found) == ["0", "1", "3"]
