"""Several detectors' scores of one segment to the scores that count.

p = sigmoid(sum over detectors of weight * log-odds + intercept + later), by column; all are learnt
on dev data (export/combined.py) and kept beside the models, with the digests of those they are for.

Each segment of a long reply is one more chance to find harm where there is none, so one that
follows others of its reply needs more to reach the same probability: `later`, 0 or less, is what it
gets. Whether it does shows in the passage alone (`follows`).

Detectors cost unlike much. Where the cheap ones that come first find a segment clearly harmless,
their own combination counts, and the others need not be asked (`Stage`); so may the next ones do.
How far a segment goes depends on its passage alone.
"""

from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Final, Protocol

import msgspec
import numpy as np

from detectors.calibrate import sigmoid
from detectors.harms import COLUMNS, DEFAULT_THRESHOLDS, THRESHOLD_KEYS
from detectors.protocol import BoolArray, FloatArray, IntArray, Passage

FILE: Final = "combination.json"
_FILES: Final = "combination*.json"
_GRAPHS: Final = ("model.fp32.onnx", "model.fp16.onnx", "model.int8.onnx")  # as export names them
_TEXT_BEFORE: Final = 30  # letters and digits, fewer are no text: blanks would be a way round
_NEAREST = 1e-6  # to 0 and to 1, of a probability that becomes log-odds
_DECIMALS = 6


class CombinationError(ValueError):
    """The file cannot serve these detectors."""


class Named(Protocol):
    """What identifies a detector."""

    @property
    def name(self) -> str:
        """As in `model`."""
        ...

    @property
    def digest(self) -> str:
        """Hex."""
        ...


class Stage(msgspec.Struct, frozen=True):
    """What the first detectors settle by themselves."""

    detectors: int  # how many of them
    weights: dict[str, tuple[float, ...]]  # as Combination's, of these alone
    below: dict[str, float]  # column -> settled where every column's probability is below

    def settles(self, scores: FloatArray, later: BoolArray) -> BoolArray:
        """(B,) whether these suffice. scores: (detectors or more, B, 7) probabilities."""
        below = np.array([self.below[column] for column in COLUMNS])
        return np.asarray((self.combined(scores, later) < below).all(axis=1))  # NaN below nothing

    def combined(self, scores: FloatArray, later: BoolArray) -> FloatArray:
        """(B, 7) by these alone."""
        return _mixed(scores[: self.detectors], self.weights, later)


class Combination(msgspec.Struct, frozen=True):
    """combination.json."""

    detectors: dict[str, str]  # name -> digest, in the order of the weights
    # column -> one weight a detector, the intercept, and `later` (left out: 0)
    weights: dict[str, tuple[float, ...]]
    thresholds: dict[str, float]  # by THRESHOLD_KEYS
    stages: tuple[Stage, ...] = ()  # of ever more detectors; none: all are always asked
    digest: str = ""  # of the file

    def combined(
        self, scores: FloatArray, later: BoolArray, asked: IntArray | None = None
    ) -> FloatArray:
        """(B, 7) probabilities of (D, B, 7) probabilities; NaN where any that counts is.

        later: (B,) which segments follow others of their reply. asked: (B,) how many detectors
        count, as `asked` gives it unless told.
        """
        asked = self.asked(scores, later) if asked is None else asked
        combined = _mixed(scores, self.weights, later)
        for stage in self.stages:
            alone = (asked == stage.detectors)[:, None]
            combined = np.where(alone, stage.combined(scores, later), combined)
        return combined

    def asked(self, scores: FloatArray, later: BoolArray) -> IntArray:
        """(B,) how many detectors each segment goes through. scores: (D, B, 7)."""
        found = np.full(scores.shape[1], len(self.detectors))
        for stage in reversed(self.stages):
            found = np.where(stage.settles(scores, later), stage.detectors, found)
        return found


def follows(passages: Sequence[Passage]) -> BoolArray:
    """(B,) which of them follow other segments of their reply: there is text before them."""
    before = (sum(map(str.isalnum, passage.before)) for passage in passages)
    return np.array([count >= _TEXT_BEFORE for count in before], dtype=bool)


def _mixed(
    scores: FloatArray, weights: Mapping[str, Sequence[float]], later: BoolArray
) -> FloatArray:
    """(B, 7) probabilities of (D, B, 7): the weighted sum of log-odds, the intercept, and what a
    later segment gets."""
    detectors = len(scores)
    slopes = np.array([weights[column][:detectors] for column in COLUMNS])  # (7, D)
    intercepts = np.array([weights[column][detectors] for column in COLUMNS])
    shifts = np.array([sum(weights[column][detectors + 1 :]) for column in COLUMNS])
    total = np.einsum("dbc,cd->bc", log_odds(scores), slopes) + intercepts  # (B, 7)
    return sigmoid(total + np.outer(later, shifts)).round(_DECIMALS)


