"""Rows to scores, segment by segment, as the worker would get them; kept, so asked for once.

What `tidegate moderate --scores-only` says of a reply follows from its segments: the highest score
of each harm, up to the first segment that is blocked (`judge`).
"""

import json
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Final, NamedTuple, Protocol, Self

import numpy as np
import numpy.typing as npt

from detectors.combine import Combination, follows, highest
from detectors.harms import COLUMNS, HARMS, THRESHOLD_KEYS
from detectors.keywords import Keywords
from detectors.load import kind_of, load_detector
from detectors.protocol import Detector, FloatArray, Passage
from detectors.session import Folder, Manifest, Precision
from detectors.words import KIND
from training.measure import SURE
from training.rows import Row
from training.windows import judged as passages_of

SHORT: Final = 10  # visible characters that the worker's defaults judge by keywords alone
_ROWS_A_CALL: Final = 50  # a kill loses as many
_FP32: Final = "model.onnx"


class Scorer(Protocol):
    """Something that can be compared."""

    @property
    def name(self) -> str:
        """As the tables show it."""
        ...

    @property
    def digest(self) -> str:
        """Hex, of everything that can move a score."""
        ...

    @property
    def thresholds(self) -> Mapping[str, float]:
        """By THRESHOLD_KEYS."""
        ...

    def score(self, passages: Sequence[Passage]) -> FloatArray:
        """(S, 7) probabilities; NaN in the columns that it does not judge. Thread-safe."""
        ...


class OfFolder:
    """A model folder as it serves. Read at once, loaded when something is to be scored."""

    def __init__(self, folder: Path, name: str) -> None:
        """Raises ModelError where the files are not what the manifest says."""
        self._folder = folder
        if is_words(folder):
            self._take(name, self._detector)
            return
        checked = Folder(folder)
        self._take(f"{name} {precision(checked.manifest)}", checked)

    def _take(self, name: str, said: "Folder | Detector") -> None:
        it = said.manifest if isinstance(said, Folder) else said
        self.name, self.digest = name, said.digest
        self.kind = it.name  # toxicity, context or words
        self.thresholds: Mapping[str, float] = it.thresholds

    @cached_property
    def _detector(self) -> Detector:
        return load_detector(self._folder.name, self._folder.parent)

    def score(self, passages: Sequence[Passage]) -> FloatArray:
        """(S, 7), by the detector itself."""
        return self._detector.score(self._detector.encode(passages))


def is_words(folder: Path) -> bool:
    """Whether it holds no encoder: there is one graph, and no tokenizer."""
    return kind_of(folder) == KIND


def precision(manifest: Manifest) -> Precision:
    """Of the graph that the CPU serves; a manifest that names none serves int8."""
    named = (kind for kind, graph in manifest.graphs.items() if graph == manifest.model)
    return next(named, "int8")


def fp32_twin(folder: Path, runs: Path) -> Path | None:
    """The model of `folder` with its fp32 graph: same tokenizer, calibration and thresholds.

    The graph is the folder's own, where it has one, or lies in RUN/onnx beside the very int8 graph
    that the folder serves. None where it is nowhere, or served already. The twin is links and a
    manifest, made anew each time.
    """
    if is_words(folder):
        return None
    manifest = Folder(folder).manifest
    graph = _fp32_graph(folder, manifest, runs)
    if graph is None or precision(manifest) == "fp32":
        return None
    twin = runs / "fp32" / folder.name
    twin.mkdir(parents=True, exist_ok=True)
    _link(twin / _FP32, graph)
    _link(twin / manifest.tokenizer, folder / manifest.tokenizer)
    contents = json.loads((folder / "manifest.json").read_bytes())
    contents["model"], contents["graphs"] = _FP32, {"fp32": _FP32}
    contents["files"] = {
        _FP32: sha256(graph.read_bytes()).hexdigest(),
        manifest.tokenizer: manifest.files[manifest.tokenizer],
    }
    (twin / "manifest.json").write_text(json.dumps(contents), encoding="utf-8")
    return twin


