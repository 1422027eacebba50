"""The floor: TF-IDF of words and characters, a logistic regression a column. What a bag of words
knows, from the rows that the classifier is trained on.

It learns from whole texts and judges what the worker judges, the text before and the segment; it
does not read the conversation. Calibration and thresholds are made as the classifier's are, on the
same half of the held-out prompts.
"""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from scipy.sparse import hstack
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from tqdm import tqdm

from detectors.calibrate import Calibration, calibrated
from detectors.harms import COLUMNS
from detectors.protocol import FloatArray, Passage
from training import thresholds
from training.measure import Scored
from training.rows import Row
from training.windows import capped, judged

_SEED: Final = 17
_VERSION: Final = 3  # raise it when the model below changes: kept scores are then another file's
_WORDS: Final = {"ngram_range": (1, 2), "min_df": 3, "max_features": 100_000}
_CHARS: Final = {"analyzer": "char_wb", "ngram_range": (2, 5), "min_df": 5, "max_features": 150_000}
_C: Final = 4.0  # inverse regularisation


class Rows(NamedTuple):
    """What the floor is made from; no row is in two of them by prompt."""

    fit: list[Row]
    calibrate: list[Row]
    harmless: list[Row]  # long harmless replies of the same part as `calibrate`


class Floor:
    """A Scorer. Fitted when the first text that is not known already is to be scored."""

    def __init__(self, name: str, rows: Rows, kept: Path) -> None:
        """kept: folder where its thresholds are kept beside the scores."""
        self.name, self._rows = name, rows
        self._fit = capped(rows.fit, random.Random(_SEED))
        self.digest = _digest(self._fit, rows)
        self._file = kept / f"floor-{self.digest[:16]}.json"

    @property
    def thresholds(self) -> Mapping[str, float]:
        """Chosen as the classifier's are."""
        if not self._file.exists():
            _ = self._fitted
        found: dict[str, float] = json.loads(self._file.read_text(encoding="utf-8"))
        return found

    def score(self, passages: Sequence[Passage]) -> FloatArray:
        """(S, 7) probabilities."""
        model, calibration = self._fitted
        return calibrated(model(passages), calibration)

    @cached_property
    def _fitted(self) -> tuple["_Model", Calibration]:
        model = _Model(self._fit)
        scored, harmless = _scored(model, self._rows.calibrate), _scored(model, self._rows.harmless)
        calibration = thresholds.calibrate(scored)
        passing = [thresholds.Passing(harmless, thresholds.FALSE_BLOCKS)]
        chosen = thresholds.choose(scored, calibration, passing)
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._file.write_text(json.dumps(chosen), encoding="utf-8")
        return model, calibration


class _Model:
    """Passages to logits, (S, 7)."""

    def __init__(self, fit: Sequence[Row]) -> None:
        self._words, self._chars = TfidfVectorizer(**_WORDS), TfidfVectorizer(**_CHARS)
        texts = [row.text for row in fit]
        features = hstack([
            vectorizer.fit_transform(texts)
            for vectorizer in tqdm((self._words, self._chars), desc="floor: words, characters")
        ]).tocsr()  # fmt: skip
        columns = range(len(COLUMNS))
        self._heads = [_head(features, fit, i) for i in tqdm(columns, desc="floor: columns")]

    def __call__(self, passages: Sequence[Passage]) -> FloatArray:
        texts = [passage.before + passage.text for passage in passages]
        features = hstack([self._words.transform(texts), self._chars.transform(texts)]).tocsr()
        return np.stack([head.decision_function(features) for head in self._heads], axis=1)


def _head(features: Any, fit: Sequence[Row], column: int) -> LogisticRegression:
    """One column's regression, over the rows that have a label for it."""
    weights = np.array([row.weights[column] for row in fit])
    targets = np.array([row.targets[column] for row in fit])
    known = weights > 0
    head = LogisticRegression(C=_C, solver="liblinear", class_weight="balanced")
    return head.fit(features[known], targets[known] > 0.5, sample_weight=weights[known])


def _scored(logits_of: Callable[[Sequence[Passage]], FloatArray], rows: Sequence[Row]) -> Scored:
    return Scored(list(rows), np.stack([logits_of(judged(row)).max(axis=0) for row in rows]))


def _digest(fit: Sequence[Row], rows: Rows) -> str:
    whole = sha256(repr((_VERSION, _WORDS, _CHARS, _C)).encode())
    for row in fit:
        whole.update(repr((row.id, row.targets, row.weights)).encode())
    for row in (*rows.calibrate, *rows.harmless):
        whole.update(row.id.encode())
    return whole.hexdigest()
