"""Do learnt thresholds keep their promise? Simulated review histories with a known truth.

    python -m bench.thresholds [--histories 1000] [--labels 2500] [--only calibrated] [--write]

Labels go through the product's own code: Evidence.add, Evidence.settle, propose. Traffic, reviewers
and truth are made up. Thresholds are tested after every 25 labels. Each scenario's figures are
kept in runs/thresholds/, so that `--only` can be run one at a time; `--write` puts the table of
all that are there into docs/thresholds.md and, where matplotlib is installed, the plot beside it.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.report import close, show
from worker.certify import BOUNDS, GRID, in_force, propose, shipped, walk
from worker.events import Label, ThresholdRecord
from worker.feedback import Claim, Evidence, Judged
from worker.settings import LearnPolicy

Method = Literal["certified", "step"]
FloatArray = NDArray[np.float64]

TARGET, DELTA, SHIPPED = 0.9, 0.05, 0.74
BATCH = 25  # labels between tests
REVIEWERS = 4
WORTH = 0.04  # precision above the target that makes a threshold worth waiting for
CLAIM = Claim("t", "violence", "m")
midpoints = np.linspace(0.0005, 0.9995, 1000)  # of cells of scores
OVER = midpoints[None, :] > np.array(GRID)[:, None]  # (101, 1000)
KEPT = Path("runs/thresholds")
PAGE = Path("docs/thresholds.md")
PLOT = Path("docs/thresholds.png")


def _beta(a: float, b: float) -> FloatArray:
    density: FloatArray = midpoints ** (a - 1.0) * (1.0 - midpoints) ** (b - 1.0)
    density /= density.sum()
    return density


def _traffic(looks_harmful: float) -> FloatArray:
    """Share of traffic by score: most of it near 0, what looks harmful near 1."""
    return (1.0 - looks_harmful) * _beta(0.5, 8.0) + looks_harmful * _beta(3.0, 0.6)


def _flat(precision: float) -> FloatArray:
    return np.where(midpoints > BOUNDS[0], precision, 0.05)


class Scenario(NamedTuple):
    """A world. Arrays are (1000,), one number a cell of scores."""

    name: str
    says: str
    truth: FloatArray  # probability that a decision with this score is harmful
    traffic: FloatArray = _traffic(0.05)
    later: FloatArray | None = None  # the truth after `changes` labels
    changes: int = 10**9
    errors: float = 0.0  # share of labels that are wrong
    hostile: bool = False  # one reviewer calls everything harmful
    follows: bool = False  # shares follow the threshold in force
    policy: tuple[tuple[str, float], ...] = ()

    def truth_at(self, number: int) -> FloatArray:
        """The truth when this label is given."""
        return self.truth if self.later is None or number < self.changes else self.later

    def precision(self, number: int) -> FloatArray:
        """(101,) the true precision above each of GRID then; 1 where there is no traffic."""
        mass = OVER @ self.traffic
        harmful = OVER @ (self.traffic * self.truth_at(number))
        return np.divide(harmful, mass, out=np.ones(len(GRID)), where=mass > 0.0)

    def shares(self, threshold: float) -> FloatArray:
        """Probability of being picked for review with this threshold in force."""
        over, near = (threshold, 0.05) if self.follows else (BOUNDS[0], 0.02)
        return np.select([midpoints > over, midpoints > 0.5 * over], [0.1, near], 0.002)

    @property
    def least(self) -> float:
        """The lowest probability with which a decision above the lowest candidate is picked."""
        return 0.05 if self.follows else 0.1

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
    Scenario("dip", "precision is below target at 0.85, above it at 0.97 and at 0.5", _DIP),
    Scenario(
        "hostile reviewer", "precision 0.88; one of four calls everything harmful",
        _flat(0.88), hostile=True,
    ),
    Scenario(
        "hostile, unprotected", "the same with max_reviewer_share = 1",
        _flat(0.88), hostile=True, policy=(("max_reviewer_share", 1.0),),
    ),
)  # fmt: skip


class Shown(NamedTuple):
    """One label as it is given."""

    cell: int
    harmful: bool
    reviewer: str
    share: float  # picked_with


class History(NamedTuple):
    """What came of one history."""

    in_force: list[float]  # after each batch
    certified: list[float | None]
    alarms: list[tuple[int, float]]  # labels before each, and the threshold that it was about
    averages_wrong: bool  # something was certified while its running average was below the target
    reached: int | None  # labels until a threshold worth having was certified
    oracle: int | None  # labels until a bettor who knows the truth has won there


class Review:
    """One history of reviews, under the product's own learner."""

    def __init__(self, scenario: Scenario, method: Method, seed: int) -> None:
        self._scenario = scenario
        self._policy = LearnPolicy(
            method=method, target_precision=TARGET, delta=DELTA, settle_ms=0, test_every=BATCH,
            **dict(scenario.policy),
        )  # fmt: skip
        self._rng = np.random.default_rng(seed)
        self._record = shipped(*CLAIM, SHIPPED, 0)
        self._evidence = Evidence(lambda _: self._policy)
        self._evidence.in_force(self._record)
        self._oracle = Oracle(scenario)
        self._shares: dict[float, list[float]] = {}  # by threshold in force
        self._average = np.zeros(len(GRID))  # running sum of `drift` in this epoch
        self._history = History([], [], [], False, None, None)

    def run(self, labels: int) -> History:
        """All of it."""
        for number, shown in enumerate(self._shown(labels)):
            if self._scenario.later is not None:
                self._average += self._scenario.drift(number)
            self._oracle.see(shown)
            self._label(number, shown)
            if (number + 1) % BATCH == 0:
                self._history.in_force.append(in_force(self._record))
                self._history.certified.append(self._record.certified)
        return self._history._replace(oracle=self._oracle.won)

    def _shown(self, labels: int) -> Iterator[Shown]:
        """Decisions as they are picked with what is in force then, and what a reviewer says."""
        most = self._scenario.shares(BOUNDS[0])  # no threshold in force makes them higher
        chances = self._scenario.traffic * most
        number = 0
        while number < labels:
            cells = self._rng.choice(len(midpoints), size=labels, p=chances / chances.sum())
            dice = self._rng.random((labels, 4))
            for cell, rolls in zip(cells.tolist(), dice.tolist(), strict=True):
                share = self._share(cell)
                if rolls[0] * most[cell] < share and number < labels:
                    yield self._said(number, cell, rolls, share)
                    number += 1

    def _share(self, cell: int) -> float:
        threshold = in_force(self._record)
        if threshold not in self._shares:
            self._shares[threshold] = self._scenario.shares(threshold).tolist()
        return self._shares[threshold][cell]

    def _said(self, number: int, cell: int, rolls: Sequence[float], share: float) -> Shown:
        reviewer = int(rolls[1] * REVIEWERS)
        harmful = bool(rolls[2] < self._scenario.truth_at(number)[cell])
        harmful ^= rolls[3] < self._scenario.errors
        harmful |= self._scenario.hostile and reviewer == 0
        return Shown(cell, harmful, f"r{reviewer}", share)

    def _label(self, number: int, shown: Shown) -> None:
        score = float(midpoints[shown.cell])
        judged = Judged(
            f"d-{number}", "s", CLAIM.tenant, CLAIM.model, "toxicity", None,
            {CLAIM.harm: score}, score, number + 1, shown.share, self._scenario.least,
        )  # fmt: skip
        label = Label(
            decision_id=judged.decision_id, stream_id="s", tenant=CLAIM.tenant, harm=CLAIM.harm,
            score=score, harmful=shown.harmful, reviewer=shown.reviewer, picked_with=shown.share,
        )  # fmt: skip
        self._evidence.add(label, judged, number + 1)
        for claim in self._evidence.settle(number + 1):
            after = propose(self._evidence.snapshot(claim), self._policy, self._record, number + 1)
            if after is not None:
                self._publish(number, after)

    def _publish(self, number: int, record: ThresholdRecord) -> None:
        history = self._history
        if record.epoch != self._record.epoch:
            self._average[:] = 0.0
        if record.alarm and not self._record.alarm:
            history.alarms.append((number, record.previous))
        if record.certified is not None:
            sound = [at for at in walk(self._policy, CLAIM.harm) if GRID[at] >= record.certified]
            wrong = self._scenario.later is not None and bool((self._average[sound] < 0.0).any())
            reached = number + 1 if self._oracle.is_worth(record.certified) else None
            self._history = history._replace(
                averages_wrong=history.averages_wrong or wrong, reached=history.reached or reached
            )
        self._record = record
        self._evidence.in_force(record)


