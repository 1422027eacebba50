"""The manifest that an export writes is the one that serving reads."""

import json
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from detectors.calibrate import Calibration
from detectors.harms import COLUMNS, DEFAULT_THRESHOLDS
from detectors.session import Folder
from export import manifest

MADE = manifest.Made(
    opset=17,
    calibration=Calibration(slopes=np.linspace(0.5, 1.1, 7), intercepts=np.linspace(-1, 1, 7)),
    thresholds=DEFAULT_THRESHOLDS,
    provenance={"base": {"name": "x"}},
    metrics={"report": {"violence": {"auprc": 0.123456, "f1": float("nan"), "positives": 3}}},
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / manifest.MODEL).write_bytes(b"graph")
    (tmp_path / manifest.TOKENIZER).write_bytes(b"{}")
    return tmp_path


def test_serving_reads_what_export_writes(folder: Path) -> None:
    """Digests fit, calibration and thresholds arrive as they were."""
    manifest.write(folder, manifest.contents(folder, MADE))
    found = Folder(folder).manifest
    assert found.files[manifest.MODEL] == sha256(b"graph").hexdigest()
    assert list(found.calibration[COLUMNS[6]]) == pytest.approx([1.1, 1.0])
    assert found.thresholds == DEFAULT_THRESHOLDS


def test_figures_that_do_not_exist_are_null(folder: Path) -> None:
    """JSON has no NaN, and 0 would be a figure."""
    manifest.write(folder, manifest.contents(folder, MADE))
    written = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    found = written["metrics"]["report"]["violence"]
    assert found == {"auprc": 0.1235, "f1": None, "positives": 3}
