"""Moves outliers from activations into weights, so that int8 loses less; the function stays.

Dynamic int8 gives all the values that go into a layer one scale, and a language model has a few
channels a hundred times as large as the others. Each channel is divided by a factor where it is
made (a norm's weight, the up projection) and its column multiplied by it where it is used:
SmoothQuant (Xiao et al. 2022, 2211.10438, equation 4),

    factor = max |activation| ** strength / max |weight| ** (1 - strength)
"""

from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

STRENGTH: Final = 0.7  # of 0.5, 0.7, 0.8 and 0.9 the least error on a pruned SmolLM2
_LEAST: Final = 1e-5  # of a maximum: channels that are never used keep their scale, nearly


class _Seam(NamedTuple):
    """Where channels are made, and the layers that read them."""

    maker: Tensor  # weights whose first axis is the channels
    readers: tuple[nn.Linear, ...]  # their weights' second axis is the channels


def smooth(model: Any, batches: Sequence[Tensor]) -> bool:
    """Changes the model in place; whether it is laid out as Llama is, others are left alone.

    batches: (B, T) token ids of texts as they will be served; the largest activations count.
    """
    seams = list(_seams(model)) if _known(model) else []
    largest = _largest([seam.readers[0] for seam in seams], model, batches)
    with torch.no_grad():
        for seam in seams:
            weights = torch.stack([reader.weight.abs().amax(dim=0) for reader in seam.readers])
            factor = _factor(largest[seam.readers[0]], weights.amax(dim=0))
            seam.maker.div_(factor.reshape(-1, *[1] * (seam.maker.dim() - 1)))
            for reader in seam.readers:
                reader.weight.mul_(factor)
    return bool(seams)


def _known(model: Any) -> bool:
    block = getattr(getattr(model, "model", None), "layers", [None])[0]
    up = getattr(getattr(block, "mlp", None), "up_proj", None)
    return up is not None and up.bias is None


def _seams(model: Any) -> Iterator[_Seam]:
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        into = (attention.q_proj, attention.k_proj, attention.v_proj)
        yield _Seam(block.input_layernorm.weight, into)
        yield _Seam(block.post_attention_layernorm.weight, (mlp.gate_proj, mlp.up_proj))
        yield _Seam(mlp.up_proj.weight, (mlp.down_proj,))
    if model.lm_head.weight is model.model.embed_tokens.weight:  # what is looked up stays as it is
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
        model.config.tie_word_embeddings = False
    yield _Seam(model.model.norm.weight, (model.lm_head,))


def _largest(
    layers: Sequence[nn.Linear], model: Any, batches: Sequence[Tensor]
) -> dict[nn.Linear, Tensor]:
    """(channels,) largest absolute value that came into each layer."""
    found: dict[nn.Linear, Tensor] = {}

    def note(layer: nn.Linear, given: tuple[Tensor, ...]) -> None:
        here = given[0].abs().flatten(0, -2).amax(dim=0)
        found[layer] = torch.maximum(found.get(layer, here), here)

    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    with torch.no_grad():
        for ids in batches:
            model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def _factor(activations: Tensor, weights: Tensor) -> Tensor:
    wanted = activations.clamp(min=_LEAST) ** STRENGTH / weights.clamp(min=_LEAST) ** (1 - STRENGTH)
    factor: Tensor = wanted / wanted.log().mean().exp()  # 1 on average: nothing drifts
    return factor
