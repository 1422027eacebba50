"""What every benchmark ends with: a table for people, one JSON line for scripts."""

import json
import platform
import statistics
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

_PACKAGES = ("aiokafka", "onnxruntime", "msgspec", "tokenizers", "transformers", "torch")


def spread(values: Sequence[float]) -> str:
    """Median, and the lowest and highest."""
    return f"{statistics.median(values):,.1f} ({min(values):,.1f}..{max(values):,.1f})"


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` of them lie at or below."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def stolen() -> float:
    """Per cent of the cores that other machines on the host took, since the last call."""
    return float(getattr(psutil.cpu_times_percent(), "steal", 0.0))


def machine() -> dict[str, Any]:
    """Where this ran: figures from elsewhere will differ."""
    import os

    return {
        "cpu": _cpu(), "cores": os.cpu_count(), "python": platform.python_version(),
        "versions": {name: found for name in _PACKAGES if (found := _version(name))},
    }  # fmt: skip


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # the train environment has others than the run-time one
        return None


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123 - not on every system
            return next(line.split(":")[1].strip() for line in file if "model name" in line)
    except (OSError, StopIteration):
        return platform.machine()


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table."""
    table = Table(title=title, title_justify="left")
    for name in columns:
        table.add_column(name, justify="left" if name == columns[0] else "right")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def close(name: str, figures: Mapping[str, Any]) -> None:
    """The last line: everything, as JSON."""
    print(json.dumps({"bench": name, **figures, "machine": machine()}))
