"""Bytes -> Delta. What cannot be read raises Unreadable with a reason for its dead letter."""

import json
from typing import Any, NoReturn

import msgspec

from worker.errors import Unreadable
from worker.events import Delta

_DECODER = msgspec.json.Decoder(Delta)


def decode(value: bytes | None) -> Delta:
    """The delta in a record's value. Raises Unreadable.

    msgspec checks types while it parses. It refuses a lone surrogate escape, which a producer that
    cuts text between UTF-16 units writes; such a record takes the slower second way.
    """
    if not value:
        raise Unreadable("empty value: a delta is a JSON object")
    try:
        return _DECODER.decode(value)
    except (msgspec.DecodeError, RecursionError) as error:
        if b"\\u" in value and not isinstance(error, (msgspec.ValidationError, RecursionError)):
            return _decode_surrogates(value)
        raise _unreadable(error) from None
    except UnicodeDecodeError:
        raise Unreadable("not UTF-8") from None


def _decode_surrogates(value: bytes) -> Delta:
    try:
        parsed: Any = json.loads(value, parse_constant=_refuse_constant)
        delta = msgspec.convert(parsed, Delta)
        for name in ("stream_id", "tenant"):  # they become keys and labels
            _check_encodable(getattr(delta, name), name)
    except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
        raise _unreadable(error) from None
    return delta


def _check_encodable(text: str, name: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Unreadable("half a surrogate pair", name) from None


def _refuse_constant(name: str) -> NoReturn:
    msg = f"{name} is not JSON"
    raise ValueError(msg)


def _unreadable(error: Exception) -> Unreadable:
    """The reason without any of the text: validation messages carry types and paths alone."""
    if isinstance(error, RecursionError):
        return Unreadable("nested too deeply")
    if isinstance(error, msgspec.ValidationError):
        reason, _, path = str(error).partition(" - at `")
        return Unreadable(reason, path.rstrip("`").removeprefix("$."))
    return Unreadable("not JSON")
