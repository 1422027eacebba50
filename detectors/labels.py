"""A foreign classifier's labels to our columns: toxic, threat, ... to violence, ..., harmful.

In log-odds from end to end, so that calibration and its refusals are the same for every model.
"""

from collections.abc import Sequence
from typing import Final, Literal

import msgspec
import numpy as np

from detectors.harms import COLUMNS, HARMFUL
from detectors.protocol import FloatArray

Activation = Literal["softmax", "sigmoid"]
Combine = Literal["max", "noisy-or", "sum"]

SILENT: Final = -30.0  # log-odds of a column that no label speaks of: a score of 0.000000
_FAR: Final = 500.0  # log-odds; expm1 overflows at 710 and a softplus vanishes at -745


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The labels that make up one column.

    max: the likeliest of them. noisy-or: 1 - (1 - p1)(1 - p2)..., for labels that are independent
    causes. sum: for labels that exclude each other, so of a softmax only.
    """

    labels: tuple[str, ...]
    combine: Combine = "max"


class LabelMap(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the logits of a model mean."""

    names: tuple[str, ...]  # (L,) in the order of the logits
    activation: Activation
    columns: dict[str, Rule]  # by COLUMNS; one that is missing scores 0
    negative: str | None = None  # harmless; `harmful` is 1 - p of it where no rule makes it
    ignored: tuple[str, ...] = ()  # labels that are no harm of ours, said so on purpose

    def log_odds(self, logits: FloatArray) -> FloatArray:
        """(N, 7) log-odds of our columns from (N, L) logits.

        Raises ValueError where a logit is NaN or infinite: a maximum could hide it.
        """
        if not np.isfinite(logits).all():
            raise ValueError("the model gave a logit that is not finite")
        found = np.full((len(logits), len(COLUMNS)), SILENT)
        for index, column in enumerate(COLUMNS):
            rule = self.columns.get(column)
            if rule is not None:
                found[:, index] = self._of_rule(rule, logits)
            elif column == HARMFUL and self.negative is not None:
                found[:, index] = -self._of_labels((self.negative,), logits)
        return found

    def silent(self) -> tuple[str, ...]:
        """The columns that no label speaks of."""
        spoken = {*self.columns} | ({HARMFUL} if self.negative is not None else set())
        return tuple(column for column in COLUMNS if column not in spoken)

    def check(self) -> None:
        """Raises ValueError where the map does not fit its own labels or our columns."""
        if len(set(self.names)) != len(self.names) or not self.names:
            raise ValueError(f"labels {list(self.names)} are none, or name one twice")
        if self.activation == "softmax" and len(self.names) < 2:
            raise ValueError("a softmax over one label is always 1; write sigmoid")
        self._check_columns()
        self._check_labels()

    def _check_columns(self) -> None:
        unknown = set(self.columns) - set(COLUMNS)
        if unknown:
            raise ValueError(f"columns {sorted(unknown)} are unknown; there are {list(COLUMNS)}")
        if HARMFUL in self.silent():
            raise ValueError("nothing says `harmful`: give it labels, or name the negative label")
        for column, rule in self.columns.items():
            if not rule.labels:
                raise ValueError(f"column {column} has no label")
            if rule.combine == "sum" and self.activation != "softmax":
                raise ValueError(f"column {column}: only labels of a softmax can be summed")
            if self.activation == "softmax" and set(rule.labels) >= set(self.names):
                raise ValueError(f"column {column} holds every label: it would always be 1")

    def _check_labels(self) -> None:
        used = {label for rule in self.columns.values() for label in rule.labels}
        named = used | set(self.ignored) | ({self.negative} if self.negative is not None else set())
        unknown = named - set(self.names)
        if unknown:
            raise ValueError(f"labels {sorted(unknown)} are not the model's: {list(self.names)}")
        forgotten = set(self.names) - named
        if forgotten:
            raise ValueError(f"labels {sorted(forgotten)} go nowhere; map them or list as ignored")

    def _of_rule(self, rule: Rule, logits: FloatArray) -> FloatArray:
        if rule.combine == "sum":
            return self._of_labels(rule.labels, logits)
        each = np.stack([self._of_labels((label,), logits) for label in rule.labels])  # (K, N)
        return each.max(axis=0) if rule.combine == "max" else _noisy_or(each)

    def _of_labels(self, labels: Sequence[str], logits: FloatArray) -> FloatArray:
        """(N,) log-odds that one of `labels` holds; several only of a softmax."""
        chosen = [self.names.index(label) for label in labels]
        if self.activation == "sigmoid":
            return logits[:, chosen[0]]
        rest = [i for i in range(len(self.names)) if i not in chosen]
        return _log_sum(logits[:, chosen]) - _log_sum(logits[:, rest])


def _log_sum(logits: FloatArray) -> FloatArray:
    """(N,) log of the summed exponentials of (N, K)."""
    summed: FloatArray = np.logaddexp.reduce(logits, axis=1)
    return summed


def _noisy_or(log_odds: FloatArray) -> FloatArray:
    """(N,) log-odds that any of K independent causes holds, from (K, N).

    -log(1 - p) of all together is the sum of theirs; expm1 turns it back without loss at either
    end.
    """
    surprise: FloatArray = np.logaddexp(0.0, log_odds.clip(-_FAR, _FAR)).sum(axis=0)  # (N,)
    return surprise + np.log(-np.expm1(-surprise))
