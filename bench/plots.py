"""Draws docs/thresholds.png from what bench/thresholds.py kept. Needs matplotlib alone.

.venv-train/bin/python -m bench.plots runs/thresholds/drawn/plot.json docs/thresholds.png
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt

INK, GREY, PALE = "#1b1f24", "#6e7781", "#d8dee4"
COLOURS = {"certified": "#0b6e6e", "step": "#d1662a"}
TRUTH = "#8250df"
DASHES = (0, (4, 3))
STYLE = {
    "font.family": "DejaVu Sans", "font.size": 9, "text.color": INK, "axes.edgecolor": GREY,
    "axes.labelcolor": INK, "xtick.color": GREY, "ytick.color": GREY, "axes.titlesize": 10,
    "axes.spines.top": False, "axes.spines.right": False, "axes.titleweight": "bold",
    "axes.titlelocation": "left",
}  # fmt: skip
TICKS = (0, 1, 2, 5, 10, 20, 50, 100)


def draw(figures: dict[str, Any], path: Path) -> None:
    """How often a threshold was wrong, and what was in force while labels came in."""
    with mpl.rc_context(STYLE):
        figure = plt.figure(figsize=(11, 8.4), layout="constrained")
        grid = figure.add_gridspec(2, 3, height_ratios=[1.25, 1])
        _shares(figure.add_subplot(grid[0, :]), figures)
        for at, name in enumerate(("calibrated", "badly calibrated", "drifting")):
            courses = [it for it in figures["courses"] if it["scenario"] == name]
            _courses(figure.add_subplot(grid[1, at]), name, courses)
        figure.savefig(path, dpi=150)
        plt.close(figure)


def _shares(axes: Any, figures: dict[str, Any]) -> None:
    """Share of histories in which a learnt threshold was ever below target, with 95 % intervals."""
    names = list(dict.fromkeys(it["scenario"] for it in figures["shares"]))
    for it in figures["shares"]:
        colour, up = COLOURS[it["method"]], 0.14 if it["method"] == "certified" else -0.14
        row = len(names) - names.index(it["scenario"]) + up
        span, share = [100 * it["low"], 100 * it["high"]], 100 * it["share"]
        axes.plot(span, [row, row], color=colour, lw=5, alpha=0.3, solid_capstyle="round")
        axes.plot(share, row, "o", color=colour, ms=5)
        crosses = span[1] < 100 * figures["delta"] < 1.4 * span[1]  # the text would
        where = (100 * figures["delta"] if crosses else span[1], row)
        beside = {"xytext": (9, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(f"{share:.1f} %", where, color=colour, fontsize=8, **beside)
    axes.axvline(100 * figures["delta"], color=INK, lw=1, ls=DASHES)
    axes.text(100 * figures["delta"] * 1.03, len(names) + 0.62, "delta", va="center")
    axes.set_xscale("symlog", linthresh=10, linscale=1.6)
    axes.set_xlim(-0.25, 170)
    axes.set_xticks(TICKS, [f"{it} %" for it in TICKS])
    axes.set_ylim(0.4, len(names) + 0.9)
    axes.set_yticks(range(len(names), 0, -1), names, color=INK)
    axes.tick_params(axis="both", length=0)
    axes.grid(axis="x", color=PALE, lw=0.6)
    axes.set_axisbelow(True)
    told = f"{figures['histories']:,} histories each, bars: 95 % intervals"
    axes.set_title(f"Histories in which a learnt threshold was ever below its target   ({told})")
    for at, (name, colour) in enumerate(COLOURS.items()):
        axes.text(
            0.44, 0.94 - 0.06 * at, name, color=colour, weight="bold", transform=axes.transAxes
        )


def _courses(axes: Any, name: str, courses: list[dict[str, Any]]) -> None:
    """Thresholds in force over the labels: the median and the middle 90 % of histories."""
    for it in sorted(courses, key=lambda it: it["method"], reverse=True):
        colour = COLOURS[it["method"]]
        low, middle, high = it["quantiles"]
        labels = [it["labels"] * (at + 1) / len(middle) for at in range(len(middle))]
        axes.fill_between(labels, low, high, color=colour, alpha=0.15, lw=0, step="post")
        axes.step(labels, middle, color=colour, lw=2, where="post")
    end, changes, (before, after) = (courses[0][it] for it in ("labels", "changes", "right"))
    for begin, until, right in ((0, changes, before), (changes, end, after)):
        if begin < until:
            axes.fill_between([begin, until], 0.48, right, color=TRUTH, alpha=0.07, lw=0)
            axes.plot([begin, until], [right, right], color=TRUTH, lw=1.2, ls=DASHES)
    if changes < end:
        axes.text(changes + 0.01 * end, 0.955, "drift", color=TRUTH, va="top")
    axes.text(0.98 * end, 0.49, "precision below target", color=TRUTH, ha="right", va="bottom")
    axes.set_ylim(0.48, 0.97)
    axes.set_xlim(0, end)
    axes.set_title(name)
    axes.set_xlabel("labels")
    axes.set_ylabel("threshold in force")


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
