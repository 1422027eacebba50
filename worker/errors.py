"""Every failure has one of three fates.

TidegateError
├── Retry          transient: the same work is tried again, the text stays held meanwhile
│   ├── DetectorError     a detector failed or gave a score outside 0..1
│   └── PartitionLost     another worker owns the partition now; our results are dropped
├── Unreadable     this record goes to dead letters with its reason, the partition moves on
└── Stop           configuration, model, too many dead letters: the worker ends, loudly
"""


class TidegateError(Exception):
    """Root of everything that Tidegate raises by itself."""


class Retry(TidegateError):
    """Transient: try again."""


class DetectorError(Retry):
    """A detector failed, timed out or gave something that is no probability."""


class PartitionLost(Retry):
    """This worker may no longer publish for the partition."""


class Unreadable(TidegateError):
    """The record cannot be read; `reason` becomes a header of its dead letter."""

    def __init__(self, reason: str, field: str = "") -> None:
        super().__init__(f"{field}: {reason}" if field else reason)
        self.reason = reason
        self.field = field


class Stop(TidegateError):
    """Going on would do harm: end the worker with this message."""
