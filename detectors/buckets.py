"""Windows to batches of a few fixed shapes, for a device that wants them: padded, masked.

One row count a length, and the length follows from the window alone. In half precision another
batch size picks another kernel, which sums in another order; so a window always runs in the same
shape, alone or among others, and what is missing is filled with windows that nobody reads.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np

from detectors.protocol import IntArray, Window

_LENGTHS: Final = (32, 64, 96, 128, 192, 256, 384, 512)  # tokens; 1.5 times at most to the next
_BATCH_TOKENS: Final = 4096  # enough to fill a large GPU with a small encoder
_MOST_ROWS: Final = 64
_MULTIPLE: Final = 8  # of the longest length: what tensor cores take without a rest


class Shape(NamedTuple):
    """Rows and tokens of a batch, padding included."""

    rows: int
    tokens: int


class Batch(NamedTuple):
    """Some of the windows, as one call of the model takes them."""

    positions: list[int]  # in the sequence that was batched; row i is window positions[i]
    shape: Shape
    feeds: Mapping[str, IntArray]  # input name -> (rows, tokens)


def shapes(
    longest: int, positions: int | None = None, batch_tokens: int = _BATCH_TOKENS
) -> tuple[Shape, ...]:
    """Shapes for windows of up to `longest` tokens, shortest first.

    positions: how many the model has; padding behind the last one would be out of its table.
    """
    last = min(-(-longest // _MULTIPLE) * _MULTIPLE, positions or 10**9)
    lengths = [*(length for length in _LENGTHS if length < last), last]
    return tuple(Shape(min(_MOST_ROWS, max(1, batch_tokens // n)), n) for n in lengths)


def batches(windows: Sequence[Window], available: Sequence[Shape], pad: int) -> Iterator[Batch]:
    """Every window in exactly one batch. ValueError where one is longer than every shape.

    available: shortest first. pad: the id that fills what is left.
    """
    waiting: dict[Shape, list[int]] = {}
    for position, window in enumerate(windows):
        waiting.setdefault(_fitting(len(window.ids), available), []).append(position)
    for shape, positions in waiting.items():
        for start in range(0, len(positions), shape.rows):
            chosen = positions[start : start + shape.rows]
            yield Batch(chosen, shape, padded([windows[i] for i in chosen], shape, pad))


def padded(windows: Sequence[Window], shape: Shape, pad: int) -> dict[str, IntArray]:
    """Feeds of one call, (rows, tokens) each. Rows without a window are one padding token long.

    A row that is masked throughout would divide by zero in a softmax that drops masked tokens.
    """
    ids = np.full(shape, pad, dtype=np.int64)
    types, mask = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    mask[len(windows) :, 0] = 1
    for row, window in enumerate(windows):
        length = len(window.ids)
        ids[row, :length] = window.ids
        types[row, :length] = window.type_ids
        mask[row, :length] = 1
    return {"input_ids": ids, "token_type_ids": types, "attention_mask": mask}


def _fitting(length: int, available: Sequence[Shape]) -> Shape:
    for shape in available:
        if length <= shape.tokens:
            return shape
    raise ValueError(f"a window of {length} tokens fits into none of {list(available)}")
