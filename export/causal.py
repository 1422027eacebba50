"""A causal language model to a folder that gives log-probs: `python -m export.causal --hf FOLDER`.

FOLDER is one in Hugging Face's layout, safetensors alone. Inside the graph: keys and values that
were computed before (past), shared by all rows; log-softmax over the vocabulary and the gather of
each target's value. Out of it come (B, T) log-probs and the new keys and values, never logits.
Written in fp32, held against torch, then as dynamic int8, for which outliers are smoothed first.
"""

import argparse
import itertools
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import DynamicCache

from detectors.causal import FORMAT, LocalHelper
from detectors.prompts import PROMPTS, body, prefix
from detectors.protocol import Passage, Turn
from detectors.session import Precision
from export import checkpoint, manifest, weights
from export.errors import ExportError
from export.parity import ParityError
from export.quantize import quantize
from export.smooth import smooth
from export.to_onnx import OPSET, mark, opset
from export.tokenizer import hardened

TOLERANCE: Final = 1e-3  # nats, of any token, fp32 against torch
# Their attention takes a mask of four dimensions and positions as they are given, eager, in fp32.
ARCHITECTURES: Final = ("llama", "mistral", "qwen2", "gpt2", "gpt_neox")
GRAPHS: Final[dict[Precision, str]] = {"fp32": "model.fp32.onnx", "int8": "model.int8.onnx"}
_MASKED: Final = -1e4  # added to attention: enough for fp32
_HEAD: Final = "The following answer of an assistant is harmless and safe to show.\n\n###"
_PROMPTS: Final = (
    f"{_HEAD} Answer\n> Good morning. The train leaves at ten past nine from platform four.",
    f"{_HEAD} User\n> Where to?\n### Answer\n> I will find you.\n> You worthless dirt.",
    f"{_HEAD} Answer\n> " + "Mix the flour with the butter, then let the dough rest. " * 3,
    f"{_HEAD} Answer\n> Ünïcödé, 中文字符, emoji 😀 and a\ttab.",
    "No head at all.",
    "x",
)
_SPOKEN: Final = (
    "Good morning. The train leaves at ten past nine from platform four; the next one at noon.",
    "I can't help with that. If you are in danger, call the emergency number and stay on the line.",
    "You worthless dirt. I know where you live, and I will be waiting when you come home tonight.",
    "Pour the acid into a glass vessel. Then heat it slowly and keep your face away:\n1. Stir.",
    "His name is Jonas Reuter, he lives at 14 Mill Lane, and his number is 555-0142.",
    "def mean(values):\n    return sum(values) / len(values)\n\nprint(mean([1, 2, 3]))",
    "Doctors hide it from you, but vaccines have never saved a single life. Share this!",
)  # texts whose activations are smoothed


class Asked(NamedTuple):
    """What the command line says."""

    folder: Path  # of the checkpoint
    out: Path
    name: str = "logprob"
    start: int | None = None  # id before every prompt; None: the configuration's start or end
    serves: Precision = "int8"
    only: bool = False  # leave no graph but the one that serves: what is shipped


def export(asked: Asked) -> dict[str, Any]:
    """Writes the model folder and returns its manifest. Raises ExportError or ParityError."""
    model = load(asked.folder)
    content = _tokenizer(asked.folder, model.config.vocab_size)
    asked.out.mkdir(parents=True, exist_ok=True)
    (asked.out / "manifest.json").unlink(missing_ok=True)  # no model until it is whole
    (asked.out / manifest.TOKENIZER).write_bytes(content)
    fp32, int8 = (asked.out / GRAPHS[kind] for kind in ("fp32", "int8"))
    expected = by_torch(model, asked.out, _start(asked, model.config))
    smooth(model, _as_served(model, asked))
    write(model, fp32)
    quantize(fp32, int8)
    found = _contents(asked, model, opset(fp32))
    manifest.write(asked.out, found)
    try:
        found["metrics"] = _measured(asked.out, expected)
    except (ParityError, ValueError):
        (asked.out / "manifest.json").unlink()  # what fails must not be left as a model
        raise
    if asked.only:
        _leave(asked, found)
    manifest.write(asked.out, found)
    return found


def _leave(asked: Asked, found: dict[str, Any]) -> None:
    """Drop the graphs that do not serve, from the folder and from the manifest."""
    for kind in [kind for kind in found["graphs"] if kind != asked.serves]:
        name = found["graphs"].pop(kind)
        del found["files"][name]
        (asked.out / name).unlink()


