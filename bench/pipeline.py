"""How many times a transformers pipeline is the shipped model, text by text, on one core?

The same texts, in turn, from text to probabilities: transformers' text-classification pipeline on
the same encoder; our fp32 graph; our int8 graph, which is what serves. Aimed at 2.1 and 3.8 times
the pipeline. Needs the train environment, and for fp32 the run that the model was exported from:

    .venv-train/bin/python -m bench.pipeline
"""

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench import report
from bench.texts import replies
from detectors.load import load_detector
from detectors.protocol import Detector, Passage, Turn

HERE = Path(__file__).resolve().parent.parent
AIMS = {"int8": 3.8, "fp32": 2.1}
TURN = 5  # texts; the machine's mood lasts longer
Judge = Callable[[Passage], Any]


def served(count: int, seed: int) -> list[Passage]:
    """Segments as the worker gives them: some 200 characters, as many before, a question."""
    found = []
    for question, reply in replies(count, seed):
        half = reply.find(". ", len(reply) // 3) + 2
        end = reply.find(". ", half + 120) + 2
        text = reply[half:end] if end > half else reply[half:]
        found.append(Passage(text, reply[max(0, half - 200) : half], (Turn("user", question),)))
    return found


def alone(count: int, seed: int) -> list[Passage]:
    """The same segments with nothing around them."""
    return [Passage(passage.text, "", ()) for passage in served(count, seed)]


def ours(detector: Detector) -> Judge:
    """encode and score of one passage."""
    return lambda passage: detector.score(detector.encode([passage]))


def pipeline(base: str) -> Judge:
    """transformers' own way, given the same two sides."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers import pipeline as make

    from training.base import folder

    torch.set_num_threads(1)
    where = folder(base)
    # The head is untrained: its numbers mean nothing, and take the same time.
    model = AutoModelForSequenceClassification.from_pretrained(where, num_labels=7).eval()
    tokenizer = AutoTokenizer.from_pretrained(where)
    classify = make(
        "text-classification", model=model, tokenizer=tokenizer, device=-1, top_k=None,
        function_to_apply="sigmoid",
    )  # fmt: skip

    def judge(passage: Passage) -> Any:
        asked = " ".join(turn.content for turn in passage.conversation)
        whole = passage.before + passage.text
        return classify({"text": asked, "text_pair": whole} if asked else whole)

    return judge


def seconds(judge: Judge, passages: Sequence[Passage]) -> float:
    """To judge them all, one by one."""
    start = time.perf_counter()
    for passage in passages:
        judge(passage)
    return time.perf_counter() - start


def tokens(detector: Detector, passages: Sequence[Passage]) -> float:
    """Of one text, on average, special ones included."""
    return statistics.mean(encoded.tokens for encoded in detector.encode(passages))


def judges(model: Path, runs: Path, beside: Path | None) -> dict[str, Judge]:
    """What is compared, by name."""
    from training.scores import fp32_twin

    manifest = json.loads((model / "manifest.json").read_bytes())
    base = manifest["provenance"].get("settings", {}).get("base", "minilm")
    detector = load_detector(model.name, model.parent)
    found = {"pipeline": pipeline(base), "int8": ours(detector)}
    twin = fp32_twin(model, runs)
    if twin is not None:
        found["fp32"] = ours(load_detector(twin.name, twin.parent))
    if beside is not None:
        other = ours(load_detector(beside.name, beside.parent))
        found["both int8"] = both(found["int8"], other)
    return found


def both(first: Judge, second: Judge) -> Judge:
    """One after the other, as the worker asks two detectors."""
    return lambda passage: (first(passage), second(passage))


def measure(
    peers: dict[str, Judge], texts: Callable[[int, int], list[Passage]], count: int, runs: int
) -> dict[str, list[float]]:
    """Texts a second of each, every run on texts of its own.

    They take turns every few texts, in any order: whatever else the machine does hits all alike.
    """
    rows: dict[str, list[float]] = {name: [] for name in peers}
    for judge in peers.values():
        seconds(judge, texts(count // 4, 999))  # warm-up
    chance = random.Random(0)
    for run in range(runs):
        passages = texts(count, run)
        spent = dict.fromkeys(peers, 0.0)
        for begin in range(0, count, TURN):
            for name in chance.sample(list(peers), len(peers)):
                spent[name] += seconds(peers[name], passages[begin : begin + TURN])
        for name in peers:
            rows[name].append(count / spent[name])
    return rows


def main() -> None:
    if find_spec("transformers") is None:
        print(
            "bench pipeline needs the train environment: .venv-train/bin/python -m bench.pipeline"
        )
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", type=Path, default=HERE / "models" / "context",
        help="one that reads segments alone is compared on those alone",
    )  # fmt: skip
    parser.add_argument("--beside", type=Path, help="a model that serves with it")
    parser.add_argument("--run-folders", type=Path, default=HERE / "runs")
    parser.add_argument("--texts", type=int, default=60, help="a run")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    os.sched_setaffinity(0, {arguments.core})
    peers = judges(arguments.model, arguments.run_folders, arguments.beside)
    detector = load_detector(arguments.model.name, arguments.model.parent)
    kinds = {"as served": served, "segments alone": alone}
    if tokens(detector, served(9, 0)) == tokens(detector, alone(9, 0)):
        del kinds["as served"]  # it would read less than the pipeline
    figures: dict[str, Any] = {}
    for name, texts in kinds.items():
        rows = measure(peers, texts, arguments.texts, arguments.runs)
        ratios = {
            peer: [mine / theirs for mine, theirs in zip(of, rows["pipeline"], strict=True)]
            for peer, of in rows.items()
        }
        mean = tokens(detector, texts(arguments.texts, 0))
        report.show(
            f"One core, one text at a time, {name}: {mean:.0f} tokens a text",
            ("", "texts/s", "x pipeline", "aimed at"),
            [(peer, report.spread(rows[peer]), _ratio(ratios[peer]), f"{AIMS.get(peer, '')}")
             for peer in peers],
        )  # fmt: skip
        figures[name] = {"tokens": mean, "texts_s": rows, "ratios": ratios}
    report.close("pipeline", figures)


def _ratio(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}..{max(values):.2f})"


if __name__ == "__main__":
    main()