class Oracle:
    """Bets on the one threshold worth having, with the stake that is best for the truth there."""

    def __init__(self, scenario: Scenario) -> None:
        precision = scenario.errors + (1.0 - 2.0 * scenario.errors) * scenario.precision(0)
        worth = [at for at in walk(LearnPolicy(), CLAIM.harm) if precision[at] >= TARGET + WORTH]
        self._at = min(worth, default=None)
        self.won: int | None = None
        self._labels, self._wealth = 0, 0.0
        if self._at is None:
            return
        right = float(precision[self._at])
        self._stake = (right - TARGET) / (TARGET * (1.0 - TARGET))  # Kelly's
        self._threshold = GRID[self._at]

    @property
    def exists(self) -> bool:
        """Whether any threshold is worth having."""
        return self._at is not None

    def is_worth(self, threshold: float) -> bool:
        return self._at is not None and threshold <= GRID[self._at]

    def see(self, shown: Shown) -> None:
        self._labels += 1
        if self._at is None or self.won or midpoints[shown.cell] <= self._threshold:
            return
        self._wealth += math.log1p(self._stake * (shown.harmful - TARGET))
        if self._wealth >= -math.log(DELTA):
            self.won = self._labels


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
    recovered: list[int]  # labels after a change until what is in force was right for good
    quantiles: list[list[float]]  # (3, batches) 5 %, 50 %, 95 % of what was in force
    samples: list[list[float]]  # (some, batches) what was in force
    right: list[float]  # (2,) lowest sound candidate before and after the change
    seconds: float


