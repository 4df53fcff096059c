"""Forward and backward one prediction at a time, so that training memory does not grow with their number.

Gloeckle et al. 2024 (arXiv:2404.19737, section 2): each head runs on a detached copy of the trunk's output, its loss is
taken back to that copy and its logits are freed before the next head runs; then the trunk goes back once.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from foretoken.objective import Stage

Loss = Callable[[Stage, Tensor], Tensor]
"""(stage, hidden [B, T, H]) -> its loss, weighted and divided as it shall enter the gradient."""


def leaf(state: Tensor, learns: bool = True) -> Tensor:
    """`state` cut from its graph, collecting a gradient of its own."""
    return state.detach().requires_grad_(learns)


def backpropagate(forest: Sequence[Stage], features: Tensor, loss: Loss) -> None:
    """Add the gradient of all stages' losses to their parameters and to `features.grad` [B, T, F]."""
    for stage in forest:
        descend(stage, features, loss)


def descend(stage: Stage, given: Tensor, loss: Loss) -> None:
    """One stage and those that follow it: forward, the followers, its own loss, backward into `given`."""
    output = stage.run(given)
    held = leaf(output, output.requires_grad)
    backpropagate(stage.then, held, loss)
    if stage.unembed is not None:
        value = loss(stage, held if stage.ready is None else stage.ready(held))
        if value.requires_grad:
            value.backward()
    if held.grad is not None:
        output.backward(held.grad)


def join(states: Sequence[tuple[Tensor, Tensor]]) -> None:
    """One backward through what gave the outputs, from what their copies collected: pairs (output, copy)."""
    reached = [(state, copy.grad) for state, copy in states if state.requires_grad and copy.grad is not None]
    if reached:
        torch.autograd.backward([state for state, _ in reached], [grad for _, grad in reached])
