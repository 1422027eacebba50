"""Several detectors' scores of one segment to the scores that count.

p = sigmoid(sum over detectors of weight * log-odds + intercept), by column; weights are learnt on
dev data (export/combined.py) and kept beside the models, with the digests of those they are for.
"""

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Final, Protocol

import msgspec
import numpy as np

from detectors.calibrate import sigmoid
from detectors.harms import COLUMNS, THRESHOLD_KEYS
from detectors.protocol import FloatArray

FILE: Final = "combination.json"
_FILES: Final = "combination*.json"
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


class Combination(msgspec.Struct, frozen=True):
    """combination.json."""

    detectors: dict[str, str]  # name -> digest, in the order of the weights
    weights: dict[str, tuple[float, ...]]  # column -> one weight a detector, then the intercept
    thresholds: dict[str, float]  # by THRESHOLD_KEYS
    digest: str = ""  # of the file

    def combined(self, scores: FloatArray) -> FloatArray:
        """(B, 7) probabilities of (D, B, 7) probabilities; NaN where any of them is."""
        table = np.array([self.weights[column] for column in COLUMNS])  # (7, D + 1)
        total = np.einsum("dbc,cd->bc", log_odds(scores), table[:, :-1]) + table[:, -1]  # (B, 7)
        return sigmoid(total).round(_DECIMALS)


def log_odds(scores: FloatArray) -> FloatArray:
    """log(p / (1 - p)) of probabilities, same shape, 14 at most either way; NaN of NaN."""
    clipped = np.clip(scores, _NEAREST, 1 - _NEAREST)
    found: FloatArray = np.log(clipped) - np.log1p(-clipped)
    return found


def read(folder: Path, detectors: Sequence[Named]) -> Combination | None:
    """The combination of exactly these detectors; None where the folder has none for their names.

    There may be several, combination.json and combination-*.json, each for other names. Raises
    CombinationError where it was learnt for other digests, or makes no sense.
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
        if found[0].detectors[detector.name] != detector.digest:
            raise CombinationError(
                f"the combination of {', '.join(names)} was learnt with another {detector.name}: "
                "learn it again with `python -m export.combined`, or remove its file to let the "
                "highest score count"
            )
    return found[0]


def _decoded(path: Path) -> Combination:
    content = path.read_bytes()
    try:
        found = msgspec.json.decode(content, type=Combination)
    except msgspec.DecodeError as error:
        raise CombinationError(f"{path.name}: {error}") from error
    return msgspec.structs.replace(found, digest=sha256(content).hexdigest())


def _check(found: Combination) -> None:
    if set(found.weights) != set(COLUMNS):
        raise CombinationError(f"{FILE}: weights: need {', '.join(COLUMNS)}")
    for column, row in found.weights.items():
        if len(row) != len(found.detectors) + 1:
            raise CombinationError(f"{FILE}: weights: {column}: one a detector, and the intercept")
        if not np.isfinite(row).all() or min(row[:-1]) < 0 or max(row[:-1]) <= 0:
            raise CombinationError(f"{FILE}: weights: {column}: a higher score must count for more")
    for harm, threshold in found.thresholds.items():
        if harm not in THRESHOLD_KEYS or not 0.0 <= threshold <= 1.0:
            raise CombinationError(f"{FILE}: thresholds: {harm}: unknown, or outside 0..1")


def highest(scores: FloatArray) -> FloatArray:
    """(B, 7) of (D, B, 7): what counts where no combination was learnt; NaN wins."""
    maximum: FloatArray = scores.max(axis=0)
    return maximum
