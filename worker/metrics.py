"""Every metric, declared once: type, unit, one sentence. Never a label that holds user text."""

from prometheus_client import Counter, Gauge, Histogram

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)

DELTAS = Counter("tidegate_deltas", "Input records read, repeats and unreadable ones included.")
DEAD_LETTERS = Counter("tidegate_dead_letters", "Input records published as dead letters.")
SEGMENTS = Counter("tidegate_segments", "Segments judged, by what settled them.", ["stage"])
DECISIONS = Counter("tidegate_decisions", "Decisions published, by verdict.", ["verdict"])
DECISION_SECONDS = Histogram(
    "tidegate_decision_seconds", "From a complete segment to its decision.", buckets=_SECONDS
)
PUBLISH_SECONDS = Histogram(
    "tidegate_publish_seconds", "One transaction, begin to commit.", buckets=_SECONDS
)
DETECTOR_FAILURES = Counter("tidegate_detector_failures", "Tries to judge a segment that failed.")
UNAVAILABLE = Counter("tidegate_unavailable", "Segments without scores at their deadline.")
LOGPROB_UNAVAILABLE = Counter(
    "tidegate_logprob_unavailable", "Segments without their second look, by cause.", ["cause"]
)
LOGPROB_SECONDS = Histogram(
    "tidegate_logprob_seconds", "One segment's second look, its queue aside.", buckets=_SECONDS
)
REVIEWS = Counter("tidegate_reviews", "Decisions published for review.")
THRESHOLDS = Counter(
    "tidegate_thresholds", "Threshold records, by what became of them.", ["outcome"]
)
LABELS = Counter("tidegate_labels", "Labels taken, refused ones included.")
LANES_LOST = Counter(
    "tidegate_lanes_lost", "Partitions dropped and taken anew after a failed publish.", ["cause"]
)
WAITING = Gauge("tidegate_waiting_segments", "Segments submitted and not judged.")
OPEN_STREAMS = Gauge("tidegate_open_streams", "Streams that have not ended.")
PAUSED = Gauge("tidegate_paused", "1 while back-pressure holds the partitions, else 0.")
