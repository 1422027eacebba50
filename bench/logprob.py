"""How fast are log-probs with a shared class prompt, against whole prompts one by one?

    python -m bench.logprob --model FOLDER [--texts 24] [--rounds 3]

FOLDER is what `python -m export.causal` writes; none ships, so without it there is nothing to do.
Both sides run the same fp32 graph on the same texts in turn and must agree within 1e-3 nats. The
naive side computes both prompts of each text in full, one a call.
"""

import argparse
import random
import resource
import statistics
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import report
from bench.texts import sentences
from detectors.causal import LocalHelper
from detectors.logprob import LogProb
from detectors.prompts import ClassPrompts
from detectors.protocol import FloatArray, Passage

PROMPT_TOKENS = (64, 512)
TEXT_TOKENS = 50  # about
GROWTH = (50, 200)  # texts; what the second takes more of memory


class Naive:
    """Whole prompts, one by one."""

    def __init__(self, model: Path) -> None:
        self.helper = LocalHelper(model, precision="fp32")
        self.split = self.helper.split

    def __call__(self, prompts: list[str]) -> list[list[float]]:
        return [self.helper([prompt])[0] for prompt in prompts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--texts", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    if given.model is None:
        print("logprob: no causal model ships; say --model FOLDER (python -m export.causal)")
        return
    naive = Naive(given.model)
    texts = [Passage(_text(naive.helper, TEXT_TOKENS, seed), "", ()) for seed in range(given.texts)]
    rows: list[list[str]] = []
    figures: dict[str, object] = {}
    for tokens in PROMPT_TOKENS:
        prompts = ClassPrompts(
            (_text(naive.helper, tokens, -1),), (_text(naive.helper, tokens, -2),)
        )
        ours = LocalHelper(given.model, prompts.heads(), precision="fp32")
        sides = {"naive": LogProb(naive, prompts), "shared": LogProb(ours, prompts)}
        took = _interleaved(sides, texts, given.rounds)
        ratio = statistics.median(took["naive"]) / statistics.median(took["shared"])
        rows.append([str(tokens), *(report.spread(took[name]) for name in sides), f"{ratio:.1f}"])
        figures[f"prompt_{tokens}"] = {"ratio": ratio, **took}
    memory = figures["memory"] = _growth(sides["shared"], texts)
    report.show(
        f"texts of {TEXT_TOKENS} tokens, ms a text, median (lowest..highest)",
        ("class prompt, tokens", "one by one", "shared, batched", "ratio"),
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
) -> dict[str, list[float]]:
    """Milliseconds a text, by side. Raises AssertionError where the sides disagree."""
    took: dict[str, list[float]] = {name: [] for name in sides}
    found: dict[str, FloatArray] = {}
    for side in sides.values():
        side.margins(texts[:2])  # warm
    for _ in range(rounds):
        for name, side in sides.items():
            start = time.perf_counter()
            found[name] = side.margins(texts)
            took[name].append((time.perf_counter() - start) * 1e3 / len(texts))
    gap = np.abs(found["naive"] - found["shared"]).max()
    assert gap <= 1e-3, f"the sides differ by {gap:.1e} nats a token"
    return took


def _growth(side: LogProb, texts: list[Passage]) -> dict[str, float]:
    """Highest resident memory after few and after many texts, MB."""
    found = {}
    for count in GROWTH:
        side.margins([texts[i % len(texts)] for i in range(count)])
        found[f"{count}_texts_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return found


if __name__ == "__main__":
    main()
