"""The mean of two runs' weights: `python -m training.average --runs A B --out RUN`.

B was started from A's weights. The mean keeps most of what B learnt newly, and of what A knew of
other texts more than B does (Wortsman et al. 2022, arXiv:2109.01903).
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor


def main(argv: Sequence[str] | None = None) -> None:
    """Writes a run folder that the export takes."""
    parser = argparse.ArgumentParser(prog="python -m training.average", description=__doc__)
    parser.add_argument("--runs", type=Path, nargs=2, required=True, metavar="RUN")
    parser.add_argument("--share", type=float, default=0.5, help="of the second one's weights")
    parser.add_argument("--out", type=Path, required=True, help="run folder, made")
    arguments = parser.parse_args(argv)
    if not 0.0 <= arguments.share <= 1.0:
        parser.error("--share: 0 to 1")
    first, second = arguments.runs
    arguments.out.mkdir(parents=True, exist_ok=True)
    weights = mean(*map(_weights, arguments.runs), arguments.share)
    torch.save(weights, arguments.out / "model.pt")
    shutil.copyfile(second / "tokenizer.json", arguments.out / "tokenizer.json")
    shutil.copyfile(second / "curve.jsonl", arguments.out / "curve.jsonl")
    settings = json.loads((second / "settings.json").read_text())
    settings["averaged_with"] = {"run": first.name, "share": 1 - arguments.share}
    (arguments.out / "settings.json").write_text(json.dumps(settings, indent=2))


def mean(first: dict[str, Tensor], second: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """Each weight `share` of the way from the first to the second. ValueError of unlike models."""
    if {name: it.shape for name, it in first.items()} != {n: it.shape for n, it in second.items()}:
        raise ValueError("two runs of different bases or sizes have no mean")
    return {
        name: torch.lerp(it, second[name], share) if it.is_floating_point() else it
        for name, it in first.items()
    }


def _weights(run: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = torch.load(run / "model.pt", weights_only=True)
    return found


if __name__ == "__main__":
    main()
