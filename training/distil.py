"""What a teacher says of the passages that a student learns from."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from detectors.protocol import Passage, Window
from detectors.tokens import PairTokens
from training.batches import padded
from training.model import load

_TOKENS: Final = 4096  # padded, of one call
_SAVE_EVERY: Final = 100  # calls


def soft_targets(teacher: Path, passages: Sequence[Passage], kept: Path) -> npt.NDArray[np.float32]:
    """(N, 7) probabilities by the teacher, float32, of the first window of each passage.

    teacher: a run folder. kept: file to resume from; the passages must be the same.
    """
    tokens = PairTokens((teacher / "tokenizer.json").read_bytes())
    windows = [tokens.encode(p).windows[0] for p in tqdm(passages, desc="teacher's tokens")]
    found: npt.NDArray[np.float32] = np.full((len(windows), 7), np.nan, np.float32)
    if kept.exists():
        found = np.load(kept)
    if len(found) != len(windows):
        raise ValueError(f"{kept}: of {len(found)} passages, not {len(windows)}: remove it")
    judge = load(teacher)
    left = [i for i in range(len(windows)) if np.isnan(found[i, 0])]
    calls = _by_length(left, windows)
    for number, rows in enumerate(tqdm(calls, desc="teacher", mininterval=10), start=1):
        ids, types, mask = padded([windows[i] for i in rows])
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            logits = judge(ids, types, mask)
        found[rows] = torch.sigmoid(logits.float()).numpy()
        if number % _SAVE_EVERY == 0 or number == len(calls):
            np.save(kept, found)
    return found


def _by_length(rows: Sequence[int], windows: Sequence[Window]) -> list[list[int]]:
    calls: list[list[int]] = [[]]
    for row in sorted(rows, key=lambda i: len(windows[i].ids)):  # the newest is the longest
        if (len(calls[-1]) + 1) * len(windows[row].ids) > _TOKENS:
            calls.append([])
        calls[-1].append(row)
    return [call for call in calls if call]
