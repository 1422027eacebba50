"""Checkpoints of the architectures that are exported, tiny and untrained, as folders on disk.

Hidden size 32, two layers, two heads. Each folder has the tokenizer files that its architecture has
had for years: a vocabulary, merges or a sentencepiece model, and no tokenizer.json.
"""

import json
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

PAIRED = ("th", "the", "in", "an", "er", "kill", "you")
LETTERS = string.ascii_lowercase + string.digits + string.punctuation
KINDS = ("bert", "distilbert", "roberta", "xlm-roberta", "deberta", "deberta-v2", "mpnet")

_SENTENCES = [
    "The train leaves at ten past nine from platform four.",
    "I will find you and hurt you.",
    "Where does the train to the coast leave, and when?",
    f"All of it: {string.ascii_letters} {string.digits} {string.punctuation}",
    "First, check whether the patient is breathing. Then call for help.",
]


def checkpoint(kind: str, folder: Path, labels: Sequence[str], **changes: Any) -> Path:
    """Writes an untrained classifier of this kind and returns its folder."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    folder.mkdir(parents=True, exist_ok=True)
    vocab_size, special = _TOKENIZERS[kind](folder)
    settings: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "id2label": dict(enumerate(labels)),
        "label2id": {label: i for i, label in enumerate(labels)},
    }
    settings |= special | _EXTRA.get(kind, {}) | changes
    config = AutoConfig.for_model(kind, **settings)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config)
    for name, parameter in model.named_parameters():
        # As initialised, all logits are nearly 0 and every parity holds; norms stay near 1.
        if parameter.dim() > 1 and "LayerNorm" not in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


def _word_pieces(folder: Path, specials: Sequence[str]) -> int:
    words = [*LETTERS, *(f"##{char}" for char in LETTERS), *PAIRED, *(f"##{p}" for p in PAIRED)]
    vocab = [*specials, *words]
    (folder / "vocab.txt").write_text("\n".join(vocab) + "\n")
    return len(vocab)


def _bert(folder: Path) -> tuple[int, dict[str, int]]:
    size = _word_pieces(folder, ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"))
    _config(folder, "BertTokenizer")
    return size, {"pad_token_id": 0}


def _distilbert(folder: Path) -> tuple[int, dict[str, int]]:
    found = _bert(folder)
    _config(folder, "DistilBertTokenizer")
    return found


def _mpnet(folder: Path) -> tuple[int, dict[str, int]]:
    size = _word_pieces(folder, ("<s>", "<pad>", "</s>", "[UNK]", "<mask>"))
    _config(folder, "MPNetTokenizer")
    return size, {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}


def _bytes(folder: Path, specials: Sequence[str]) -> int:
    from tokenizers.pre_tokenizers import ByteLevel

    merges = [("t", "h"), ("th", "e"), ("i", "n"), ("Ġ", "the"), ("y", "o"), ("yo", "u")]
    vocab = [*specials, *sorted(ByteLevel.alphabet()), *(a + b for a, b in merges)]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocab)}))
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    return len(vocab)


def _roberta(folder: Path) -> tuple[int, dict[str, int]]:
    size = _bytes(folder, ("<s>", "<pad>", "</s>", "<unk>", "<mask>"))
    _config(folder, "RobertaTokenizer")
    return size, {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}


def _deberta(folder: Path) -> tuple[int, dict[str, int]]:
    size = _bytes(folder, ("[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"))
    _config(folder, "DebertaTokenizer")
    return size, {"pad_token_id": 0}


def _pieces(prefix: Path, **ids: Any) -> None:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_SENTENCES * 20), model_prefix=str(prefix), vocab_size=110,
        character_coverage=1.0, minloglevel=2, **ids,
    )  # fmt: skip


def _xlm_roberta(folder: Path) -> tuple[int, dict[str, int]]:
    # As its authors made it: ids of the pieces are shifted by one on the way to the model's.
    _pieces(folder / "spm", unk_id=0, bos_id=1, eos_id=2, pad_id=-1)
    (folder / "spm.model").rename(folder / "sentencepiece.bpe.model")
    _config(folder, "XLMRobertaTokenizer")
    return 112, {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}


def _deberta_v2(folder: Path) -> tuple[int, dict[str, int]]:
    _pieces(folder / "spm", pad_id=0, bos_id=1, eos_id=2, unk_id=3,
            bos_piece="[CLS]", eos_piece="[SEP]", pad_piece="[PAD]", unk_piece="[UNK]")  # fmt: skip
    _config(folder, "DebertaV2Tokenizer")
    return 111, {"pad_token_id": 0}


def _config(folder: Path, tokenizer: str) -> None:
    content = {"tokenizer_class": tokenizer, "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps(content))


_TOKENIZERS: dict[str, Callable[[Path], tuple[int, dict[str, int]]]] = {
    "bert": _bert,
    "distilbert": _distilbert,
    "roberta": _roberta,
    "xlm-roberta": _xlm_roberta,
    "deberta": _deberta,
    "deberta-v2": _deberta_v2,
    "mpnet": _mpnet,
}
_RELATIVE: dict[str, Any] = {
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "max_relative_positions": -1,
    "type_vocab_size": 0,
}
_EXTRA: dict[str, dict[str, Any]] = {
    "distilbert": {"hidden_dim": 64},
    "roberta": {"max_position_embeddings": 514, "type_vocab_size": 1},
    "xlm-roberta": {"max_position_embeddings": 514, "type_vocab_size": 1},
    "mpnet": {"max_position_embeddings": 514},
    "deberta": _RELATIVE,
    # As DeBERTa-v3: one projection for contents and positions, positions in buckets.
    "deberta-v2": {**_RELATIVE, "position_buckets": 64, "share_att_key": True,
                   "norm_rel_ebd": "layer_norm"},
}  # fmt: skip
