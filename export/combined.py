"""How several detectors' scores become one: `python -m export.combined --models A B C --data DATA`.

The model folders as they serve, in the order of the settings, to combination.json beside them (or
to combination-NAME.json with --name, for a choice of some of them): weights, thresholds, and the
figures of the whole. With --first N the first N also learn to settle by themselves what they find
clearly harmless; with more than one number, so do the next ones. Everything is learnt on rows that
trained no detector and are not reported (training.sets.calibrating).
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
from scipy.optimize import minimize

from detectors.calibrate import Calibration, sigmoid
from detectors.combine import FILE, follows, log_odds
from detectors.harms import COLUMNS, HARMFUL, THRESHOLD_KEYS
from detectors.load import load_detectors
from detectors.protocol import BoolArray, FloatArray
from export import card, figures, manifest
from training import measure, scores, thresholds
from training.measure import Labelled, Scored, stacked
from training.metrics import auroc
from training.rows import Row
from training.scores import OfFolder
from training.windows import judged

PLAIN: Final = Calibration(np.ones(len(COLUMNS)), np.zeros(len(COLUMNS)))  # log-odds already
_FEW: Final = 12  # rows of the rarer class; fewer teach no weights, and all count alike
_RIDGE: Final = 1e-3  # of the squared weights, against the mean loss of a row
_SAMPLE: Final = 40  # rows of a known source
_SHIFTS: Final = tuple(-0.1 * tenth for tenth in range(21))  # of log-odds
_SHARES: Final = (0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1, 0.07, 0.05, 0.03, 0.02, 0.01)
_LOST: Final = 0.01  # of what is rightly blocked
_UNRANKED: Final = 0.001  # of an AUROC


class Read(NamedTuple):
    """Rows and what each detector says of their segments."""

    rows: list[Row]
    log_odds: list[FloatArray]  # a row: (S, D, 7)
    later: list[BoolArray]  # a row: (S,) which segments follow others

    def by(self, detector: int) -> Scored:
        """The highest log-odds of one detector over each row's segments."""
        return Scored(self.rows, stacked([s[:, detector].max(axis=0) for s in self.log_odds]))

    def together(self, combined: "Combined") -> Scored:
        """The highest combined log-odds over each row's segments."""
        return Scored(self.rows, stacked([combined.of(*it).max(axis=0) for it in self.said()]))

    def said(self) -> Iterator[tuple[FloatArray, BoolArray]]:
        """A row's log-odds, and which of its segments follow others."""
        return zip(self.log_odds, self.later, strict=True)

    def only(self, detectors: int) -> "Read":
        """The same by the first so many."""
        return self._replace(log_odds=[of_row[:, :detectors] for of_row in self.log_odds])


class Combined(Protocol):
    """How several detectors' log-odds become one."""

    def of(self, said: FloatArray, later: BoolArray) -> FloatArray:
        """(S, 7) of (S, D, 7) log-odds. later: (S,) which segments follow others."""
        ...


class Weights(NamedTuple):
    """Combined log-odds = sum over detectors of slope * log-odds, + intercept, + later where a
    segment follows others of its row; by column."""

    slopes: FloatArray  # (D, 7)
    intercepts: FloatArray  # (7,)
    later: FloatArray  # (7,) 0 or less

    def of(self, said: FloatArray, later: BoolArray) -> FloatArray:
        """(S, 7) of (S, D, 7) log-odds."""
        combined: FloatArray = (said * self.slopes).sum(axis=1) + self.intercepts
        return combined + np.outer(later, self.later)

    def by_column(self) -> dict[str, list[float]]:
        """As combination.json has them."""
        table = np.vstack([self.slopes, self.intercepts, self.later]).T  # (7, D + 2)
        return {c: [round(float(w), 5) for w in row] for c, row in zip(COLUMNS, table, strict=True)}


