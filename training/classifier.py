"""Fine-tunes the classifier: `python -m training.classifier --data ../shared/data --out RUN`.

A run folder holds settings, tokenizer, the learning curve, the best weights (model.pt), the last
ones (last.pt) and, until it is through, where to go on from (state.pt): start it again to resume.
With a teacher, another run folder, the student learns what that says of each passage besides the
labels. Calibration, thresholds and figures are made from the model that serves, so they come with
the export.
"""

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from detectors.harms import COLUMNS
from detectors.tokens import PairTokens
from training import also, base, hard, sources
from training.batches import Example, batches, examples, padded
from training.distil import soft_targets
from training.loop import Loop, Pace, through
from training.model import Judge, fresh
from training.rows import Parts, Row, read, split
from training.windows import Sample, capped, samples

_HELD_OUT: Final = 800  # rows from whose windows those come whose loss picks the weights
_WINDOWS: Final = 1_200


@dataclass(frozen=True)
class Settings:
    """How to train. Saved in the run folder."""

    base: str = "minilm"
    layers: int = 0  # of the base, from the bottom; 0 = all
    frozen: int = 0  # layers from the bottom, and with them the embeddings, that stay as they are
    seed: int = 17
    epochs: int = 1
    batch_tokens: int = 4096  # padded tokens a step: 32 windows of 128
    learning_rate: float = 1e-4
    head_learning_rate: float = 1e-3
    warm_up: float = 0.06  # share of the steps
    threads: int = 2
    save_every: int = 50  # steps
    patience: int = 3  # looks at the held-out loss without a better one end the run
    rows: int = 0  # of the packs at most, those of sources.WHOLE aside; 0 = all
    steps: int = 0  # at most; 0 = a whole pass an epoch
    start_from: str = ""  # a model.pt of an earlier run; empty: the base
    teacher: str = ""  # a run folder; empty: labels alone
    soft_share: float = 0.7  # of the loss where the teacher has spoken
    own: bool = True  # the texts of our own too
    hard: str = ""  # segments that training.hard found; empty: none
    also: tuple[str, ...] = ()  # a user's files, see training/also.py


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, or goes on with a run that was cut short."""
    arguments = _arguments(argv)
    known = {field.name for field in fields(Settings)}
    chosen = {name: value for name, value in vars(arguments).items() if name in known}
    settings = Settings(**chosen | {"also": tuple(map(str, arguments.also))})
    run: Path = arguments.out
    parts = split(read(arguments.data / "permissive"))
    print({name: len(rows) for name, rows in parts._asdict().items()}, flush=True)
    prepare(run, settings)
    if not through(run):
        train(run, parts, settings)
    print(f"trained; next: python -m export --checkpoint {run} --data {arguments.data}")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m training.classifier", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds permissive/")
    parser.add_argument("--out", type=Path, required=True, help="run folder, made or resumed")
    parser.add_argument("--base", choices=list(base.BASES), default=Settings.base)
    parser.add_argument("--layers", type=int, default=Settings.layers, help="kept; 0 = all")
    parser.add_argument("--frozen", type=int, default=Settings.frozen, help="layers left alone")
    parser.add_argument("--epochs", type=int, default=Settings.epochs)
    parser.add_argument("--seed", type=int, default=Settings.seed)
    parser.add_argument("--threads", type=int, default=Settings.threads)
    parser.add_argument(
        "--rows", type=int, default=Settings.rows,
        help="of the packs at most, sources.WHOLE aside; 0 = all",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=Settings.steps, help="at most; 0 = all")
    parser.add_argument("--learning-rate", type=float, default=Settings.learning_rate)
    parser.add_argument(
        "--patience", type=int, default=Settings.patience,
        help="early stopping: looks, of 8, without a better held-out loss; 8 = never",
    )  # fmt: skip
    parser.add_argument("--start-from", default=Settings.start_from, help="an earlier model.pt")
    parser.add_argument("--teacher", default=Settings.teacher, help="run folder to distil")
    parser.add_argument("--hard", default=Settings.hard, help="what training.hard wrote")
    parser.add_argument("--no-own", dest="own", action="store_false", help="public packs alone")
    parser.add_argument(
        "--also", type=Path, nargs="+", default=[], metavar="FILE",
        help="your rows, or review items and labels from Kafka, as JSON Lines",
    )  # fmt: skip
    return parser.parse_args(argv)


def prepare(run: Path, settings: Settings) -> None:
    """The run folder with its settings and tokenizer; seeds every generator."""
    run.mkdir(parents=True, exist_ok=True)
    tokenizer = base.tokenizer_json(base.folder(settings.base) / "tokenizer.json")
    (run / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), "utf-8")
    (run / "settings.json").write_text(json.dumps(asdict(settings), indent=2))
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    random.seed(settings.seed)


def train(run: Path, parts: Parts, settings: Settings) -> None:
    """Leaves the weights of the lowest held-out loss in model.pt."""
    chance = random.Random(settings.seed)
    tokens = PairTokens((run / "tokenizer.json").read_bytes())
    found = samples(_rows(parts, settings, chance), chance)
    if settings.hard:
        found += hard.samples(Path(settings.hard), parts.fit)
    chosen = examples(found, tokens, _soft(run, found, settings))
    dev = capped(parts.calibrate, chance)
    held_out = examples(samples(chance.sample(dev, min(_HELD_OUT, len(dev))), chance), tokens)
    held_out = chance.sample(held_out, min(_WINDOWS, len(held_out)))
    steps = [
        batch
        for epoch in range(settings.epochs)
        for batch in batches(chosen, settings.batch_tokens, f"{settings.seed}/{epoch}")
    ][: settings.steps or None]
    print(f"{len(chosen)} windows, {len(held_out)} held out, {len(steps)} steps", flush=True)
    judge = fresh(settings.base, settings.layers)
    _freeze(judge, settings.frozen)
    if settings.start_from:
        judge.load_state_dict(torch.load(settings.start_from, weights_only=True))
    Loop(
        run, judge, _groups(judge, settings),
        loss=lambda batch: _loss(judge, batch, settings.soft_share),
        held_out=lambda: _mean_loss(judge, held_out, settings.batch_tokens),
        steps=steps, pace=Pace(settings.warm_up, settings.save_every, patience=settings.patience),
    ).go()  # fmt: skip


def _rows(parts: Parts, settings: Settings, chance: random.Random) -> list[Row]:
    rows = capped(parts.fit, chance)
    if settings.rows:
        whole = [row for row in rows if row.source in sources.WHOLE]
        rows = [row for row in rows if row.source not in sources.WHOLE]
        rows = [*whole, *chance.sample(rows, min(settings.rows, len(rows)))]
    if settings.own:
        rows += capped(also.own(), chance)
    return rows + also.apart(also.read_files(list(map(Path, settings.also))), parts)


def _soft(run: Path, found: Sequence[Sample], settings: Settings) -> npt.NDArray[np.float32]:
    """(N, 7) what the teacher says; NaN of our own texts, of which it has never seen the like."""
    soft = np.full((len(found), len(COLUMNS)), np.nan, np.float32)
    if settings.teacher:
        asked = [i for i, sample in enumerate(found) if not sample.source.startswith("own_")]
        passages = [found[i].passage for i in asked]
        soft[asked] = soft_targets(Path(settings.teacher), passages, run / "teacher.npz")
    return soft


def _mean_loss(judge: Judge, held_out: Sequence[Example], batch_tokens: int) -> float:
    chosen = batches(held_out, batch_tokens, "held out")
    return float(np.mean([_loss(judge, batch, 0.0).item() for batch in chosen]))


def _freeze(judge: Judge, layers: int) -> None:
    still = [judge.encoder.embeddings, *judge.encoder.encoder.layer[:layers]] if layers else []
    for part in still:
        part.requires_grad_(requires_grad=False)


def _groups(judge: Judge, settings: Settings) -> list[dict[str, Any]]:
    learning = [p for p in judge.encoder.parameters() if p.requires_grad]
    return [
        {"params": learning, "lr": settings.learning_rate},
        {"params": judge.head.parameters(), "lr": settings.head_learning_rate},
    ]


def _loss(judge: Judge, batch: Sequence[Example], soft_share: float) -> Tensor:
    """Mean binary cross-entropy over the labels there are, mixed with that to the teacher's.

    Hinton et al. 2015, arXiv:1503.02531, at temperature 1: its outputs are independent sigmoids.
    """
    ids, types, mask = padded([example.window for example in batch])
    targets, weights, soft = (
        torch.from_numpy(np.stack([example[i] for example in batch])) for i in (1, 2, 3)
    )  # (B, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = judge(ids, types, mask).float()
    cross_entropy = nn.functional.binary_cross_entropy_with_logits
    hard = cross_entropy(logits, targets, reduction="none") * weights
    spoken = ~soft.isnan()
    taught = cross_entropy(logits, soft.nan_to_num(), reduction="none") * spoken
    share = soft_share * spoken
    total = (1 - share) * hard + share * taught
    counted = (1 - share) * weights + share * spoken
    return total.sum() / counted.sum().clamp(min=1.0)


if __name__ == "__main__":
    main()
