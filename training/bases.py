"""Which base to build on: `python -m training.bases --data ../shared/data --out runs/bases`.

Each base reads the same passages, as one text with the last user's turn before it, and the mean of
its last states goes into one linear layer. First with the base as it comes, where only that layer
learns (a probe: what the base knows already); then with all weights learning, one pass. The
language model is used as if it were an encoder. A table of AUROC on held-out prompts comes out.
"""

import argparse
import json
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from tokenizers import Tokenizer
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModel

from detectors.harms import COLUMNS
from detectors.protocol import FloatArray, Passage
from training import base, causal_base, sets
from training.measure import SURE
from training.metrics import auroc
from training.rows import Row, read, split
from training.windows import Sample, capped, one, samples

_TOKENS: Final = 160  # of a passage, its end
_BATCH_TOKENS: Final = 2048
_RATES: Final = {"minilm": 8e-5, "mpnet": 4e-5, "smollm2": 4e-5}
_HEAD_RATE: Final = 1e-3
_SEED: Final = 5
_SAMPLE: Final = 20  # held-out rows of a known source
_KINDS: Final = ("reply", "prompt", "comment")


class Given(NamedTuple):
    """A passage as one base reads it."""

    ids: list[int]
    targets: Sequence[float]  # (7,)
    weights: Sequence[float]


