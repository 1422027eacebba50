"""How fast is the keyword prefilter, against looking for each term with `in`?

    python -m bench.keywords [--seconds 20]

Text goes through in segments of 200 characters, as in a stream, and of 20,000, where the calls'
own cost does not show. Both sides get the same segments
in turn, round after round; the table has medians over the rounds and their spread. The naive side
only folds case and looks for substrings: no look-alikes, no word borders, no offsets.
"""

import argparse
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from detectors.keywords import SHIPPED, Entry, Keywords
from detectors.normalise import VERSION, fold

SEGMENT_CHARS = (200, 20_000)
PROSE = """
    the model wrote a long answer about rivers and seas while people asked how much of their
    water would still be clean after ten years of work by 14 cities, and who pays $3 for it.
    Here's a list: first of all, we should look at what was measured! Then compare.
"""
TEXTS: dict[str, dict[int, int]] = {
    "ascii": {},
    "accented": str.maketrans("aeo'", "áéö’"),
    "cyrillic": str.maketrans("abcdefghiklmnoprstuvwyz", "абцдефгхиклмнопрстувыйз"),
}


def _prose(chars: int, seed: int = 5) -> str:
    rng = random.Random(seed)
    words: list[str] = []
    while sum(map(len, words)) + len(words) < chars:
        words.extend(rng.choices(PROSE.split(), k=200))
    return " ".join(words)


def _made_up(count: int) -> Keywords:
    rng = random.Random(6)
    letters = "abcdefghijklmnopqrstuvwxyz"
    terms = {"".join(rng.choices(letters, k=rng.randint(5, 12))) for _ in range(count)}
    return Keywords((Entry("other", "suspect", term) for term in sorted(terms)), "made up")


def _segments(text: str, chars: int) -> list[str]:
    return [text[at : at + chars] for at in range(0, len(text), chars)]


def _ours(keywords: Keywords, segments: list[str]) -> int:
    """The whole prefilter as the worker calls it: search and carry the tail."""
    found, tail = 0, ""
    for segment, after in zip(segments, [*segments[1:], ""], strict=True):
        found += len(keywords.find(segment, tail, after[:1]))
        tail = keywords.next_tail(tail, segment)
    return found


def _naive(keywords: Keywords, segments: list[str]) -> int:
    terms = [entry.text for entry in keywords.entries]
    found = 0
    for segment in segments:
        lowered = segment.casefold()
        found += sum(term in lowered for term in terms)
    return found


def _fold_only(_: Keywords, segments: list[str]) -> int:
    return sum(len(fold(segment)) for segment in segments)


class Case(NamedTuple):
    """One thing to time."""

    step: Callable[[Keywords, list[str]], int]
    keywords: Keywords
    segments: list[str]

    def rate(self) -> float:
        """MB/s of UTF-8."""
        start = time.perf_counter()
        self.step(self.keywords, self.segments)
        seconds = time.perf_counter() - start
        return sum(len(segment.encode()) for segment in self.segments) / seconds / 1e6


def _cases() -> dict[str, Case]:
    """Name -> what to run; the naive side gets less text, for it is slow."""
    lists = {"shipped": Keywords.load(SHIPPED), "10k": _made_up(10_000)}
    long, short = _prose(400_000), {"shipped": _prose(100_000), "10k": _prose(20_000)}
    cases: dict[str, Case] = {}
    for (kind, table), chars in product(TEXTS.items(), SEGMENT_CHARS):
        whole = _segments(long.translate(table), chars)
        for name, keywords in lists.items():
            part = _segments(short[name].translate(table), chars)
            cases[f"{kind}/{chars}/{name}/ours"] = Case(_ours, keywords, whole)
            cases[f"{kind}/{chars}/{name}/in"] = Case(_naive, keywords, part)
        cases[f"{kind}/{chars}/-/fold"] = Case(_fold_only, lists["shipped"], whole)
    return cases


def _measure(seconds: float) -> dict[str, list[float]]:
    cases = _cases()
    for case in cases.values():
        case.rate()  # warm-up: fills the fold's table
    rates: dict[str, list[float]] = {name: [] for name in cases}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(rates.values()))) < 5:
        for name, case in cases.items():
            rates[name].append(case.rate())
    return rates


def _row(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    low, median, high = (round(value, 2) for value in statistics.quantiles(values, n=4))
    return low, median, high


def _ratio(ours: list[float], naive: list[float]) -> float:
    """Median over the rounds of ours to naive in the same round."""
    return round(statistics.median(a / b for a, b in zip(ours, naive, strict=True)), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="how long to repeat")
    rates = _measure(parser.parse_args().seconds)
    rows = {name: _row(values) for name, values in rates.items()}
    print(f"{'text/segment/list/side':28} {'MB/s':>9} {'quartiles':>19}")
    for name, (low, median, high) in rows.items():
        print(f"{name:28} {median:9.2f} {low:9.2f} {high:9.2f}")
    summary = {
        "bench": "keywords",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {
            "python": platform.python_version(),
            "ahocorasick_rs": version("ahocorasick_rs"),
            "normaliser": VERSION,
        },
        "unit": "MB/s of UTF-8, one core",
        "rounds": len(next(iter(rates.values()))),
        "median": {name: row[1] for name, row in rows.items()},
        "ratio": {  # to the `in` loop
            name: _ratio(rates[f"{name}/ours"], rates[f"{name}/in"])
            for name in (row.removesuffix("/ours") for row in rows if row.endswith("/ours"))
        },
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
