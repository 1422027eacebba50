"""Plots of a run and of its scores, as PNG: loss, precision-recall, reliability, score histograms.

`python -m training.plots --run RUN` draws the loss; `training.evaluate --out` draws the others.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import matplotlib as mpl
import numpy as np

from detectors.harms import COLUMNS
from detectors.protocol import FloatArray
from training import metrics

CURVE: Final = "curve.jsonl"  # of a run: {"step", "loss"} a line, some with "held_out"
_COLOURS: Final = ("#1f6feb", "#d1791f", "#6b7280", "#2a9d5c")  # one a system
_STYLES: Final = {"report": "-", "unseen": "--"}
_SAYS: Final = {"report": "prompts held out", "unseen": "sources left out"}
_HARMLESS, _HARMFUL, _LIMIT = "#8b98a9", "#c2382f", "#111827"
_DPI: Final = 130
_FEW: Final = 10  # harmful rows below which a curve says nothing


class Drawn(NamedTuple):
    """One system on one part."""

    system: str
    part: str
    points: Mapping[str, tuple[FloatArray, FloatArray]]  # column -> targets, probabilities
    limits: Mapping[str, float]  # column -> threshold


def main(argv: Sequence[str] | None = None) -> None:
    """Draws a run's loss."""
    parser = argparse.ArgumentParser(prog="python -m training.plots", description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help=f"run folder with {CURVE}")
    run: Path = parser.parse_args(argv).run
    loss(run / CURVE, run / "loss.png")
    print(f"written: {run / 'loss.png'}")


def loss(curve: Path, target: Path) -> None:
    """Training loss, smoothed, and the held-out loss over the steps."""
    lines = [json.loads(line) for line in curve.read_text(encoding="utf-8").splitlines()]
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    learnt = np.array([(line["step"], line["loss"]) for line in lines if "loss" in line])
    held = np.array([(line["step"], line["held_out"]) for line in lines if "held_out" in line])
    if len(learnt):
        axes.plot(*learnt.T, color=_COLOURS[0], alpha=0.25, linewidth=0.8)
        axes.plot(
            learnt[:, 0], _smooth(learnt[:, 1]), color=_COLOURS[0], label="training, smoothed"
        )
    if len(held):
        axes.plot(*held.T, "o-", color=_HARMFUL, markersize=4, label="held out")
    axes.set(xlabel="step", ylabel="loss", title="Loss")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    _plain(axes)
    figure.savefig(target, dpi=_DPI)
    pyplot.close(figure)


def harms(folder: Path, drawn: Sequence[Drawn]) -> None:
    """precision_recall.png, reliability.png and scores.png: a small plot a harm."""
    first = drawn[0].system
    ours = [one for one in drawn if one.system == first]
    _page(
        folder / "precision_recall.png", "Precision over recall", drawn, _precision_recall,
        "Dots: the thresholds that ship.\nAbove each plot: harmful of all texts, by part.",
    )  # fmt: skip
    _page(
        folder / "reliability.png", f"Reliability: {first}", ours, _reliability,
        f"Dots grow with the texts in a bin;\nbins of fewer than {_FEW} are not joined.",
    )  # fmt: skip
    _page(folder / "scores.png", f"Scores, both parts: {first}", ours, _histogram)


def _page(
    target: Path, title: str, drawn: Sequence[Drawn],
    draw: Callable[[Any, str, Sequence[Drawn]], None], note: str = "",
) -> None:  # fmt: skip
    """Seven small plots, the legend in the eighth place."""
    pyplot = _pyplot()
    figure, grid = pyplot.subplots(2, 4, figsize=(15, 7.6), layout="constrained")
    places = grid.flatten()
    for axes, column in zip(places, COLUMNS, strict=False):
        draw(axes, column, drawn)
        _plain(axes)
    handles, labels = max(
        (axes.get_legend_handles_labels() for axes in places), key=lambda it: len(it[0])
    )
    places[-1].axis("off")
    places[-1].legend(handles, labels, loc="center left", frameon=False, fontsize=10)
    places[-1].text(0.05, 0.12, note, fontsize=9, color="#4b5563", transform=places[-1].transAxes)
    figure.suptitle(title, fontsize=13, x=0.01, ha="left")
    figure.savefig(target, dpi=_DPI)
    pyplot.close(figure)