class Pooled(nn.Module):
    """(B, T) ids and mask to the mean of the last states, and to (B, 7) logits."""

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(body.config.hidden_size, len(COLUMNS))

    def mean(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, H)."""
        states = self.body(input_ids=ids, attention_mask=mask).last_hidden_state
        there = mask[..., None].to(states.dtype)
        pooled: Tensor = (states * there).sum(dim=1) / there.sum(dim=1)
        return pooled

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, 7)."""
        logits: Tensor = self.head(self.mean(ids, mask).float())
        return logits


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table; bases.json keeps it, and a base that is in it is not tried again."""
    parser = argparse.ArgumentParser(prog="python -m training.bases", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds permissive/")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=3_000, help="windows to learn from")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bases", nargs="+", choices=list(_RATES), default=list(_RATES))
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    parts, chance = split(read(given.data / "permissive")), random.Random(_SEED)
    learnt = samples(capped(parts.fit, chance), chance)
    learnt = [it for it in chance.sample(learnt, 2 * given.rows) if it.weights[-1] >= SURE]
    chosen = sets.calibrating(parts, (), _SAMPLE)
    held = [row for row in (*chosen.known, *chosen.unknown) if row.weights[-1] >= SURE]
    windows = [one(row, chance) for row in held]
    given.out.mkdir(parents=True, exist_ok=True)
    kept = given.out / "bases.json"
    table: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    for name in given.bases:
        if name not in table:
            table[name] = _tried(name, learnt[: given.rows], windows, held)
            kept.write_text(json.dumps(table, indent=1))
    _print(table)


def _tried(
    name: str, learnt: Sequence[Sample], windows: Sequence[Sample], held: Sequence[Row]
) -> dict[str, Any]:
    """Figures of one base, as it comes and tuned."""
    torch.manual_seed(_SEED)
    body, tokenizer = _base(name)
    model = Pooled(body)
    train, dev = ([_given(it, tokenizer) for it in some] for some in (learnt, windows))
    started = time.process_time()
    states = _over(model.mean, dev)
    seconds = (time.process_time() - started) / len(dev)
    probe = LogisticRegression(C=1.0, max_iter=2_000)
    probe.fit(_over(model.mean, train), [it.targets[-1] > 0 for it in train])
    before = _figures(probe.decision_function(states), held)
    started = time.process_time()
    _tune(name, model, train)
    tuned = time.process_time() - started
    after = _figures(_over(model, dev)[:, -1], held)
    size = sum(parameter.numel() for parameter in body.parameters())
    return {
        "parameters": size, "cpu_s_a_passage": seconds, "cpu_s_to_tune": tuned,
        "as it comes": before, "tuned": after,
    }  # fmt: skip


def _base(name: str) -> tuple[Any, Tokenizer]:
    folder = causal_base.whole() if name == "smollm2" else base.folder(name)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return AutoModel.from_pretrained(folder, dtype=torch.float32), tokenizer


def _given(sample: Sample, tokenizer: Tokenizer) -> Given:
    ids = tokenizer.encode(_text(sample.passage)).ids[-_TOKENS:]
    return Given(ids, sample.targets, sample.weights)


def _text(passage: Passage) -> str:
    asked = [turn.content for turn in passage.conversation if turn.role == "user"]
    return "\n".join([*asked[-1:], passage.before + passage.text])


def _batches(some: Sequence[Given], order: Sequence[int]) -> Iterator[list[int]]:
    """Of like lengths, at most _BATCH_TOKENS with padding; in `order` of the first of each."""
    by_length = sorted(range(len(some)), key=lambda i: len(some[i].ids))
    found: list[list[int]] = [[]]
    for i in by_length:
        if len(some[i].ids) * (len(found[-1]) + 1) > _BATCH_TOKENS:
            found.append([])
        found[-1].append(i)
    place = {i: at for at, i in enumerate(order)}
    yield from sorted(filter(None, found), key=lambda batch: place[batch[0]])


def _padded(some: Sequence[Given]) -> tuple[Tensor, Tensor]:
    longest = max(len(it.ids) for it in some)
    ids = torch.zeros(len(some), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for at, it in enumerate(some):
        ids[at, : len(it.ids)] = torch.tensor(it.ids)
        mask[at, : len(it.ids)] = 1
    return ids, mask


def _over(function: Any, some: Sequence[Given]) -> FloatArray:
    """(N, ...) what a part of the model says of each."""
    found: dict[int, FloatArray] = {}
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        for batch in _batches(some, range(len(some))):
            said = function(*_padded([some[i] for i in batch])).float().numpy()
            found.update(zip(batch, said, strict=True))
    return np.stack([found[i] for i in range(len(some))]).astype(np.float64)


def _tune(name: str, model: Pooled, some: Sequence[Given]) -> None:
    """One pass over all weights, the rate falling to 0."""
    order = random.Random(_SEED).sample(range(len(some)), len(some))
    steps = list(_batches(some, order))
    groups = [
        {"params": model.body.parameters(), "lr": _RATES[name]},
        {"params": model.head.parameters(), "lr": _HEAD_RATE},
    ]
    optimiser = torch.optim.AdamW(groups, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, len(steps))
    model.train()
    for batch in tqdm(steps, desc=name, mininterval=10):
        chosen = [some[i] for i in batch]
        targets, weights = (
            torch.tensor([it[part] for it in chosen]) for part in (1, 2)
        )  # (B, 7) each
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(*_padded(chosen)).float()
        losses = nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        loss = (losses * weights).sum() / weights.sum().clamp(min=1.0)
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    model.eval()


def _figures(said: FloatArray, held: Sequence[Row]) -> dict[str, float]:
    """AUROC of `harmful` by kind of text."""
    kinds = np.array([row.kind for row in held])
    targets = np.array([row.targets[-1] for row in held])
    found = {kind: float(auroc(targets[kinds == kind], said[kinds == kind])) for kind in _KINDS}
    return found | {"all": float(auroc(targets, said))}


def _print(table: dict[str, Any]) -> None:
    print("| base | M parameters | ms a passage | probe: " + ", ".join((*_KINDS, "all")), end="")
    print(" | tuned | CPU minutes |\n|---|---|---|---|---|---|")
    for name, of in table.items():
        said = (", ".join(f"{v:.3f}" for v in of[key].values()) for key in ("as it comes", "tuned"))
        cells = f"{of['parameters'] / 1e6:.0f} | {1e3 * of['cpu_s_a_passage']:.0f}"
        print(f"| {name} | {cells} | {' | '.join(said)} | {of['cpu_s_to_tune'] / 60:.1f} |")


if __name__ == "__main__":
    main()
