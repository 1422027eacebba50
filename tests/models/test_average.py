"""The mean of two runs' weights is a run that can be exported. Needs the train extra."""

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.train


def run(folder: Path, value: float, width: int = 3) -> Path:
    """A run folder of one layer, all of whose weights are `value`."""
    import torch

    folder.mkdir()
    weights = {"layer": torch.full((2, width), value), "ids": torch.arange(4)}
    torch.save(weights, folder / "model.pt")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "curve.jsonl").write_text("")
    (folder / "settings.json").write_text(json.dumps({"base": "minilm", "layers": 0}))
    return folder


def test_each_weight_lies_between_the_two(tmp_path: Path) -> None:
    """A quarter of the way; whole numbers stay those of the first."""
    import torch

    from training import average

    runs = [str(run(tmp_path / name, value)) for name, value in (("a", 1.0), ("b", 3.0))]
    average.main(["--runs", *runs, "--share", "0.25", "--out", str(tmp_path / "c")])
    weights = torch.load(tmp_path / "c" / "model.pt", weights_only=True)
    assert weights["layer"].tolist() == [[1.5] * 3] * 2
    assert weights["ids"].tolist() == [0, 1, 2, 3]
    settings = json.loads((tmp_path / "c" / "settings.json").read_text())
    assert settings["base"] == "minilm"
    assert settings["averaged_with"] == {"run": "a", "share": 0.75}


def test_unlike_models_are_refused(tmp_path: Path) -> None:
    """Another width, or another base."""
    from training import average

    runs = [run(tmp_path / "a", 1.0), run(tmp_path / "b", 3.0, width=4)]
    with pytest.raises(ValueError, match="no mean"):
        average.main(["--runs", *map(str, runs), "--out", str(tmp_path / "c")])
