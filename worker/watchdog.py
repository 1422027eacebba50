"""Ends a worker whose event loop is stuck: others take over its partitions."""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable

EXIT_STUCK = 70  # EX_SOFTWARE of sysexits.h


def start(beat: Callable[[], float], timeout_ms: int) -> None:
    """Watch from a thread that `beat` (monotonic seconds) moves on; exit the process if not.

    A whole process that was stopped and woken is not stuck: the thread overslept as well, and
    gives the loop another round.
    """
    if timeout_ms <= 0:
        return
    period_s = timeout_ms / 4e3
    threading.Thread(
        target=_watch, args=(beat, timeout_ms / 1e3, period_s), name="watchdog", daemon=True
    ).start()


def _watch(beat: Callable[[], float], timeout_s: float, period_s: float) -> None:
    while True:
        slept_from = time.monotonic()
        time.sleep(period_s)
        now = time.monotonic()
        if now - slept_from > 2 * period_s:
            continue
        if now - beat() > timeout_s:
            sys.stderr.write(f"watchdog: event loop stuck for over {timeout_s:.1f} s; stacks:\n")
            faulthandler.dump_traceback(all_threads=True)
            os._exit(EXIT_STUCK)
