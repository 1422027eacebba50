"""Fine-tunes the classifier: `python -m training.classifier --data ../shared/data --out RUN`.

A run folder holds settings, tokenizer, the best weights (model.pt) and, until it is through, where
to go on from (state.pt): start it again to resume. Calibration, thresholds and figures are made
from the model that serves, so they come with the export.
"""

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from detectors.protocol import Window
from detectors.tokens import PairTokens
from training import base
from training.model import Judge, fresh
from training.rows import Parts, read, split
from training.windows import Sample, capped, samples

_HELD_OUT = 800  # rows whose loss picks the weights


@dataclass(frozen=True)
class Settings:
    """How to train. Saved in the run folder."""

    base: str = "minilm"
    frozen: int = 0  # layers from the bottom, and with them the embeddings, that stay as they are
    seed: int = 17
    epochs: int = 1
    batch_tokens: int = 4096  # padded tokens a step: 32 windows of 128
    learning_rate: float = 1e-4
    head_learning_rate: float = 1e-3
    warm_up: float = 0.06  # share of the steps
    threads: int = 2
    save_every: int = 50  # steps
    rows: int = 0  # at most, for a quick try; 0 = all
    start_from: str = ""  # a model.pt of an earlier run; empty: the base


class Example(tuple[Window, np.ndarray, np.ndarray]):
    """A window with its targets and weights, (7,) each."""


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, or goes on with a run that was cut short."""
    arguments = _arguments(argv)
    settings = Settings(
        base=arguments.base,
        frozen=arguments.frozen,
        epochs=arguments.epochs,
        seed=arguments.seed,
        threads=arguments.threads,
        rows=arguments.rows,
        learning_rate=arguments.learning_rate,
        start_from=str(arguments.start_from or ""),
    )
    run: Path = arguments.out
    parts = split(read(arguments.data / "permissive"))
    print({name: len(rows) for name, rows in parts._asdict().items()}, flush=True)
    prepare(run, settings)
    if not (run / "model.pt").exists() or (run / "state.pt").exists():
        train(run, parts, settings)
    print(f"trained; next: python -m export --checkpoint {run} --data {arguments.data}")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m training.classifier", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds permissive/")
    parser.add_argument("--out", type=Path, required=True, help="run folder, made or resumed")
    parser.add_argument("--base", choices=list(base.BASES), default=Settings.base)
    parser.add_argument("--frozen", type=int, default=Settings.frozen, help="layers left alone")
    parser.add_argument("--epochs", type=int, default=Settings.epochs)
    parser.add_argument("--seed", type=int, default=Settings.seed)
    parser.add_argument("--threads", type=int, default=Settings.threads)
    parser.add_argument("--rows", type=int, default=Settings.rows, help="at most; 0 = all")
    parser.add_argument("--learning-rate", type=float, default=Settings.learning_rate)
    parser.add_argument("--start-from", type=Path, help="model.pt of an earlier run")
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
    """Leaves the weights of the epoch with the lowest held-out loss in model.pt."""
    chance = random.Random(settings.seed)
    tokens = PairTokens((run / "tokenizer.json").read_bytes())
    rows = capped(parts.fit, chance)
    if settings.rows:
        rows = chance.sample(rows, settings.rows)
    examples = _examples(samples(rows, chance), tokens)
    dev = capped(parts.calibrate, chance)
    held_out = _examples(samples(chance.sample(dev, min(_HELD_OUT, len(dev))), chance), tokens)
    steps = [
        batch for epoch in range(settings.epochs) for batch in _batches(examples, settings, epoch)
    ]
    print(f"{len(examples)} windows, {len(held_out)} held out, {len(steps)} steps", flush=True)
    _Run(run, settings, len(steps)).go(steps, held_out)


class _Run:
    """One training run: model, optimiser, schedule, and where it stands."""

    def __init__(self, run: Path, settings: Settings, steps: int) -> None:
        self.folder, self.settings = run, settings
        self.judge = fresh(settings.base)
        _freeze(self.judge, settings.frozen)
        if settings.start_from:
            self.judge.load_state_dict(torch.load(settings.start_from, weights_only=True))
        self.optimiser = torch.optim.AdamW(_groups(self.judge, settings), weight_decay=0.01)
        warm = max(1, int(settings.warm_up * steps))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimiser, lambda step: min((step + 1) / warm, max(0.0, 1 - step / steps))
        )
        self.step, self.best = 0, float("inf")
        if (run / "state.pt").exists():
            self._resume()

    def go(self, steps: list[list[Example]], held_out: list[Example]) -> None:
        """The steps that are left; state.pt goes when nothing is left to resume."""
        with tqdm(total=len(steps), initial=self.step, mininterval=10) as progress:
            for batch in steps[self.step :]:
                loss = self._learn(batch)
                self.step += 1
                progress.update()
                progress.set_postfix(loss=f"{loss:.4f}", refresh=False)
                if self.step % self.settings.save_every == 0:
                    self._save()
                if self.step in (len(steps), len(steps) // 2, len(steps) * 3 // 4):
                    self._keep_if_best(held_out)
        (self.folder / "state.pt").unlink(missing_ok=True)

    def _learn(self, batch: list[Example]) -> float:
        self.judge.train()
        self.optimiser.zero_grad()
        loss = _loss(self.judge, batch)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.judge.parameters(), 1.0)
        self.optimiser.step()
        self.schedule.step()
        return loss.item()

    def _keep_if_best(self, held_out: list[Example]) -> None:
        self.judge.eval()
        batches = list(_batches(held_out, self.settings, epoch=0))
        with torch.no_grad():
            loss = float(np.mean([_loss(self.judge, batch).item() for batch in batches]))
        print(f"step {self.step}: held-out loss {loss:.4f}", flush=True)
        if loss < self.best:
            self.best = loss
            torch.save(self.judge.state_dict(), self.folder / "model.pt")

    def _save(self) -> None:
        state = {
            "judge": self.judge.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "schedule": self.schedule.state_dict(),
            "step": self.step,
            "best": self.best,
        }
        part = self.folder / "state.part"
        torch.save(state, part)
        part.replace(self.folder / "state.pt")  # a kill in between leaves the last whole one

    def _resume(self) -> None:
        state: dict[str, Any] = torch.load(self.folder / "state.pt", weights_only=True)
        self.judge.load_state_dict(state["judge"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.schedule.load_state_dict(state["schedule"])
        self.step, self.best = state["step"], state["best"]


def _freeze(judge: Judge, layers: int) -> None:
    still = [judge.encoder.embeddings, *judge.encoder.encoder.layer[:layers]] if layers else []
    for part in still:
        part.requires_grad_(requires_grad=False)


def _groups(judge: Judge, settings: Settings) -> list[dict[str, Any]]:
    return [
        {"params": [p for p in judge.encoder.parameters() if p.requires_grad], "lr": settings.learning_rate},
        {"params": judge.head.parameters(), "lr": settings.head_learning_rate},
    ]


def _examples(found: Sequence[Sample], tokens: PairTokens) -> list[Example]:
    """The first window of each passage: training passages fit into one, or nearly."""
    return [
        Example((tokens.encode(s.passage).windows[0], np.array(s.targets), np.array(s.weights)))
        for s in tqdm(found, desc="tokens", mininterval=10)
    ]


def _batches(
    examples: Sequence[Example], settings: Settings, epoch: int
) -> Iterator[list[Example]]:
    """Batches of like lengths in an order of their own for each epoch."""
    chance = random.Random(f"{settings.seed}/{epoch}")
    order = sorted(examples, key=lambda e: len(e[0].ids) + chance.random() * 8)
    batches: list[list[Example]] = [[]]
    for example in order:  # sorted, so the newest is the longest
        if (len(batches[-1]) + 1) * len(example[0].ids) > settings.batch_tokens:
            batches.append([])
        batches[-1].append(example)
    whole = [batch[i : i + 48] for batch in batches for i in range(0, len(batch), 48)]
    chance.shuffle(whole)
    yield from whole


def _loss(judge: Judge, batch: Sequence[Example]) -> Tensor:
    """Mean binary cross-entropy over the labels there are."""
    ids, types, mask = padded([example[0] for example in batch])
    targets = torch.tensor(np.stack([example[1] for example in batch]), dtype=torch.float32)
    weights = torch.tensor(np.stack([example[2] for example in batch]), dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = judge(ids, types, mask)
    losses = nn.functional.binary_cross_entropy_with_logits(
        logits.float(), targets, reduction="none"
    )  # (B, 7)
    return (losses * weights).sum() / weights.sum().clamp(min=1.0)


def padded(windows: Sequence[Window]) -> tuple[Tensor, Tensor, Tensor]:
    """ids, type ids and mask of the windows, (B, T) int64 each, padded at the end."""
    longest = max(len(window.ids) for window in windows)
    ids = np.zeros((len(windows), longest), dtype=np.int64)
    types, mask = np.zeros_like(ids), np.zeros_like(ids)
    for row, window in enumerate(windows):
        ids[row, : len(window.ids)] = window.ids
        types[row, : len(window.ids)] = window.type_ids
        mask[row, : len(window.ids)] = 1
    return torch.from_numpy(ids), torch.from_numpy(types), torch.from_numpy(mask)


if __name__ == "__main__":
    main()