def log_odds(scores: FloatArray) -> FloatArray:
    """log(p / (1 - p)) of probabilities, same shape, 14 at most either way; NaN of NaN."""
    clipped = np.clip(scores, _NEAREST, 1 - _NEAREST)
    found: FloatArray = np.log(clipped) - np.log1p(-clipped)
    return found


def read(folder: Path, detectors: Sequence[Named]) -> Combination | None:
    """The combination of exactly these detectors; None where the folder has none for their names.

    There may be several, combination.json and combination-*.json, each for other names. Raises
    CombinationError where it was learnt for other folders, or makes no sense.
    """
    if len(detectors) < 2:
        return None
    names = [detector.name for detector in detectors]
    found = [it for it in map(_decoded, sorted(folder.glob(_FILES))) if list(it.detectors) == names]
    if not found:
        return None
    if len(found) > 1:
        raise CombinationError(f"{folder}: two combinations of {', '.join(names)}: remove one")
    _check(found[0])
    for detector in detectors:
        if not _is_of(detector.digest, found[0].detectors[detector.name]):
            raise CombinationError(
                f"the combination of {', '.join(names)} was learnt with another {detector.name}: "
                "learn it again with `python -m export.combined`, or remove its file to let the "
                "highest score count"
            )
    return found[0]


def with_graph(digest: str, graph: str) -> str:
    """The digest of a folder where another graph than its manifest's own is run."""
    return sha256(f"{digest} {graph}".encode()).hexdigest()


def _is_of(digest: str, folder: str) -> bool:
    """Whether it is the folder's own digest, or that of another of its graphs.

    Weights are learnt with the graph that the CPU serves and hold for the others: an export fails
    where their logits stray.
    """
    return digest in (folder, *(with_graph(folder, graph) for graph in _GRAPHS))


def _decoded(path: Path) -> Combination:
    try:
        content = path.read_bytes()
        found = msgspec.json.decode(content, type=Combination)
    except OSError as error:
        raise CombinationError(f"{path}: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise CombinationError(f"{path.name}: {error}") from error
    return msgspec.structs.replace(found, digest=sha256(content).hexdigest())


def _check(found: Combination) -> None:
    _check_weights(found.weights, len(found.detectors), "weights")
    for harm, threshold in found.thresholds.items():
        if harm not in THRESHOLD_KEYS or not 0.0 <= threshold <= 1.0:
            raise CombinationError(f"{FILE}: thresholds: {harm}: unknown, or outside 0..1")
    sizes = [stage.detectors for stage in found.stages]
    if sizes != sorted({it for it in sizes if 0 < it < len(found.detectors)}):
        raise CombinationError(
            f"{FILE}: stages: detectors: ever more, and fewer than the {len(found.detectors)}"
        )
    for stage in found.stages:
        _check_stage(stage, DEFAULT_THRESHOLDS | found.thresholds)


def _check_weights(weights: Mapping[str, Sequence[float]], detectors: int, field: str) -> None:
    if set(weights) != set(COLUMNS):
        raise CombinationError(f"{FILE}: {field}: need {', '.join(COLUMNS)}")
    for column, row in weights.items():
        if not detectors + 1 <= len(row) <= detectors + 2:
            raise CombinationError(
                f"{FILE}: {field}: {column}: one a detector, the intercept, and for later segments"
            )
        slopes, shift = row[:detectors], sum(row[detectors + 1 :])
        if not np.isfinite(row).all() or min(slopes) < 0 or max(slopes) <= 0:
            raise CombinationError(f"{FILE}: {field}: {column}: a higher score must count for more")
        if shift > 0:
            raise CombinationError(f"{FILE}: {field}: {column}: a later segment counts for no more")


def _check_stage(stage: Stage, thresholds: Mapping[str, float]) -> None:
    _check_weights(stage.weights, stage.detectors, "stages: weights")
    if set(stage.below) != set(COLUMNS):
        raise CombinationError(f"{FILE}: stages: below: need {', '.join(COLUMNS)}")
    for column, key in zip(COLUMNS, THRESHOLD_KEYS, strict=True):
        if not 0.0 <= stage.below[column] <= thresholds[key]:
            raise CombinationError(
                f"{FILE}: stages: below: {column}: 0 to its threshold, {thresholds[key]}: "
                "what is above is not harmless"
            )


def highest(scores: FloatArray) -> FloatArray:
    """(B, 7) of (D, B, 7): what counts where no combination was learnt; NaN wins."""
    maximum: FloatArray = scores.max(axis=0)
    return maximum
