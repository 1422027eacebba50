"""For all tests."""

import signal
from collections.abc import Iterator

import pytest
import structlog


def pytest_configure() -> None:
    """Shells start background jobs deaf to SIGINT, and every child would inherit that: the tests
    that press Ctrl-C would wait for ever."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _logs_as_they_were() -> Iterator[None]:
    """A command that ran in this process has bound its logs to a stream that is closed by now."""
    yield
    structlog.reset_defaults()
