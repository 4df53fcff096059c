"""Attention of few queries over many slots, registered with transformers under the name "foretoken".

torch's kernel for a single query row on a processor is three times slower than for two, and transformers copies grouped
keys and values to every query head; here the query heads of a group are rows of one product, and a lone row is doubled.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from foretoken.errors import UserError

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
    if attention_mask is not None and attention_mask.dtype == torch.int64:
        return planned(query, key, value, attention_mask, scaling, **kwargs), None
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


def planned(query: Tensor, key: Tensor, value: Tensor, plan: Tensor, scaling: float | None, **kwargs: Any) -> Tensor:
    """[B, N, H, E] attention to slots by a plan (`planned.PlannedCache`), which `cpu/kernels.cpp` reads."""
    if kwargs.get("position_bias") is not None:
        raise UserError("Attention with a bias of its own cannot be compiled; decode this model without compiling.")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    cap = float(kwargs.get("softcap") or 0.0)
    return torch.ops.foretoken.attend(query, key, value, plan, scale, cap, kwargs.get("s_aux"))


def adopt(model: PreTrainedModel) -> None:
    """Let a model that would use torch's attention through transformers' registry use ours."""
    if model._supports_attention_backend and model.config._attn_implementation == "sdpa":  # pyright: ignore[reportPrivateUsage]
        model.set_attn_implementation(NAME)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
