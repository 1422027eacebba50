"""Makes both detectors of a run: `python -m export --checkpoint RUN --out models --data DATA`.

The steps are those of the package: graph, int8, parity; then calibration, thresholds and figures
from the int8 graph, because that is the one that serves; then the manifest.

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
from typing import Any, Final, NamedTuple

from detectors.calibrate import Calibration
from detectors.combine import FILE
from detectors.protocol import Window
from detectors.session import Folder
from detectors.tokens import PairTokens
from export import card, foreign, manifest, pair, parity
from export.errors import ExportError
from export.fuse import fuse, halve
from export.pair import Read
from export.quantize import quantize
from export.to_onnx import of_judge, opset, to_onnx, write
from training import base, measure, rows, sources, thresholds
from training.measure import Scored
from training.model import load
from training.rows import Parts, Row
from training.windows import judged

_A_SOURCE: Final = {"calibrate": 40, "report": 40, "unseen": 120}  # rows of each source, at most
_HARMLESS_A_SOURCE: Final = 80  # and of each source of long harmless replies
_PARITY_ROWS: Final = 200
_SEED: Final = 1


class _Choice(NamedTuple):
    calibration: Calibration
    thresholds: dict[str, float]


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
    figures = _graphs(run, work, windows)
    read = _read(parts, tokens, work / manifest.MODEL, arguments.threads)
    made = [
        _detector(name, read, arguments, figures, tokens, windows) for name in pair.VIEWS
    ]  # fmt: skip
    calibrations = [one.choice.calibration for one in made]
    weights = pair.learn(read["calibrate"], calibrations)
    whole = {part: some.together(calibrations, weights) for part, some in read.items()}
    choice = _Choice(pair.PLAIN, _thresholds(whole, pair.PLAIN))
    found = _figures(whole, choice)
    contents = pair.combination({it.name: it.digest for it in made}, weights, choice.thresholds)
    contents["metrics"] = manifest.without_nan(found)
    (out / FILE).write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(contents["weights"], indent=1))
    print(card.tables(contents["metrics"], choice.thresholds))


class _Detector(NamedTuple):
    name: str
    digest: str
    choice: _Choice


def _detector(
    name: str, read: dict[str, Read], arguments: argparse.Namespace, figures: dict[str, Any],
    tokens: PairTokens, windows: list[Window],
) -> _Detector:  # fmt: skip
    """Writes one model folder; prints its figures."""
    run, out = arguments.checkpoint, arguments.out / name
    out.mkdir(exist_ok=True)
    shutil.copyfile(run / "onnx" / manifest.MODEL, out / manifest.MODEL)
    shutil.copyfile(run / manifest.TOKENIZER, out / manifest.TOKENIZER)
    figures = figures | (_for_cuda(run, out, windows) if arguments.cuda else {})
    view = list(pair.VIEWS).index(name)
    scored = {part: some.by(view) for part, some in read.items()}
    calibration = thresholds.calibrate(scored["calibrate"])
    choice = _Choice(calibration, _thresholds(scored, calibration))
    figures = figures | _figures(scored, choice)
    provenance = _provenance(arguments.data / "permissive", run)
    made = manifest.Made(
        opset(out / manifest.MODEL), *choice, provenance, figures, layout=tokens.layout,
        graphs=("int8", "fp16") if arguments.cuda else ("int8",), name=name,
        view=pair.VIEWS[name],
    )  # fmt: skip
    manifest.write(out, manifest.contents(out, made))
    print(f"\n## {name}\n\n{card.tables(manifest.without_nan(figures), choice.thresholds)}")
    return _Detector(name, Folder(out).digest, choice)


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


def _read(parts: Parts, tokens: PairTokens, graph: Path, threads: int) -> dict[str, Read]:
    """The parts that were not trained on, and of each the harmless texts that must pass."""
    logits_of = parity.of_graph(graph)
    found = {}
    for part, most in _A_SOURCE.items():
        members: list[Row] = getattr(parts, part)
        for name, chosen in (
            (part, _some(members, most)),
            (f"{part}_harmless", _some(filter(_long_harmless, members), _HARMLESS_A_SOURCE)),
            (f"{part}_look_alikes", _some(filter(_looks_harmful, members), _HARMLESS_A_SOURCE)),
        ):
            print(f"{name}: {len(chosen)} rows", flush=True)
            found[name] = pair.read(chosen, tokens, logits_of, threads)
    return found


def _some(members: Any, most: int) -> list[Row]:
    by_source: dict[str, list[Row]] = {}
    for row in members:
        by_source.setdefault(row.source, []).append(row)
    chance = random.Random(_SEED)  # noqa: S311 - a sample, not a secret
    return [r for group in by_source.values() for r in chance.sample(group, min(most, len(group)))]


def _long_harmless(row: Row) -> bool:
    return (
        row.source in sources.LONG_HARMLESS
        and row.kind == "reply"
        and row.targets[-1] == 0
        and row.weights[-1] == 1
    )


def _looks_harmful(row: Row) -> bool:
    return row.source in sources.LOOK_ALIKES and row.targets[-1] == 0 and row.weights[-1] == 1


def _thresholds(scored: dict[str, Scored], calibration: Calibration) -> dict[str, float]:
    return thresholds.choose(
        scored["calibrate"], scored["calibrate_harmless"], calibration,
        scored["calibrate_look_alikes"],
    )  # fmt: skip


def _figures(scored: dict[str, Scored], choice: _Choice) -> dict[str, Any]:
    """Figures on rows that neither weights nor calibration nor thresholds have seen."""
    found: dict[str, Any] = {}
    for part in ("report", "unseen"):
        by_column = measure.table(scored[part], *choice)
        found[part] = {column: figures._asdict() for column, figures in by_column.items()}
        found[f"{part}_replies"] = _harmful_of_replies(scored[part], choice)
        harmless = scored[f"{part}_harmless"]
        found[f"{part}_harmless_replies"] = len(harmless.rows)
        found[f"{part}_harmless_replies_blocked"] = float(measure.blocked(harmless, *choice).mean())
        alike = scored[f"{part}_look_alikes"]
        found[f"{part}_look_alikes"] = len(alike.rows)
        found[f"{part}_look_alikes_blocked"] = float(measure.blocked(alike, *choice).mean())
    found["by_source"] = measure.blocked_by_source(scored["unseen"], *choice)
    return found


def _harmful_of_replies(scored: Scored, choice: _Choice) -> dict[str, Any]:
    replies = scored.only(lambda row: row.kind == "reply")
    return measure.table(replies, *choice)["harmful"]._asdict()


def _provenance(data: Path, run: Path) -> dict[str, Any]:
    untrained = sources.UNUSED | sources.UNSEEN
    settings = json.loads((run / "settings.json").read_text())
    origin = base.BASES[settings.get("base", "minilm")]
    return {
        "base": {
            "name": origin.name,
            "package": " ".join(origin.requirements),
            "licence": origin.licence,
        },
        "licence": "Apache-2.0",
        "settings": settings,
        "data": {s: licence for s, licence in rows.licences(data).items() if s not in untrained},
        "held_out_sources": sorted(sources.UNSEEN),
    }


if __name__ == "__main__":
    main()
