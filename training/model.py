"""The classifier: an encoder, its first token, seven logits."""

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
        self.dropout = nn.Dropout(_DROPOUT)
        self.head = nn.Linear(encoder.config.hidden_size, len(COLUMNS))

    def forward(self, input_ids: Tensor, token_type_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """All arguments (B, T) int64; the mask is 1 at tokens. Returns (B, 7) float32."""
        hidden = self.encoder(
            input_ids=input_ids, token_type_ids=token_type_ids, attention_mask=attention_mask
        ).last_hidden_state  # (B, T, H)
        logits: Tensor = self.head(self.dropout(hidden[:, 0]))  # (B, 7)
        return logits


def fresh() -> Judge:
    """The base encoder with an untrained head."""
    return Judge(_encoder(base.folder()))


def load(checkpoint: Path) -> Judge:
    """The weights of a checkpoint's model.pt, for inference."""
    judge = fresh()
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
