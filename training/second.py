"""How good the log-prob model is, and when the worker asks it.

    python -m training.second --model FOLDER --data ../shared/data --out docs/evaluation

Calibration, aggregation and the band are chosen on the rows that thresholds are chosen on, and
reported on others. FOLDER gets second.json (detectors/second.py), --out logprob.md and logprob.png.
"""

import argparse
import random
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
from rich.console import Console
from tqdm import tqdm

from detectors import second
from detectors.calibrate import sigmoid
from detectors.causal import LocalHelper
from detectors.harms import COLUMNS, HARMFUL, THRESHOLD_KEYS
from detectors.load import load_combination, load_detector
from detectors.logprob import (
    IDENTITY,
    Affine,
    Aggregation,
    accuracy,
    cross_entropy,
    log_mean_exp,
)  # fmt: skip
from detectors.logprob_calibration import batch, contextual, platt, temperature
from detectors.prompts import PROMPTS, SHORT_LIMITS, ClassPrompts, body, prefix
from detectors.protocol import FloatArray, Passage
from training import tables
from training.measure import SURE
from training.metrics import Interval, auroc, calibration_error, interval
from training.rows import Row, read, split
from training.scores import together
from training.tables import Table
from training.windows import Sample, one

_AGGREGATIONS: Final[tuple[Aggregation, ...]] = ("sum", "token", "byte")
_FIT: Final = 500  # passages that calibration is fitted on, as operators may have
_REPORT: Final = 600
_UNSEEN: Final = 300
_CONTENT_FREE: Final = ("N/A", "...", "[text]", "-")  # after Zhao et al. 2021
_LENGTHS: Final = (0, 80, 160, 240, 10**9)  # characters: buckets
_WIDTHS: Final = (0.0, 0.05, 0.1, 0.2, 0.3)  # of a band, below and above the threshold
_LEAST: Final = 60  # labelled passages inside a band, or it stays empty
_NAMES: Final = ("chosen on", "reported", "sources left out")


class Set(NamedTuple):
    """Passages of replies with labels, and the prompts they come from."""

    samples: list[Sample]
    groups: list[str]

    def labels(self, column: int) -> tuple[FloatArray, FloatArray]:
        """(N,) targets 0 or 1, and (N,) whether they are known for sure."""
        targets = np.array([sample.targets[column] for sample in self.samples])
        known = np.array([sample.weights[column] >= SURE for sample in self.samples])
        return (targets >= 0.5).astype(float), known

    @property
    def passages(self) -> list[Passage]:
        """In order."""
        return [sample.passage for sample in self.samples]


