"""Two small insult classifiers from PyPI, as they are: what one gets without training anything.

They see a segment alone, and judge few of the columns. In the train environment:

    pip install --no-deps toxic-comment-classifier==0.3.0 alt-profanity-check==1.9.1
    pip install keras h5py

Both read pickles of their own wheels, which is running their code, as importing them is. Only this
comparison does so: nothing that ships knows them.
"""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from threading import Lock
from types import ModuleType
from typing import Any, Final
from unittest.mock import patch

import numpy as np

from detectors.harms import COLUMNS, HARMFUL, THRESHOLD_KEYS
from detectors.protocol import FloatArray, Passage

_INSTALL: Final = (
    "pip install --no-deps toxic-comment-classifier==0.3.0 alt-profanity-check==1.9.1 && "
    "pip install keras h5py"
)
_EVEN: Final = dict.fromkeys(THRESHOLD_KEYS, 0.5)  # neither brings thresholds
_COLUMN: Final = {"toxic": HARMFUL, "threat": "violence", "identity_hate": "hate_speech"}
_ALIASES: Final = ("", ".models", ".layers", ".preprocessing", ".preprocessing.sequence")


class BaselineMissing(Exception):
    """A baseline's package is not installed here."""


class Profanity:
    """alt-profanity-check: a linear SVM on words; its probability stands in for `harmful`."""

    name = "alt-profanity-check"

    def __init__(self) -> None:
        """Raises BaselineMissing."""
        self.digest = _digest(self.name)
        self.thresholds: Mapping[str, float] = _EVEN

    @cached_property
    def _package(self) -> Any:
        return import_module("profanity_check")

    def score(self, passages: Sequence[Passage]) -> FloatArray:
        """(S, 7), NaN but for `harmful`."""
        found = self._package.predict_prob([passage.text for passage in passages])
        return _columns({HARMFUL: np.asarray(found, dtype=float)}, len(passages))


class ToxicComments:
    """toxic-comment-classifier: a bidirectional LSTM on Jigsaw's six classes, 100 words at most.

    Its classes toxic, threat and identity_hate stand in for harmful, violence and hate_speech.
    """

    name = "toxic-comment-classifier"

    def __init__(self) -> None:
        """Raises BaselineMissing."""
        self.digest = _digest(self.name)
        self.thresholds: Mapping[str, float] = _EVEN
        self._one_at_a_time = Lock()  # Keras says nothing of threads

    @cached_property
    def _package(self) -> Any:
        with _keras_as_tensorflow():
            return import_module("toxic_classifier.model")

    @cached_property
    def _classifier(self) -> Any:
        return self._package.ToxicCommentClassifier()

    def score(self, passages: Sequence[Passage]) -> FloatArray:
        """(S, 7), NaN in four columns. What its `classify` does, many texts a call."""
        with self._one_at_a_time:
            words = self._classifier.tokenizer.texts_to_sequences([p.text for p in passages])
            padded = self._package.pad_sequences(words, maxlen=self._package.MAXLEN)
            found = self._classifier.model.predict_on_batch(padded)  # (S, 6)
        by_class = dict(zip(self._package.LIST_CLASSES, np.asarray(found, float).T, strict=True))
        return _columns({_COLUMN[name]: by_class[name] for name in _COLUMN}, len(passages))


def installed() -> list[Profanity | ToxicComments]:
    """Both of them. Raises BaselineMissing saying how to install them."""
    return [Profanity(), ToxicComments()]


@contextmanager
def _keras_as_tensorflow() -> Iterator[None]:
    """Its model is plain Keras, imported under TensorFlow's name; torch runs it here.

    For the import only: where a module of that name stays, Keras asks it for more.
    """
    os.environ.setdefault("KERAS_BACKEND", "torch")
    try:
        keras = {name: import_module(f"keras{name}") for name in _ALIASES}
    except ImportError as error:
        raise BaselineMissing(f"to have them: {_INSTALL}") from error
    aliases = {f"tensorflow.keras{name}": module for name, module in keras.items()}
    with patch.dict(sys.modules, {"tensorflow": ModuleType("tensorflow"), **aliases}):
        yield


def _digest(package: str) -> str:
    try:
        return f"{package}-{version(package)}".encode().hex()
    except PackageNotFoundError as error:
        raise BaselineMissing(f"to have them: {_INSTALL}") from error


def _columns(known: Mapping[str, FloatArray], count: int) -> FloatArray:
    scores = np.full((count, len(COLUMNS)), np.nan)
    for column, values in known.items():
        scores[:, COLUMNS.index(column)] = values
    return scores