class Staged(NamedTuple):
    """The first detectors alone where they settle a segment, what comes next elsewhere."""

    first: Weights
    then: Combined  # all of them, or another stage
    below: FloatArray  # (7,) probabilities

    def settled(self, said: FloatArray, later: BoolArray) -> BoolArray:
        """(S,) of (S, D, 7) log-odds."""
        return np.asarray((sigmoid(self._early(said, later)) < self.below).all(axis=1))

    def of(self, said: FloatArray, later: BoolArray) -> FloatArray:
        """(S, 7) of (S, D, 7) log-odds."""
        settled = self.settled(said, later)[:, None]
        return np.where(settled, self._early(said, later), self.then.of(said, later))

    def _early(self, said: FloatArray, later: BoolArray) -> FloatArray:
        return self.first.of(said[:, : len(self.first.slopes)], later)

    def stages(self) -> list["Staged"]:
        """This one and those behind it."""
        return [self, *(self.then.stages() if isinstance(self.then, Staged) else ())]

    def shares(self, some: Read) -> list[float]:
        """Of all segments, the shares settled once each stage was asked, this one first."""
        settled = np.zeros(sum(map(len, some.log_odds)), dtype=bool)
        found = []
        for stage in self.stages():
            settled = settled | np.concatenate([stage.settled(*it) for it in some.said()])
            found.append(float(settled.mean()))
        return found

    def described(self) -> dict[str, Any]:
        """As combination.json has it."""
        below = zip(COLUMNS, self.below, strict=True)
        return {
            "detectors": len(self.first.slopes),
            "weights": self.first.by_column(),
            "below": {column: round(float(limit), 6) for column, limit in below},
        }


def main(argv: Sequence[str] | None = None) -> None:
    """Writes combination.json, prints weights and figures."""
    arguments = _arguments(argv)
    folders: list[Path] = arguments.models
    beside = folders[0].parent
    held = figures.held(arguments.data, _SAMPLE)
    read = {name: _read(some, folders, arguments) for name, some in held.items()}
    weights = learn(read["calibrate"])
    staged: Combined = weights
    for count in reversed(arguments.first):
        staged = stage(read, staged, count)
    whole = {name: some.together(staged) for name, some in read.items()}
    chosen = figures.choose(whole, PLAIN)
    detectors = load_detectors([folder.name for folder in folders], beside)
    contents = combination({it.name: it.digest for it in detectors}, weights, chosen)
    contents["metrics"] = manifest.without_nan(figures.of(whole, PLAIN, chosen))
    if isinstance(staged, Staged):
        contents["stages"] = [it.described() for it in staged.stages()]
        settled = {
            name: [round(share, 3) for share in staged.shares(some)]
            for name, some in read.items() if some.rows
        }  # fmt: skip
        contents["metrics"]["settled"] = settled
        print(f"segments that the first {arguments.first} settle: {settled}")
    name = f"combination-{arguments.name}.json" if arguments.name else FILE
    (beside / name).write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(contents["weights"]))
    print(card.tables(contents["metrics"], chosen))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m export.combined", description=__doc__)
    parser.add_argument(
        "--models", type=Path, nargs="+", required=True, metavar="FOLDER",
        help="of the detectors, beside one another, in the order of the settings",
    )  # fmt: skip
    parser.add_argument("--name", help="where these are not the detectors that ship by default")
    parser.add_argument(
        "--first", type=int, nargs="+", default=[], metavar="N",
        help="so many of them are asked first, the others where these do not suffice; with "
        "rising numbers in as many stages, as 2 3: two, then the third, then the rest",
    )  # fmt: skip
    parser.add_argument("--data", type=Path, required=True, help="folder that holds permissive/")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="scores are kept in it")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args(argv)
    if len({folder.parent for folder in arguments.models}) > 1 or len(arguments.models) < 2:
        parser.error("--models: two or more folders of one parent")
    if arguments.first != sorted({it for it in arguments.first if 0 < it < len(arguments.models)}):
        parser.error("--first: ever more, and fewer than there are models")
    return arguments


def _read(rows: Sequence[Row], folders: Sequence[Path], arguments: argparse.Namespace) -> Read:
    """Every segment of every row through every detector, as it serves."""
    by_detector = [
        scores.scored(
            OfFolder(folder, folder.name), rows, arguments.runs / "scores", arguments.threads
        )
        for folder in folders
    ]
    said = [log_odds(np.stack(of_row, axis=1)) for of_row in zip(*by_detector, strict=True)]
    return Read(list(rows), said, [follows(judged(row)) for row in rows])


def stage(read: Mapping[str, Read], then: Combined, count: int) -> Staged:
    """The first `count` detectors' own weights, and how low their scores must be to settle it.

    Each column's limit is the same share of its threshold: the largest at which, of the rows that
    without this stage would rightly be blocked, at most _LOST pass, and by which `harmful` ranks
    rows next to as well, its AUROC being at most _UNRANKED lower.
    """
    first = learn(read["calibrate"].only(count))
    chosen = figures.choose({name: some.together(then) for name, some in read.items()}, PLAIN)
    limits = np.array([chosen[key] for key in THRESHOLD_KEYS])
    judged = read["calibrate"].together(then)
    rightly = measure.blocked(judged, PLAIN, chosen) * [max(row.targets) for row in judged.rows] > 0
    for share in _SHARES:
        staged = Staged(first, then, share * limits)
        found = read["calibrate"].together(staged)
        still = measure.blocked(found, PLAIN, chosen) > 0
        lost = (rightly & ~still).sum() / max(1, rightly.sum())
        if lost <= _LOST and _ranked(judged) - _ranked(found) <= _UNRANKED:
            return staged
    raise ValueError(f"the first {count} detectors pass too much that is harmful: ask all at once")