def _precision_recall(axes: Any, column: str, drawn: Sequence[Drawn]) -> None:
    systems = list(dict.fromkeys(one.system for one in drawn))
    for one in drawn:
        targets, scores = one.points[column]
        label = f"{one.system}, {_SAYS[one.part]}"
        style = {"color": _COLOURS[systems.index(one.system)], "linestyle": _STYLES[one.part]}
        if targets.sum() < _FEW or np.isnan(scores).any():
            axes.plot([], [], label=label, **style)  # for the legend
            continue
        recall, precision = metrics.precision_recall(targets, scores)
        axes.step([0, *recall], [precision[0], *precision], where="post", label=label, **style)
        if one.system == systems[0]:
            _mark(axes, targets, scores, one.limits[column], style["color"])
    axes.set_title(_counted(column, drawn), fontsize=10.5)
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision")


def _counted(column: str, drawn: Sequence[Drawn]) -> str:
    """The harm, and how many texts of each part have it."""
    parts = {one.part: one.points[column][0] for one in drawn}
    counts = "; ".join(f"{int(t.sum())} of {len(t)}" for t in parts.values())
    return f"{column.replace('_', ' ')}: {counts}"


def _mark(axes: Any, targets: FloatArray, scores: FloatArray, limit: float, colour: str) -> None:
    """A dot where the shipped threshold lies."""
    above = scores > limit
    if above.any():
        recall, precision = targets[above].sum() / targets.sum(), targets[above].mean()
        axes.plot(recall, precision, "o", color=colour, markersize=6, markeredgecolor="white")


def _reliability(axes: Any, column: str, drawn: Sequence[Drawn]) -> None:
    axes.plot([0, 1], [0, 1], color="#c3c8cf", linewidth=1, label="as predicted")
    for number, (one, colour) in enumerate(zip(drawn, _COLOURS, strict=False)):
        targets, scores = one.points[column]
        if not len(targets):
            continue
        bins = metrics.reliability(targets, scores)
        sizes = 8 + 130 * bins.counts / bins.counts.max()
        axes.scatter(bins.predicted, bins.observed, sizes, color=colour, alpha=0.85, linewidths=0)
        line = np.where(bins.counts >= _FEW, bins.observed, np.nan)
        axes.plot(bins.predicted, line, _STYLES[one.part], color=colour, label=_SAYS[one.part])
        error = float(metrics.calibration_error(targets, scores))
        axes.text(
            0.03, 0.92 - 0.08 * number, f"ECE {error:.3f}", color=colour, fontsize=9,
            transform=axes.transAxes, bbox={"color": "white", "alpha": 0.8, "pad": 1},
        )  # fmt: skip
    axes.set_title(_counted(column, drawn), fontsize=10.5)
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xlabel="predicted", ylabel="share harmful")


def _histogram(axes: Any, column: str, drawn: Sequence[Drawn]) -> None:
    targets = np.concatenate([one.points[column][0] for one in drawn])
    scores = np.concatenate([one.points[column][1] for one in drawn])
    edges = np.linspace(0, 1, 26)
    sides = [scores[targets == wanted] for wanted in (0, 1)]
    axes.hist(sides, edges, color=(_HARMLESS, _HARMFUL), label=("harmless", "harmful"))
    axes.axvline(drawn[0].limits[column], color=_LIMIT, linestyle=":", label="threshold")
    axes.set_yscale("symlog", linthresh=1)
    axes.set_yticks([0, 1, 10, 100, 1000], ["0", "1", "10", "100", "1,000"])
    axes.set_ylim(0, 3000)
    axes.set_title(f"{column.replace('_', ' ')}", fontsize=10.5)
    axes.set(xlim=(0, 1), xlabel="score", ylabel="texts")


def _smooth(values: FloatArray, share: float = 0.03) -> FloatArray:
    """Means over a window of some steps, of what there is at the ends."""
    width = max(1, int(len(values) * share))
    kernel = np.ones(width)
    counts = np.convolve(np.ones(len(values)), kernel, mode="same")
    smoothed: FloatArray = np.convolve(values, kernel, mode="same") / counts
    return smoothed


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#eef0f2", linewidth=0.8)
    axes.set_axisbelow(True)


def _pyplot() -> Any:
    mpl.use("Agg")  # files only: no screen is asked for
    from matplotlib import pyplot as plt

    return plt


if __name__ == "__main__":
    main()
