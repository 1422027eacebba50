"""Do learnt thresholds keep their promise? Simulated review histories with a known truth.

    python -m bench.thresholds [--histories 1000] [--labels 2500] [--only calibrated] [--write]

What labels prove and what is published is the product's own code: `propose`, `drift.advance`.
Traffic, reviewers and truth are made up. Thresholds are tested after every 25 labels. Figures are
kept in runs/thresholds/, so that `--only` can be run one at a time; `--write` puts the table of
all that are there into docs/thresholds.md; bench/plots.py draws the plot beside it.
"""

import argparse
import json
import math
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.report import close, show
from worker import drift
from worker.certify import (
    BOUNDS,
    GRID,
    STAKES,
    Blocked,
    Goal,
    Tally,
    in_force,
    propose,
    shipped,
    walk,
)
from worker.events import ThresholdRecord
from worker.feedback import RECENT, Claim
from worker.settings import LearnPolicy

Method = Literal["certified", "step"]
FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int_]
BoolArray = NDArray[np.bool_]

TARGET, DELTA, SHIPPED = 0.9, 0.05, 0.74
BATCH = 25  # labels between tests
REVIEWERS = 4  # one of them hostile in some scenarios
HOSTILE_SHARE = 0.4  # of the labels
WORTH = 0.04  # precision above the target that makes a threshold worth waiting for
CLAIM = Claim("t", "violence", "m")
midpoints = np.linspace(0.0005, 0.9995, 1000)  # of cells of scores
OVER = midpoints[None, :] > np.array(GRID)[:, None]  # (101, 1000)
KEPT = Path("runs/thresholds")
PAGE = Path("docs/thresholds.md")
PLOT = Path("docs/thresholds.png")
DRAWN = KEPT / "drawn" / "plot.json"


def _beta(a: float, b: float) -> FloatArray:
    density: FloatArray = midpoints ** (a - 1.0) * (1.0 - midpoints) ** (b - 1.0)
    density /= density.sum()
    return density


def _traffic(looks_harmful: float) -> FloatArray:
    """Share of traffic by score: most of it near 0, what looks harmful near 1."""
    return (1.0 - looks_harmful) * _beta(0.5, 8.0) + looks_harmful * _beta(3.0, 0.6)


def _flat(precision: float) -> FloatArray:
    return np.where(midpoints > BOUNDS[0], precision, 0.05)


_known: dict[tuple[int, int], FloatArray] = {}


def _precision(traffic: FloatArray, truth: FloatArray) -> FloatArray:
    key = (id(traffic), id(truth))
    if key not in _known:
        mass, harmful = OVER @ traffic, OVER @ (traffic * truth)
        _known[key] = np.divide(harmful, mass, out=np.ones(len(GRID)), where=mass > 0.0)
    return _known[key]


class Scenario(NamedTuple):
    """A world. Arrays are (1000,), one number a cell of scores."""

    name: str
    says: str
    truth: FloatArray  # probability that a decision with this score is harmful
    traffic: FloatArray = _traffic(0.05)
    later: FloatArray | None = None  # the truth after `changes` labels
    changes: int = 10**9
    errors: float = 0.0  # share of labels that are wrong
    hostile: int = 0  # so many names call everything harmful, and give 40 % of the labels
    follows: bool = False  # shares follow the threshold in force
    policy: tuple[tuple[str, float], ...] = ()

    def truth_at(self, number: int) -> FloatArray:
        """The truth when this label is given."""
        return self.truth if self.later is None or number < self.changes else self.later

    def precision(self, number: int) -> FloatArray:
        """(101,) the true precision above each of GRID then; 1 where there is no traffic."""
        return _precision(self.traffic, self.truth_at(number))

    def seen(self, number: int) -> FloatArray:
        """(101,) the same of the labels, wrong ones included."""
        return self.errors + (1.0 - 2.0 * self.errors) * self.precision(number)

    def shares(self, threshold: float) -> FloatArray:
        """Probability of being picked for review with this threshold in force."""
        return self.share(midpoints, np.full_like(midpoints, threshold))

    def share(self, scores: FloatArray, thresholds: FloatArray) -> FloatArray:
        """The same of one score each."""
        over, near = (thresholds, 0.05) if self.follows else (np.full_like(scores, BOUNDS[0]), 0.02)
        return np.select([scores > over, scores > 0.5 * over], [0.1, near], 0.002)

    @property
    def least(self) -> float:
        """The lowest probability with which a decision above the lowest candidate is picked."""
        return 0.05 if self.follows else 0.1

    @property
    def busy(self) -> FloatArray:
        """(R,) share of the labels by reviewer, the hostile ones first."""
        if not self.hostile:
            return np.full(REVIEWERS, 1.0 / REVIEWERS)
        names = np.full(self.hostile + REVIEWERS - 1, (1.0 - HOSTILE_SHARE) / (REVIEWERS - 1))
        names[: self.hostile] = HOSTILE_SHARE / self.hostile
        return names

    def drift(self, number: int) -> FloatArray:
        """(101,) mean over the labels then of weight x (outcome - target), up to a constant."""
        return OVER @ (self.traffic * (self.truth_at(number) - TARGET))


