"""Layers of a drafter's own, run in the frame of the target: its rotary positions, masks and calling conventions.

The frame is a shallow copy of the target's decoder in which the blocks are replaced and the final norm is left out; it
reads hidden states where the decoder reads embeddings. So any model family lends its layers, and none is copied.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from foretoken.cache import SlotCache
from foretoken.errors import UserError
from foretoken.target import Target

NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f")
"""What transformers calls the norm between the last block and the output head."""


def blocks_of(target: Target) -> tuple[str, nn.ModuleList]:
    """The decoder's list of blocks, and its name."""
    decoder, total = target.decoder, target.config.num_hidden_layers
    for name, child in decoder.named_children():
        if isinstance(child, nn.ModuleList) and len(child) == total:
            return name, child
    raise UserError(f"{type(decoder).__name__} has no list of its {total} layers; use another model.")


def norm_of(target: Target) -> tuple[str, nn.Module]:
    """The decoder's final norm, and its name."""
    for name, child in target.decoder.named_children():
        if name in NORMS:
            return name, child
    raise UserError(f"{type(target.decoder).__name__} has no final norm called {', '.join(NORMS)}; use another model.")


class Branch:
    """`layers` as a small decoder over hidden states. Holds no weights: the layers belong to the drafter."""

    def __init__(self, target: Target, layers: Sequence[nn.Module]) -> None:
        self.target = target
        self.windows = [target.windows[-1]] * len(layers)
        self.frame = framed(target, layers)

    def cache(self, batch: int, capacity: int, width: int = 1) -> SlotCache:
        """An empty cache of the branch's own for rows of `capacity` tokens and drafts of `width` nodes."""
        return SlotCache(batch, capacity, self.windows, max(self.target.chunk, width), self.target.device)

    def __call__(self, states: Tensor) -> Tensor:
        """[B, T, H] output, before the final norm, of states [B, T, H] read as a whole and causally."""
        position = torch.arange(states.shape[1], device=states.device)[None]
        return self._run(states, None, position, use_cache=False)

    def extend(
        self,
        states: Tensor,
        depth: Tensor,
        ancestors: Tensor | None,
        cache: SlotCache,
        *,
        offset: int = 0,
        count: list[int] | None = None,
    ) -> Tensor:
        """[B, n, H] output, before the final norm, at nodes `offset ..` of a tree; arguments as `Target.extend`'s."""
        masks = cache.plan(depth, ancestors, offset, states.dtype, count)
        position = cache.length[:, None] + depth
        if self.target.context is not None:
            position = position.clamp(max=self.target.context - 1)
        mask = None if masks is None else next(iter(masks.values()))
        return self._run(states, mask, position, use_cache=True, past_key_values=cache)

    def _run(self, states: Tensor, mask: Any, position: Tensor, **cache: Any) -> Tensor:
        if mask is not None and len(set(self.target.windows)) > 1:
            mask = {self.target.config.layer_types[-1]: mask}
        out = self.frame(inputs_embeds=states, attention_mask=mask, position_ids=position, **cache)
        return out.last_hidden_state

    def read(self, states: Tensor, count: list[int], cache: SlotCache) -> Tensor:
        """Append the first `count[b]` of states [B, M, H] to row b, in chunks; the outputs [B, M, H]."""
        outputs: list[Tensor] = []
        for start in range(0, states.shape[1], self.target.chunk):
            part = states[:, start : start + self.target.chunk]
            n = part.shape[1]
            taken = [max(0, min(n, c - start)) for c in count]
            depth = torch.arange(n, device=states.device).expand(len(count), n)
            outputs.append(self.extend(part, depth, None, cache, count=taken if min(taken) < n else None))
            cache.commit(None, taken)
        return torch.cat(outputs, 1)


def framed(target: Target, layers: Sequence[nn.Module]) -> nn.Module:
    """The target's decoder with these blocks and no final norm."""
    (blocks, _), (norm, _) = blocks_of(target), norm_of(target)
    frame = copy.copy(target.decoder)
    config = copy.copy(target.config)
    config.num_hidden_layers = len(layers)
    if getattr(config, "layer_types", None):
        config.layer_types = [target.config.layer_types[-1]] * len(layers)
    frame.__dict__["config"] = config
    frame.__dict__["_modules"] = dict(frame.named_children()) | {blocks: nn.ModuleList(layers), norm: nn.Identity()}
    for hooks in ("_forward_hooks", "_forward_pre_hooks"):
        frame.__dict__[hooks] = type(frame.__dict__[hooks])()  # a hook on the decoder is not for its branches
    for number, layer in enumerate(layers):
        for module in layer.modules():
            if "layer_idx" in vars(module):
                vars(module)["layer_idx"] = number
    return frame


def last_layers(target: Target, count: int) -> nn.ModuleList:
    """`count` copies of the target's last block; `UserError` unless a branch of such a copy computes what it does."""
    copies = nn.ModuleList(copy.deepcopy(blocks_of(target)[1][-1]) for _ in range(count))
    tokens = torch.arange(8, device=target.device)[None] % target.vocab
    with torch.inference_mode():
        states = target.decoder(input_ids=tokens, output_hidden_states=True, use_cache=False).hidden_states
        again = norm_of(target)[1](Branch(target, [copies[0]])(states[-2]))
    spread = float(states[-1].float().std())
    if float((again - states[-1]).float().abs().max()) > 0.05 * spread:
        raise UserError(
            f"{type(target.model).__name__} does more to its input than its layers and final norm do, so a layer added "
            "beside the last one would not see what the last one sees; use heads that read the final hidden state."
        )
    return copies