def _fp32_graph(folder: Path, manifest: Manifest, runs: Path) -> Path | None:
    if "fp32" in manifest.graphs:
        return folder / manifest.graphs["fp32"]
    run = run_of(folder, runs)
    graph = run / "onnx" / _FP32 if run else None
    return graph if graph and graph.exists() else None


def run_of(folder: Path, runs: Path) -> Path | None:
    """The run that the model was exported from: its int8 graph is the folder's, by digest."""
    if is_words(folder):
        return None
    manifest = Folder(folder).manifest
    wanted = manifest.files[manifest.model]
    for graph in sorted(runs.glob(f"*/onnx/{manifest.model}")):
        if sha256(graph.read_bytes()).hexdigest() == wanted:
            return graph.parent.parent
    return None


def _link(link: Path, target: Path) -> None:
    link.unlink(missing_ok=True)
    link.symlink_to(target.resolve())


def scored(scorer: Scorer, rows: Sequence[Row], kept: Path, threads: int = 1) -> list[FloatArray]:
    """(S, 7) probabilities of each row's segments. kept: folder of the scores known already."""
    from tqdm import tqdm

    with _Store(kept, scorer) as store:
        keys = [_key(row) for row in rows]
        known = store.read(set(keys))
        missing = {key: row for key, row in zip(keys, rows, strict=True) if key not in known}
        bar = tqdm(total=len(missing), desc=scorer.name, unit="row", mininterval=5, leave=False)
        with bar, ThreadPoolExecutor(threads) as pool:
            for fresh in pool.map(lambda some: _scored(scorer, some), _chunks(missing)):
                store.write(fresh)
                known |= fresh
                bar.update(len(fresh))
        return [known[key] for key in keys]


def keep(scorer: Scorer, rows: Sequence[Row], found: Sequence[FloatArray], kept: Path) -> None:
    """Puts (S, 7) scores of each row's segments, known from elsewhere, where `scored` looks."""
    with _Store(kept, scorer) as store:
        store.write({_key(row): of_row for row, of_row in zip(rows, found, strict=True)})


def _chunks(missing: Mapping[str, Row]) -> Iterator[dict[str, Row]]:
    pairs = list(missing.items())
    for begin in range(0, len(pairs), _ROWS_A_CALL):
        yield dict(pairs[begin : begin + _ROWS_A_CALL])


def _scored(scorer: Scorer, rows: Mapping[str, Row]) -> dict[str, FloatArray]:
    """The rows' segments in one call; a detector takes them one by one all the same."""
    passages = [passages_of(row) for row in rows.values()]
    scores = scorer.score([passage for of_row in passages for passage in of_row])  # (S, 7)
    ends = np.cumsum([len(of_row) for of_row in passages])
    return dict(zip(rows, np.split(scores, ends[:-1]), strict=True))


def _key(row: Row) -> str:
    """Of the row and of how it is cut, so that another cut is another key."""
    whole = blake2b(row.id.encode(), digest_size=16)
    whole.update(repr(passages_of(row)).encode("utf-8", "surrogatepass"))
    return whole.hexdigest()


class _Store:
    """Scores of one scorer on disk. Another digest is another file."""

    def __init__(self, folder: Path, scorer: Scorer) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        name = scorer.name.replace("/", "-").replace(" ", "-")
        self._file = sqlite3.connect(folder / f"{name}-{scorer.digest[:16]}.sqlite")
        self._file.execute("CREATE TABLE IF NOT EXISTS scores (key TEXT PRIMARY KEY, value BLOB)")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, wanted: set[str]) -> dict[str, FloatArray]:
        """Those of them that are known."""
        found = self._file.execute("SELECT key, value FROM scores")
        return {key: _unpacked(value) for key, value in found if key in wanted}

    def write(self, scores: Mapping[str, FloatArray]) -> None:
        """Keeps them, all or none."""
        with self._file:
            self._file.executemany(
                "INSERT OR REPLACE INTO scores VALUES (?, ?)",
                [(key, value.astype("<f8").tobytes()) for key, value in scores.items()],
            )


