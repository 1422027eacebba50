"""Which rows calibrate and which are reported, thresholds and figures: the same of every model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detectors.calibrate import Calibration
from training import measure, rows, sets, thresholds
from training.also import own_held_out
from training.measure import Scored
from training.rows import Row
from training.thresholds import Passing

_REPORTED = ("report", "unseen")


def held(data: Path, sample: int) -> dict[str, list[Row]]:
    """Rows by what they are for; only those of `calibrate...` may choose anything.

    data: folder that holds permissive/. sample: rows of a known source.
    """
    parts = rows.split(rows.read(data / "permissive"))
    chosen, shown = sets.calibrating(parts, own_held_out(), sample), sets.shown(parts, sample)
    found = {
        "calibrate": [*chosen.known, *chosen.unknown],
        "calibrate_harmless": chosen.long_harmless,
        "calibrate_look_alikes": chosen.look_alikes,
        "calibrate_counter_speech": chosen.counter_speech,
    }
    for part in _REPORTED:
        found[part] = getattr(shown, part)
        ids = {row.id for row in getattr(parts, part)}
        found[f"{part}_harmless"] = [row for row in shown.long_harmless if row.id in ids]
        found[f"{part}_look_alikes"] = [row for row in shown.look_alikes if row.id in ids]
    return found


def choose(scored: Mapping[str, Scored], calibration: Calibration) -> dict[str, float]:
    """Thresholds by THRESHOLD_KEYS, from the rows that calibrate."""
    passing = [
        Passing(scored["calibrate_harmless"], thresholds.FALSE_BLOCKS),
        Passing(scored["calibrate_look_alikes"], thresholds.LOOK_ALIKES_BLOCKED),
        Passing(scored["calibrate_counter_speech"], thresholds.COUNTER_SPEECH_BLOCKED),
    ]
    return thresholds.choose(scored["calibrate"], calibration, passing)


def of(
    scored: Mapping[str, Scored], calibration: Calibration, chosen: Mapping[str, float]
) -> dict[str, Any]:
    """Figures on rows that neither weights nor calibration nor thresholds have seen."""
    choice = calibration, dict(chosen)
    found: dict[str, Any] = {}
    for part in _REPORTED:
        by_column = measure.table(scored[part], *choice)
        found[part] = {column: figures._asdict() for column, figures in by_column.items()}
        replies = scored[part].only(lambda row: row.kind == "reply")
        found[f"{part}_replies"] = measure.table(replies, *choice)["harmful"]._asdict()
        for kind in ("harmless", "look_alikes"):
            some = scored[f"{part}_{kind}"]
            name = f"{part}_harmless_replies" if kind == "harmless" else f"{part}_look_alikes"
            found[name] = len(some.rows)
            found[f"{name}_blocked"] = (
                float(measure.blocked(some, *choice).mean()) if some.rows else float("nan")
            )
    found["by_source"] = measure.blocked_by_source(scored["unseen"], *choice)
    return found
