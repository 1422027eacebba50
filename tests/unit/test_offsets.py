"""offsets.py: the lowest offset that a restart must read again."""

from hypothesis import given
from hypothesis import strategies as st

from worker.offsets import OpenOffsets


def test_position_is_committed_when_nothing_is_open() -> None:
    """With no open stream a restart reads on."""
    assert OpenOffsets().lowest(42) == 42


def test_oldest_open_stream_holds_the_offset() -> None:
    """Streams that closed before it do not move it."""
    offsets = OpenOffsets()
    for stream_id, offset in (("a", 3), ("b", 5), ("c", 9)):
        offsets.need(stream_id, offset)
    offsets.release("b")
    assert (offsets.lowest(20), offsets.oldest()) == (3, "a")
    offsets.release("a")
    assert (offsets.lowest(20), offsets.oldest()) == (9, "c")


@given(
    st.lists(st.tuples(st.sampled_from(["open", "spill", "close"]), st.integers(0, 9)), max_size=60)
)
def test_never_above_an_open_stream(steps: list[tuple[str, int]]) -> None:
    """Whatever opens, spills and closes in whichever order: it is the minimum over the open."""
    offsets, model = OpenOffsets(), {}
    for position, (step, number) in enumerate(steps):
        name = str(number)
        if (step == "open" and name not in model) or (step == "spill" and name in model):
            model[name] = position
            offsets.need(name, position)
        elif step == "close":
            model.pop(name, None)
            offsets.release(name)
        assert offsets.lowest(position + 1) == min(model.values(), default=position + 1)
        assert len(offsets) == len(model)