def _unpacked(value: bytes) -> FloatArray:
    return np.frombuffer(value, dtype="<f8").reshape(-1, len(COLUMNS))


def together(
    rows: Sequence[Row], parts: Sequence[Sequence[FloatArray]], combination: Combination | None
) -> list[FloatArray]:
    """What several detectors say of the rows' segments, as the worker makes one of them: as learnt,
    or the highest of each column. parts: of each detector (S, 7) a row."""
    said = [np.stack(of_row) for of_row in zip(*parts, strict=True)]  # (D, S, 7) each
    if combination is None:
        return [highest(it) for it in said]
    return [
        combination.combined(it, follows(passages_of(row)))
        for row, it in zip(rows, said, strict=True)
    ]


def with_keywords(
    keywords: Keywords, rows: Sequence[Row], segments: Sequence[FloatArray]
) -> list[FloatArray]:
    """The scores behind the worker's prefilter: keywords that block, and texts too short."""
    return [_screened(keywords, row, known) for row, known in zip(rows, segments, strict=True)]


def _screened(keywords: Keywords, row: Row, known: FloatArray) -> FloatArray:
    scores, tail = known.copy(), ""
    passages = passages_of(row)
    following = [*(passage.text[:1] for passage in passages[1:]), ""]
    for i, (passage, after) in enumerate(zip(passages, following, strict=True)):
        hits = keywords.find(passage.text, tail, after)
        blocking = {hit.harm for hit in hits if hit.action == "block"}
        if blocking:
            scores[i] = [*(float(harm in blocking) for harm in HARMS), 1.0]
        elif not hits and len(passage.before) + len(passage.text) < SHORT:
            scores[i] = 0.0
        tail = keywords.next_tail(tail, passage.text)
    return scores


class Judged(NamedTuple):
    """Rows with what became of them."""

    rows: list[Row]
    highest: FloatArray  # (N, 7) as `--scores-only` says; NaN where a column is not judged
    blocked_at: npt.NDArray[np.int64]  # (N,) index of the segment that was blocked; -1: none
    limits: FloatArray  # (7,) thresholds

    @property
    def blocked(self) -> FloatArray:
        """(N,) 1 where the reply was blocked."""
        return (self.blocked_at >= 0).astype(float)

    @property
    def groups(self) -> list[str]:
        """The prompts, (N,)."""
        return [row.group for row in self.rows]

    def targets(self, column: int) -> FloatArray:
        """(N,) the labels of a column, 0 where there is none."""
        return np.array([row.targets[column] for row in self.rows])

    def labelled(self, column: int) -> "Judged":
        """The rows that have a sure label for the column."""
        return self.only(lambda row: row.weights[column] >= SURE)

    def only(self, chosen: Callable[[Row], bool]) -> "Judged":
        """The rows for which `chosen` holds."""
        mask = np.array([chosen(row) for row in self.rows], dtype=bool)
        rows = [row for row, wanted in zip(self.rows, mask, strict=True) if wanted]
        return Judged(rows, self.highest[mask], self.blocked_at[mask], self.limits)


def judge(
    rows: Sequence[Row], segments: Sequence[FloatArray], thresholds: Mapping[str, float]
) -> Judged:
    """Each row as the worker leaves it: nothing behind a blocked segment is judged."""
    limits = np.array([thresholds[key] for key in THRESHOLD_KEYS])
    ends = [_blocked_at(scores, limits) for scores in segments]
    tops = [
        (scores if end < 0 else scores[: end + 1]).max(axis=0)
        for scores, end in zip(segments, ends, strict=True)
    ]
    stacked = np.stack(tops) if tops else np.empty((0, len(COLUMNS)))
    return Judged(list(rows), stacked, np.array(ends, dtype=np.int64), limits)


def _blocked_at(scores: FloatArray, limits: FloatArray) -> int:
    above = (scores > limits).any(axis=1)  # (S,); NaN compares false
    return int(above.argmax()) if above.any() else -1
