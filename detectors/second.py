"""When a language model is asked for a second look, and what its answer counts for: second.json.

    {"format": 1, "aggregation": "token", "limits": {"conversation": 160, "before": 100},
     "calibration": {"violence": {"slope": 6.1, "intercept": -0.4}},
     "band": {"violence": {"below": 0.2, "above": 0.1}},
     "encoders": ["<hex digest>", "..."]}

`calibration`, `band` and `prompts` are keyed by harms.COLUMNS (`harmful`, not `other`). A harm
without a band is never asked about. `prompts` ({"harmful": [...], "harmless": [...]} by harm) may
be left out: those of prompts.py. `encoders` is what `encoders` gives for the detectors that the
band was chosen with: around other scores it would be a band around nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from hashlib import sha256
from math import isfinite
from pathlib import Path
from typing import Final, NamedTuple, Protocol

import msgspec

from detectors.combine import Combination, Named
from detectors.harms import COLUMNS, HARMFUL, THRESHOLD_KEYS
from detectors.logprob import Affine, Aggregation, Helper, LogProb
from detectors.prompts import PROMPTS, SHORT_LIMITS, ClassPrompts, Limits
from detectors.protocol import Passage

FORMAT: Final = 1
FILE: Final = "second.json"
FILES: Final = "second*.json"
_DECIMALS: Final = 6  # as the encoders' combined scores have


class SecondError(ValueError):
    """The file makes no sense, or is for other detectors."""


class OtherDetectorsError(SecondError):
    """The file is for other detectors."""


class Band(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How far from its threshold a score is uncertain, 0..1 each; both 0: never."""

    below: float
    above: float


class Plan(msgspec.Struct, frozen=True):
    """second.json; fields that are not known, such as figures, are ignored."""

    format: int
    encoders: tuple[str, ...]  # digests
    calibration: dict[str, Affine]
    band: dict[str, Band]
    aggregation: Aggregation = "token"
    limits: Limits = SHORT_LIMITS
    prompts: dict[str, ClassPrompts] = {}

    def digest(self, helper: str) -> str:
        """Hex, over everything that can move a second score; helper: the language model's own."""
        prompts = {name: self.asks(name) for name in sorted(self.bands())}
        return sha256(msgspec.json.encode([self, prompts, helper], order="sorted")).hexdigest()

    def bands(self) -> dict[str, Band]:
        """Those that are not empty."""
        return {name: band for name, band in self.band.items() if band.below or band.above}

    def asks(self, name: str) -> ClassPrompts:
        """The class prompts of a column."""
        return self.prompts.get(name) or PROMPTS[name]

    def heads(self) -> tuple[str, ...]:
        """What every prompt that will be asked begins with."""
        return tuple(head for name in self.bands() for head in self.asks(name).heads())


class Second:
    """A language model that looks again where the encoders are uncertain. As thread-safe as it."""

    def __init__(
        self, plan: Plan, helper: Helper, digest: str, shipped: Mapping[str, float]
    ) -> None:
        """digest: hex, of everything that can move a score.

        shipped: by THRESHOLD_KEYS, the thresholds that the plan's bands were chosen around.
        """
        self._shipped = tuple(shipped[key] for key in THRESHOLD_KEYS)
        self._helper = helper
        self.digest = digest
        self._asked = [_Asked(COLUMNS.index(it), band) for it, band in plan.bands().items()]
        self._judges = {
            it.column: LogProb(
                helper, plan.asks(name), aggregation=plan.aggregation, limits=plan.limits,
                calibration=plan.calibration[name],
            )
            for it, name in zip(self._asked, plan.bands(), strict=True)
        }  # fmt: skip

    def uncertain(self, scores: Sequence[float], thresholds: Sequence[float]) -> tuple[int, ...]:
        """Columns whose score lies inside its band, both ends included; mostly none.

        The band holds what is uncertain by the threshold it was chosen around and by the one that
        is given: elsewhere the answers' calibration means nothing. At a threshold of 1 nobody is
        asked, nor about `harmful` where another harm is surely above its threshold: `harmful`
        counts for what no harm explains (worker/decide.py).

        scores: (7,) as harms.COLUMNS. thresholds: (7,) as harms.THRESHOLD_KEYS.
        """
        columns = tuple(
            column for column, band in self._asked
            if thresholds[column] < 1.0
            and max(thresholds[column], self._shipped[column]) - band.below <= scores[column]
            <= min(thresholds[column], self._shipped[column]) + band.above
        )  # fmt: skip
        explained = any(
            scores[column] > thresholds[column]
            for column, name in enumerate(COLUMNS)
            if name != HARMFUL and column not in columns
        )
        return tuple(it for it in columns if not (explained and COLUMNS[it] == HARMFUL))

    def score(self, passage: Passage, column: int) -> float:
        """The calibrated probability, 0..1, that a column's harm is there.

        Raises HelperError where the helper gives no answer, ValueError where it gives a wrong one.
        """
        return round(self._judges[column].classify([passage])[0], _DECIMALS)

    def close(self) -> None:
        """End the helper, where it can be ended: threads and connections of a server's."""
        closing: Callable[[], object] = getattr(self._helper, "close", lambda: None)
        closing()


