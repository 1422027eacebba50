"""What a model's labels mean to us, from a small TOML file; some come along in export/labels.

source = "unitary/toxic-bert"
licence = "Apache-2.0"
data = "what it was trained on"
inputs = "text"                  # or "pair", of a model that was trained on conversation + text
activation = "sigmoid"           # or "softmax"
negative = "neutral"             # the harmless label, if there is one
ignored = ["spam"]

[columns]
violence = ["threat"]
harmful = { labels = ["toxic", "threat"], combine = "noisy-or" }

[thresholds]                     # optional, as in decisions: six harms and `other`
other = 0.8
"""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from detectors.harms import DEFAULT_THRESHOLDS, THRESHOLD_KEYS
from detectors.labels import Activation, LabelMap, Rule
from detectors.tokens import Inputs
from export.errors import ExportError

SHIPPED: Final = Path(__file__).parent / "labels"
_PROBLEMS: Final = {
    "single_label_classification": "softmax",
    "multi_label_classification": "sigmoid",
}


class LabelFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file as it is written."""

    source: str
    licence: str
    data: str
    inputs: Inputs
    activation: Activation
    columns: dict[str, Rule | tuple[str, ...]]
    negative: str | None = None
    ignored: tuple[str, ...] = ()
    thresholds: dict[str, float] = {}

    def map_of(self, names: tuple[str, ...], problem: str | None) -> LabelMap:
        """The map for a model with these labels. Raises ExportError where they do not fit.

        problem: the checkpoint's own `problem_type`, if it has one.
        """
        if _PROBLEMS.get(problem or "", self.activation) != self.activation:
            raise ExportError(
                f"the checkpoint says {problem}, the label map {self.activation}: one is wrong"
            )
        rules = {
            column: rule if isinstance(rule, Rule) else Rule(rule)
            for column, rule in self.columns.items()
        }
        found = LabelMap(names, self.activation, rules, self.negative, self.ignored)
        try:
            found.check()
        except ValueError as error:
            raise ExportError(f"label map: {error}") from error
        return found

    def all_thresholds(self) -> dict[str, float]:
        """The file's own, else the contract's."""
        return DEFAULT_THRESHOLDS | self.thresholds


def read(path: Path) -> LabelFile:
    """A label file: a path, or the name of one that comes along. Raises ExportError."""
    found = path if path.is_file() else SHIPPED / path.with_suffix(".toml").name
    if not found.is_file():
        there = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.toml")))
        raise ExportError(f"no label map {path}; write one, or take one that comes along: {there}")
    try:
        content = tomllib.loads(found.read_text(encoding="utf-8"))
        labels = msgspec.convert(content, LabelFile)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise ExportError(f"{found}: {error}") from error
    _check_thresholds(labels.thresholds)
    return labels


def _check_thresholds(thresholds: Mapping[str, Any]) -> None:
    unknown = set(thresholds) - set(THRESHOLD_KEYS)
    if unknown:
        raise ExportError(f"thresholds for {sorted(unknown)}; there are {list(THRESHOLD_KEYS)}")
    outside = {harm: t for harm, t in thresholds.items() if not 0.0 <= t <= 1.0}
    if outside:
        raise ExportError(f"thresholds outside 0..1: {outside}")
