"""Trains the words detector: `python -m training.words --data ../shared/data --out runs/words`.

TF-IDF over hashed words and stretches of characters (detectors/grams.py), and a logistic regression
a column, all seven at once by L-BFGS (Liu and Nocedal 1989). It learns from passages as the worker
cuts them, of the sources that the encoders learn from; the same seed gives the same weights.
"""

import argparse
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize
from scipy.sparse import csr_matrix
from tqdm import tqdm

from detectors import grams
from detectors.harms import COLUMNS
from training import also, sources
from training.rows import Row, read, split
from training.windows import samples

WEIGHTS: Final = "weights.npz"
_Floats = npt.NDArray[np.float32]
_SURE: Final = 0.5  # a target above it is harmful


@dataclass(frozen=True)
class Settings:
    """What is chosen; docs/log.md says what else was tried."""

    seed: int = 17
    bits: int = 18  # of a bucket's number
    caps: float = 2.0  # rows of a source, times its cap for the encoders
    least_rows: int = 3  # that a bucket occurs in; a rarer one has no weight
    loudness: float = 2.0  # of the rows against the penalty of the squared weights
    evenness: float = 0.5  # 0: every row counts alike; 1: every source
    iterations: int = 80
    own: bool = True  # the texts of training/texts too
    also: tuple[str, ...] = ()  # the user's own rows, reviewers' labels


class Text(NamedTuple):
    """What is learnt from, with its labels. targets, weights: (7,)."""

    text: str
    targets: Sequence[float]
    weights: Sequence[float]
    source: str


class Labels(NamedTuple):
    """Of N texts."""

    targets: _Floats  # (N, 7) 0 or 1
    weights: _Floats  # (N, 7) 0 where nothing is known


