"""What is compared: the models, their fp32 graphs, what they make together, the floor, others."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from detectors.combine import Combination
from detectors.harms import DEFAULT_THRESHOLDS, THRESHOLD_KEYS
from detectors.keywords import Keywords
from detectors.load import SecondSpec, load_combination, load_detector, load_second
from detectors.protocol import Detector, FloatArray
from detectors.second import Second
from training import baselines, scores
from training.asked import Looks
from training.rows import Row
from training.scores import Judged, OfFolder, Scorer
from training.sets import Sets, distinct

SERVED: Final = "as served"
SECOND: Final = SecondSpec("logprob", fitting=True)  # as the worker's default setting has it
FLOOR: Final = "TF-IDF + logistic regression"
_KEYWORDS: Final = Path(__file__).resolve().parent.parent / "detectors" / "keywords.toml"


class System(NamedTuple):
    """One thing that is compared, with its scores of the rows that it was asked for."""

    name: str
    thresholds: Mapping[str, float]
    known: Mapping[str, FloatArray]  # row id -> (S, 7)

    def judged(self, rows: Sequence[Row]) -> Judged:
        """Those of the rows that it was asked for."""
        some = [row for row in rows if row.id in self.known]
        return scores.judge(some, [self.known[row.id] for row in some], self.thresholds)


class Compare:
    """Scores every system on the rows that it is compared on."""

    def __init__(self, chosen: Sets, models: Sequence[Path], runs: Path, threads: int) -> None:
        """runs: where fp32 graphs are looked for and scores are kept."""
        self._chosen = chosen
        self._folders = {_name(folder, models): folder for folder in models}
        self._runs, self._kept, self._threads = runs, runs / "scores", threads
        self._all = distinct(
            (*chosen.report, *chosen.unseen, *chosen.long_harmless, *chosen.stand_ins)
        )

    def models(self) -> Iterator[System]:
        """Each model, some together where that was learnt, those that serve together, and last
        what is served."""
        found = {name: OfFolder(folder, name) for name, folder in self._folders.items()}
        alone = {name: self._through(model, self._all) for name, model in found.items()}
        yield from alone.values()
        names = _first_of_each(found)
        for some, learnt in self._learnt(names):
            yield _together([alone[name] for name in some], learnt, self._all)
        whole = _together([alone[name] for name in names], self._combination(names), self._all)
        if len(names) > 1:
            yield whole
        looked = self._looked(whole, names)
        if looked is not None:
            yield looked
        yield _served(looked or whole, self._all)

    def exact(self) -> Iterator[System]:
        """The encoders with fp32 graphs, where there are any, on what is reported by harm: they
        take more than twice the time. Together with them stands what is no encoder, as it is."""
        rows = distinct((*self._chosen.report, *self._chosen.unseen))
        twins = {
            name: OfFolder(twin, name)
            for name, folder in self._folders.items()
            if (twin := self._twin(folder))
        }
        alone = {name: self._through(model, rows) for name, model in twins.items()}
        exact = [name for name in alone if not scores.is_words(self._folders[name])]
        yield from (alone[name] for name in exact)
        names = _first_of_each(twins)
        if exact and len(names) > 1:
            yield _together([alone[name] for name in names], self._combination(names), rows)

    def others(self) -> Iterator[System]:
        """The floor, and the small baselines where they are installed."""
        from training.floor import Floor, Rows  # its libraries take seconds to import

        rows = Rows(self._chosen.fit, self._chosen.calibrate, self._chosen.calibrate_harmless)
        yield self._through(Floor(FLOOR, rows, self._kept), self._all)
        try:
            small = baselines.installed()
        except baselines.BaselineMissing as missing:
            print(f"without the small baselines: {missing}")
            return
        for baseline in small:
            yield self._through(baseline, self._all)

    def _twin(self, folder: Path) -> Path | None:
        return folder if scores.is_words(folder) else scores.fp32_twin(folder, self._runs)

    def _combination(self, names: Sequence[str]) -> Combination | None:
        """As it lies beside the models. Raises LoadError where it is for others."""
        beside, detectors = self._detectors(names)
        return load_combination(beside, detectors) if beside else None

    def _detectors(self, names: Sequence[str]) -> tuple[Path | None, list[Detector]]:
        """And the folder that holds them all, if one does."""
        folders = [self._folders[name] for name in names]
        detectors = [load_detector(folder.name, folder.parent) for folder in folders]
        beside = {folder.parent for folder in folders}
        return beside.pop() if len(beside) == 1 else None, detectors

    def _learnt(self, names: Sequence[str]) -> Iterator[tuple[tuple[str, ...], Combination]]:
        """Choices of some of them that a combination was learnt for."""
        beside, detectors = self._detectors(names)
        if beside is None:
            return
        by_name = dict(zip(names, detectors, strict=True))
        for count in range(2, len(names)):
            for some in combinations(names, count):
                found = load_combination(beside, [by_name[name] for name in some])
                if found is not None:
                    yield some, found

    def _looked(self, whole: System, names: Sequence[str]) -> System | None:
        """With the second look that ships, where it is for these detectors."""
        beside, detectors = self._detectors(names)
        if beside is None:
            return None
        combination = load_combination(beside, detectors)
        second = load_second(SECOND, beside, detectors, combination)
        return with_looks(whole, self._all, second) if second else None

    def _through(self, scorer: Scorer, rows: list[Row]) -> System:
        found = scores.scored(scorer, rows, self._kept, self._threads)
        known = {row.id: of_row for row, of_row in zip(rows, found, strict=True)}
        return System(scorer.name, {**DEFAULT_THRESHOLDS, **scorer.thresholds}, known)


def main_of(systems: Sequence[System]) -> System:
    """The models together, as they serve: what stands right before what is served."""
    names = [system.name for system in systems]
    return systems[names.index(SERVED) - 1]


def _name(folder: Path, among: Sequence[Path]) -> str:
    """The folder's name, with its parent's where two are called the same."""
    alike = sum(other.name == folder.name for other in among)
    return folder.name if alike == 1 else f"{folder.parent.name}/{folder.name}"


def _first_of_each(models: Mapping[str, OfFolder]) -> list[str]:
    """The names of the models that serve together: the first of each kind."""
    first: dict[str, str] = {}
    for name, model in models.items():
        first.setdefault(model.kind, name)
    return list(first.values())


def _together(
    parts: Sequence[System], combination: Combination | None, rows: Sequence[Row]
) -> System:
    """Several detectors as the worker makes one of them; of two thresholds the first's counts."""
    if len(parts) == 1:
        return parts[0]
    ids = [row.id for row in rows]
    said = [[part.known[i] for i in ids] for part in parts]
    found = scores.together(rows, said, combination)
    name = " + ".join(part.name for part in parts)
    thresholds = {**parts[0].thresholds, **(combination.thresholds if combination else {})}
    return System(name, thresholds, dict(zip(ids, found, strict=True)))


def with_looks(whole: System, rows: Sequence[Row], second: Second) -> System:
    """A language model's word in place of what is uncertain, as the worker asks for it."""
    from tqdm import tqdm  # tests without the train extra need none

    limits = np.array([whole.thresholds[key] for key in THRESHOLD_KEYS])
    looks = Looks(second, limits)
    bar = tqdm(rows, desc="second look", unit="row", mininterval=5, leave=False)
    known = {row.id: looks.scores(row, whole.known[row.id]) for row in bar}
    return System(f"{whole.name} + logprob", whole.thresholds, known)


def _served(whole: System, rows: Sequence[Row]) -> System:
    """What `tidegate moderate` says: keywords, and texts too short to judge, come first."""
    keywords = Keywords.load(_KEYWORDS)
    found = scores.with_keywords(keywords, rows, [whole.known[row.id] for row in rows])
    known = {row.id: of_row for row, of_row in zip(rows, found, strict=True)}
    return System(SERVED, whole.thresholds, known)
