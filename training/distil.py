"""What a teacher says of the passages that a student learns from."""

from collections.abc import Sequence
from hashlib import blake2b
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
    """(N, 7) probabilities by the teacher, of the first window of each passage.

    teacher: a run folder. kept: file of what it has said already, of these passages or others.
    """
    known = _load(kept)
    keys = [_key(passage) for passage in passages]
    new = {key: passage for key, passage in zip(keys, passages, strict=True) if key not in known}
    if new:
        _ask(teacher, new, known, kept)
    return np.stack([known[key] for key in keys])


def _ask(
    teacher: Path, new: dict[bytes, Passage], known: dict[bytes, npt.NDArray[np.float32]],
    kept: Path,
) -> None:  # fmt: skip
    tokens = PairTokens((teacher / "tokenizer.json").read_bytes())
    keys = list(new)
    windows = [tokens.encode(new[key]).windows[0] for key in tqdm(keys, desc="teacher's tokens")]
    judge = load(teacher)
    calls = _by_length(range(len(keys)), windows)
    for number, rows in enumerate(tqdm(calls, desc="teacher", mininterval=10), start=1):
        ids, types, mask = padded([windows[i] for i in rows])
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            logits = judge(ids, types, mask)
        said = torch.sigmoid(logits.float()).numpy()
        known.update((keys[i], row) for i, row in zip(rows, said, strict=True))
        if number % _SAVE_EVERY == 0 or number == len(calls):
            _save(kept, known)


def _key(passage: Passage) -> bytes:
    return blake2b(repr(passage).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _load(kept: Path) -> dict[bytes, npt.NDArray[np.float32]]:
    if not kept.exists():
        return {}
    with np.load(kept) as found:
        keys, rows = found["keys"], found["rows"]
    return {key.tobytes(): row for key, row in zip(keys, rows, strict=True)}


def _save(kept: Path, known: dict[bytes, npt.NDArray[np.float32]]) -> None:
    part = kept.with_suffix(".part.npz")
    keys = np.stack([np.frombuffer(key, np.uint8) for key in known])  # (N, 16)
    np.savez(part, keys=keys, rows=np.stack(list(known.values())))
    part.replace(kept)


def _by_length(rows: Sequence[int], windows: Sequence[Window]) -> list[list[int]]:
    calls: list[list[int]] = [[]]
    for row in sorted(rows, key=lambda i: len(windows[i].ids)):  # the newest is the longest
        if (len(calls[-1]) + 1) * len(windows[row].ids) > _TOKENS:
            calls.append([])
        calls[-1].append(row)
    return [call for call in calls if call]
