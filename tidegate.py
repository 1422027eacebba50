"""Tidegate's public face: what callers import. Everything is loaded when it is first used.

    async with tidegate.Moderator() as moderator:
        text, safe = await moderator.process_output("...", context="What the user asked.")

Without an event loop: SyncModerator. One token stream in a script: guard. Over Kafka: Gate.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from worker.events import Decision
    from worker.gate import Gate
    from worker.moderator import Moderator, SyncModerator, guard
    from worker.settings import Settings

    __version__: str

__all__ = [
    "Decision",
    "Gate",
    "Moderator",
    "Settings",
    "SyncModerator",
    "__version__",
    "guard",
]

_HOMES = {
    "Decision": "worker.events",
    "Gate": "worker.gate",
    "Moderator": "worker.moderator",
    "Settings": "worker.settings",
    "SyncModerator": "worker.moderator",
    "guard": "worker.moderator",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("tidegate")
    if name not in _HOMES:
        raise AttributeError(f"module 'tidegate' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
