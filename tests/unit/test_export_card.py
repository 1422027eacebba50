"""Figures as Markdown."""

from typing import Any

from detectors.harms import COLUMNS, DEFAULT_THRESHOLDS
from export import card

FIGURES: dict[str, Any] = {
    "positives": 3,
    "negatives": 4,
    "auprc": 0.98765,
    "auroc": 0.5,
    "precision": None,
    "recall": 0.0,
    "f1": 0.0,
    "ece": 0.1,
}


def metrics() -> dict[str, Any]:
    made: dict[str, Any] = {"by_source": {"dices": dict.fromkeys(("harmless", "harmful"), 2)}}
    made["by_source"]["dices"] |= {"harmless_blocked": 0.5, "harmful_blocked": None}
    for part in ("report", "unseen"):
        made[part] = dict.fromkeys(COLUMNS, FIGURES)
        made[f"{part}_replies"] = FIGURES
        made[f"{part}_harmless_replies"] = 600
        made[f"{part}_harmless_replies_blocked"] = 0.005
    return made


def test_every_column_has_a_line_in_each_part_and_a_missing_figure_is_a_dash() -> None:
    """Eight lines a part, thresholds beside them; nothing that was not measured reads as 0."""
    found = card.tables(metrics(), DEFAULT_THRESHOLDS).splitlines()
    line = "| hate_speech | 0.800 | 3 | 4 | 0.988 | 0.500 | - | 0.000 | 0.000 | 0.100 |"
    assert found.count(line) == 2
    assert sum(text.startswith("| harmful, replies | 0.900 |") for text in found) == 2
    assert "| dices | 2 | 0.500 | 2 | - |" in found
    assert any("0.50% of 600" in text for text in found)
