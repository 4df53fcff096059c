"""A decoder layer of a drafter's own, whatever the target's family: rotary attention with grouped heads, gated MLP."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from foretoken.attention import attend
from foretoken.branch import Layers
from foretoken.errors import UserError
from foretoken.target import Target


@dataclass(frozen=True, slots=True)
class Stretch:
    """Rotary frequencies slowed for texts longer than those first trained on, as Llama 3.1's (arXiv:2407.21783) are.

    factor    by which a frequency is slowed that turns `low` times or fewer
    high      one that turns as often or more is not; between them in proportion
    original  tokens that the turns are counted over (0: all are slowed, which is linear scaling)
    """

    factor: float
    low: float = 1.0
    high: float = 4.0
    original: int = 0

    def slowed(self, frequency: Tensor) -> Tensor:
        turned = self.original * frequency / (2 * math.pi)
        kept = ((turned - self.low) / (self.high - self.low)).clamp(0, 1)
        return frequency * (kept + (1 - kept) / self.factor)


@dataclass(frozen=True, slots=True)
class Size:
    """
    hidden   H, width of the states
    heads    attention heads
    groups   heads of keys and values
    head     size of a head
    inner    of the MLP
    theta    base of the rotary frequencies
    eps      of the norms
    stretch  what slows the rotary frequencies (None: nothing)
    """

    hidden: int
    heads: int
    groups: int
    head: int
    inner: int
    theta: float = 10000.0
    eps: float = 1e-6
    stretch: Stretch | None = None


def size_like(target: Target, inner: int = 0) -> Size:
    """The size of the target's own layers, with an MLP of `inner` if that is not 0."""
    config, hidden = target.config, target.config.hidden_size
    heads = int(getattr(config, "num_attention_heads", 0) or 0)
    if not heads or hidden % heads:
        raise UserError(f"{type(config).__name__} names no number of heads that divides {hidden}; use another model.")
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    return Size(
        hidden,
        heads,
        int(getattr(config, "num_key_value_heads", None) or heads),
        hidden // heads,
        inner or int(getattr(config, "intermediate_size", None) or 4 * hidden),
        float(rope.get("rope_theta") or 10000.0),
        float(getattr(config, "rms_norm_eps", None) or 1e-6),
    )


def linear(inputs: int, outputs: int) -> nn.Linear:
    """Without bias; normal weights of deviation 0.02."""
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(layer.weight, std=0.02)
    return layer


class Attention(nn.Module):
    """Rotary attention of states of `inputs` numbers each."""

    def __init__(self, size: Size, inputs: int) -> None:
        super().__init__()
        self.size, self.num_key_value_groups = size, size.heads // size.groups
        self.q_proj = linear(inputs, size.heads * size.head)
        self.k_proj = linear(inputs, size.groups * size.head)
        self.v_proj = linear(inputs, size.groups * size.head)
        self.o_proj = linear(size.heads * size.head, size.hidden)

    def forward(self, states: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor | None, cache: Any) -> Tensor:
        """[B, T, H] of states [B, T, inputs]; `cache` gives the keys and values to be attended, if there is one."""
        query, key, value = (
            project(states).unflatten(-1, (-1, self.size.head)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = rotated(query, *turn), rotated(key, *turn)
        if cache is not None:
            key, value = cache.update(key, value, 0)
        out, _ = attend(self, query, key, value, mask, self.size.head**-0.5, is_causal=mask is None)
        return self.o_proj(out.flatten(2))


def turns(size: Size, position: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(cosine, sine) [B, 1, T, D] of the rotary angles at `position` [B, T] (arXiv:2104.09864)."""
    step = torch.arange(0, size.head, 2, device=position.device, dtype=torch.float32) / size.head
    frequency = size.theta**-step
    if size.stretch is not None:
        frequency = size.stretch.slowed(frequency)
    angle = (position[..., None].float() * frequency).repeat(1, 1, 2)[:, None]
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """x [B, heads, T, D] turned, halves of D being the two coordinates."""
    left, right = x.chunk(2, -1)
    return x * cosine + torch.cat([-right, left], -1) * sine


class Mlp(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = linear(size.hidden, size.inner), linear(size.hidden, size.inner)
        self.down_proj = linear(size.inner, size.hidden)

    def forward(self, states: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(states)) * self.up_proj(states))


class OwnLayer(Layers):
    """One layer as `Layers`: `layer(states, turns, mask, cache)` [B, T, F] -> [B, T, H]."""

    def __init__(self, target: Target, layer: nn.Module, size: Size) -> None:
        super().__init__(target, [None])
        self.layer, self.size = layer, size

    def run(self, states: Tensor, mask: Tensor | None, position: Tensor, cache: Any) -> Tensor:
        return self.layer(states, turns(self.size, position, states.dtype), mask, cache)
