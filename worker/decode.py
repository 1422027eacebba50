"""Bytes -> Delta, Label, threshold. What cannot be read raises Unreadable with a reason."""

import json
from typing import Any, NoReturn

import msgspec

from detectors.harms import THRESHOLD_KEYS
from worker.errors import Unreadable
from worker.events import Delta, Label, ThresholdRecord

_DECODER = msgspec.json.Decoder(Delta)
_LABELS = msgspec.json.Decoder(Label)
_THRESHOLDS = msgspec.json.Decoder(ThresholdRecord)


def decode(value: bytes | None) -> Delta:
    """The delta in a record's value. Raises Unreadable.

    msgspec checks types while it parses. It refuses a lone surrogate escape, which a producer that
    cuts text between UTF-16 units writes; such a record takes the slower second way.
    """
    if not value:
        raise Unreadable("empty value: a delta is a JSON object")
    try:
        return _DECODER.decode(value)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        if b"\\u" in value and type(error) is msgspec.DecodeError:
            return _decode_surrogates(value)
        raise _unreadable(error) from None


def decode_label(value: bytes | None) -> Label:
    """The label in a record's value. Raises Unreadable."""
    if not value:
        raise Unreadable("empty value: a label is a JSON object")
    try:
        return _LABELS.decode(value)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _unreadable(error) from None


def threshold_key(tenant: str, harm: str) -> bytes:
    """The key of a tenant's and harm's records on moderation.thresholds."""
    return f"{tenant}/{harm}".encode()


def decode_threshold(key: bytes | None, value: bytes) -> ThresholdRecord:
    """The threshold in a record's value. Raises Unreadable, also where its key is another's."""
    try:
        record = _THRESHOLDS.decode(value)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _unreadable(error) from None
    if record.harm not in THRESHOLD_KEYS:
        raise Unreadable("unknown harm", "harm")
    if record.version < 1:
        raise Unreadable("versions begin with 1", "version")
    for name in ("threshold", "previous"):
        if not 0.0 <= getattr(record, name) <= 1.0:
            raise Unreadable("outside 0..1", name)
    if key != threshold_key(record.tenant, record.harm):
        raise Unreadable("the key is not tenant/harm")
    return record


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
    if isinstance(error, UnicodeDecodeError):
        return Unreadable("not UTF-8")
    if isinstance(error, msgspec.ValidationError):
        reason, _, path = str(error).partition(" - at `")
        return Unreadable(reason, path.rstrip("`").removeprefix("$."))
    return Unreadable("not JSON")
