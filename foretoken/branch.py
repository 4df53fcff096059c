"""Layers of a drafter's own over hidden states, with caches of their own.

A `Branch` runs them in the frame of the target: its rotary positions, masks and calling conventions. The frame is a
shallow copy of the target's decoder in which the blocks are replaced and the final norm is left out; it reads hidden
states where the decoder reads embeddings. So any model family lends its layers, and none is copied.
"""

import copy
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from foretoken.cache import Count, SlotCache
from foretoken.errors import UserError
from foretoken.target import Target, norm_of


def blocks_of(target: Target) -> tuple[str, nn.ModuleList]:
    """The decoder's list of blocks, and its name."""
    decoder, total = target.decoder, target.config.num_hidden_layers
    for name, child in decoder.named_children():
        if isinstance(child, nn.ModuleList) and len(child) == total:
            return name, child
    raise UserError(f"{type(decoder).__name__} has no list of its {total} layers; use another model.")


class Layers:
    """A small decoder over hidden states. Holds no weights: they belong to the drafter."""

    def __init__(self, target: Target, windows: list[int | None]) -> None:
        """`windows`: per layer, full attention (None) or the length of its sliding window; all alike."""
        self.target, self.windows = target, windows

    def run(self, states: Tensor, mask: Tensor | None, position: Tensor, cache: Any) -> Tensor:
        """[B, T, H] output of states [B, T, F] at `position` [B or 1, T].

        mask   additive [B or 1, 1, T, slots]; None: causal among the T
        cache  has `update(key, value, layer)`, which returns all keys and values to be attended; None: there is none
        """
        raise NotImplementedError

    def cache(self, batch: int, capacity: int, width: int = 1) -> SlotCache:
        """An empty cache of the layers' own for rows of `capacity` tokens and drafts of `width` nodes."""
        return SlotCache(batch, capacity, self.windows, max(self.target.chunk, width), self.target.device)

    def __call__(self, states: Tensor) -> Tensor:
        """[B, T, H] output of states [B, T, F] read as a whole and causally."""
        position = torch.arange(states.shape[1], device=states.device)[None]
        return self.run(states, None, position, None)

    def unrolled(self, states: Tensor, memory: Tensor | None, step: int) -> tuple[Tensor, Tensor]:
        """([B, T, H] output, memory) of step 0, 1, ... over the same rows, as decoding takes it from each of them.

        Row t attends to what the first step left at rows up to t and to what each later step left at row t, itself
        included, at position t + step: the training-time test of EAGLE-3 (Li et al. 2025, arXiv:2503.01840, section
        3.2). memory [B, T, M]: the keys and values of all steps so far, None before the first.
        """
        past, T = Past(memory, len(self.windows)), states.shape[1]
        mask = unrolled_mask(T, step, self.windows[0], states.dtype, states.device) if step else None
        position = torch.arange(step, step + T, device=states.device)[None]
        return self.run(states, mask, position, past), past.memory()

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
        """[B, n, H] output at nodes `offset ..` of a tree; arguments as `Target.extend`'s."""
        masks = cache.plan(depth, ancestors, offset, states.dtype, count)
        position = cache.length[:, None] + depth
        if self.target.context is not None:
            position = position.clamp(max=self.target.context - 1)
        return self.run(states, None if masks is None else next(iter(masks.values())), position, cache)

    def read(self, states: Tensor, count: Count, cache: SlotCache) -> Tensor:
        """Append the first `count[b]` of states [B, M, F] to row b, in chunks; the outputs [B, M, H]."""
        if isinstance(count, Tensor):
            depth = torch.arange(states.shape[1], device=states.device).expand(states.shape[:2])
            output = self.extend(states, depth, None, cache)
            cache.commit(None, count)
            return output
        outputs: list[Tensor] = []
        for start in range(0, states.shape[1], self.target.chunk):
            part = states[:, start : start + self.target.chunk]
            n = part.shape[1]
            taken = [max(0, min(n, c - start)) for c in count]
            depth = torch.arange(n, device=states.device).expand(len(count), n)
            outputs.append(self.extend(part, depth, None, cache, count=taken if min(taken) < n else None))
            cache.commit(None, taken)
        return torch.cat(outputs, 1)


class Past(Cache):
    """Keys and values of the steps of `Layers.unrolled`, in one tensor, so that gradients pass through it."""

    def __init__(self, memory: Tensor | None, layers: int) -> None:
        super().__init__(layers=[])
        self.held, self.depth = memory, layers
        self.fresh: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """All steps' keys and values [B, heads, steps * T, D], this step's [B, heads, T, D] last."""
        heads, sizes = key_states.shape[1], (key_states.shape[3], value_states.shape[3])
        new = torch.cat([x.transpose(1, 2).flatten(2) for x in (key_states, value_states)], -1)
        self.fresh.append(new)
        if self.held is None:
            return key_states, value_states
        B, T = new.shape[:2]
        steps = self.held.view(B, T, -1, self.depth, new.shape[2])[..., layer_idx, :]  # [B, T, steps, columns]
        parts = steps.split([heads * size for size in sizes], -1)
        keys, values = (
            part.unflatten(-1, (heads, size)).permute(0, 3, 2, 1, 4).flatten(2, 3)
            for part, size in zip(parts, sizes, strict=True)
        )
        return torch.cat([keys, key_states], 2), torch.cat([values, value_states], 2)

    def memory(self) -> Tensor:
        """[B, T, M] with this step's."""
        return torch.cat([*([] if self.held is None else [self.held]), *self.fresh], -1)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


@lru_cache(maxsize=32)
def unrolled_mask(T: int, step: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[1, 1, T, (step + 1) * T], additive: the first step's rows up to one's own, later steps' at one's own row."""
    with torch.inference_mode(False):
        row = torch.arange(T, device=device)
        age = row[:, None] - row
        seen = (age >= 0) if window is None else (age >= 0) & (age + step < window)
        seen = torch.cat([seen, (age == 0).repeat(1, step)], 1)
        return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, torch.finfo(dtype).min)[
            None, None
        ]


class Branch(Layers):
    """Blocks of the target's own kind, in its frame."""

    def __init__(self, target: Target, layers: Sequence[nn.Module]) -> None:
        super().__init__(target, [target.windows[-1]] * len(layers))
        self.frame = framed(target, layers)

    def run(self, states: Tensor, mask: Tensor | None, position: Tensor, cache: Any) -> Tensor:
        """The output before the final norm."""
        given: Any = mask
        if mask is not None and len(set(self.target.windows)) > 1:
            given = {self.target.config.layer_types[-1]: mask}
        out = self.frame(
            inputs_embeds=states,
            attention_mask=given,
            position_ids=position,
            past_key_values=cache,
            use_cache=cache is not None,
        )
        return out.last_hidden_state


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


def neutral(norm: nn.Module) -> nn.Module:
    """A norm of the same kind that scales nothing: its weight is 1, or 0 where the kind adds 1 to it."""
    made = copy.deepcopy(norm)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        weight = next(made.parameters(), None)
        if weight is not None:
            probe = torch.where(torch.arange(len(weight), device=weight.device) % 2 == 0, 1.0, -1.0)
            if float(made(probe.to(weight.dtype)[None]).abs().mean()) > 1.5:
                weight.fill_(0.0)
    return made


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
