"""Makes detectors of a run: `python -m export --checkpoint RUN --out models --data DATA`.

Both, toxicity and context, or with --views one of them, where they come from two runs. The steps
are those of the package: graph, int8, parity; then calibration, thresholds and figures from the
int8 graph, because that is the one that serves; then the manifest. `export.words` makes the third
detector, and `export.combined` one score of all.

Somebody else's classifier, a folder in Hugging Face's layout: `python -m export --hf FOLDER
--labels MAP.toml --out models/NAME`; see export/foreign.py and export/label_map.py.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from detectors.calibrate import Calibration, calibrated
from detectors.protocol import Window
from detectors.tokens import PairTokens
from detectors.toxicity import DECIMALS
from export import card, figures, foreign, manifest, pair, parity
from export.errors import ExportError
from export.fuse import fuse, halve
from export.pair import Read
from export.quantize import quantize
from export.to_onnx import of_judge, opset, to_onnx, write
from training import base, rows, scores, thresholds
from training.model import load
from training.rows import Row
from training.windows import judged

_A_SOURCE: Final = 40  # rows of a known source, at most
_PARITY_ROWS: Final = 200
_SEED: Final = 1
_KEPT: Final = Path("runs/scores")


def main(argv: Sequence[str] | None = None) -> None:
    """Checkpoint to model folder, figures printed."""
    arguments = _arguments(argv)
    if arguments.hf is not None:
        _foreign(arguments)
        return
    run, out, work = arguments.checkpoint, arguments.out, arguments.checkpoint / "onnx"
    out.mkdir(parents=True, exist_ok=True)
    work.mkdir(exist_ok=True)
    parts = rows.split(rows.read(arguments.data / "permissive"))
    tokens = PairTokens((run / manifest.TOKENIZER).read_bytes())
    windows = _windows(parts.report, tokens)
    parity_figures = _graphs(run, work, windows)
    read = _read(arguments, tokens, work / manifest.MODEL)
    for name in arguments.views:
        _detector(name, read, arguments, parity_figures, tokens, windows)


def _detector(
    name: str, read: dict[str, Read], arguments: argparse.Namespace, parity_figures: dict[str, Any],
    tokens: PairTokens, windows: list[Window],
) -> None:  # fmt: skip
    """Writes one model folder; prints its figures."""
    run, out = arguments.checkpoint, arguments.out / name
    out.mkdir(exist_ok=True)
    shutil.copyfile(run / "onnx" / manifest.MODEL, out / manifest.MODEL)
    shutil.copyfile(run / manifest.TOKENIZER, out / manifest.TOKENIZER)
    metrics = parity_figures | (_for_cuda(run, out, windows) if arguments.cuda else {})
    view = arguments.views.index(name)
    scored = {part: some.by(view) for part, some in read.items()}
    calibration = thresholds.calibrate(scored["calibrate"])
    chosen = figures.choose(scored, calibration)
    metrics |= figures.of(scored, calibration, chosen)
    provenance = _provenance(arguments.data / "permissive", run)
    made = manifest.Made(
        opset(out / manifest.MODEL), calibration, chosen, provenance, metrics, layout=tokens.layout,
        graphs=("int8", "fp16") if arguments.cuda else ("int8",), name=name,
        view=pair.VIEWS[name],
    )  # fmt: skip
    manifest.write(out, manifest.contents(out, made))
    _keep(out, view, list(read.values()), calibration)
    print(f"\n## {name}\n\n{card.tables(manifest.without_nan(metrics), chosen)}")


def _keep(folder: Path, view: int, read: Sequence[Read], calibration: Calibration) -> None:
    """What is known now need not be asked again: by export.combined, and by the evaluation."""
    rows_read = [row for some in read for row in some.rows]
    logits = [of_row[:, view] for some in read for of_row in some.logits]
    found = [calibrated(of_row, calibration).round(DECIMALS) for of_row in logits]
    scores.keep(scores.OfFolder(folder, folder.name), rows_read, found, _KEPT)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m export", description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", type=Path, help="run folder of training")
    source.add_argument("--hf", type=Path, help="folder of a sequence classifier, safetensors")
    parser.add_argument("--labels", type=Path, help="with --hf: label map, a file or its name")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of models; with --hf, the model's own"
    )
    parser.add_argument("--data", type=Path, help="folder that holds permissive/")
    parser.add_argument(
        "--views",
        nargs="+",
        choices=list(pair.VIEWS),
        default=["toxicity", "context"],
        help="with --checkpoint: the detectors that are made of it",
    )
    parser.add_argument(
        "--serve", choices=("int8", "fp32"), default="int8", help="with --hf: on CPU"
    )
    parser.add_argument("--cuda", action="store_true", help="fp16 too; --hf always writes it")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args(argv)
    if arguments.checkpoint is not None and arguments.data is None:
        parser.error("--checkpoint needs --data: calibration and thresholds come from it")
    if arguments.hf is not None and arguments.labels is None:
        parser.error("--hf needs --labels: what its labels mean to us")
    return arguments


def _foreign(arguments: argparse.Namespace) -> None:
    asked = foreign.Asked(
        arguments.hf, arguments.labels, arguments.out, arguments.data, arguments.serve,
        arguments.threads,
    )  # fmt: skip
    try:
        found = foreign.export(asked)
    except (ExportError, parity.ParityError) as error:
        sys.exit(f"export: {error}")
    print(json.dumps(found["metrics"], indent=1))


def _for_cuda(run: Path, out: Path, windows: list[Window]) -> dict[str, Any]:
    """Writes the fp16 graph too. Raises ParityError where it is not the checkpoint."""
    classifier = of_judge(load(run))
    config = classifier.encoder.config
    fp16 = out / manifest.GRAPHS["fp16"]
    with tempfile.TemporaryDirectory() as work:
        whole, fused = Path(work) / "whole.onnx", Path(work) / "fused.onnx"
        write(classifier, whole, whole=True)
        counted = fuse(whole, fused, config.num_attention_heads, config.hidden_size)
        halve(fused, fp16)
    reference = parity.of_classifier(classifier)
    largest = parity.check(reference, fp16, windows, parity.FP16_TOLERANCE)
    print(f"fp16 off by {largest:.1e}; attentions fused: {counted.fused} of {counted.attentions}")
    return {
        "fp16_largest_logit_error": f"{largest:.1e}",
        "attentions_fused": f"{counted.fused} of {counted.attentions}",
    }


def _graphs(run: Path, work: Path, windows: list[Window]) -> dict[str, Any]:
    """Writes both graphs; raises ParityError where fp32 is not the checkpoint."""
    judge = load(run)
    fp32, int8 = work / "model.onnx", work / manifest.MODEL
    to_onnx(judge, fp32)
    quantize(fp32, int8)
    largest = parity.check_fp32(judge, fp32, windows)
    loss = parity.int8_loss(fp32, int8, windows)
    print(f"fp32 off by {largest:.1e}; int8 {loss}", flush=True)
    # As text: rounding to four digits would make it 0.
    return {"fp32_largest_logit_error": f"{largest:.1e}", "int8_score_error": loss._asdict()}


def _windows(some: list[Row], tokens: PairTokens) -> list[Window]:
    chosen = random.Random(_SEED).sample(some, min(_PARITY_ROWS, len(some)))  # noqa: S311 - a sample
    return [tokens.encode(judged(row)[-1]).windows[0] for row in chosen]


def _read(arguments: argparse.Namespace, tokens: PairTokens, graph: Path) -> dict[str, Read]:
    """The rows that were not trained on, and of them the harmless texts that must pass."""
    logits_of = parity.of_graph(graph)
    found = {}
    for name, chosen in figures.held(arguments.data, _A_SOURCE).items():
        print(f"{name}: {len(chosen)} rows", flush=True)
        found[name] = pair.read(chosen, tokens, logits_of, arguments.views, arguments.threads)
    return found


def _provenance(data: Path, run: Path) -> dict[str, Any]:
    settings = json.loads((run / "settings.json").read_text())
    origin = base.BASES[settings.get("base", "minilm")]
    return {
        "base": {
            "name": origin.name,
            "package": " ".join(origin.requirements),
            "licence": origin.licence,
        },
        "settings": settings,
        **rows.provenance(data),
    }


if __name__ == "__main__":
    main()
