"""Plots for docs/, from figures that a benchmark kept. Needs matplotlib: the train extra."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib import pyplot as plt

if TYPE_CHECKING:
    from bench.thresholds import Figures

INK, GREY, PALE = "#1b1f24", "#6e7781", "#d8dee4"
OURS, STEP, TRUTH = "#0b6e6e", "#d1662a", "#8250df"

mpl.use("Agg")


def thresholds(figures: Sequence["Figures"], path: Path) -> None:
    """How often a threshold was wrong, and what was in force while labels came in."""
    style = {
        "font.family": "DejaVu Sans", "font.size": 9, "text.color": INK, "axes.edgecolor": GREY,
        "axes.labelcolor": INK, "xtick.color": GREY, "ytick.color": GREY,
        "axes.spines.top": False, "axes.spines.right": False, "axes.titleweight": "bold",
        "axes.titlesize": 10, "axes.titlelocation": "left",
    }  # fmt: skip
    with mpl.rc_context(style):
        figure = plt.figure(figsize=(11, 8.4), layout="constrained")
        grid = figure.add_gridspec(2, 3, height_ratios=[1.25, 1])
        _wrong(figure.add_subplot(grid[0, :]), figures)
        for at, name in enumerate(("calibrated", "badly calibrated", "drifting")):
            both = {it.method: it for it in figures if it.scenario == name}
            _courses(figure.add_subplot(grid[1, at]), name, both, legend=at == 0)
        figure.savefig(path, dpi=150)
        plt.close(figure)


def _wrong(axes: Any, figures: Sequence["Figures"]) -> None:
    """Share of histories in which a learnt threshold was ever below target, with 95 % intervals."""
    from bench.thresholds import DELTA, SCENARIOS, wilson

    names = [it.name for it in SCENARIOS if any(f.scenario == it.name for f in figures)]
    for it in figures:
        ours = it.method == "certified"
        row = len(names) - names.index(it.scenario) + (0.13 if ours else -0.13)
        count = max(it.wrong_certificate, it.wrong_in_force) if ours else it.wrong_in_force
        low, high = wilson(count, it.histories)
        colour = OURS if ours else STEP
        axes.plot(
            [100 * low, 100 * high],
            [row, row],
            color=colour,
            lw=5,
            alpha=0.3,
            solid_capstyle="round",
        )
        axes.plot(100 * count / it.histories, row, "o", color=colour, ms=6)
        said = f"{100 * count / it.histories:.1f} %"
        axes.annotate(
            said, (100 * high, row), (8, 0), textcoords="offset points", va="center", color=colour
        )
    axes.axvline(100 * DELTA, color=INK, lw=1, ls=(0, (4, 3)))
    axes.annotate(
        "delta = 5 %",
        (100 * DELTA, len(names) + 0.75),
        (4, 0),
        textcoords="offset points",
        va="center",
    )
    axes.set_xscale("symlog", linthresh=10, linscale=1.4)
    axes.set_xlim(-0.3, 160)
    axes.set_xticks([0, 1, 2, 5, 10, 20, 50, 100], ["0", "1", "2", "5", "10", "20", "50", "100 %"])
    axes.set_ylim(0.4, len(names) + 1.05)
    axes.set_yticks(range(len(names), 0, -1), names, color=INK)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=PALE, lw=0.6)
    axes.set_axisbelow(True)
    histories = max(it.histories for it in figures)
    title = "Histories in which a learnt threshold was ever below its precision target"
    axes.set_title(f"{title} ({histories:,} each, 95 % intervals)")
    for name, colour, at in (("certified", OURS, 0.9), ("step", STEP, 0.84)):
        axes.text(0.99, at, name, color=colour, weight="bold", ha="right", transform=axes.transAxes)


def _courses(axes: Any, name: str, both: Mapping[Any, "Figures"], *, legend: bool) -> None:
    """Thresholds in force over the labels: some histories, the median, the middle 90 %."""
    from bench.thresholds import BATCH, SCENARIOS

    changes = next(it.changes for it in SCENARIOS if it.name == name)
    for method, colour in (("step", STEP), ("certified", OURS)):
        if method not in both:
            continue
        low, middle, high = both[method].quantiles
        labels = [BATCH * (at + 1) for at in range(len(middle))]
        axes.fill_between(labels, low, high, color=colour, alpha=0.13, lw=0, step="post")
        axes.step(labels, middle, color=colour, lw=2, where="post", label=method)
    some = both["certified"]
    end = labels[-1]
    spans = [(0, min(changes, end), some.right[0]), (min(changes, end), end, some.right[1])]
    for begin, until, right in spans:
        if begin < until:
            axes.fill_between([begin, until], 0.48, min(right, 0.97), color=TRUTH, alpha=0.07, lw=0)
            axes.plot([begin, until], [right, right], color=TRUTH, lw=1.2, ls=(0, (4, 3)))
    if changes < end:
        axes.annotate("drift", (changes, 0.955), (4, 0), textcoords="offset points", color=TRUTH)
    axes.text(
        end, some.right[1] - 0.006, "precision below target", color=TRUTH, ha="right", va="top"
    )
    axes.set_ylim(0.48, 0.97)
    axes.set_xlim(0, end)
    axes.set_title(name)
    axes.set_xlabel("labels")
    if legend:
        axes.set_ylabel("threshold in force")
        axes.legend(frameon=False, loc="lower left")
