"""A model's figures as Markdown, for its card."""

from collections.abc import Iterable, Mapping
from typing import Any, Final

from detectors.harms import COLUMNS, HARMFUL, THRESHOLD_KEYS

_STUB: Final = """# {source}, as exported

Made by `python -m export --hf`; what is not known is left open below. Fill it in before you ship.

- Architecture: {architecture}; judges {inputs}.
- Trained on: {data}.
- Licence: {licence}.
- Columns that no label feeds, and that always score 0: {silent}.
- Scores: {calibrated}.
- Graphs: fp32 off by {fp32}, fp16 by {fp16} (largest logit); int8 moves scores by {int8:.4f} at
  most; attentions fused for CUDA: {fused}.

## Labels

{labels}

## How good it is

{figures}

## Where it fails

(not written yet)
"""
_COLUMNS: Final = ("auprc", "auroc", "precision", "recall", "f1", "ece")


def tables(metrics: Mapping[str, Any], thresholds: Mapping[str, float]) -> str:
    """The tables of both held-out parts and of the sources nobody trained on."""
    parts = (
        _harms("Held-out prompts of known sources", metrics, "report", thresholds),
        _harms("Whole sources left out", metrics, "unseen", thresholds),
        _sources(metrics["by_source"]),
    )
    return "\n\n".join(parts)


def stub(manifest: Mapping[str, Any]) -> str:
    """The beginning of a card for somebody else's model, from what the manifest knows."""
    provenance, metrics = manifest["provenance"], manifest["metrics"]
    labels = manifest["labels"]
    spoken = {*labels["columns"]} | ({HARMFUL} if labels["negative"] is not None else set())
    fitted = ", ".join(provenance["calibrated"])
    pair = manifest["inputs"] == "pair"
    return _STUB.format(
        **{key: provenance[key] for key in ("source", "architecture", "data", "licence")},
        inputs="text in its conversation" if pair else "text alone, without its conversation",
        silent=", ".join(column for column in COLUMNS if column not in spoken) or "none",
        calibrated=f"calibrated on held-out rows: {fitted}" if fitted else "not calibrated",
        fp32=metrics["fp32_largest_logit_error"],
        fp16=metrics["fp16_largest_logit_error"],
        int8=metrics["int8_score_error"]["largest"],
        fused=metrics["attentions_fused"],
        labels=_labels(labels),
        figures=_foreign(manifest),
    )


def _labels(labels: Mapping[str, Any]) -> str:
    rows = [
        (column, rule["combine"], ", ".join(rule["labels"]))
        for column, rule in labels["columns"].items()
    ]
    if HARMFUL not in labels["columns"]:
        rows.append((HARMFUL, "1 - p", labels["negative"]))
    return _table(("column", f"of ({labels['activation']})", "labels"), rows)


def _foreign(manifest: Mapping[str, Any]) -> str:
    metrics, thresholds = manifest["metrics"], manifest["thresholds"]
    parts = {"report": "Rows of known sources", "unseen": "Whole sources left out"}
    keys = dict(zip(COLUMNS, THRESHOLD_KEYS, strict=True))
    tables = [
        f"### {title}\n\n"
        + _table(
            ("column", "threshold", "pos", "neg", *_COLUMNS),
            [(c, thresholds[keys[c]], *_row(found)) for c, found in metrics[part].items()],
        )
        for part, title in parts.items()
        if part in metrics
    ]
    return "\n\n".join(tables) or "(not measured: export with --data)"


def _harms(
    title: str, metrics: Mapping[str, Any], part: str, thresholds: Mapping[str, float]
) -> str:
    rows = [
        (column, thresholds[key], *_row(metrics[part][column]))
        for column, key in zip(COLUMNS, THRESHOLD_KEYS, strict=True)
    ]
    rows.append(("harmful, replies", thresholds["other"], *_row(metrics[f"{part}_replies"])))
    share = metrics[f"{part}_harmless_replies_blocked"]
    shown = "no such replies" if share is None else f"{share:.2%}"
    note = (
        f"Long harmless replies blocked at any segment: {shown} "
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
