"""For all tests."""

import signal


def pytest_configure() -> None:
    """Shells start background jobs deaf to SIGINT, and every child would inherit that: the tests
    that press Ctrl-C would wait for ever."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