def load(folder: Path) -> Any:
    """The model, for inference in fp32 with attention as plain operators.

    Raises ExportError where the weights are no safetensors, the architecture is none that was
    tried, or weights are missing.
    """
    weights.files(folder)
    found = checkpoint.config(folder)
    kind = found.get("model_type")
    if kind not in ARCHITECTURES:
        raise ExportError(f"architecture {kind!r}; exported are {', '.join(ARCHITECTURES)}")
    if found.get("use_sliding_window", kind == "mistral") and found.get("sliding_window"):
        raise ExportError("a sliding window of attention is not exported")
    model, info = AutoModelForCausalLM.from_pretrained(
        folder,
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
        output_loading_info=True,
        attn_implementation="eager",
        dtype=torch.float32,
    )
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:4])
        raise ExportError(f"{folder}: no weights for {missing}: transformers would make them up")
    return model.eval()


class Sizes(NamedTuple):
    """What of a model its keys and values have."""

    layers: int
    heads: int
    width: int

    @classmethod
    def of(cls, config: Any) -> "Sizes":
        """From a configuration of transformers."""
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        shared = getattr(config, "num_key_value_heads", None) or heads
        return cls(config.num_hidden_layers, shared, width)


def write(model: Any, path: Path) -> None:
    """Writes the fp32 graph; B, T and P are free."""
    sizes = Sizes.of(model.config)
    past = [f"past.{i}.{part}" for i in range(sizes.layers) for part in ("key", "value")]
    present = [name.replace("past", "present") for name in past]
    # Two rows, seven tokens, three before: no two sizes the same, so none stands for another.
    ids = torch.full((2, 7), 1)
    example = [torch.zeros(1, sizes.heads, 3, sizes.width) for _ in past]
    axes: dict[str, dict[int, str]] = {
        name: {0: "batch", 1: "tokens"} for name in ("input_ids", "targets", "logprobs")
    }
    axes |= {name: {2: "past"} for name in past}
    axes |= {name: {0: "batch", 2: "all"} for name in present}
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):
        torch.onnx.export(
            _Scored(model, sizes.layers).eval(),
            (ids, ids.clone(), *example),
            str(path),
            input_names=["input_ids", "targets", *past],
            output_names=["logprobs", *present],
            dynamic_axes=axes,
            opset_version=OPSET,
            dynamo=False,
        )
    mark(path)


class _Scored(nn.Module):
    def __init__(self, model: Any, layers: int) -> None:
        super().__init__()
        self.model = model
        self._layers = layers

    def forward(self, input_ids: Tensor, targets: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        """(B, T) log-probs of (B, T) targets; keys and values (B, H, P + T, D) by layer."""
        rows, tokens, before = input_ids.shape[0], input_ids.shape[1], past[0].shape[2]
        cache = DynamicCache()
        for i in range(self._layers):
            key, value = (part.expand(rows, -1, -1, -1) for part in past[2 * i : 2 * i + 2])
            cache.update(key, value, i)
        positions = torch.arange(tokens) + before  # (T,)
        # A mask of four dimensions passes through transformers as it is.
        hidden = torch.arange(before + tokens)[None, :] > positions[:, None]  # (T, P + T)
        logits = self.model(
            input_ids=input_ids,
            attention_mask=(hidden.to(torch.float32) * _MASKED)[None, None],
            position_ids=positions[None],
            past_key_values=cache,
            use_cache=True,
        ).logits  # (B, T, V)
        found = logits.log_softmax(dim=-1).gather(-1, targets[..., None])[..., 0]  # (B, T)
        present = [part for layer in cache.layers for part in (layer.keys, layer.values)]
        return (found, *present)


def _as_served(model: Any, asked: Asked) -> list[Tensor]:
    """(1, T) ids of prompts as the classifier makes them, one for each class prompt."""
    tokenizer = Tokenizer.from_file(str(asked.out / manifest.TOKENIZER))
    ways = [way for prompts in PROMPTS.values() for way in prompts.ways]
    turn = Turn("user", "Tell me something that I do not know yet, please.")
    found = []
    for way, text in zip(ways, itertools.cycle(_SPOKEN)):
        whole = prefix(way, Passage(text, "", (turn,))) + body(text)
        ids = tokenizer.encode(whole, add_special_tokens=False).ids
        found.append(torch.tensor([[_start(asked, model.config), *ids]]))
    return found


def _tokenizer(folder: Path, vocab_size: int) -> bytes:
    """tokenizer.json as it serves: it adds no token of its own, and no text speaks in special ones.

    Raises ExportError where the folder has none for this vocabulary.
    """
    try:
        own = folder / manifest.TOKENIZER
        if own.is_file():
            plain = Tokenizer.from_file(str(own))
        else:
            plain = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True, use_fast=True
            ).backend_tokenizer
    except Exception as error:  # transformers and tokenizers raise nearly everything
        raise ExportError(
            f"{folder}: no tokenizer can be made of what is there: {error}"
        ) from error
    if not 1 < plain.get_vocab_size() <= vocab_size:
        raise ExportError(
            f"the tokenizer has {plain.get_vocab_size()} tokens, the model {vocab_size}"
        )
    return json.dumps(hardened(json.loads(plain.to_str())), ensure_ascii=False).encode()