_CURVE: FloatArray = 1.0 / (1.0 + np.exp(-20.0 * (midpoints - 0.80)))
_DIP = np.select(
    [midpoints > 0.97, midpoints > 0.85, midpoints > BOUNDS[0]], [0.97, 0.8, 0.999], 0.1
)
SCENARIOS = (
    Scenario("calibrated", "a score is the probability that it names", midpoints),
    Scenario("badly calibrated", "a score says too much below 0.9", _CURVE),
    Scenario(
        "drifting", "calibrated for 1,250 labels, badly calibrated from then on",
        midpoints, later=_CURVE, changes=1250,
    ),
    Scenario(
        "stratified sampling", "shares 0.1, 0.05, 0.002 follow the threshold in force",
        _CURVE, follows=True,
    ),
    Scenario("rare harm", "1 text in 200 looks harmful", midpoints, _traffic(0.005)),
    Scenario("reviewers wrong 5 %", "calibrated; 5 % of labels flipped", midpoints, errors=0.05),
    Scenario("at the edge", "precision is 0.895 at every candidate", _flat(TARGET - 0.005)),
    Scenario(
        "at the edge, at its worst", "0.8999, no label wasted, one trusted reviewer",
        _flat(TARGET - 0.0001), _beta(60.0, 1.0), policy=(("max_reviewer_share", 1.0),),
    ),
    Scenario("dip", "precision is below target at 0.85, above it at 0.97 and at 0.5", _DIP),
    Scenario(
        "hostile reviewer", "precision 0.88; who gives 40 % of labels calls all harmful",
        _flat(0.88), hostile=1,
    ),
    Scenario(
        "hostile, unprotected", "the same with max_reviewer_share = 1",
        _flat(0.88), hostile=1, policy=(("max_reviewer_share", 1.0),),
    ),
    Scenario(
        "hostile, under eight names", "the same 40 %, protected, but not of one name: A3 is broken",
        _flat(0.88), hostile=8,
    ),
)  # fmt: skip


class Shown(NamedTuple):
    """One label in each history. (H,)"""

    cells: IntArray
    harmful: BoolArray
    reviewers: IntArray
    shares: FloatArray  # picked_with


