"""Makes tests/models/served: a tiny RoBERTa's model folder, for the tests that have no torch.

`.venv-train/bin/python -m tests.models.make_served`
"""

import tempfile
from pathlib import Path

from tests.models.tiny import checkpoint

SERVED = Path(__file__).parent / "served"
LABELS = ("neutral", "toxic", "threat")
MAP = """
source = "a tiny RoBERTa, untrained"
licence = "Apache-2.0"
data = "none"
inputs = "pair"
activation = "softmax"
negative = "neutral"
[columns]
violence = ["threat"]
hate_speech = { labels = ["toxic", "threat"], combine = "noisy-or" }
"""


def make(out: Path) -> None:
    """One layer of 16, 64 positions, 267 tokens: all three graphs in 150 kB."""
    from export import foreign

    with tempfile.TemporaryDirectory() as work:
        folder = checkpoint(
            "roberta", Path(work) / "roberta", LABELS, num_hidden_layers=1,
            hidden_size=16, intermediate_size=16, max_position_embeddings=66,
        )  # fmt: skip
        labels = Path(work) / "map.toml"
        labels.write_text(MAP)
        foreign.export(foreign.Asked(folder, labels, out))


if __name__ == "__main__":
    make(SERVED)