def measure(scenario: Scenario, method: Method, histories: int, labels: int) -> Figures:
    """Play all histories of one scenario."""
    start = time.process_time()
    numbers = range(BATCH - 1, labels, BATCH)
    precisions = np.array([scenario.precision(number) for number in numbers])  # (batches, 101)
    played = [Review(scenario, method, seed).run(labels) for seed in range(histories)]
    in_force_at = np.array([history.in_force for history in played])  # (H, batches)
    of_in_force = np.take_along_axis(precisions, np.rint(in_force_at * 100).astype(int).T, 1).T
    learnt = in_force_at != SHIPPED
    wrong = learnt & (of_in_force < TARGET)
    quiet = np.array([number < scenario.changes for number in numbers])  # (batches,)
    last = [int(np.flatnonzero(row)[-1]) if row.any() else -1 for row in of_in_force < TARGET]
    change = scenario.changes // BATCH
    return Figures(
        scenario.name, scenario.says, method, histories, labels,
        wrong_certificate=sum(_is_wrong(it, precisions[quiet]) for it in played),
        wrong_in_force=int(wrong[:, quiet].any(axis=1).sum()),
        wrong_by_far=int((wrong & (of_in_force < 0.8))[:, quiet].any(axis=1).sum()),
        wrong_average=None if scenario.later is None else sum(it.averages_wrong for it in played),
        false_alarms=sum(_is_false(it, scenario) for it in played),
        moved=int(learnt[:, -1].sum()),
        reached=[it.reached for it in played if it.reached is not None],
        oracle=[it.oracle for it in played if it.oracle is not None],
        recovered=[(at + 1 - change) * BATCH for at in last if change <= at + 1 < len(numbers)],
        quantiles=np.quantile(in_force_at, [0.05, 0.5, 0.95], axis=0).round(3).tolist(),
        samples=in_force_at[:25].tolist(),
        right=[_lowest_right(scenario, 0), _lowest_right(scenario, labels)],
        seconds=round(time.process_time() - start, 1),
    )  # fmt: skip


def _is_wrong(history: History, precisions: FloatArray) -> bool:
    """Whether anything was ever certified, at the end of the walk or before, that is not so."""
    candidates = [GRID[at] for at in walk(LearnPolicy(), CLAIM.harm)]
    for last, precision in zip(history.certified, precisions, strict=False):
        sound = [round(100 * it) for it in candidates if last is not None and it >= last]
        if (precision[sound] < TARGET).any():
            return True
    return False


def _is_false(history: History, scenario: Scenario) -> bool:
    return any(
        scenario.precision(number)[round(100 * threshold)] >= TARGET
        for number, threshold in history.alarms
    )


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
        worth = Oracle(scenario).exists
        found.append([
            scenario.name, share(ours.wrong_certificate, ours.histories),
            share(ours.wrong_in_force, ours.histories), *cells,
            share(ours.false_alarms, ours.histories),
            _until(ours.reached, ours.histories) if worth else "none is",
            _until(ours.oracle, ours.histories) if worth else "",
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
    try:
        from bench.plots import thresholds
    except ImportError:
        print("no matplotlib here: the plot stays as it was")
        return
    thresholds(figures, PLOT)


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
    KEPT.mkdir(parents=True, exist_ok=True)
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