class Histories:
    """Many histories of reviews at once, under the product's own learner.

    Counting is done here for all of them together; what the counts prove, when the alarm rings
    and what is published is `worker.certify` and `worker.drift`; a test
    holds the counts against `worker.feedback`.
    """

    def __init__(self, scenario: Scenario, method: Method, histories: int, seed: int) -> None:
        self.scenario = scenario
        self.policy = LearnPolicy(
            method=method, target_precision=TARGET, delta=DELTA, settle_ms=0, test_every=BATCH,
            min_picked=scenario.least, **dict(scenario.policy),
        )  # fmt: skip
        self._goal = Goal.of(self.policy)
        self._rng = np.random.default_rng(seed)
        self._all = np.arange(histories)
        self.records = [shipped(*CLAIM, SHIPPED, 0)] * histories
        self.threshold = np.full(histories, SHIPPED)  # (H,) in force
        self._weights = np.unique(np.concatenate([
            scenario.least / scenario.shares(it) for it in (BOUNDS[0], BOUNDS[1])
        ]).round(12))  # fmt: skip
        worlds = 1 + len(scenario.busy)
        self.counts = np.zeros((histories, worlds, len(GRID), 2, len(self._weights)), np.int32)
        self.labels = np.zeros(histories, int)  # in this epoch
        self.took_part = np.zeros((histories, worlds - 1), int)
        self.recent: list[deque[tuple[int, int, int]]] = [deque(maxlen=RECENT) for _ in self._all]
        self._wealth = np.zeros((histories, worlds, len(STAKES)))
        self._watched = np.zeros(histories, int)
        self.rang = np.zeros(histories, bool)
        self._told = np.zeros(histories, bool)
        self.since = np.zeros((histories, 3))  # blocked: decisions, weight, harmful weight
        self.settled_ms = 0

    # -- what reviewers say -------------------------------------------------------------------

    def shown(self) -> Shown:
        """One more decision in each history, picked with what is in force there."""
        most = self.scenario.shares(BOUNDS[0])  # no threshold in force makes them higher
        chances = self.scenario.traffic * most
        cells = np.zeros(len(self._all), int)
        waiting = self._all
        while len(waiting):
            cells[waiting] = self._rng.choice(
                len(midpoints), len(waiting), p=chances / chances.sum()
            )
            kept = (
                self._rng.random(len(waiting)) * most[cells[waiting]] < self._shares(cells)[waiting]
            )
            waiting = waiting[~kept]
        return Shown(cells, *self._said(cells), self._shares(cells))

    def _shares(self, cells: IntArray) -> FloatArray:
        """(H,) probability of being picked."""
        return self.scenario.share(midpoints[cells], self.threshold)

    def _said(self, cells: IntArray) -> tuple[BoolArray, IntArray]:
        rolls = self._rng.random((2, len(cells)))
        shares = self.scenario.busy
        equal = None if self.scenario.hostile == 0 else shares  # None draws otherwise, and faster
        reviewers = self._rng.choice(len(shares), size=len(cells), p=equal)
        harmful = rolls[0] < self.scenario.truth_at(self.settled_ms)[cells]
        harmful ^= rolls[1] < self.scenario.errors
        harmful |= reviewers < self.scenario.hostile
        return harmful, reviewers

    # -- what the learner makes of it ---------------------------------------------------------

    def label(self, shown: Shown) -> list[int]:
        """Count it; the histories in which a test is due."""
        self.settled_ms += 1
        weights = (self.scenario.least / shown.shares).round(12)
        columns = np.searchsorted(self._weights, weights)
        bins = np.searchsorted(GRID, midpoints[shown.cells])
        harmful = shown.harmful.astype(int)
        self.counts[self._all, :, bins, harmful, columns] += 1
        self.counts[self._all, 1 + shown.reviewers, bins, harmful, columns] -= 1
        self.labels += 1
        self.took_part[self._all, shown.reviewers] += 1
        for history, *it in zip(
            self._all.tolist(), bins.tolist(), harmful.tolist(), columns.tolist(), strict=True
        ):
            self.recent[history].append((it[0], it[1], it[2]))
        self._watch(shown, weights)
        due = (self.labels % BATCH == 0) | (self.rang & ~self._told)
        self._told[due] = self.rang[due]
        return np.flatnonzero(due).tolist()

    def _watch(self, shown: Shown, weights: FloatArray) -> None:
        above = midpoints[shown.cells] > self.threshold
        harmful = shown.harmful & above
        self.since += np.stack([above, above * weights, harmful * weights], axis=1)
        bets = above & ~self.rang
        self._watched += bets
        losses = np.where(
            shown.harmful, self._goal.loss(True, True, 1.0), self._goal.loss(True, False, 1.0)
        )
        after = drift.advance(
            self._wealth, np.maximum(self._watched, 1)[:, None, None],
            (losses * weights)[:, None, None],
        )  # fmt: skip
        after[self._all, 1 + shown.reviewers] = self._wealth[self._all, 1 + shown.reviewers]
        self._wealth = np.where(bets[:, None, None], after, self._wealth)
        judges = 1 if self.policy.max_reviewer_share == 1.0 else None
        self.rang |= bets & drift.rings(self._wealth[:, :judges], DELTA)

    def tally(self, history: int) -> Tally:
        """What `propose` is shown."""
        decisions, weight, harmful = self.since[history].tolist()
        return Tally(
            *CLAIM, int(self.labels[history]), self.settled_ms, self._weights,
            self.counts[history], tuple(self.recent[history]),
            Blocked(round(decisions), weight, harmful),
            int(self.took_part[history].max()) / max(1, int(self.labels[history])),
            bool(self.rang[history]),
        )  # fmt: skip

    def publish(self, history: int, record: ThresholdRecord) -> None:
        """Put it in force, as `Evidence.in_force` does."""
        before, self.records[history] = self.records[history], record
        if record.epoch_ms != before.epoch_ms:
            self.counts[history], self.labels[history] = 0, 0
            self.took_part[history] = 0
            self.recent[history].clear()
        threshold = in_force(record)
        if (threshold, record.since_ms) != (self.threshold[history], before.since_ms):
            self.threshold[history] = threshold
            self._wealth[history], self._watched[history], self.since[history] = 0.0, 0, 0.0
            self.rang[history] = self._told[history] = False


