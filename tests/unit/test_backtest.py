"""backtest.py: what other thresholds would have decided."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from detectors.harms import DEFAULT_THRESHOLDS, HARMS
from worker.backtest import (
    Backtest,
    Estimate,
    Made,
    Sources,
    by_decision,
    parse_thresholds,
    plot,
    run,
    settle_labels,
    wilson,
)
from worker.cli import app
from worker.errors import Stop
from worker.events import Label
from worker.settings import LearnPolicy, Settings, TenantPolicy
from worker.thresholds import Thresholds

MODEL = "fake@000000"


def made(number: int, score: float, harm: str | None = None, **fields: Any) -> Made:
    """A decision whose violence has this score."""
    plain: dict[str, Any] = {
        "decision_id": f"in-0-{number}-0", "tenant": "a", "harm": harm,
        "scores": dict.fromkeys(HARMS, 0.0) | {"violence": score}, "harmful": score,
        "stage": "toxicity", "model": MODEL,
    }  # fmt: skip
    return Made(**(plain | fields))


def label(of: Made, harmful: bool, reviewer: str = "r", **fields: Any) -> Label:
    plain: dict[str, Any] = {
        "decision_id": of.decision_id, "stream_id": "s", "harm": "violence",
        "score": of.scores["violence"], "harmful": harmful, "reviewer": reviewer, "tenant": "a",
        "picked_with": 1.0,
    }  # fmt: skip
    return Label(**(plain | fields))


def again(
    decisions: list[Made], labels: list[Label], other: dict[str, float], **more: Any
) -> Backtest:
    settings = Settings()
    in_force = Thresholds({}, settings, MODEL).of
    backtest = Backtest(settings, in_force, other, by_decision(labels, settings), **more)
    for it in decisions:
        backtest.add(it)
    return backtest


def test_blocks_gained_and_lost_are_counted_by_harm() -> None:
    """Down to 0.6 two more block; `other` gives way to the type that now explains it."""
    decisions = [
        made(1, 0.75, "violence"), made(2, 0.65), made(3, 0.61), made(4, 0.6), made(5, 0.1),
        made(6, 0.65, "other", harmful=0.95), made(7, 1.0, "violence", stage="keyword"),
    ]  # fmt: skip
    violence, other = again(decisions, [], {"violence": 0.6}).rows()
    assert violence[:5] == ("violence", 2, 5, 3, 0)
    assert other[:5] == ("other", 1, 0, 0, 1)
    (stricter,) = again(decisions[:5], [], {"violence": 0.8}).rows()
    assert stricter[:5] == ("violence", 1, 0, 0, 1)


def test_precision_and_recall_are_those_of_the_labels() -> None:
    """Per harm, as decided and as it would have been."""
    decisions = [made(n, 0.65) for n in range(4)] + [made(n, 0.9, "violence") for n in range(4, 8)]
    labels = [label(it, n in {0, 1, 2, 4, 5, 6, 7}) for n, it in enumerate(decisions)]
    (row,) = again(decisions, labels, {"violence": 0.6}).rows()
    assert (row.precision.value, row.precision.labels) == (1.0, 4)
    assert (row.precision_then.value, row.precision_then.labels) == (7 / 8, 8)
    assert (row.recall.value, row.recall_then.value) == (4 / 7, 1.0)
    assert row.precision.low < 0.6
    assert row.precision.high == 1.0


def test_reviewers_are_settled_and_complaints_left_out() -> None:
    """The last word of each, most of them decide, a tie is harmless; who complains is no sample."""
    it = made(1, 0.9)
    for says, expected in (
        ([("a", True)], True), ([("a", True), ("a", False)], False),
        ([("a", True), ("b", False)], False), ([("a", True), ("b", False), ("c", True)], True),
    ):  # fmt: skip
        settled = settle_labels([label(it, harmful, who) for who, harmful in says], it)
        assert settled["violence"].harmful is expected
    assert not by_decision([label(it, True, picked_with=None)], Settings())


def test_forged_labels_and_strangers_are_left_out() -> None:
    """As the learner refuses them: another score or tenant, a reviewer who is none."""
    it = made(1, 0.9)
    for fields in ({"score": 0.8}, {"tenant": "b"}, {"harm": "spam"}):
        assert not settle_labels([label(it, True, **fields)], it)
    assert settle_labels([label(it, True)], it)
    staff = Settings(tenants={"a": TenantPolicy(learn=LearnPolicy(reviewers=("ann", "bob")))})
    labels = [label(it, True, who) for who in ("ann", "made up")]
    assert by_decision(labels, staff) == {it.decision_id: labels[:1]}


def test_weights_undo_the_sampling_and_intervals_cover() -> None:
    """Half the truth is in what is rarely picked: unweighted precision would be far off."""
    rng = random.Random(5)
    covered = 0
    for _ in range(200):
        decisions, labels, right = [], [], []
        for n in range(1_500):
            often = rng.random() < 0.5
            harmful = rng.random() < (0.95 if often else 0.6)
            decisions.append(made(n, 0.9, "violence"))
            right.append(harmful)
            if rng.random() < (0.5 if often else 0.1):
                labels.append(label(decisions[-1], harmful, picked_with=0.5 if often else 0.1))
        (row,) = again(decisions, labels, {}).rows()
        truth = sum(right) / len(right)
        covered += row.precision.low <= truth <= row.precision.high
        assert abs((row.precision.value or 0.0) - truth) < 0.15
    assert covered >= 180  # of 190 expected


def test_wilson_is_the_textbook_s() -> None:
    """81 of 263: 0.2553 to 0.3662 (Newcombe 1998)."""
    low, high = wilson(81 / 263, 263)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)


def test_only_the_tenant_and_the_model_that_is_asked_for() -> None:
    """Scores of another model mean something else; it says which there are."""
    decisions = [made(1, 0.9), made(2, 0.9, tenant="b"), made(3, 0.9, model="fake@111111")]
    backtest = again(decisions, [], {}, tenant="a", model=MODEL)
    assert backtest.decisions == 1
    assert dict(backtest.models) == {MODEL: 1, "fake@111111": 1}


@pytest.mark.parametrize(
    ("text", "reason"),
    [("spam=0.5", "unknown harm"), ("violence", "write it as"), ("violence=2", "lies in 0..1"),
     ("violence=nan", "lies in 0..1")],
)  # fmt: skip
def test_nonsense_thresholds_are_refused(text: str, reason: str) -> None:
    """With what to write instead."""
    with pytest.raises(Stop, match=reason):
        parse_thresholds([text])


def write(path: Path, rows: list[Any]) -> Path:
    import msgspec

    path.write_bytes(b"\n".join(map(msgspec.json.encode, rows)))
    return path


async def test_files_need_no_broker(tmp_path: Path) -> None:
    """Settings' thresholds hold for the rest; lines that are no decision are passed over."""
    file = write(tmp_path / "d.jsonl", [made(1, 0.65), {"no": "decision"}, made(2, 0.9)])
    labels = write(tmp_path / "l.jsonl", [label(made(1, 0.65), True), {"no": "label"}])
    settings = Settings(tenants={"a": TenantPolicy(thresholds={"violence": 0.95})})
    sources = Sources(file, labels, 0)
    found, other = await run(settings, {}, MODEL, ["violence=0.6"], sources, None, None)
    assert other == {"violence": 0.6}
    assert found.rows()[0][:5] == ("violence", 0, 2, 2, 0)
    found, _ = await run(settings, {}, MODEL, ["hate_speech=0.6"], sources, None, None)
    assert sum(row.then for row in found.rows()) == 0
    with pytest.raises(Stop, match="no decision of other@1; there are: 2 of fake@000000"):
        await run(settings, {}, MODEL, ["violence=0.6"], sources, None, "other@1")


