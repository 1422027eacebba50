"""How good the log-prob model is, and when the worker asks it.

    python -m training.second --model FOLDER --data ../shared/data --out docs/evaluation

Calibration, aggregation and the band are chosen on the rows that thresholds are chosen on, and
reported on others. FOLDER gets second.json (detectors/second.py), or second-NAME.json with --name,
where a band is worth its time; --out gets logprob.md.
"""

import argparse
import random
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from rich.console import Console
from tqdm import tqdm

from detectors import second
from detectors.calibrate import sigmoid
from detectors.causal import LocalHelper
from detectors.combine import Combination, follows, highest
from detectors.harms import COLUMNS, HARMFUL, THRESHOLD_KEYS
from detectors.load import load_combination, load_detector, shipped_thresholds
from detectors.logprob import (
    IDENTITY,
    Affine,
    Aggregation,
    accuracy,
    aggregated,
    cross_entropy,
    log_mean_exp,
)  # fmt: skip
from detectors.logprob_calibration import batch, contextual, temperature
from detectors.prompts import PROMPTS, SHORT_LIMITS, ClassPrompts, body, prefix
from detectors.protocol import Detector, FloatArray, Passage
from training import tables
from training.asked import replies
from training.band import WIDTHS, Look, Mask, choose, only, platt_or_flat
from training.measure import SURE
from training.metrics import Interval, auroc, calibration_error, interval
from training.rows import Row, read, split
from training.sets import read as read_sets
from training.tables import Table
from training.windows import Sample, one