class Sums(NamedTuple):
    """What a helper says of N passages behind K prompts."""

    nats: FloatArray  # (N, K) sum of log-probs
    tokens: FloatArray  # (N,)
    bytes: FloatArray  # (N,)
    harmful: int  # of the prompts, the first ones
    seconds: float  # of CPU, a passage

    def margins(self, aggregation: Aggregation) -> FloatArray:
        """(N,) as logprob.LogProb makes them."""
        divisor = {"sum": np.ones_like(self.tokens), "token": self.tokens, "byte": self.bytes}
        found = self.nats / divisor[aggregation][:, None]
        return log_mean_exp(found[:, : self.harmful]) - log_mean_exp(found[:, self.harmful :])


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the tables, writes them and second.json."""
    parser = argparse.ArgumentParser(prog="python -m training.second", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="from `python -m export.causal`")
    parser.add_argument("--data", type=Path, required=True, help="folder that holds permissive/")
    parser.add_argument("--models", type=Path, default=Path("models"), help="the encoders")
    parser.add_argument("--out", type=Path, help="folder for logprob.md")
    given = parser.parse_args(argv)
    parts = split(read(given.data / "permissive"))
    chance = random.Random(41)
    sets = [
        held(parts.calibrate, _FIT, chance),
        held(parts.report, _REPORT, chance),
        held(parts.unseen, _UNSEEN, chance),
    ]
    heads = tuple(head for prompts in PROMPTS.values() for head in prompts.heads())
    helper = LocalHelper(given.model, heads)
    found = [summed(helper, PROMPTS[HARMFUL], it.passages) for it in sets]
    aggregation, aggregations = by_aggregation(sets, found)
    said = [
        aggregations,
        by_calibration(sets, found, aggregation, content_free(helper, aggregation)),
        by_length(sets, found),
    ]
    plan, bands = banded(given.models, helper, sets, found, aggregation)
    second.write(given.model / second.FILE, plan)
    said.append(bands)
    for table in said:
        tables.show(table, Console())
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
        text = "\n\n".join(["# The log-prob model", *map(tables.markdown, said)])
        (given.out / "logprob.md").write_text(f"{text}\n", encoding="utf-8")


def held(rows: Sequence[Row], count: int, chance: random.Random) -> Set:
    """A passage of each of `count` replies whose label is sure, half of them harmful."""
    sure = [row for row in rows if row.kind == "reply" and row.weights[-1] >= SURE]
    harmful = [row for row in sure if row.targets[-1] >= 0.5]
    harmless = [row for row in sure if row.targets[-1] < 0.5]
    each = min(count // 2, len(harmful), len(harmless))
    chosen = chance.sample(harmful, each) + chance.sample(harmless, each)
    return Set([one(row, chance) for row in chosen], [row.group for row in chosen])


def summed(helper: LocalHelper, prompts: ClassPrompts, passages: Sequence[Passage]) -> Sums:
    """Sums of the texts' own log-probs behind every prompt."""
    ways = (*prompts.harmful, *prompts.harmless)
    nats, tokens = np.empty((len(passages), len(ways))), np.empty(len(passages))
    start = time.process_time()
    for row, passage in enumerate(tqdm(passages, desc="passages", mininterval=10)):
        own = body(passage.text)
        prefixes = [prefix(way, passage, SHORT_LIMITS) for way in ways]
        for column, (before, said) in enumerate(
            zip(prefixes, helper([before + own for before in prefixes]), strict=True)
        ):
            text = said[helper.split(before, before + own) :]
            nats[row, column], tokens[row] = sum(text), len(text)
    seconds = (time.process_time() - start) / max(len(passages), 1)
    sizes = np.array([float(len(body(passage.text).encode())) for passage in passages])
    return Sums(nats, tokens, sizes, len(prompts.harmful), seconds)


def content_free(helper: LocalHelper, aggregation: Aggregation) -> Affine:
    """Contextual calibration: what the prompts make of texts that say nothing."""
    empty = [Passage(text, "", ()) for text in _CONTENT_FREE]
    return contextual(list(summed(helper, PROMPTS[HARMFUL], empty).margins(aggregation)))


def by_aggregation(sets: Sequence[Set], found: Sequence[Sums]) -> tuple[Aggregation, Table]:
    """The aggregation of least cross-entropy where it is chosen, each Platt-scaled there."""
    rows: list[tuple[object, ...]] = []
    losses: dict[Aggregation, float] = {}
    for aggregation in _AGGREGATIONS:
        targets, _ = sets[0].labels(-1)
        line = platt_or_flat(found[0].margins(aggregation), targets)
        for name, of, sums in zip(_NAMES, sets, found, strict=False):
            figures = measured(of, line.apply(sums.margins(aggregation)))
            rows.append((aggregation, name, *figures))
            losses.setdefault(aggregation, figures[2])
    best = min(losses, key=losses.__getitem__)
    header = ("aggregation", "passages", "n", "accuracy", "cross-entropy", "AUROC", "ECE")
    note = f"Replies, half of them harmful; Platt scaling from {_FIT}. Chosen: {best}."
    return best, Table("Aggregation", header, rows, note, left=2)


def by_calibration(
    sets: Sequence[Set], found: Sequence[Sums], aggregation: Aggregation, without: Affine
) -> Table:
    """Each calibration, fitted where things are chosen, measured on what is reported."""
    margins, (targets, _) = found[0].margins(aggregation), sets[0].labels(-1)
    lines = {"none": IDENTITY}
    try:
        lines["temperature"] = temperature(list(margins), [int(it) for it in targets])
    except ValueError as error:
        print(f"temperature: {error}")
    for count in (50, _FIT):
        some = np.random.default_rng(count).permutation(len(margins))[:count]
        lines[f"Platt, {len(some)} labels"] = platt_or_flat(margins[some], targets[some])
    lines["contextual"] = without
    lines["batch"] = batch(list(margins))
    rows = [
        (name, *measured(sets[1], line.apply(found[1].margins(aggregation))))
        for name, line in lines.items()
    ]
    header = ("calibration", "n", "accuracy", "cross-entropy", "AUROC", "ECE")
    return Table(f"Calibration ({aggregation})", header, list(rows), "On what is reported.")