def test_the_command_prints_a_table_or_lines(tmp_path: Path) -> None:
    """`tidegate backtest` on files."""
    file = write(tmp_path / "d.jsonl", [made(1, 0.65), made(2, 0.9, "violence")])
    arguments = ["backtest", "--decisions", str(file), "--model", MODEL]
    environment = {"TIDEGATE_DETECTORS": '["python:detectors.constant:Constant"]'}
    chosen = ["--threshold", "violence=0.6"]
    shown = CliRunner().invoke(app, [*arguments, *chosen], env=environment)
    assert shown.exit_code == 0, shown.output
    assert "2 decisions again" in shown.output
    assert "…" not in shown.output  # 80 characters wide
    blocked, now, then = (
        line.split()
        for line in shown.output.splitlines()
        if "violence" in line or (" then " in line and "blocked" not in line)
    )
    assert blocked == ["violence", "1", "2", "1", "0"]
    assert (now[:3], then[:2]) == (["violence", "now", "0"], ["then", "0"])
    lines = CliRunner().invoke(app, [*arguments, *chosen, "--json"], env=environment)
    row = json.loads(lines.stdout.splitlines()[0])
    assert (row["harm"], row["blocks"], row["then"], row["gained"]) == ("violence", 1, 2, 1)
    nothing = CliRunner().invoke(app, arguments, env=environment)
    assert isinstance(nothing.exception, Stop)


def labelled() -> Backtest:
    decisions = [made(n, 0.5 + n / 250) for n in range(100)]
    return again(decisions, [label(it, n > 30) for n, it in enumerate(decisions)], {})


def test_curve_is_precision_above_each_threshold() -> None:
    """Strict ones with no label above them are left out."""
    curve = dict(labelled().curve("violence"))
    assert (curve[0.4].value, curve[0.4].labels) == (0.69, 100)
    assert curve[0.7].value == 1.0
    assert max(curve) < 0.9
    assert not labelled().curve("hate_speech")


def test_plot_without_matplotlib_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It is an extra."""
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(Stop, match=r"pip install 'tidegate\[plot\]'"):
        plot(labelled(), {}, tmp_path / "p.png")


def test_plot_has_a_panel_for_each_harm_with_labels(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its curve, its interval, and the threshold that is asked about. matplotlib is an extra, so
    this holds what is drawn, not how."""
    import sys
    from unittest.mock import MagicMock

    drawn = MagicMock()
    figure = drawn.Figure.return_value
    axis = figure.subplots.return_value[0].__iter__.return_value = [MagicMock()]
    monkeypatch.setitem(sys.modules, "matplotlib.figure", drawn)
    plot(labelled(), {"violence": 0.6}, tmp_path / "p.png")
    figure.subplots.assert_called_once_with(1, 1, squeeze=False, sharey=True)
    at, shares = axis[0].plot.call_args.args
    assert dict(zip(at, shares, strict=True))[0.4] == 0.69
    assert axis[0].axvline.call_args.args == (0.6,)
    assert figure.savefig.call_args.args == (tmp_path / "p.png",)
    with pytest.raises(Stop, match="nothing to plot"):
        plot(again([made(1, 0.9)], [], {}), {}, tmp_path / "p.png")


def test_an_estimate_of_nothing_says_so() -> None:
    """No label, no figure."""
    assert Estimate.of([]).value is None
    assert DEFAULT_THRESHOLDS["violence"] == 0.7  # as the tests above take it
