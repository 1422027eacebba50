"""A model's figures as Markdown, for its card."""

from collections.abc import Iterable, Mapping
from typing import Any, Final

from detectors.harms import COLUMNS, THRESHOLD_KEYS

_COLUMNS: Final = ("auprc", "auroc", "precision", "recall", "f1", "ece")


def tables(metrics: Mapping[str, Any], thresholds: Mapping[str, float]) -> str:
    """The tables of both held-out parts and of the sources nobody trained on."""
    parts = (
        _harms("Held-out prompts of known sources", metrics, "report", thresholds),
        _harms("Whole sources left out", metrics, "unseen", thresholds),
        _sources(metrics["by_source"]),
    )
    return "\n\n".join(parts)


def _harms(
    title: str, metrics: Mapping[str, Any], part: str, thresholds: Mapping[str, float]
) -> str:
    rows = [
        (column, thresholds[key], *_row(metrics[part][column]))
        for column, key in zip(COLUMNS, THRESHOLD_KEYS, strict=True)
    ]
    rows.append(("harmful, replies", thresholds["other"], *_row(metrics[f"{part}_replies"])))
    share = metrics[f"{part}_harmless_replies_blocked"]
    note = (
        f"Long harmless replies blocked at any segment: {share:.2%} "
        f"of {metrics[f'{part}_harmless_replies']}."
    )
    header = ("column", "threshold", "pos", "neg", *_COLUMNS)
    return f"### {title}\n\n{_table(header, rows)}\n\n{note}"


def _row(figures: Mapping[str, Any]) -> tuple[Any, ...]:
    return (figures["positives"], figures["negatives"], *(figures[name] for name in _COLUMNS))


def _sources(by_source: Mapping[str, Mapping[str, Any]]) -> str:
    names = ("harmless", "harmless_blocked", "harmful", "harmful_blocked")
    rows = [(source, *(found[name] for name in names)) for source, found in by_source.items()]
    header = ("source", "harmless rows", "of these blocked", "harmful rows", "of these blocked")
    return f"### Blocked by source, whole sources left out\n\n{_table(header, rows)}"


def _table(header: Iterable[str], rows: Iterable[tuple[Any, ...]]) -> str:
    names = tuple(header)
    lines = [names, ("---",) * len(names), *(tuple(map(_cell, row)) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
