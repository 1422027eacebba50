"""A folder in Hugging Face's layout to a sequence-classification model: safetensors, no code."""

import json
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoModelForSequenceClassification

from export import weights
from export.errors import ExportError

ARCHITECTURES: Final = (
    "bert", "distilbert", "roberta", "xlm-roberta", "deberta", "deberta-v2", "mpnet",
)  # fmt: skip


def load(folder: Path) -> Any:
    """The model, for inference in fp32 with attention as plain operators.

    Raises ExportError where the weights are no safetensors, the architecture is none that was
    tried, or there is no trained head.
    """
    weights.files(folder)
    _check_config(config(folder))
    model, info = AutoModelForSequenceClassification.from_pretrained(
        folder,
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
        output_loading_info=True,
        attn_implementation="eager",
        dtype=torch.float32,
    )
    missing = sorted(info["missing_keys"])
    if missing:
        raise ExportError(
            f"{folder}: no weights for {', '.join(missing[:4])}: transformers would make them up. "
            "Export a checkpoint that was trained to classify sequences"
        )
    return model.eval()


def config(folder: Path) -> dict[str, Any]:
    """config.json. Raises ExportError where it cannot be read."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExportError(f"{folder}: config.json cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ExportError(f"{folder}: config.json is no object")
    return found


def _check_config(found: dict[str, Any]) -> None:
    kind = found.get("model_type")
    if kind not in ARCHITECTURES:
        raise ExportError(f"architecture {kind!r}; exported are {', '.join(ARCHITECTURES)}")
    if found.get("is_decoder"):
        raise ExportError("is_decoder is set: it attends to the left alone, which is not exported")


def names(model: Any) -> tuple[str, ...]:
    """The labels in the order of the logits."""
    by_id = model.config.id2label
    return tuple(str(by_id[i]) for i in range(model.config.num_labels))


def positions(model: Any) -> int:
    """How many tokens the model has positions for."""
    most = int(model.config.max_position_embeddings)
    # These count positions from behind the padding token's id.
    shifted = model.config.model_type in ("roberta", "xlm-roberta", "mpnet")
    behind = model.config.pad_token_id if model.config.model_type != "mpnet" else 1
    return most - (int(behind) + 1 if shifted else 0)