def _ranked(scored: Scored) -> float:
    labelled = scored.labels(COLUMNS.index(HARMFUL))
    return float(auroc(labelled.targets, labelled.logits))


def learn(some: Read) -> Weights:
    """Weights by logistic regression a column, known and unknown sources counting alike; how much
    a later segment loses; then a calibration of what comes out of them, on known sources."""
    scored = [some.by(detector) for detector in range(some.log_odds[0].shape[1])]
    slopes = np.stack(
        [_slopes([thresholds.evened(one, i) for one in scored]) for i in range(len(COLUMNS))],
        axis=1,
    )  # (D, 7)
    none = np.zeros(len(COLUMNS))
    outer = thresholds.calibrate(some.together(Weights(slopes, none, none)))
    alike = Weights(slopes * outer.slopes, outer.intercepts, none)
    inner = alike._replace(later=_later(some, alike))
    outer = thresholds.calibrate(some.together(inner))
    return Weights(
        inner.slopes * outer.slopes, inner.intercepts * outer.slopes + outer.intercepts,
        inner.later * outer.slopes,
    )  # fmt: skip


def _later(some: Read, alike: Weights) -> FloatArray:
    """(7,) what is added to the log-odds of segments that follow others: by maximum likelihood of
    the rows' labels, a row being as harmful as its highest segment; known and unknown sources count
    alike.

    alike: weights by which segments count alike, calibrated.
    """
    losses = [
        _losses(some.together(alike._replace(later=np.full(len(COLUMNS), it)))) for it in _SHIFTS
    ]
    return np.array(_SHIFTS)[np.argmin(losses, axis=0)]


def _losses(scored: Scored) -> FloatArray:
    """(7,) mean losses of the labelled rows, calibrated anew; 0 where too few are."""
    found = []
    for column in range(len(COLUMNS)):
        labelled = thresholds.evened(scored, column)
        if _too_few(labelled):
            found.append(0.0)
            continue
        slope, intercept = thresholds.platt(labelled)
        total = slope * labelled.logits + intercept
        losses = np.logaddexp(0.0, total) - labelled.targets * total
        loss = float(np.average(losses, weights=labelled.weights))
        found.append(loss if slope > 0 else np.inf)
    return np.array(found)


def _too_few(labelled: Labelled) -> bool:
    return min((labelled.targets > 0).sum(), (labelled.targets == 0).sum()) < _FEW


def _slopes(labelled: Sequence[Labelled]) -> FloatArray:
    """(D,) non-negative: a higher score of one detector must not lower the whole.

    labelled: the same rows, as each detector judges them.
    """
    targets, weights = labelled[0].targets, labelled[0].weights
    even = np.full(len(labelled), 1 / len(labelled))
    if _too_few(labelled[0]):
        return even
    features = np.stack([one.logits for one in labelled], axis=1)  # (N, D)
    shares = weights / weights.sum()

    def loss(point: FloatArray) -> tuple[float, FloatArray]:
        total = features @ point[:-1] + point[-1]  # (N,)
        losses = np.logaddexp(0.0, total) - targets * total
        gap = shares * (1.0 / (1.0 + np.exp(-total)) - targets)
        slope = np.append(features.T @ gap + _RIDGE * point[:-1], gap.sum())
        return float(shares @ losses + _RIDGE / 2 * (point[:-1] ** 2).sum()), slope

    bounds = [(0.0, None)] * len(labelled) + [(None, None)]
    found = minimize(loss, np.append(even, 0.0), jac=True, bounds=bounds, method="L-BFGS-B")
    slopes: FloatArray = found.x[:-1]
    return slopes if slopes.max() > 0 else even


def combination(
    digests: Mapping[str, str], weights: Weights, chosen: Mapping[str, float]
) -> dict[str, Any]:
    """combination.json. digests: name of each detector to its own, in the order of the weights."""
    return {
        "detectors": dict(digests),
        "weights": weights.by_column(),
        "thresholds": dict(chosen),
    }


if __name__ == "__main__":
    main()
