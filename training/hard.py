"""Harmless segments of the training rows that the models as they are take for harmful:
`python -m training.hard --data ../shared/data --out runs/hard.jsonl`.

One line a row, {"id", "segments": indexes}, for `training.classifier --hard`: the next model sees
what this one gets wrong, and not a random window of these rows alone (bootstrapping of hard
negatives, Sung and Poggio 1998, doi:10.1109/34.655648). Only rows that may be trained on are read.
"""

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import numpy as np
from tqdm import tqdm

from detectors.combine import Combination, highest
from detectors.harms import COLUMNS, HARMFUL
from detectors.load import load_combination, load_detectors
from detectors.protocol import Detector, FloatArray, Passage
from training import sources
from training.measure import SURE
from training.rows import Row, read, split
from training.windows import Sample, judged

_ABOVE: Final = 0.15  # probability of any harm
_ROWS_A_CALL: Final = 40
_MOST: Final = 500  # rows of a source that count: one of them has most
_SOURCES: Final = (
    sources.SOUND | sources.LONG_HARMLESS | sources.LOOK_ALIKES | sources.COUNTER_SPEECH
)


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the file, rows in an order of chance."""
    parser = argparse.ArgumentParser(prog="python -m training.hard", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds permissive/")
    parser.add_argument("--out", type=Path, required=True, help="JSON Lines")
    parser.add_argument(
        "--detectors", nargs="+", default=["toxicity", "words", "context", "context_large"]
    )
    parser.add_argument("--models", type=Path, default=Path("models"), help="folder of theirs")
    parser.add_argument(
        "--rows", type=int, default=0, help="read at most; 0 = all: 15 minutes on 2 threads"
    )
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args(argv)
    detectors = load_detectors(arguments.detectors, arguments.models)
    combination = load_combination(arguments.models, detectors)
    rows = harmless(split(read(arguments.data / "permissive")).fit)
    random.Random(0).shuffle(rows)
    rows = rows[: arguments.rows or None]
    count = 0
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("w", encoding="utf-8") as out:
        for row, segments in _found(rows, detectors, combination, arguments.threads):
            print(json.dumps({"id": row.id, "segments": segments}), file=out, flush=True)
            count += len(segments)
    print(f"{count} segments of {len(rows)} rows: {arguments.out}")


def harmless(rows: Iterable[Row]) -> list[Row]:
    """Those of sources whose harmless rows are surely so."""
    return [
        row
        for row in rows
        if row.source in _SOURCES and max(row.targets) == 0 and row.weights[-1] >= SURE
    ]


def samples(found: Path, rows: Iterable[Row]) -> list[Sample]:
    """The segments that a file names, as the worker would give them.

    rows: that these are of; at most _MOST of a source count.
    """
    named: dict[str, list[int]] = {}
    for line in found.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        named[record["id"]] = record["segments"]
    by_source: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row.id in named:
            by_source[row.source].append(row)
    return [
        Sample(passages[i], row.targets, row.weights, row.source)
        for of_source in by_source.values()
        for row in of_source[:_MOST]
        for passages in [judged(row)]
        for i in named[row.id]
    ]


def _found(
    rows: Sequence[Row], detectors: Sequence[Detector], combination: Combination | None,
    threads: int,
) -> Iterator[tuple[Row, list[int]]]:  # fmt: skip
    chunks = [rows[i : i + _ROWS_A_CALL] for i in range(0, len(rows), _ROWS_A_CALL)]
    bar = tqdm(total=len(rows), unit="row", mininterval=10)
    with bar, ThreadPoolExecutor(threads) as pool:
        for some, wrong in pool.map(
            lambda chunk: (chunk, [_wrong(row, detectors, combination) for row in chunk]), chunks
        ):
            bar.update(len(some))
            yield from ((row, at) for row, at in zip(some, wrong, strict=True) if at)


def _wrong(row: Row, detectors: Sequence[Detector], combination: Combination | None) -> list[int]:
    """Indexes of the row's segments that score too high."""
    scores = scored(judged(row), detectors, combination)
    return np.flatnonzero(scores[:, COLUMNS.index(HARMFUL)] > _ABOVE).tolist()


def scored(
    passages: Sequence[Passage], detectors: Sequence[Detector], combination: Combination | None
) -> FloatArray:
    """(S, 7) as the worker makes them of a reply's first segment, each of these; the costly
    detectors asked where the first do not settle."""
    said = np.zeros((len(detectors), len(passages), len(COLUMNS)))
    later = np.zeros(len(passages), dtype=bool)  # what one of those loses would hide an error
    open_ = np.arange(len(passages))
    stages = combination.stages if combination else ()
    ends = {stage.detectors: stage for stage in stages}
    for number, detector in enumerate(detectors, start=1):
        if len(open_):
            said[number - 1, open_] = detector.score(detector.encode([passages[i] for i in open_]))
        if number in ends:
            open_ = open_[~ends[number].settles(said[:, open_], later[open_])]
    return combination.combined(said, later) if combination else highest(said)


if __name__ == "__main__":
    main()