class _Asked(NamedTuple):
    """A column with a band that is not empty."""

    column: int  # of harms.COLUMNS
    band: Band


class _Digested(Protocol):
    @property
    def digest(self) -> str: ...


def encoders(detectors: Sequence[Named], combination: Combination | None) -> tuple[str, ...]:
    """What scores come from: the detectors' digests in their order, then the combination's."""
    sources: list[_Digested] = [*detectors, *([combination] if combination else [])]
    return tuple(source.digest for source in sources)


def read(path: Path, expected: Sequence[str]) -> Plan:
    """The plan in a file, for these `encoders`.

    path: or a folder with several, second.json and second-*.json, each for other encoders. Raises
    SecondError where there is none or it makes no sense, OtherDetectorsError where it is for
    others.
    """
    if not path.is_dir():
        return _read(path, expected)
    files = sorted(path.glob(FILES)) or [path / FILE]
    for file in files[:-1]:
        with suppress(OtherDetectorsError):
            return _read(file, expected)
    return _read(files[-1], expected)


def _read(path: Path, expected: Sequence[str]) -> Plan:
    try:
        plan = msgspec.json.decode(path.read_bytes(), type=Plan)
    except OSError as error:
        raise SecondError(f"{path}: {error.strerror}; it says when the model is asked") from error
    except msgspec.DecodeError as error:
        raise SecondError(f"{path}: {error}") from error
    if plan.encoders != tuple(expected):
        raise OtherDetectorsError(
            f"{path}: its band was chosen with other detectors "
            f"({_short(plan.encoders)}; these are {_short(expected)}): choose it again"
        )
    _check(plan, path)
    return plan


def write(path: Path, plan: Plan) -> None:
    """Write what `read` takes. Raises SecondError where it would not."""
    _check(plan, path)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(plan), indent=1) + b"\n")


def _check(plan: Plan, path: Path) -> None:
    if plan.format != FORMAT:
        raise SecondError(f"{path}: format {plan.format}, this version reads {FORMAT}")
    tables: tuple[Mapping[str, object], ...] = (plan.calibration, plan.band, plan.prompts)
    for name in (name for table in tables for name in table):
        if name not in COLUMNS:
            raise SecondError(f"{path}: {name!r} is no column; known: {', '.join(COLUMNS)}")
    _check_bands(plan, path)
    _check_classes(plan, path)
    if min(plan.limits.conversation, plan.limits.before) < 0:
        raise SecondError(f"{path}: limits: characters, 0 or more")


def _check_bands(plan: Plan, path: Path) -> None:
    for name, band in plan.band.items():
        if not (0.0 <= band.below <= 1.0 and 0.0 <= band.above <= 1.0):
            raise SecondError(f"{path}: band: {name}: widths are 0 to 1")
    for name in plan.bands():
        if name not in plan.calibration:
            raise SecondError(f"{path}: calibration: {name} has a band and no calibration")
    for name, line in plan.calibration.items():
        if not (isfinite(line.slope) and isfinite(line.intercept)) or line.slope <= 0:
            raise SecondError(f"{path}: calibration: {name}: a larger margin must count for more")


def _check_classes(plan: Plan, path: Path) -> None:
    for name, classes in plan.prompts.items():
        if not (classes.harmful and classes.harmless and all(classes.ways)):
            raise SecondError(f"{path}: prompts: {name}: each class needs one that is not empty")


def _short(digests: Sequence[str]) -> str:
    return "+".join(digest[:6] for digest in digests) or "none"
