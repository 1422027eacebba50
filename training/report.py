"""What the evaluation says: one function a table."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from detectors.harms import COLUMNS, THRESHOLD_KEYS
from detectors.protocol import FloatArray
from training import metrics
from training.early import early, is_long
from training.measure import SURE
from training.metrics import NOTHING, Interval
from training.rows import Row
from training.scores import Judged
from training.sets import LOOK_ALIKES, STAND_INS, Sets, distinct
from training.systems import FLOOR, System, main_of
from training.tables import Table

PARTS: Final = {
    "report": "held-out prompts of sources that were trained on",
    "unseen": "sources left out whole, of calibration and thresholds too",
}
_RANKED: Final = ("AUPRC", "AUROC", "F1", "precision", "recall", "false blocks", "ECE")
_OWN: Final = (*_RANKED[:5], "false alarms", "ECE")


class Line(NamedTuple):
    """What is said of one system on one set of rows, by one label."""

    positives: int
    negatives: int
    auprc: Interval
    auroc: Interval
    f1: Interval
    precision: float
    recall: float
    false_blocks: Interval
    ece: Interval

    @property
    def short(self) -> tuple[float, ...]:
        """Without intervals, for the long tables."""
        return tuple(value.value if isinstance(value, Interval) else value for value in self)


def line(judged: Judged, column: int = -1, *, verdict: bool = True) -> Line:
    """Figures of the rows labelled in a column, ranked by that column's score.

    verdict: F1, precision, recall and false blocks are of the verdict (any harm above its
    threshold); else of this column at its own threshold.
    """
    sure = judged.labelled(column)
    targets, probabilities = sure.targets(column), sure.highest[:, column]
    positives = int(targets.sum())
    if not len(targets) or np.isnan(probabilities).any():
        return Line(
            positives, len(targets) - positives, *(NOTHING,) * 3, NOTHING.value, NOTHING.value,
            NOTHING, NOTHING,
        )  # fmt: skip
    above = sure.blocked if verdict else (probabilities > sure.limits[column]).astype(float)
    harmless = targets == 0

    def of(statistic: Callable[[FloatArray], FloatArray]) -> Interval:
        return metrics.interval(statistic, sure.groups)

    return Line(
        positives,
        len(targets) - positives,
        of(lambda weights: metrics.auprc(targets, probabilities, weights)),
        of(lambda weights: metrics.auroc(targets, probabilities, weights)),
        of(lambda weights: metrics.f1(targets, above, weights)),
        float(metrics.share(targets[above > 0])) if positives else NOTHING.value,
        float(metrics.share(above[~harmless])),
        metrics.share_interval(above[harmless], np.array(sure.groups)[harmless].tolist()),
        of(lambda weights: metrics.calibration_error(targets, probabilities, weights)),
    )


def tables(systems: Sequence[System], chosen: Sets, sample: int) -> Iterator[Table]:
    """All of them, the shortest first. sample: rows a source, for the note."""
    yield by_kind(systems, chosen, sample)
    yield false_blocks(systems, chosen)
    yield early_blocks(systems, chosen)
    yield stand_ins(systems, chosen)
    for part in PARTS:
        yield by_harm(systems, part, getattr(chosen, part))
    for part in PARTS:
        yield by_source(systems, part, getattr(chosen, part))
    for part in PARTS:
        yield by_source_and_harm(main_of(systems), part, getattr(chosen, part))


def by_kind(systems: Sequence[System], chosen: Sets, sample: int) -> Table:
    """Any harm: replies, prompts, comments, on both parts."""
    rows: list[tuple[Any, ...]] = []
    for part, says in PARTS.items():
        for kind in ("reply", "prompt", "comment"):
            some = [row for row in getattr(chosen, part) if row.kind == kind]
            rows.append((f"{part}, {kind}: {says}",))
            rows += [(system.name, *line(system.judged(some))) for system in systems]
    note = (
        "AUPRC, AUROC and ECE are of the score `harmful`; F1, precision, recall and false blocks "
        "(the share of harmless texts that is blocked) of the verdict: any harm above the "
        f"threshold that ships. Brackets: 95 % of {metrics.DRAWS} bootstrap draws of whole "
        "prompts; those of an ECE lean upwards, noise being an error too. ECE: "
        f"{metrics.BINS} bins of equal width. At most {sample} rows a source in `report` and "
        f"{3 * sample} in `unseen`, so that sources weigh alike."
    )
    return Table("Any harm, by kind of text", _headed("any harm", _RANKED), rows, note)


def false_blocks(systems: Sequence[System], chosen: Sets) -> Table:
    """Of long harmless replies, and of requests that look harmful."""
    dev = (*chosen.report, *chosen.unseen)
    views = {
        "long harmless replies, sources trained on": _of(chosen.long_harmless, chosen.report),
        "long harmless replies, sources left out": _of(chosen.long_harmless, chosen.unseen),
        "long harmless replies, stand-in (alpaca_eval)": [
            row for row in chosen.stand_ins if row.source == "alpaca_eval"
        ],
        "requests that look harmful": [row for row in dev if row.source in LOOK_ALIKES],
    }
    rows: list[tuple[Any, ...]] = []
    for view, some in views.items():
        if some:
            rows.append((view,))
        for system in systems:
            judged = system.judged(some)
            if len(judged.rows) == len(some) > 0:
                rate = metrics.share_interval(judged.blocked, judged.groups)
                rows.append((system.name, len(judged.rows), int(judged.blocked.sum()), rate))
    note = (
        "Blocked at any segment. Where none was, the upper end is the exact bound for as many "
        f"prompts. Requests that look harmful: {', '.join(sorted(LOOK_ALIKES))}."
    )
    header = ("harmless texts", "rows", "blocked", "share")
    return Table("Harmless texts blocked", header, rows, note)


def early_blocks(systems: Sequence[System], chosen: Sets) -> Table:
    """How much of a harmful reply is out when it is blocked."""
    dev = distinct((*chosen.report, *chosen.unseen, *chosen.long_harmless))
    views = {"dev": dev, "stand-ins": chosen.stand_ins}
    rows: list[tuple[Any, ...]] = []
    for view, some in views.items():
        replies = [row for row in some if row.kind == "reply" and row.weights[-1] >= SURE]
        for says, wanted in (
            ("all replies", replies),
            ("replies of 3 segments or more", [row for row in replies if is_long(row)]),
        ):
            rows.append((f"{view}: {says}",))
            for system in systems:
                judged = system.judged(wanted)
                if len(judged.rows) == len(wanted) > 0:
                    rows.append((system.name, *early(judged)))
    note = (
        "Shares of a reply's characters. Out: what was shown before the block came; a reply that "
        "no block stops counts 1. Read: the mean share that was there when the block came, of "
        "those blocked. Labels are of whole replies: where one turns harmful late, nothing before "
        "that could have been blocked rightly. Harmless replies are those of the same sources and "
        "the long harmless ones."
    )
    header = (
        "replies", "harmful", "harmless", "out, median", "out, p90", "never blocked",
        "out if blocked, median", "out if blocked, p90", "read if blocked", "harmless blocked",
        "macro F1",
    )  # fmt: skip
    return Table("How early a block comes", header, rows, note)


def stand_ins(systems: Sequence[System], chosen: Sets) -> Table:
    """Sources that nobody trains on, in the place of public benchmarks."""
    rows: list[tuple[Any, ...]] = []
    for heading, column, some in _places(chosen.stand_ins):
        rows.append((heading,))
        for system in (*systems, _blocking_everything(some)):
            judged = system.judged(some)
            if len(judged.rows) == len(some):
                rows.append((system.name, *line(judged, column)))
    note = (
        "Not the public benchmarks: data of the same kinds, for research only, that no weight, "
        "calibration or threshold has seen. F1 stands beside AUROC and false blocks: blocking "
        "everything has a high F1 where most rows are harmful. Hate posts are labelled and ranked "
        "by hate_speech, the others by `harmful`; F1, precision, recall and false blocks are of "
        "the verdict."
    )
    header = _headed("stand-in", _RANKED)
    return Table("Stand-ins for public benchmarks", header, rows, note)


def _places(some: Sequence[Row]) -> Iterator[tuple[str, int, list[Row]]]:
    """Heading, column and rows of each place, and of its sources where there are several."""
    by_source = _grouped(some)
    for place in dict.fromkeys(stand_in.place for stand_in in STAND_INS.values()):
        names = [name for name in by_source if STAND_INS[name].place == place]
        if not names:
            continue
        column = COLUMNS.index(STAND_INS[names[0]].column)
        every = [row for name in names for row in by_source[name]]
        yield f"{place} ({', '.join(names)})", column, every
        if len(names) > 1:
            for name in names:
                yield f"{place}: {name}", column, by_source[name]


def _blocking_everything(some: Sequence[Row]) -> System:
    known = {row.id: np.ones((1, len(COLUMNS))) for row in some}
    return System("blocking everything", dict.fromkeys(THRESHOLD_KEYS, 0.5), known)


def by_harm(systems: Sequence[System], part: str, some: Sequence[Row]) -> Table:
    """Each column by itself."""
    rows: list[tuple[Any, ...]] = []
    for i, column in enumerate(COLUMNS):
        rows.append((column,))
        for system in systems:
            judged = system.judged(some)
            found = line(judged, i, verdict=False)
            rows.append((system.name, float(judged.limits[i]), *found.short))
    header = (part, "threshold", "harmful", "harmless", *_OWN)
    note = "Each column at its own threshold: false alarms are of this harm alone."
    return Table(f"By harm, {part}: {PARTS[part]}", header, rows, note)


def by_source(systems: Sequence[System], part: str, some: Sequence[Row]) -> Table:
    """Any harm, ours and the floor."""
    shown = [system for system in systems if system.name in {main_of(systems).name, FLOOR}]
    rows: list[tuple[Any, ...]] = []
    for source, of_source in _grouped(some).items():
        kinds = "/".join(sorted({row.kind for row in of_source}))
        rows += [
            (source, kinds, system.name, *line(system.judged(of_source)).short) for system in shown
        ]
    header = ("source", "kind", "", "harmful", "harmless", *_RANKED)
    return Table(f"By source, {part}: {PARTS[part]}", header, rows, left=3)


def by_source_and_harm(system: System, part: str, some: Sequence[Row]) -> Table:
    """Each harm where a source has harmful rows of it."""
    rows: list[tuple[Any, ...]] = []
    for source, of_source in _grouped(some).items():
        judged = system.judged(of_source)
        for i, column in enumerate(COLUMNS[:-1]):
            found = line(judged, i, verdict=False)
            if found.positives:
                rows.append((source, column, *found.short))
    header = ("source", "harm", "harmful", "harmless", *_OWN)
    title = f"By source and harm, {part}: {system.name}"
    note = "Where the source has a harmful row of that harm."
    return Table(title, header, rows, note, left=2)


def _headed(first: str, figures: Sequence[str]) -> tuple[str, ...]:
    return (first, "harmful", "harmless", *figures)


def _grouped(some: Sequence[Row]) -> dict[str, list[Row]]:
    names = sorted({row.source for row in some})
    return {name: [row for row in some if row.source == name] for name in names}


def _of(some: Sequence[Row], part: Sequence[Row]) -> list[Row]:
    """Those of the sources of a part."""
    names = {row.source for row in part}
    return [row for row in some if row.source in names]
