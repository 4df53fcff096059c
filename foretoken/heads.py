"""Heads: guesses of every depth from one hidden state, each without knowing the guesses before it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foretoken.drafter import Feed
from foretoken.errors import UserError
from foretoken.grow import Extend, Growth
from foretoken.plan import Settings
from foretoken.saved import load_weights, read, require_target, settle
from foretoken.target import Target
from foretoken.unembed import Unembedding


@dataclass(frozen=True, slots=True)
class Config(Settings):
    """
    path          the folder that `foretoken train` wrote (or, for eagle, a published one)
    other_target  use weights that were trained on another target; the output stays exact, fewer guesses survive
    """

    path: "str | nn.Module" = ""
    other_target: bool = False


def known(logits: Tensor) -> tuple[Tensor, Extend]:
    """How guesses begin and go on that are all made at once: logits [B, D, V'] of depths 1 to D."""

    def extend(growth: Growth) -> Tensor:
        return logits[:, growth.level : growth.level + 1]

    return logits[:, :1], extend


def last_states(feed: Feed, states: Tensor) -> Tensor:
    """[B, 1, H] of states [B, M, H] at each row's last committed token."""
    place = (torch.as_tensor(feed.count, device=states.device) - 1).clamp(min=0)[:, None, None]
    return states.gather(1, place.expand(-1, -1, states.shape[2]))


def output_head(target: Target, own: nn.ParameterList, head: int) -> Unembedding:
    """The output head of guess `head`, from 0: its own weights [V, H], or the target's where heads have none."""
    return replace(target.unembed, weight=own[head]) if len(own) else target.unembed


def opened(
    method: str, config: Config, target: Target, architecture: type, fresh: Callable[[Target, Any], nn.Module]
) -> tuple[Any, dict[str, list[list[int]]]]:
    """The heads that `config` names, beside the target, and their trees; heads in memory are taken as they are."""
    if isinstance(config.path, nn.Module):
        return config.path, {}
    if not config.path:
        raise UserError(
            f"{method} needs trained heads; name them as {method}:PATH, or train some with `foretoken train`."
        )
    folder = Path(config.path)
    saved = read(folder, method)
    if not config.other_target:
        require_target(saved, target, folder)
    heads = fresh(target, settle(architecture, saved, folder))
    load_weights(folder, heads)
    return heads.to(target.device, target.dtype), saved.trees
