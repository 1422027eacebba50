"""How fast are log-probs with a shared class prompt, against whole prompts one by one?

    python -m bench.logprob [--model FOLDER] [--texts 24] [--rounds 3]

FOLDER is what `python -m export.causal` writes. Both sides run the same graph on the same texts in
turn: in fp32, where the folder has it, they must agree within 1e-3 nats; int8 scales what is
computed together, so there the gap is told. The naive side computes both prompts of each text in
full, one a call. Memory is of many short texts through the shared side.
"""

import argparse
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import report
from bench.texts import sentences
from detectors.causal import LocalHelper
from detectors.logprob import LogProb
from detectors.prompts import ClassPrompts
from detectors.protocol import FloatArray, Passage
from detectors.session import Precision

GRAPH = "model.fp32.onnx"  # as the export names it
PROMPT_TOKENS = (64, 512)
TEXT_TOKENS = 50  # about
GROWTH = (100, 1_000)  # texts: memory must not grow with them; 10,000 take some seven minutes
GROWTH_TOKENS = 12  # of each of those


class Naive:
    """Whole prompts, one by one."""

    def __init__(self, model: Path, precision: Precision | None) -> None:
        self.helper = LocalHelper(model, precision=precision)
        self.split = self.helper.split

    def __call__(self, prompts: list[str]) -> list[list[float]]:
        return [self.helper([prompt])[0] for prompt in prompts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("models/logprob"))
    parser.add_argument("--texts", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--growth", type=int, nargs="+", default=GROWTH, help="texts, rising")
    given = parser.parse_args()
    exact = (given.model / GRAPH).is_file()
    precision: Precision | None = "fp32" if exact else None
    naive = Naive(given.model, precision)
    texts = [Passage(_text(naive.helper, TEXT_TOKENS, seed), "", ()) for seed in range(given.texts)]
    rows: list[list[str]] = []
    figures: dict[str, object] = {}
    for tokens in PROMPT_TOKENS:
        prompts = ClassPrompts(
            (_text(naive.helper, tokens, -1),), (_text(naive.helper, tokens, -2),)
        )
        ours = LocalHelper(given.model, prompts.heads(), precision=precision)
        sides = {"naive": LogProb(naive, prompts), "shared": LogProb(ours, prompts)}
        took, gap = _interleaved(sides, texts, given.rounds)
        assert gap <= 1e-3 or not exact, f"the sides differ by {gap:.1e} nats a token"
        ratio = statistics.median(took["naive"]) / statistics.median(took["shared"])
        rows.append(
            [
                str(tokens),
                *(report.spread(took[name]) for name in sides),
                f"{ratio:.1f}",
                f"{gap:.1e}",
            ]
        )
        figures[f"prompt_{tokens}"] = {"ratio": ratio, "gap": gap, **took}
    short = [Passage(_text(naive.helper, GROWTH_TOKENS, seed), "", ()) for seed in range(20)]
    memory = figures["memory"] = _growth(sides["shared"], short, given.growth)
    figures["precision"] = precision or "int8"
    report.show(
        f"texts of {TEXT_TOKENS} tokens, ms a text, median (lowest..highest)",
        ("class prompt, tokens", "one by one", "shared, batched", "ratio", "gap, nats"),
        rows,
    )
    print(f"memory: {memory}")
    report.close("logprob", figures)


def _text(helper: LocalHelper, tokens: int, seed: int) -> str:
    """Words of about as many tokens."""
    chance = random.Random(seed)
    text = ""
    words = "".join(sentences()).split()
    while helper.split(text, text + " and") < tokens:  # counts without running the model
        text += " " + chance.choice(words)
    return text


def _interleaved(
    sides: dict[str, LogProb], texts: list[Passage], rounds: int
) -> tuple[dict[str, list[float]], float]:
    """Milliseconds a text, by side; and how far the sides are apart at most, nats a token."""
    took: dict[str, list[float]] = {name: [] for name in sides}
    found: dict[str, FloatArray] = {}
    for side in sides.values():
        side.margins(texts[:2])  # warm
    for _ in range(rounds):
        for name, side in sides.items():
            start = time.perf_counter()
            found[name] = side.margins(texts)
            took[name].append((time.perf_counter() - start) * 1e3 / len(texts))
    return took, float(np.abs(found["naive"] - found["shared"]).max())


def _growth(side: LogProb, texts: list[Passage], counts: Sequence[int]) -> dict[str, float]:
    """Resident memory after so many texts, MB."""
    found = {}
    for count in counts:
        side.margins([texts[i % len(texts)] for i in range(count)])
        found[f"{count}_texts_mb"] = psutil.Process().memory_info().rss / 2**20
    return found


if __name__ == "__main__":
    main()