class Model(NamedTuple):
    """What the graph is made of."""

    idf: _Floats  # (B,) 0 where a bucket is too rare to be used
    weights: _Floats  # (B, 7)
    bias: _Floats  # (7,)


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the run folder."""
    parser = argparse.ArgumentParser(prog="python -m training.words", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds permissive/")
    parser.add_argument("--out", type=Path, required=True, help="run folder")
    parser.add_argument(
        "--also", type=Path, nargs="+", default=[], metavar="FILE",
        help="your rows, or review items and labels from Kafka, as JSON Lines",
    )  # fmt: skip
    given = parser.parse_args(argv)
    settings = Settings(also=tuple(map(str, given.also)))
    parts = split(read(given.data / "permissive"))
    added = also.apart(also.read_files(given.also), parts)
    more = [*(also.own() if settings.own else []), *added]
    chosen = texts(parts.fit, more, settings)
    print(f"{len(chosen)} texts", flush=True)
    model = train(chosen, settings)
    given.out.mkdir(parents=True, exist_ok=True)
    np.savez(given.out / WEIGHTS, **model._asdict())
    (given.out / "settings.json").write_text(
        json.dumps(asdict(settings) | {"texts": len(chosen)}, indent=2) + "\n", encoding="utf-8"
    )
    print(f"written: {given.out}")


def load(run: Path) -> Model:
    """What `main` wrote. Raises OSError or ValueError."""
    with np.load(run / WEIGHTS, allow_pickle=False) as found:
        return Model(found["idf"], found["weights"], found["bias"])


def texts(fit: Iterable[Row], more: Sequence[Row], settings: Settings) -> list[Text]:
    """Passages as the worker cuts them, of rows that may be trained on, and of `more`."""
    chance = random.Random(settings.seed)
    rows = [*_capped(fit, settings.caps, chance), *more]
    found = (
        Text(s.passage.before + s.passage.text, s.targets, s.weights, s.source)
        for s in samples(rows, chance)
    )
    return [one for one in found if any(one.weights)]


def _capped(rows: Iterable[Row], times: float, chance: random.Random) -> list[Row]:
    by_source: dict[str, list[Row]] = {}
    for row in rows:
        by_source.setdefault(row.source, []).append(row)
    chosen: list[Row] = []
    for source, members in sorted(by_source.items()):
        chance.shuffle(members)
        chosen += members[: int(times * sources.cap(source))]
    return chosen


def train(chosen: Sequence[Text], settings: Settings) -> Model:
    """The weights of the lowest penalised loss that so many iterations reach."""
    counts = counted([one.text for one in chosen], settings.bits)
    idf = inverse_frequencies(counts, settings.least_rows)
    features = weighed(counts, idf)
    weights, bias = fitted(features, balanced(chosen, settings.evenness), settings)
    return Model(idf, weights, bias)


def counted(some: Sequence[str], bits: int) -> Any:
    """(N, B) sparse: how often each bucket is hit in each text."""
    found = [grams.buckets(text, bits) for text in tqdm(some, desc="features", mininterval=10)]
    ends = np.cumsum([0, *(len(ids) for ids, _ in found)])
    ids = np.concatenate([ids.astype(np.int32) for ids, _ in found])
    hits = np.concatenate([hits.astype(np.float32) for _, hits in found])
    return csr_matrix((hits, ids, ends), shape=(len(some), 2**bits))


def inverse_frequencies(counts: Any, least: int) -> _Floats:
    """(B,) log((1 + N) / (1 + rows with it)) + 1; 0 where fewer than `least` rows have it."""
    rows = counts.shape[0]
    having = np.bincount(counts.indices, minlength=counts.shape[1])
    idf = np.log((1 + rows) / (1 + having)) + 1
    return np.where(having >= least, idf, 0.0).astype(np.float32)


def weighed(counts: Any, idf: _Floats) -> Any:
    """(N, B) sparse: count * idf, each row of length 1, as the graph makes them."""
    found = counts.copy()
    found.data = found.data * idf[found.indices]
    lengths = np.sqrt(np.asarray(found.multiply(found).sum(axis=1)).ravel())
    found.data /= np.repeat(np.maximum(lengths, 1e-6), np.diff(found.indptr)).astype(np.float32)
    return found


def balanced(chosen: Sequence[Text], evenness: float) -> Labels:
    """Labels with weights such that of each column both classes weigh alike."""
    targets = np.array([one.targets for one in chosen]) > _SURE
    weights = np.array([one.weights for one in chosen], dtype=np.float64)
    _, index, sizes = np.unique(
        [one.source for one in chosen], return_inverse=True, return_counts=True
    )
    weights *= (sizes[index] / sizes.mean())[:, None] ** -evenness
    for column in range(len(COLUMNS)):
        half = weights[:, column].sum() / 2
        for some in (targets[:, column], ~targets[:, column]):
            weights[some, column] *= half / max(weights[some, column].sum(), 1e-9)
    return Labels(targets.astype(np.float32), weights.astype(np.float32))


def fitted(features: Any, labels: Labels, settings: Settings) -> tuple[_Floats, _Floats]:
    """(B, 7) weights and (7,) bias of logistic regressions with a penalty of |w|^2 / 2 each."""
    buckets, columns = features.shape[1], labels.targets.shape[1]
    turned = features.T.tocsr()

    def loss(point: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
        table = point.astype(np.float32).reshape(buckets + 1, columns)
        weights, bias = table[:-1], table[-1]
        logits = features @ weights + bias  # (N, 7)
        losses = labels.weights * (np.logaddexp(0, logits) - labels.targets * logits)
        gaps = labels.weights * (1 / (1 + np.exp(-logits)) - labels.targets)
        gaps *= settings.loudness
        slopes = np.vstack([turned @ gaps + weights, gaps.sum(axis=0)])
        penalty = 0.5 * float((weights * weights).sum(dtype=np.float64))
        total = settings.loudness * float(losses.sum(dtype=np.float64)) + penalty
        return total, slopes.ravel().astype(np.float64)

    start = np.zeros((buckets + 1) * columns)
    with tqdm(total=settings.iterations, desc="iterations", mininterval=10) as bar:
        found = minimize(
            loss, start, jac=True, method="L-BFGS-B", callback=lambda _: bar.update(),
            options={"maxiter": settings.iterations, "maxcor": 6},
        )  # fmt: skip
    table = found.x.reshape(buckets + 1, columns).astype(np.float32)
    return table[:-1], table[-1]


if __name__ == "__main__":
    main()