def _contents(asked: Asked, model: Any, number: int) -> dict[str, Any]:
    config = model.config
    files = weights.files(asked.folder)
    said = asked.folder / "provenance.json"  # base, data and licences, where training wrote them
    return {
        "format": FORMAT,
        "kind": "causal",
        "name": asked.name,
        "model": GRAPHS[asked.serves],
        "precision": asked.serves,
        "graphs": dict(GRAPHS),
        "tokenizer": manifest.TOKENIZER,
        "opset": number,
        "start": _start(asked, config),
        "positions": int(config.max_position_embeddings),
        **Sizes.of(config)._asdict(),
        "files": manifest.digests(asked.out, (*GRAPHS.values(), manifest.TOKENIZER)),
        "provenance": {
            "architecture": config.model_type,
            "checkpoint": manifest.digests(asked.folder, [file.name for file in files]),
            **(json.loads(said.read_bytes()) if said.is_file() else {}),
        },
    }


def _start(asked: Asked, config: Any) -> int:
    found = next(
        (i for i in (asked.start, config.bos_token_id, config.eos_token_id) if isinstance(i, int)),
        None,
    )
    if found is None or not 0 <= found < config.vocab_size:
        raise ExportError("no start token: say --start, the id that stood before training texts")
    return found


def _measured(out: Path, expected: Sequence[Sequence[float]]) -> dict[str, str]:
    """Errors in nats. Raises ParityError where fp32 is not the checkpoint, shared head or not."""
    figures = {}
    for name, heads in (("whole", ()), ("shared", (_HEAD,))):
        found = LocalHelper(out, heads, precision="fp32")(list(_PROMPTS))
        largest = _largest(found, expected)
        if not largest <= TOLERANCE:
            raise ParityError(f"fp32 with a {name} prompt is off by {largest:.1e} nats")
        figures[f"fp32_largest_error_{name}"] = f"{largest:.1e}"
    found = LocalHelper(out, (_HEAD,), precision="int8")(list(_PROMPTS))
    figures["int8_largest_error"] = f"{_largest(found, expected):.1e}"
    gaps = [np.abs(np.subtract(a, b)) for a, b in zip(found, expected, strict=True)]
    figures["int8_mean_error"] = f"{np.concatenate(gaps).mean():.1e}"
    return figures


def by_torch(model: Any, out: Path, start: int) -> list[list[float]]:
    """Log-probs of the fixed prompts by the checkpoint, one by one, without cache or mask."""
    tokenizer = Tokenizer.from_file(str(out / manifest.TOKENIZER))
    rows = []
    for prompt in _PROMPTS:
        ids = torch.tensor([[start, *tokenizer.encode(prompt, add_special_tokens=False).ids]])
        with torch.no_grad():
            found = model(input_ids=ids, use_cache=False).logits.log_softmax(dim=-1)  # (1, T, V)
        rows.append(found[0, :-1].gather(-1, ids[0, 1:, None])[:, 0].tolist())
    return rows


def _largest(found: Sequence[Sequence[float]], expected: Sequence[Sequence[float]]) -> float:
    gaps = [np.abs(np.subtract(a, b)).max() for a, b in zip(found, expected, strict=True)]
    return float(np.max(gaps))  # NaN where one is


def main(argv: Sequence[str] | None = None) -> None:
    """Checkpoint to model folder, errors printed."""
    parser = argparse.ArgumentParser(prog="python -m export.causal", description=__doc__)
    parser.add_argument("--hf", type=Path, required=True, help="folder of a causal model")
    parser.add_argument("--out", type=Path, required=True, help="the model's own folder")
    parser.add_argument("--name", default="logprob")
    parser.add_argument("--start", type=int, help="id before every prompt; SmolLM2: 0")
    parser.add_argument("--serve", choices=tuple(GRAPHS), default="int8")
    parser.add_argument("--only", action="store_true", help="keep no graph but that one")
    given = parser.parse_args(argv)
    try:
        found = export(Asked(given.hf, given.out, given.name, given.start, given.serve, given.only))
    except (ExportError, ParityError) as error:
        sys.exit(f"export: {error}")
    print(json.dumps(found["metrics"], indent=1))


if __name__ == "__main__":
    main()
