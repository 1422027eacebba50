"""Causal checkpoints, tiny and untrained, as folders on disk.

`.venv-train/bin/python -m tests.models.tiny_causal` makes tests/models/causal: a model folder for
the tests that have no torch.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

KINDS = ("llama", "mistral", "qwen2", "gpt2", "gpt_neox")
SERVED = Path(__file__).parent / "causal"
START = "<|endoftext|>"
_MERGES = [("t", "h"), ("th", "e"), ("i", "n"), ("Ġ", "the"), ("e", "r"), ("o", "u"), ("#", "#"),
           ("##", "#"), ("Ġ", "a"), ("Ċ", "Ċ")]  # fmt: skip


def tokenizer(folder: Path) -> int:
    """Writes a byte-level tokenizer with GPT-2's way of cutting words; returns its tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocab = [START, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in _MERGES)]
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(vocab)}, _MERGES))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(START, special=True)])
    made.save(str(folder / "tokenizer.json"))
    return len(vocab)


def checkpoint(kind: str, folder: Path, **changes: Any) -> Path:
    """Writes an untrained model of this kind and returns its folder."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {
        "vocab_size": tokenizer(folder),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    if kind in ("llama", "mistral", "qwen2"):
        settings["num_key_value_heads"] = 2
    if kind == "mistral":
        settings["sliding_window"] = None  # as from version 0.2 on
    config = AutoConfig.for_model(kind, **(settings | changes))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        # As initialised, all tokens are about as likely and every parity holds; norms stay near 1.
        if parameter.dim() > 1 and "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


def make(out: Path) -> None:
    """Two layers of 16, 266 tokens, 512 positions: both graphs in less than 200 kB."""
    from export.causal import Asked, export

    with tempfile.TemporaryDirectory() as work:
        folder = checkpoint(
            "llama", Path(work), hidden_size=16, intermediate_size=16, num_attention_heads=2,
            num_key_value_heads=1,
        )  # fmt: skip
        print(json.dumps(export(Asked(folder, out, serves="fp32"))["metrics"]))  # noqa: T201


if __name__ == "__main__":
    make(SERVED)