def by_length(sets: Sequence[Set], found: Sequence[Sums]) -> Table:
    """What length does to the verdict: mean margin of harmless texts, in standard deviations."""
    rows: list[tuple[object, ...]] = []
    targets, _ = sets[1].labels(-1)
    lengths = np.array([len(passage.text) for passage in sets[1].passages])
    for low, high in pairwise(_LENGTHS):
        inside = (lengths >= low) & (lengths < high)
        row: list[object] = [f"{low} to {high}" if high < 10**9 else f"{low} on", int(inside.sum())]
        for aggregation in _AGGREGATIONS:
            margins = found[1].margins(aggregation)
            spread = float(margins.std()) or 1.0
            harmless = margins[inside & (targets == 0)]
            shift = float((harmless.mean() - margins[targets == 0].mean()) / spread)
            row += [shift if len(harmless) else float("nan"), _ranked(targets, margins, inside)]
        rows.append(tuple(row))
    header = ("characters", "n", *(f"{a} {b}" for a in _AGGREGATIONS for b in ("shift", "AUROC")))
    note = "Shift: of the mean margin of harmless texts from that of all, in standard deviations."
    return Table("Length", header, rows, note)


def platt_or_flat(margins: FloatArray, targets: FloatArray) -> Affine:
    """Platt scaling; margins that rank the wrong way round count for next to nothing."""
    try:
        return platt(list(margins), [int(it) for it in targets])
    except ValueError as error:
        print(f"platt: {error}")
        return Affine(1e-6, 0.0)


def measured(of: Set, odds: FloatArray) -> tuple[int, float, float, Interval, float]:
    """n, accuracy, cross-entropy, AUROC with its interval, ECE of (N,) log-odds."""
    targets, _ = of.labels(-1)
    chances = sigmoid(odds)
    labels = [int(it) for it in targets]
    ranked = interval(lambda weights: auroc(targets, odds, weights), of.groups)
    return (
        len(labels), accuracy(list(chances), labels), cross_entropy(list(chances), labels),
        ranked, float(calibration_error(targets, chances)),
    )  # fmt: skip


def _ranked(targets: FloatArray, margins: FloatArray, inside: FloatArray) -> float:
    return float(auroc(targets[inside], margins[inside]))


class Choice(NamedTuple):
    """A band of one harm, and what decisions inside gain, right ones less wrong ones a passage."""

    band: second.Band
    gained: float
    asked: int


def banded(
    models: Path,
    helper: LocalHelper,
    sets: Sequence[Set],
    harmful: Sequence[Sums],
    aggregation: Aggregation,
) -> tuple[second.Plan, Table]:
    """The band of each harm: the most right decisions gained for each second spent, if any."""
    detectors = [load_detector(name, models) for name in ("toxicity", "context")]
    combination = load_combination(models, detectors)
    thresholds = dict(combination.thresholds) if combination else {}
    scores = [
        np.concatenate(together([[d.score(d.encode(it.passages))] for d in detectors], combination))
        for it in sets
    ]
    calibration: dict[str, Affine] = {}
    bands: dict[str, second.Band] = {}
    rows: list[tuple[object, ...]] = []
    for column, name in enumerate(COLUMNS):
        threshold = thresholds[THRESHOLD_KEYS[column]]
        near = [np.abs(it[:, column] - threshold) <= max(_WIDTHS) for it in scores]
        asked = [_only(it.passages, of) for it, of in zip(sets, near, strict=True)]
        sums = harmful if name == HARMFUL else [
            summed(helper, PROMPTS[name], it) for it in asked
        ]  # fmt: skip
        looks = [
            _look(it, column, score, of, sum_, aggregation, whole=name == HARMFUL)
            for it, score, of, sum_ in zip(sets, scores, near, sums, strict=True)
        ]
        line, band, row = _choose(looks, threshold)
        rows.append((name, threshold, *row))
        if band is not None and line is not None:
            calibration[name] = line
            bands[name] = band
    plan = second.Plan(
        second.FORMAT, second.encoders(detectors, combination), calibration, bands, aggregation,
        SHORT_LIMITS,
    )  # fmt: skip
    header = (
        "harm", "threshold", "labelled inside", "below", "above", "asked", "gain where chosen",
        "asked (reported)", "gain reported", "ms",
    )  # fmt: skip
    note = (
        "Gain: right decisions with the second look less those without, a passage asked, with its "
        "95 % interval. A band stays empty where the interval of the rows that it is chosen on "
        "holds 0. ms: of CPU, a passage asked."
    )
    return plan, Table("The band", header, rows, note)


