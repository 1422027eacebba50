"""Text to bench with: replies recombined from the demo's sentences, none twice."""

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

SAMPLES = Path(__file__).resolve().parent.parent / "worker" / "samples.jsonl"


def sentences() -> list[str]:
    """Every sentence of the demo's harmless samples, with the space after it."""
    found = []
    for line in SAMPLES.read_text(encoding="utf-8").splitlines():
        sample = json.loads(line)
        if sample["should"] != "allow":
            continue
        text = sample["text"]
        found += re.findall(r"[^.!?]+[.!?]+\s*", text + " ")
    return [sentence.strip() + " " for sentence in found if len(sentence) > 20]


def replies(count: int, seed: int = 0) -> Iterator[tuple[str, str]]:
    """(question, reply) pairs; a reply has 4 to 12 sentences."""
    rng = random.Random(seed)
    pool = sentences()
    for number in range(count):
        picked = rng.choices(pool, k=rng.randint(4, 12))
        yield f"Question {number}: {rng.choice(pool)}", "".join(picked) + f"({number})"
