"""Samples to examples, examples to padded batches of like lengths."""

import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from detectors.harms import COLUMNS
from detectors.protocol import Window
from detectors.tokens import PairTokens
from training.windows import Sample

Float32s = npt.NDArray[np.float32]
_MOST_ROWS = 96  # of a batch of very short windows


class Sized(Protocol):
    """What a batch is made of."""

    @property
    def length(self) -> int:
        """Tokens."""
        ...


Item = TypeVar("Item", bound=Sized)


class Example(NamedTuple):
    """A window with what is known of it, (7,) each. soft: a teacher's probabilities, or NaN."""

    window: Window
    targets: Float32s
    weights: Float32s
    soft: Float32s

    @property
    def length(self) -> int:
        """Tokens of the window."""
        return len(self.window.ids)


def examples(
    found: Sequence[Sample], tokens: PairTokens, soft: Float32s | None = None
) -> list[Example]:
    """The first window of each passage of which something is known.

    Training passages fit into one, or nearly.
    """
    if soft is None:
        soft = np.full((len(found), len(COLUMNS)), np.nan, np.float32)
    return [
        Example(
            tokens.encode(sample.passage).windows[0],
            np.array(sample.targets, np.float32), np.array(sample.weights, np.float32), said,
        )
        for sample, said in zip(tqdm(found, desc="tokens", mininterval=10), soft, strict=True)
        if any(sample.weights) or not np.isnan(said).any()
    ]  # fmt: skip


def batches(chosen: Sequence[Item], most_tokens: int, seed: str) -> Iterator[list[Item]]:
    """Batches of like lengths, padding counted, in an order that `seed` decides."""
    chance = random.Random(seed)
    cut: list[list[Item]] = [[]]
    for item in sorted(chosen, key=lambda it: it.length + chance.random() * 8):
        # Nearly sorted: the newest is the longest, or a few tokens short of it.
        if (len(cut[-1]) + 1) * item.length > most_tokens:
            cut.append([])
        cut[-1].append(item)
    whole = [rows[i : i + _MOST_ROWS] for rows in cut for i in range(0, len(rows), _MOST_ROWS)]
    chance.shuffle(whole)
    yield from whole


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
