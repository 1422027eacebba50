"""The harm types. Their order is the column order of every score matrix."""

from typing import Final

HARMS: Final = (
    "violence",
    "hate_speech",
    "misinformation",
    "privacy_violation",
    "illegal_activity",
    "sexual_content",
)
HARMFUL: Final = "harmful"  # any harm at all, the six and whatever is none of them
OTHER: Final = "other"  # the decision's harm where only `harmful` is above its threshold

COLUMNS: Final = (*HARMS, HARMFUL)  # (7,) columns of a detector's scores
THRESHOLD_KEYS: Final = (*HARMS, OTHER)  # `other` is the threshold that `harmful` is held against

# In force where a model's manifest brings none.
DEFAULT_THRESHOLDS: Final = dict(
    zip(THRESHOLD_KEYS, (0.70, 0.80, 0.60, 0.90, 0.85, 0.75, 0.90), strict=True)
)
