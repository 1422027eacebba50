"""How long does a rebuild of the evidence take from a million labels, and what does it hold?

    python -m bench.evidence [--labels 1000000]

JSON labels are decoded, held against their decisions, counted and settled, with thresholds in
force that are watched for drift: 20 tenants, 7 harms, 12 reviewers. Making labels up is not timed.
Time is CPU time of the process, memory its resident size.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import msgspec
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.report import close, show
from detectors.harms import THRESHOLD_KEYS
from worker.certify import shipped
from worker.events import Label
from worker.feedback import Evidence, Judged
from worker.settings import LearnPolicy

CHUNK = 20_000
TENANTS, REVIEWERS = 20, 12
MODEL = "toxicity@ab12cd"
EVERY_MS = 500  # between labels: two reviewers' work

_decoder = msgspec.json.Decoder(Label)


def _made_up(begin: int, count: int) -> tuple[list[bytes], list[Judged]]:
    rng = np.random.default_rng(begin)
    scores = rng.beta(0.5, 0.5, count).round(6).tolist()
    harmful = (rng.random(count) < scores).tolist()
    who, tenants, harms = (
        rng.integers(most, size=count).tolist() for most in (REVIEWERS, TENANTS, 7)
    )
    labels, judged = [], []
    for at in range(count):
        number, harm, tenant = begin + at, THRESHOLD_KEYS[harms[at]], f"tenant-{tenants[at]}"
        share = 0.1 if scores[at] > 0.5 else 0.02 if scores[at] > 0.25 else 0.002
        decision, stream = f"llm.outputs-{number % 12}-{number}-0", f"chat-{number // 5}/turn-1/0"
        label = Label(
            decision_id=decision, stream_id=stream, tenant=tenant, harm=harm, score=scores[at],
            harmful=harmful[at], reviewer=f"r-{who[at]}", picked_with=share,
        )  # fmt: skip
        labels.append(msgspec.json.encode(label))
        judged.append(
            Judged(
                decision, stream, tenant, MODEL, "toxicity", None, {harm: scores[at]}, scores[at],
                number * EVERY_MS, share, 0.1,
            )
        )  # fmt: skip
    return labels, judged


def _rebuild(evidence: Evidence, begin: int, labels: list[bytes], judged: list[Judged]) -> int:
    """Take them all; the tests that a live learner would have made."""
    tests = 0
    for number, (value, decision) in enumerate(zip(labels, judged, strict=True), begin):
        evidence.add(_decoder.decode(value), decision, number * EVERY_MS)
        for _ in evidence.settle(number * EVERY_MS):
            tests += 1
    return tests


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--labels", type=int, default=1_000_000)
    count = parser.parse_args().labels
    policy = LearnPolicy()
    evidence = Evidence(lambda _: policy)
    for tenant in range(TENANTS):
        for harm in THRESHOLD_KEYS:
            evidence.in_force(shipped(f"tenant-{tenant}", harm, MODEL, 0.74, 0))
    _made_up(0, CHUNK)
    before, seconds, tests, held = _resident_mb(), 0.0, 0, []
    for begin in range(0, count, CHUNK):
        made_up = _made_up(begin, min(CHUNK, count - begin))
        start = time.process_time()
        tests += _rebuild(evidence, begin, *made_up)
        seconds += time.process_time() - start
        held.append(round(_resident_mb() - before, 1))
    show(
        "evidence", ("labels", "s of one core", "us a label", "MB at half", "MB at the end"),
        [[f"{count:,}", f"{seconds:.1f}", f"{seconds / count * 1e6:.1f}",
          f"{held[len(held) // 2]:.0f}", f"{held[-1]:.0f}"]],
    )  # fmt: skip
    close("evidence", {"labels": count, "seconds": round(seconds, 2), "mb": held, "tests": tests})


if __name__ == "__main__":
    main()
