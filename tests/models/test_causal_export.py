"""Causal checkpoints from a folder to log-probs, against torch: needs the train extra."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detectors.causal import LocalHelper
from detectors.session import ModelError
from tests.models.tiny_causal import KINDS, checkpoint

pytestmark = pytest.mark.train


@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture_gives_the_log_probs_of_torch(kind: str, tmp_path: Path) -> None:
    """fp32 within 1e-3 nats, whole prompts and shared heads, batched; int8 is written too."""
    from export import causal

    folder, out = checkpoint(kind, tmp_path / kind), tmp_path / "out"
    manifest = causal.export(causal.Asked(folder, out, serves="fp32"))
    model = causal.load(folder)
    expected = causal.by_torch(model, out, manifest["start"])
    for heads in ((), (causal._HEAD,)):
        found = LocalHelper(out, heads, max_batch_tokens=2000)(list(causal._PROMPTS))
        assert causal._largest(found, expected) <= causal.TOLERANCE
    assert float(manifest["metrics"]["int8_largest_error"]) < 3.0
    assert min(min(row) for row in expected) < -5  # not all alike, or anything would pass


def test_another_checkpoint_is_caught(tmp_path: Path) -> None:
    """The check has teeth: against a model with other weights the export is refused."""
    import torch

    from export import causal
    from export.parity import ParityError

    folder, out = checkpoint("llama", tmp_path / "llama"), tmp_path / "out"
    causal.export(causal.Asked(folder, out))
    other = causal.load(folder)
    with torch.no_grad():
        other.lm_head.weight *= 1.01
    with pytest.raises(ParityError, match="is off by"):
        causal._measured(out, causal.by_torch(other, out, 0))


@pytest.mark.parametrize("kind", KINDS)
def test_smoothing_changes_no_log_prob(kind: str, tmp_path: Path) -> None:
    """Outliers move into the weights: the same function, smaller activations, where Llama's layout
    is known; elsewhere nothing happens."""
    import torch

    from export import causal
    from export.smooth import smooth

    model = causal.load(checkpoint(kind, tmp_path / kind))
    ids = torch.arange(3, 43)[None]
    into: list[float] = []
    with torch.no_grad():
        if kind in {"llama", "mistral", "qwen2"}:  # one channel a hundred times as large
            model.model.layers[0].post_attention_layernorm.weight[5] *= 100
            layer = model.model.layers[0].mlp.gate_proj
            layer.register_forward_pre_hook(
                lambda _, given: into.append(float(given[0].abs().max()))
            )
        before = model(input_ids=ids).logits.log_softmax(-1)
        changed = smooth(model, [ids])
        after = model(input_ids=ids).logits.log_softmax(-1)
    assert torch.allclose(before, after, atol=1e-4)
    assert changed == (kind in {"llama", "mistral", "qwen2"})
    if changed:
        assert into[-1] < into[0] / 5


def test_no_vocabulary_leaves_the_graph(tmp_path: Path) -> None:
    """Outputs are (B, T) log-probs and keys and values: no axis has the vocabulary's size."""
    import onnx

    from export import causal

    folder, out = checkpoint("llama", tmp_path / "llama"), tmp_path / "out"
    causal.export(causal.Asked(folder, out))
    for name in causal.GRAPHS.values():
        graph = onnx.load(str(out / name)).graph
        assert graph.output[0].name == "logprobs"
        sizes = [d.dim_value for part in graph.output for d in part.type.tensor_type.shape.dim]
        assert 266 not in sizes


def changed(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_only_the_graph_that_serves_is_left(tmp_path: Path) -> None:
    """It serves as before; another precision is refused, not looked for."""
    from export import causal

    folder, out = checkpoint("llama", tmp_path / "llama"), tmp_path / "out"
    whole = causal.export(causal.Asked(folder, tmp_path / "whole"))
    found = causal.export(causal.Asked(folder, out, only=True))
    assert {path.name for path in out.iterdir()} == {
        "manifest.json", "model.int8.onnx", "tokenizer.json"
    }  # fmt: skip
    assert {*whole["files"]} - {*found["files"]} == {"model.fp32.onnx"}
    assert LocalHelper(out)(["A text."]) == LocalHelper(tmp_path / "whole")(["A text."])
    with pytest.raises(ModelError, match="no fp32 graph"):
        LocalHelper(out, precision="fp32")


def test_what_is_not_exported_says_so(tmp_path: Path) -> None:
    """A pickle, an architecture that was not tried, a sliding window, missing weights, no start."""
    from safetensors.numpy import load_file, save_file

    from export import causal
    from export.errors import ExportError

    folder = checkpoint("llama", tmp_path / "llama")

    def refused(says: str, **changes: Any) -> None:
        original = (folder / "config.json").read_text()
        with pytest.raises(ExportError, match=says):
            causal.export(causal.Asked(changed(folder, **changes), tmp_path / "out"))
        (folder / "config.json").write_text(original)
        assert not (tmp_path / "out" / "manifest.json").exists()

    refused("architecture 'mamba'", model_type="mamba")
    refused("sliding window", model_type="mistral", sliding_window=64)
    refused("no start token", bos_token_id=None, eos_token_id=None)
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    refused(r"no weights for model\.norm\.weight")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused("pickle")


def test_padding_and_neighbours_move_nothing(tmp_path: Path) -> None:
    """A row among longer ones: within 1e-4 of the row alone, fp32."""
    from export import causal

    folder, out = checkpoint("gpt2", tmp_path / "gpt2"), tmp_path / "out"
    causal.export(causal.Asked(folder, out, serves="fp32"))
    helper = LocalHelper(out, max_batch_tokens=2000)
    prompts = list(causal._PROMPTS)
    for row, prompt in zip(helper(prompts), prompts, strict=True):
        assert np.abs(np.subtract(row, helper([prompt])[0])).max() <= 1e-4
