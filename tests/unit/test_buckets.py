"""Batches of fixed shapes: every window in one of them, padded so that nobody reads the rest."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from detectors import buckets
from detectors.buckets import Shape
from detectors.protocol import Window

SHAPES = (Shape(3, 8), Shape(2, 16))
PAD = 99


def window(length: int, first: int = 1) -> Window:
    """Different ids, the second half of them of type 1."""
    types = np.zeros(length, np.int64)
    types[length // 2 :] = 1
    return Window(np.arange(first, first + length), types)


def test_shapes_reach_the_longest_window_and_no_further() -> None:
    """A small fixed set, by what the model takes; rows fall as tokens rise."""
    found = buckets.shapes(259)
    assert [shape.tokens for shape in found] == [32, 64, 96, 128, 192, 256, 264]
    assert [shape.rows for shape in found] == [64, 64, 42, 32, 21, 16, 15]
    assert buckets.shapes(512)[-1] == Shape(8, 512)
    assert buckets.shapes(20) == (Shape(64, 24),)
    assert buckets.shapes(512, batch_tokens=100)[-1] == Shape(1, 512)


def test_no_shape_is_longer_than_the_model_has_positions() -> None:
    """Rounded up it would be 64, and position 60 is in no table."""
    assert buckets.shapes(59, positions=60)[-1].tokens == 60
    assert buckets.shapes(59, positions=512)[-1].tokens == 64


@given(st.lists(st.integers(1, 16), max_size=20))
def test_every_window_is_in_one_batch_that_it_fits(lengths: list[int]) -> None:
    """Whatever they are, and in a shape that its own length chooses, not its company."""
    windows = [window(length, first=100 * i) for i, length in enumerate(lengths)]
    found = list(buckets.batches(windows, SHAPES, PAD))
    assert sorted(p for batch in found for p in batch.positions) == list(range(len(windows)))
    for batch in found:
        assert batch.shape in SHAPES
        assert all(values.shape == batch.shape for values in batch.feeds.values())
        for row, position in enumerate(batch.positions):
            length = lengths[position]
            assert batch.shape == (SHAPES[0] if length <= 8 else SHAPES[1])
            ids, types = windows[position]
            assert batch.feeds["input_ids"][row, :length].tolist() == ids.tolist()
            assert batch.feeds["token_type_ids"][row, :length].tolist() == types.tolist()


def test_what_is_no_window_is_masked_and_padding() -> None:
    """Behind a window and below the last one; but no row is masked throughout."""
    (batch,) = buckets.batches([window(3), window(8)], SHAPES, PAD)
    assert batch.feeds["attention_mask"].tolist() == [
        [1, 1, 1, 0, 0, 0, 0, 0], [1] * 8, [1, 0, 0, 0, 0, 0, 0, 0],
    ]  # fmt: skip
    assert batch.feeds["input_ids"][0].tolist() == [1, 2, 3, PAD, PAD, PAD, PAD, PAD]
    assert batch.feeds["input_ids"][2].tolist() == [PAD] * 8
    assert batch.feeds["token_type_ids"][2].tolist() == [0] * 8


def test_a_window_longer_than_every_shape_is_an_error() -> None:
    """It is not clipped."""
    with pytest.raises(ValueError, match="17 tokens"):
        list(buckets.batches([window(17)], SHAPES, PAD))
