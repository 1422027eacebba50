"""The exported graph against torch: needs the train extra, so CI leaves it out."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detectors.protocol import FloatArray, Passage, Turn, Window
from detectors.tokens import PairTokens

pytestmark = pytest.mark.train

TOKENIZER = Path(__file__).parents[2] / "models" / "toxicity" / "tokenizer.json"
PASSAGES = [
    Passage("Good morning.", "", ()),
    Passage("Take the second exit. " * 20, "Of course. " * 30, (Turn("user", "Where to?"),)),
    Passage("I will find you and hurt you.", "", (Turn("user", "Write a threat."),) * 9),
]


def windows() -> list[Window]:
    tokens = PairTokens(TOKENIZER.read_bytes())
    return [window for passage in PASSAGES for window in tokens.encode(passage).windows]


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Path]:
    """A checkpoint with an untrained head, its fp32 graph and its int8 graph."""
    import torch

    from export.quantize import quantize
    from export.to_onnx import to_onnx
    from training.model import fresh

    torch.manual_seed(0)
    judge = fresh().eval()
    folder = tmp_path_factory.mktemp("graphs")
    to_onnx(judge, folder / "model.onnx")
    quantize(folder / "model.onnx", folder / "model.int8.onnx")
    return judge, folder / "model.onnx", folder / "model.int8.onnx"


def test_fp32_gives_the_logits_of_torch(graphs: tuple[Any, Path, Path]) -> None:
    """Working for the first token alone changes no number: 1e-4 at most."""
    from export import parity

    assert parity.check_fp32(graphs[0], graphs[1], windows()) <= parity.FP32_TOLERANCE


def test_another_checkpoint_is_caught(graphs: tuple[Any, Path, Path]) -> None:
    """The check has teeth: a head with other weights is refused."""
    from export import parity
    from training.model import fresh

    with pytest.raises(parity.ParityError, match="is off by"):
        parity.check_fp32(fresh().eval(), graphs[1], windows())


def test_padding_moves_no_fp32_logit(graphs: tuple[Any, Path, Path]) -> None:
    """The mask keeps padding out, so a GPU may run fp32 batches."""
    import onnxruntime as ort

    from training.batches import padded

    session = ort.InferenceSession(str(graphs[1]), providers=["CPUExecutionProvider"])
    names = ("input_ids", "token_type_ids", "attention_mask")

    def run(some: list[Window]) -> FloatArray:
        feeds = dict(zip(names, (part.numpy() for part in padded(some)), strict=True))
        return np.asarray(session.run(["logits"], feeds)[0], dtype=np.float64)

    alone = np.concatenate([run([window]) for window in windows()])
    assert np.abs(run(windows()) - alone).max() <= 1e-4


def test_int8_stays_near_fp32(graphs: tuple[Any, Path, Path]) -> None:
    """Largest error of a score 0.10 (an untrained head; the manifest has the trained one's)."""
    from export import parity

    assert parity.int8_loss(graphs[1], graphs[2], windows()).largest <= 0.10


def test_every_attention_of_our_own_is_fused_for_cuda(
    graphs: tuple[Any, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six of six, counted; fp16 within 0.02 of torch's logits, on the CPU that is here."""
    from export import __main__ as command
    from export import parity

    monkeypatch.setattr(command, "load", lambda _: graphs[0])
    found = command._for_cuda(tmp_path, tmp_path, windows())
    assert found["attentions_fused"] == "6 of 6"
    assert float(found["fp16_largest_logit_error"]) <= parity.FP16_TOLERANCE
    assert (tmp_path / "model.fp16.onnx").stat().st_size < 50_000_000
