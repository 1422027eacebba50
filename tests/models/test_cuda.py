"""The CUDA path, on a GPU: skipped where onnxruntime has none, and so far it always was."""

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from detectors.calibrate import sigmoid
from detectors.protocol import Passage, Turn, Window
from detectors.session import Folder, Session
from detectors.toxicity import Toxicity
from tests.models.make_served import SERVED

pytestmark = pytest.mark.skipif(
    "CUDAExecutionProvider" not in ort.get_available_providers(), reason="no GPU here"
)
PASSAGES = [
    Passage(text, before, turns)
    for text in ("you", "I will kill the lot of you.", "a b c d e f g " * 9)
    for before in ("", "well, in the end ")
    for turns in ((), (Turn("user", "where does the train leave?"),))
]


@pytest.fixture(scope="module")
def windows() -> list[Window]:
    served = Toxicity(SERVED)
    return [window for e in served.encode(PASSAGES) for window in e.windows]


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_cuda_gives_the_logits_of_the_cpu(windows: list[Window], cuda_graphs: bool) -> None:
    """fp16 within 0.02 of fp32 on CPU, three times over: recorded graphs replay from the second."""
    folder = Folder(Path(SERVED))
    expected = Session(folder, precision="fp32").all_logits(windows)
    session = Session(folder, "cuda", cuda_graphs=cuda_graphs)
    for _ in range(3):
        assert np.abs(session.all_logits(windows) - expected).max() <= 0.02


def test_alone_or_among_others_scores_are_the_same_on_cuda(windows: list[Window]) -> None:
    """Guarantee 4 in halves: every window in the shape that its own length chooses."""
    session = Session(Folder(Path(SERVED)), "cuda")
    together = session.all_logits(windows)
    alone = np.stack([session.logits(window) for window in windows])
    assert np.abs(sigmoid(together) - sigmoid(alone)).max() <= 1e-4
