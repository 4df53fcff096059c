"""Attention of few queries over many slots, registered with transformers under the name "foretoken".

torch's kernel for a single query row on a processor is three times slower than for two, and transformers copies grouped
keys and values to every query head; here the query heads of a group are rows of one product, and a lone row is doubled.
"""

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "foretoken"


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """[B, N, H, D] attention of query [B, H, N, D] to key, value [B, K, S, D] under an additive mask [B, 1, N, S].

    What has no such mask (a prompt's first chunk, transformers' own use of the model) or has a bias or dropout of its
    own goes to transformers' function unchanged.
    """
    special = any(kwargs.get(name) is not None for name in ("position_bias", "softcap", "cache", "s_aux"))
    if attention_mask is None or special or kwargs.get("dropout"):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    B, H, N, D = query.shape
    groups = H // key.shape[1]
    rows, mask = query.reshape(B, key.shape[1], groups * N, D), attention_mask[..., : key.shape[2]]
    if groups > 1:
        mask = mask.repeat(1, 1, groups, 1)
    if groups * N == 1:
        rows = rows.expand(-1, -1, 2, -1)
    out = nn.functional.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scaling)
    return out[:, :, : groups * N].reshape(B, H, N, -1).transpose(1, 2).contiguous(), None


def adopt(model: PreTrainedModel) -> None:
    """Let a model that would use torch's attention through transformers' registry use ours."""
    if model._supports_attention_backend and model.config._attn_implementation == "sdpa":  # pyright: ignore[reportPrivateUsage]
        model.set_attn_implementation(NAME)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
