"""How good the classifiers are, in one command that prints it all:

    python -m training.evaluate --data ../shared/data --out docs/evaluation

Each row is judged as `tidegate moderate --scores-only` judges it: segment by segment, each with
what stands before it, the highest score of each harm up to the first block. Beside the models: the
same with their fp32 graph, what they make together, what is served (keywords before them), a bag of
words on the same training rows, and two small classifiers from PyPI.

No row shown was trained on, nor was any other on its prompt; calibration and thresholds were made
on other prompts again. Scores are kept in runs/scores, so a second run takes a minute.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from rich.console import Console

from detectors.harms import COLUMNS
from detectors.protocol import FloatArray
from training import plots, report, sets, tables
from training.scores import Judged, run_of
from training.sets import Sets
from training.systems import FLOOR, Compare, System, main_of
from training.tables import Table

_HERE: Final = Path(__file__).resolve().parent.parent
_DETECTORS: Final = ("toxicity", "words", "context", "context_large")  # as in the worker's settings
_SAMPLE: Final = 40  # rows a source: one model and its fp32 graph in 10 minutes on one core


def main(argv: Sequence[str] | None = None) -> None:
    """Prints every table; with --out writes them, and the plots, as files."""
    arguments = _arguments(argv)
    chosen = sets.read(arguments.data, arguments.sample)
    compare = Compare(chosen, arguments.models, arguments.runs, arguments.threads)
    systems = list(compare.models())
    if not arguments.only_models:
        systems += [*compare.exact(), *compare.others()]
    found = list(report.tables(systems, chosen, arguments.sample))
    console = Console()
    for table in found:
        tables.show(table, console)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        plots.harms(arguments.out, drawn(systems, chosen))
        draw_loss(arguments.models, arguments.runs, arguments.out)
        write(arguments.out, found)
        print(f"written: {arguments.out}")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m training.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--data", type=Path, required=True,
        help="folder that holds permissive/, and noncommercial/ for the stand-ins",
    )  # fmt: skip
    parser.add_argument(
        "--models", type=Path, nargs="+", action="extend", metavar="FOLDER",
        help="model folders; the first of each kind among them are also judged together, in this "
        "order (default: those in models/)",
    )  # fmt: skip
    parser.add_argument("--sample", type=int, default=_SAMPLE, help=f"rows a source ({_SAMPLE})")
    parser.add_argument("--out", type=Path, help="folder for Markdown, JSON and plots")
    parser.add_argument("--runs", type=Path, default=_HERE / "runs", help="fp32 graphs and scores")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--only-models", action="store_true", help="a quick look: no fp32, floor or baselines"
    )
    arguments = parser.parse_args(argv)
    arguments.models = arguments.models or _shipped()
    return arguments


def _shipped() -> list[Path]:
    """The model folders that are here, in the order that the worker's settings would name them."""
    folders = (_HERE / "models" / name for name in _DETECTORS)
    return [folder for folder in folders if (folder / "manifest.json").exists()]


def write(folder: Path, found: Sequence[Table]) -> None:
    """The tables as README.md, behind the plots, and as figures.json."""
    losses = [f"![Loss over the steps]({path.name})" for path in sorted(folder.glob("loss_*.png"))]
    text = "\n\n".join([_TOP, _PLOTS, *losses, *map(tables.markdown, found)])
    (folder / "README.md").write_text(f"{text}\n", encoding="utf-8")
    figures = {table.title: tables.plain(table) for table in found}
    (folder / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def draw_loss(models: Sequence[Path], runs: Path, folder: Path) -> None:
    """loss_RUN.png of each run that the models come from, where it is here with its curve."""
    found = {run_of(model, runs) for model in models}
    for run in sorted(run for run in found if run is not None):
        if (run / plots.CURVE).exists():
            plots.loss(run / plots.CURVE, folder / f"loss_{run.name}.png")


def drawn(systems: Sequence[System], chosen: Sets) -> list[plots.Drawn]:
    """What the plots show: ours and the floor, both parts."""
    return [
        plots.Drawn(system.name, part, _points(judged), _limits(judged))
        for system in systems
        if system.name in {main_of(systems).name, FLOOR}
        for part in report.PARTS
        for judged in [system.judged(getattr(chosen, part))]
    ]


def _points(judged: Judged) -> dict[str, tuple[FloatArray, FloatArray]]:
    found = {}
    for i, column in enumerate(COLUMNS):
        sure = judged.labelled(i)
        found[column] = sure.targets(i), sure.highest[:, i]
    return found


def _limits(judged: Judged) -> dict[str, float]:
    return dict(zip(COLUMNS, judged.limits.tolist(), strict=True))


_TOP: Final = """# Evaluation

Made by `make evaluate DATA=folder`; `python -m training.evaluate --help` says how. Rows are
judged as `tidegate moderate --scores-only` judges them."""

_PLOTS: Final = """![Precision and recall per harm](precision_recall.png)

![How often what was predicted came true, per harm](reliability.png)

![Scores of harmful and harmless texts, per harm](scores.png)"""

if __name__ == "__main__":
    main()