def _only(passages: Sequence[Passage], inside: npt.NDArray[np.bool_]) -> list[Passage]:
    return [passage for passage, it in zip(passages, inside, strict=True) if it]


class _Look(NamedTuple):
    """Passages near a threshold whose label is known: (M,) each."""

    scores: FloatArray
    margins: FloatArray
    targets: FloatArray
    groups: list[str]
    seconds: float


def _look(
    of: Set, column: int, scores: FloatArray, near: npt.NDArray[np.bool_], sums: Sums,
    aggregation: Aggregation, *, whole: bool,
) -> _Look:  # fmt: skip
    targets, known = of.labels(column)
    chosen = near & known
    margins = sums.margins(aggregation)
    among = margins[chosen] if whole else margins[known[near]]
    groups = [group for group, inside in zip(of.groups, chosen, strict=True) if inside]
    return _Look(scores[chosen, column], among, targets[chosen], groups, sums.seconds)


def _choose(
    looks: Sequence[_Look], threshold: float
) -> tuple[Affine | None, second.Band | None, tuple[object, ...]]:
    """Calibration and band from the first look, figures of the second."""
    first, report = looks[0], looks[1]
    nothing = float("nan")
    empty = (len(first.targets), 0.0, 0.0, 0, nothing, 0, nothing, first.seconds * 1e3)
    if len(first.targets) < _LEAST or len(set(first.targets)) < 2:
        return None, None, empty
    line = platt_or_flat(first.margins, first.targets)
    best: tuple[float, second.Band] | None = None
    for below in _WIDTHS:
        for above in _WIDTHS:
            found, asked = _gain(first, line, threshold, below, above)
            # Right decisions gained, and no wider than they pay: of equal gains the fewest asked.
            if asked >= _LEAST and found.low > 0:
                total = found.value * asked - 1e-6 * asked
                if best is None or total > best[0]:
                    best = total, second.Band(below, above)
    if best is None:
        found, asked = _gain(first, line, threshold, 0.1, 0.1)
        return None, None, (*empty[:3], asked, found, *empty[5:])
    band = best[1]
    chosen, asked = _gain(first, line, threshold, band.below, band.above)
    told, reported = _gain(report, line, threshold, band.below, band.above)
    return line, band, (
        len(first.targets), band.below, band.above, asked, chosen, reported, told,
        first.seconds * 1e3,
    )  # fmt: skip


def _gain(
    look: _Look, line: Affine, threshold: float, below: float, above: float
) -> tuple[Interval, int]:
    """Mean of right with less right without inside the band, and how many are inside."""
    inside = (look.scores >= threshold - below) & (look.scores <= threshold + above)
    targets = look.targets[inside] == 1
    without = (look.scores[inside] >= threshold) == targets
    chances = sigmoid(line.apply(look.margins[inside]))
    with_it = (chances >= threshold) == targets
    gain = with_it.astype(float) - without.astype(float)
    groups = [group for group, it in zip(look.groups, inside, strict=True) if it]

    def mean(weights: FloatArray) -> FloatArray:
        found: FloatArray = (weights * gain).sum(axis=-1) / weights.sum(axis=-1)
        return found

    return interval(mean, groups), int(inside.sum())


if __name__ == "__main__":
    main()