_ENCODERS: Final = ("toxicity", "words", "context", "context_large")  # as in the settings
_AGGREGATIONS: Final[tuple[Aggregation, ...]] = ("sum", "token", "byte")
_FIT: Final = 1_400  # passages that the band is chosen on, at most; few lie near a threshold
_LABELS: Final = (50, 500)  # that calibration is shown with, as operators may have
_REPORT: Final = 600
_UNSEEN: Final = 300
_SAMPLE: Final = 40  # rows a source, as in the evaluation
_UNTUNED: Final = 200  # passages of each set that the base is asked about
_CONTENT_FREE: Final = ("N/A", "...", "[text]", "-")  # after Zhao et al. 2021
_LENGTHS: Final = (0, 80, 160, 240, 10**9)  # characters: buckets
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

    def some(self, count: int) -> "Set":
        """Every so many of them, `count` or one more: as many harmful as before."""
        step = max(1, len(self.samples) // count)
        return Set(self.samples[::step], self.groups[::step])


class Tails(NamedTuple):
    """What a helper says of N passages behind K prompts."""

    logprobs: list[list[list[float]]]  # (N, K, tokens of the passage's own text), nats
    bytes: list[int]  # (N,) of the texts in UTF-8
    harmful: int  # of the prompts, the first ones
    seconds: float  # of CPU, a passage

    def margins(self, aggregation: Aggregation) -> FloatArray:
        """(N,) as logprob.LogProb makes them."""
        if not self.logprobs:
            return np.empty(0)
        scores = np.array(
            [
                [aggregated(tail, aggregation, size) for tail in of_passage]
                for of_passage, size in zip(self.logprobs, self.bytes, strict=True)
            ]
        )  # (N, K)
        return log_mean_exp(scores[:, : self.harmful]) - log_mean_exp(scores[:, self.harmful :])

    def only(self, chosen: Mask) -> "Tails":
        """Of the passages for which `chosen`, (N,), holds."""
        return self._replace(logprobs=only(self.logprobs, chosen), bytes=only(self.bytes, chosen))


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the tables, writes them and the plan."""
    parser = argparse.ArgumentParser(prog="python -m training.second", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="from `python -m export.causal`")
    parser.add_argument("--data", type=Path, required=True, help="folder that holds permissive/")
    parser.add_argument("--models", type=Path, default=Path("models"), help="of the encoders")
    parser.add_argument("--detectors", nargs="+", default=_ENCODERS, help="folders there")
    parser.add_argument("--name", help="where these are not the detectors that ship by default")
    parser.add_argument("--untuned", type=Path, help="the base as it comes, exported, to compare")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where scores are kept")
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
    found = [tails(helper, PROMPTS[HARMFUL], it.passages) for it in sets]
    aggregation, aggregations = by_aggregation(sets, found)
    said = [
        aggregations,
        *([zero_shot(LocalHelper(given.untuned, heads), sets)] if given.untuned else []),
        by_calibration(sets, found, aggregation, content_free(helper, aggregation)),
        by_length(sets, found),
    ]
    detectors = [load_detector(name, given.models) for name in given.detectors]
    combination = load_combination(given.models, detectors)
    plan, bands = banded(detectors, combination, helper, sets, found, aggregation)
    file = given.model / (f"second-{given.name}.json" if given.name else second.FILE)
    if plan.bands():
        second.write(file, plan)
    else:  # who loads the model for it would ask it nothing
        file.unlink(missing_ok=True)
        print(f"no band is worth its time: no {file.name}, so these detectors ask for no look")
    said.append(bands)
    chosen = read_sets(given.data, _SAMPLE)
    thresholds = shipped_thresholds(detectors, combination)
    looks = second.Second(plan, helper, "", thresholds)
    said.append(
        replies(looks, detectors, combination, thresholds, chosen, given.models, given.runs)
    )
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


def tails(helper: LocalHelper, prompts: ClassPrompts, passages: Sequence[Passage]) -> Tails:
    """Log-probs of the texts' own tokens behind every prompt."""
    found: list[list[list[float]]] = []
    start = time.process_time()
    for passage in tqdm(passages, desc="passages", mininterval=10):
        own = body(passage.text)
        before = [prefix(way, passage, SHORT_LIMITS) for way in prompts.ways]
        said = helper([it + own for it in before])
        cuts = [helper.split(it, it + own) for it in before]
        found.append([row[cut:] for row, cut in zip(said, cuts, strict=True)])
    seconds = (time.process_time() - start) / max(len(passages), 1)
    sizes = [len(body(passage.text).encode()) for passage in passages]
    return Tails(found, sizes, len(prompts.harmful), seconds)


def content_free(helper: LocalHelper, aggregation: Aggregation) -> Affine:
    """Contextual calibration: what the prompts make of texts that say nothing."""
    empty = [Passage(text, "", ()) for text in _CONTENT_FREE]
    return contextual(list(tails(helper, PROMPTS[HARMFUL], empty).margins(aggregation)))


def by_aggregation(sets: Sequence[Set], found: Sequence[Tails]) -> tuple[Aggregation, Table]:
    """The aggregation of least cross-entropy where it is chosen, each Platt-scaled there."""
    rows: list[tuple[object, ...]] = []
    losses: dict[Aggregation, float] = {}
    for aggregation in _AGGREGATIONS:
        targets, _ = sets[0].labels(-1)
        line = platt_or_flat(found[0].margins(aggregation), targets)
        for name, of, said in zip(_NAMES, sets, found, strict=True):
            figures = measured(of, line.apply(said.margins(aggregation)))
            rows.append((aggregation, name, *figures))
            losses.setdefault(aggregation, figures[2])
    best = min(losses, key=losses.__getitem__)
    header = ("aggregation", "passages", "n", "accuracy", "cross-entropy", "AUROC", "ECE")
    note = (
        f"Replies; Platt scaling from {len(sets[0].samples)}, half of them harmful. Chosen: {best}."
    )
    return best, Table("Aggregation", header, rows, note, left=2)


def zero_shot(base: LocalHelper, sets: Sequence[Set]) -> Table:
    """The same of the language model before any training, on some of the passages."""
    some = [it.some(_UNTUNED) for it in sets]
    found = [tails(base, PROMPTS[HARMFUL], it.passages) for it in some]
    table = by_aggregation(some, found)[1]
    return table._replace(title="Zero-shot: the base as it comes")


def by_calibration(
    sets: Sequence[Set], found: Sequence[Tails], aggregation: Aggregation, without: Affine
) -> Table:
    """Each calibration, fitted where things are chosen, measured on what is reported."""
    margins, (targets, _) = found[0].margins(aggregation), sets[0].labels(-1)
    lines = {"none": IDENTITY}
    try:
        lines["temperature"] = temperature(list(margins), [int(it) for it in targets])
    except ValueError as error:
        print(f"temperature: {error}")
    for count in _LABELS:
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


def by_length(sets: Sequence[Set], found: Sequence[Tails]) -> Table:
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


def banded(
    detectors: Sequence[Detector],
    combination: Combination | None,
    helper: LocalHelper,
    sets: Sequence[Set],
    harmful: Sequence[Tails],
    aggregation: Aggregation,
) -> tuple[second.Plan, Table]:
    """The band of each harm: the most right decisions gained, with an interval above 0, if any."""
    thresholds = shipped_thresholds(detectors, combination)
    limits = np.array([thresholds[key] for key in THRESHOLD_KEYS])
    scores = []
    for it in sets:
        said = np.stack([d.score(d.encode(it.passages)) for d in detectors])  # (D, N, 7)
        later = follows(it.passages)
        scores.append(combination.combined(said, later) if combination else highest(said))
    calibration: dict[str, Affine] = {}
    bands: dict[str, second.Band] = {}
    rows: list[tuple[object, ...]] = []
    for column, name in enumerate(COLUMNS):
        threshold = thresholds[THRESHOLD_KEYS[column]]
        looks = []
        for of, scored, known in zip(sets[:2], scores, harmful, strict=False):
            targets, sure = of.labels(column)
            near = (np.abs(scored[:, column] - threshold) <= max(WIDTHS)) & sure
            if name == HARMFUL:  # as Second.uncertain asks
                near &= (scored[:, :-1] <= limits[:-1]).all(axis=1)
            said = (
                known.only(near) if name == HARMFUL
                else tails(helper, PROMPTS[name], only(of.passages, near))
            )  # fmt: skip
            looks.append(Look(
                scored[near, column], said.margins(aggregation), targets[near],
                only(of.groups, near), said.seconds,
            ))  # fmt: skip
        line, band, row = choose(looks, threshold)
        rows.append((name, threshold, *row))
        if band is not None and line is not None:
            calibration[name] = line
            bands[name] = band
    plan = second.Plan(
        second.FORMAT, second.encoders(detectors, combination), calibration, bands, aggregation,
        SHORT_LIMITS,
    )  # fmt: skip
    header = (
        "harm", "threshold", "labelled near", "below", "above", "asked", "gain where chosen",
        "asked (reported)", "gain reported", "ms",
    )  # fmt: skip
    note = (
        "Gain: right decisions with the second look less those by the threshold that would by "
        "itself be best on the rows that it is chosen on, a passage asked, with its 95 % "
        "interval. A band stays empty where the interval of the rows that it is chosen on holds "
        "0; shown is then one of 0.1 each way. ms: of CPU, a passage asked."
    )
    return plan, Table("The band", header, rows, note)


if __name__ == "__main__":
    main()
