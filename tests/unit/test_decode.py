"""decode.py: bytes -> Delta, or a reason."""

import pytest

from worker.decode import decode
from worker.errors import Unreadable

GOOD = b'{"stream_id":"s","seq":3,"delta":"hi","final":false,"tenant":"t","channel":"tool"}'


def test_delta_is_read_with_its_optional_fields() -> None:
    """Every field that is there is taken over; those that are not have their defaults."""
    delta = decode(GOOD)
    assert (delta.stream_id, delta.seq, delta.delta, delta.final) == ("s", 3, "hi", False)
    assert (delta.tenant, delta.channel, delta.context) == ("t", "tool", ())


def test_unknown_fields_are_ignored() -> None:
    """A newer producer may send more than we know."""
    assert decode(b'{"stream_id":"s","seq":0,"delta":"","final":true,"new":{"a":[1]}}').final


@pytest.mark.parametrize(
    ("value", "field"),
    [
        (None, ""),
        (b"", ""),
        (b"{", ""),
        (b"[]", ""),
        (b"null", ""),
        (b"\xff\xfe", ""),
        (b'{"stream_id":"s","seq":0,"delta":"\xff","final":true}', ""),
        (b'{"stream_id":"s","seq":NaN,"delta":"","final":true}', ""),
        (b'{"stream_id":"s","seq":"0","delta":"","final":true}', "seq"),
        (b'{"stream_id":"s","seq":-1,"delta":"","final":true}', "seq"),
        (b'{"stream_id":"s","seq":0.5,"delta":"","final":true}', "seq"),
        (b'{"stream_id":"","seq":0,"delta":"","final":true}', "stream_id"),
        (b'{"stream_id":"' + b"x" * 513 + b'","seq":0,"delta":"","final":true}', "stream_id"),
        (b'{"stream_id":"\\ud800","seq":0,"delta":"","final":true}', "stream_id"),
        (b'{"stream_id":"s","seq":0,"delta":1,"final":true}', "delta"),
        (b'{"stream_id":"s","seq":0,"delta":"","final":"yes"}', "final"),
        (b'{"stream_id":"s","seq":0,"delta":"","final":true,"channel":"video"}', "channel"),
        (b'{"stream_id":"s","seq":0,"delta":"","final":true,"context":[{"role":"u"}]}', "context"),
        (b"[" * 100_000, ""),
        (b'{"a":' + b"[" * 100_000, ""),
        (b'{"\\ud800":' * 50_000, ""),
    ],
)
def test_what_is_no_delta_is_unreadable_with_its_field(value: bytes | None, field: str) -> None:
    """Nothing but Unreadable comes out, and it names the field where there is one."""
    with pytest.raises(Unreadable) as caught:
        decode(value)
    assert caught.value.reason
    assert caught.value.field.startswith(field)


@pytest.mark.parametrize("name", ["stream_id", "seq", "delta", "final"])
def test_missing_required_field_is_named(name: str) -> None:
    """The reason says which field is missing."""
    fields = {"stream_id": '"s"', "seq": "0", "delta": '""', "final": "true"}
    del fields[name]
    value = "{" + ",".join(f'"{key}":{text}' for key, text in fields.items()) + "}"
    with pytest.raises(Unreadable, match=name):
        decode(value.encode())


def test_reason_holds_no_user_text() -> None:
    """Reasons become headers and logs: they must not quote the record."""
    with pytest.raises(Unreadable) as caught:
        decode(b'{"stream_id":"s","seq":0,"delta":["my secret"],"final":true}')
    assert "secret" not in str(caught.value)


def test_half_a_surrogate_pair_in_the_text_is_kept() -> None:
    """A producer that cuts between UTF-16 units sends one half in each of two deltas."""
    assert decode(b'{"stream_id":"s","seq":0,"delta":"x\\ud83d","final":false}').delta == "x\ud83d"
