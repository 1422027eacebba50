"""The classifier: an encoder, its first token, seven logits."""

import json
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

from detectors.harms import COLUMNS
from training import base

_DROPOUT = 0.1


class Judge(nn.Module):
    """(B, T) token ids to (B, 7) logits, columns as in harms.COLUMNS."""

    def __init__(self, encoder: PreTrainedModel) -> None:
        super().__init__()
        self.encoder = encoder
        self.has_types = hasattr(encoder.embeddings, "token_type_embeddings")
        self.dropout = nn.Dropout(_DROPOUT)
        self.head = nn.Linear(encoder.config.hidden_size, len(COLUMNS))

    def forward(self, input_ids: Tensor, token_type_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """All arguments (B, T) int64; the mask is 1 at tokens. Returns (B, 7) float32."""
        types = {"token_type_ids": token_type_ids} if self.has_types else {}
        hidden = self.encoder(
            input_ids=input_ids, attention_mask=attention_mask, **types
        ).last_hidden_state  # (B, T, H)
        logits: Tensor = self.head(self.dropout(hidden[:, 0]))  # (B, 7)
        return logits


def fresh(name: str = "minilm", layers: int = 0) -> Judge:
    """A base encoder (a key of base.BASES) with an untrained head.

    layers: the first so many are kept, 0 = all. Of a deep encoder the last ones are the easiest to
    do without once it is fine-tuned (Sajjad et al. 2020, arXiv:2004.03844).
    """
    encoder = _encoder(base.folder(name))
    if layers:
        encoder.encoder.layer = encoder.encoder.layer[:layers]
        encoder.config.num_hidden_layers = layers
    return Judge(encoder)


def load(checkpoint: Path) -> Judge:
    """The weights of a checkpoint's model.pt, for inference."""
    settings = json.loads((checkpoint / "settings.json").read_text())
    judge = fresh(settings.get("base", "minilm"), settings.get("layers", 0))
    judge.load_state_dict(torch.load(checkpoint / "model.pt", weights_only=True))
    return judge.eval()


def _encoder(folder: Path) -> PreTrainedModel:
    # Eager attention without dropout: 3,750 tokens/s in training on 2 cores with AMX, against
    # 2,300 with torch's fused attention and dropout (its backward pass on CPU takes half).
    encoder: PreTrainedModel = AutoModel.from_pretrained(
        folder,
        add_pooling_layer=False,
        attn_implementation="eager",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return encoder