class Diary:
    """What came of the histories."""

    def __init__(self, world: Histories, labels: int) -> None:
        histories = len(world.records)
        self._world = world
        self.in_force = np.zeros((labels // BATCH, histories))
        self.certified = np.ones((labels // BATCH, histories))  # lowest candidate; 1: none
        self.false_alarms = np.zeros(histories, bool)
        self.averages_wrong = np.zeros(histories, bool)
        self.reached: dict[int, int] = {}  # history -> labels until a threshold worth having
        self._average = np.zeros((histories, len(GRID)))
        self._order = walk(world.policy, CLAIM.harm)
        self._oracle = Oracle(world.scenario)

    def label(self, number: int) -> None:
        """After each label."""
        if self._world.scenario.later is not None:
            self._average += self._world.scenario.drift(number)
        if (number + 1) % BATCH == 0:
            row = number // BATCH
            self.in_force[row] = self._world.threshold
            records = self._world.records
            self.certified[row] = [1.0 if it.certified is None else it.certified for it in records]

    def record(self, number: int, history: int, record: ThresholdRecord) -> None:
        """Before each publication."""
        scenario, before = self._world.scenario, self._world.records[history]
        if record.alarm and not before.alarm:
            right = scenario.seen(number)[round(100 * record.previous)] >= TARGET
            self.false_alarms[history] |= right
        if record.certified is not None:
            earlier = before.certified if before.epoch == record.epoch else None
            last = 1.0 if earlier is None else earlier
            new = [at for at in self._order if record.certified <= GRID[at] < last]
            self.averages_wrong[history] |= (self._average[history, new] < 0.0).any()
            if self._oracle.is_worth(record.certified):
                self.reached.setdefault(history, number + 1)
        if record.epoch != before.epoch:
            self._average[history] = 0.0


def play(
    scenario: Scenario, method: Method, histories: int, labels: int, seed: int = 1
) -> tuple[Diary, list[int]]:
    """All histories; and after how many labels the oracle has won, where it has."""
    world = Histories(scenario, method, histories, seed)
    diary, oracle = Diary(world, labels), Oracle(scenario, histories)
    for number in range(labels):
        shown = world.shown()
        oracle.see(shown)
        for history in world.label(shown):
            record = propose(world.tally(history), world.policy, world.records[history], number + 1)
            if record is not None:
                diary.record(number, history, record)
                world.publish(history, record)
        diary.label(number)
    return diary, oracle.won


class Oracle:
    """Bets on the one threshold worth having, with the stake that is best for the truth there."""

    def __init__(self, scenario: Scenario, histories: int = 0) -> None:
        precision = scenario.seen(0)
        worth = [at for at in walk(LearnPolicy(), CLAIM.harm) if precision[at] >= TARGET + WORTH]
        self._at = min(worth, default=None)
        self._wealth = np.zeros(histories)
        self._labels = 0
        self.won: list[int] = []

    @property
    def exists(self) -> bool:
        """Whether any threshold is worth having."""
        return self._at is not None

    def is_worth(self, threshold: float) -> bool:
        return self._at is not None and threshold <= GRID[self._at]

    def see(self, shown: Shown) -> None:
        self._labels += 1
        if self._at is None:
            return
        right = TARGET + WORTH
        stake = (right - TARGET) / (TARGET * (1.0 - TARGET))  # Kelly's
        before = self._wealth < -math.log(DELTA)
        above = midpoints[shown.cells] > GRID[self._at]
        self._wealth += np.where(above & before, np.log1p(stake * (shown.harmful - TARGET)), 0.0)
        self.won += [self._labels] * int((before & (self._wealth >= -math.log(DELTA))).sum())


class Figures(NamedTuple):
    """What came of all histories of one scenario and method."""

    scenario: str
    says: str
    method: Method
    histories: int
    labels: int
    wrong_certificate: int  # histories where a candidate was certified whose precision is below
    wrong_in_force: int  # ... where a learnt threshold below target was in force
    wrong_by_far: int  # ... of precision below 0.8
    wrong_average: int | None  # ... where the running average was below target; None: no drift
    false_alarms: int  # ... where a threshold that was right was given up
    moved: int  # ... where a learnt threshold was in force in the end
    reached: list[int]  # labels until a threshold worth having was certified, where it was
    oracle: list[int]
    recovered: list[int]  # labels after a change until what is in force was right for good; 0: was
    quantiles: list[list[float]]  # (3, batches) 5 %, 50 %, 95 % of what was in force
    right: list[float]  # (2,) lowest sound candidate before and after the change
    seconds: float


def measure(scenario: Scenario, method: Method, histories: int, labels: int) -> Figures:
    """Play all histories of one scenario."""
    start = time.process_time()
    diary, oracle = play(scenario, method, histories, labels)
    numbers = range(BATCH - 1, labels, BATCH)
    precisions = np.array([scenario.precision(number) for number in numbers])  # (batches, 101)
    at = np.rint(diary.in_force * 100).astype(int)  # (batches, H)
    precision = np.take_along_axis(precisions, at, axis=1)
    learnt = diary.in_force != SHIPPED
    quiet = np.array([number < scenario.changes for number in numbers])  # (batches,)
    wrong = (precision < TARGET) & learnt
    change = scenario.changes // BATCH
    last = [int(np.flatnonzero(row)[-1]) if row.any() else -1 for row in (precision < TARGET).T]
    return Figures(
        scenario.name, scenario.says, method, histories, labels,
        wrong_certificate=int(_are_wrong(diary.certified, precisions)[quiet].any(axis=0).sum()),
        wrong_in_force=int(wrong[quiet].any(axis=0).sum()),
        wrong_by_far=int((wrong & (precision < 0.8))[quiet].any(axis=0).sum()),
        wrong_average=None if scenario.later is None else int(diary.averages_wrong.sum()),
        false_alarms=int(diary.false_alarms.sum()),
        moved=int(learnt[-1].sum()),
        reached=list(diary.reached.values()),
        oracle=oracle,
        recovered=[max(0, it + 1 - change) * BATCH for it in last if it + 1 < len(numbers)],
        quantiles=np.quantile(diary.in_force, [0.05, 0.5, 0.95], axis=1).round(3).tolist(),
        right=[_lowest_right(scenario, 0), _lowest_right(scenario, labels)],
        seconds=round(time.process_time() - start, 1),
    )  # fmt: skip


def _are_wrong(certified: FloatArray, precisions: FloatArray) -> BoolArray:
    """(batches, H) whether anything certified, at the end of the walk or before, is not so."""
    order = list(walk(LearnPolicy(), CLAIM.harm))
    worst = np.minimum.accumulate(precisions[:, order], axis=1)  # (batches, candidates)
    at = np.rint((BOUNDS[1] - certified) * 100).astype(int)  # place in the walk; below 0: none
    found = np.take_along_axis(worst, np.maximum(at, 0), axis=1)
    return np.asarray((found < TARGET) & (at >= 0))


def _lowest_right(scenario: Scenario, number: int) -> float:
    """The lowest candidate above which no candidate is below target; 1 if there is none."""
    lowest = 1.0
    for at in walk(LearnPolicy(), CLAIM.harm):
        if scenario.precision(number)[at] < TARGET:
            break
        lowest = GRID[at]
    return lowest


# -- out ------------------------------------------------------------------------------------------


def share(count: int, of: int) -> str:
    """A share in percent with its 95 % interval (Wilson)."""
    low, high = wilson(count, of)
    return f"{100 * count / of:.1f} ({100 * low:.1f}..{100 * high:.1f})"


def wilson(count: int, of: int) -> tuple[float, float]:
    """95 % interval of a share."""
    z, mean = 1.96, count / of
    middle = (mean + z * z / (2 * of)) / (1 + z * z / of)
    half = z * math.sqrt(mean * (1 - mean) / of + z * z / (4 * of * of)) / (1 + z * z / of)
    return max(0.0, middle - half), min(1.0, middle + half)


def _until(found: Sequence[int], histories: int) -> str:
    """Median over all histories; those that did not get there count as longest."""
    if 2 * len(found) <= histories:
        return f"- ({len(found) / histories:.0%})"
    middle = sorted(found)[histories // 2]
    return f"{middle:,} ({len(found) / histories:.0%})"


COLUMNS = (
    "scenario", "certificate wrong, %", "in force wrong, %", "`step`: in force wrong, %",
    "`step`: precision < 0.8, %", "false alarm, %", "labels until worth having", "oracle",
)  # fmt: skip


def rows(figures: Sequence[Figures]) -> list[list[str]]:
    """The table: one row a scenario."""
    by = {(it.scenario, it.method): it for it in figures}
    found = []
    for scenario in SCENARIOS:
        ours, step = by.get((scenario.name, "certified")), by.get((scenario.name, "step"))
        if ours is None:
            continue
        cells = ["-", "-"]
        if step is not None:
            cells = [
                share(step.wrong_in_force, step.histories),
                share(step.wrong_by_far, step.histories),
            ]
        worth = Oracle(scenario).exists and scenario.later is None
        found.append([
            scenario.name, share(ours.wrong_certificate, ours.histories),
            share(ours.wrong_in_force, ours.histories), *cells,
            share(ours.false_alarms, ours.histories),
            _until(ours.reached, ours.histories) if worth else "-",
            _until(ours.oracle, ours.histories) if worth else "-",
        ])  # fmt: skip
    return found


def write(figures: Sequence[Figures]) -> None:
    """The table into the page, the plot beside it."""
    table = rows(figures)
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in table]
    page = PAGE.read_text(encoding="utf-8")
    begin, end = "<!-- table -->\n", "<!-- end of table -->"
    before, rest = page.split(begin)
    PAGE.write_text(
        before + begin + "\n".join(lines) + "\n" + end + rest.split(end)[1], encoding="utf-8"
    )
    DRAWN.write_text(json.dumps(_drawn(figures)), encoding="utf-8")
    print(f"now: .venv-train/bin/python -m bench.plots {DRAWN} {PLOT}")


def _drawn(figures: Sequence[Figures]) -> dict[str, Any]:
    """What the plot shows, for an environment that has matplotlib and not the product."""
    order = [it.name for it in SCENARIOS]
    changes = {it.name: it.changes for it in SCENARIOS}
    shares, courses = [], []
    for it in sorted(figures, key=lambda it: order.index(it.scenario)):
        wrong = it.wrong_in_force if it.method == "step" else _wrong(it)
        low, high = wilson(wrong, it.histories)
        name = {"scenario": it.scenario, "method": it.method}
        shares.append(name | {"share": wrong / it.histories, "low": low, "high": high})
        if it.scenario in {"calibrated", "badly calibrated", "drifting"}:
            course = {"quantiles": it.quantiles, "right": it.right, "labels": it.labels}
            courses.append(name | course | {"changes": min(it.labels, changes[it.scenario])})
    return {
        "delta": DELTA, "histories": figures[0].histories, "shares": shares, "courses": courses,
    }  # fmt: skip


def _wrong(figures: Figures) -> int:
    """Histories with a wrong certificate, or with a wrong threshold in force: mostly the same."""
    return max(figures.wrong_certificate, figures.wrong_in_force)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--histories", type=int, default=1000)
    parser.add_argument("--labels", type=int, default=2500)
    parser.add_argument("--only", help="one scenario")
    parser.add_argument("--method", choices=["certified", "step"], help="one method")
    parser.add_argument(
        "--write", action="store_true", help="nothing is played, all is put together"
    )
    chosen = parser.parse_args()
    DRAWN.parent.mkdir(parents=True, exist_ok=True)
    for scenario in SCENARIOS if not chosen.write else ():
        for method in ("certified", "step"):
            if chosen.only in {None, scenario.name} and chosen.method in {None, method}:
                found = measure(scenario, method, chosen.histories, chosen.labels)
                name = f"{scenario.name.replace(' ', '-')}-{method}.json"
                (KEPT / name).write_text(json.dumps(found._asdict()), encoding="utf-8")
    figures = [Figures(**json.loads(it.read_text())) for it in sorted(KEPT.glob("*.json"))]
    show("thresholds", COLUMNS, rows(figures))
    if chosen.write:
        write(figures)
    kept = (
        "scenario",
        "method",
        "histories",
        "labels",
        "wrong_certificate",
        "wrong_in_force",
        "seconds",
    )
    close("thresholds", {"runs": [{name: getattr(it, name) for name in kept} for it in figures]})


if __name__ == "__main__":
    main()
