"""One optimiser step: the gradient of every prediction's loss, one at a time, whatever the method."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor

from foretoken.drafter import Needs
from foretoken.errors import UserError
from foretoken.objective import IGNORED, Batch, Stage, predictions
from foretoken.training.backward import backpropagate, join, leaf
from foretoken.training.evaluate import Tally
from foretoken.training.losses import cross_entropy, divergence
from foretoken.training.recipe import Loss
from foretoken.training.trunk import Shown, Trunk

NEXT, KEPT = "next token", "kept"
"""The target's own prediction, and how far it went from what it was."""

Autocast = Callable[[], AbstractContextManager[Any]]


class Trainable(Protocol):
    """A drafter that training can improve: it says what it reads and what it predicts."""

    @property
    def needs(self) -> Needs: ...

    def stages(self, batch: Batch) -> Sequence[Stage]: ...


class Learner:
    """Computes gradients and losses; holds nothing that a run would have to save."""

    def __init__(self, trunk: Trunk, drafter: Trainable | None, loss: Loss) -> None:
        self.trunk, self.drafter, self.settings = trunk, drafter, loss
        self.layers = tuple(drafter.needs.features) if drafter is not None else ()

    def forest(self, batch: Batch) -> list[Stage]:
        """The drafter's predictions."""
        return list(self.drafter.stages(batch)) if self.drafter is not None else []

    def own(self) -> Stage:
        """The target's prediction of the next token."""
        return Stage(NEXT, 1, self.settings.next_token, lambda states: states, self.trunk.target.unembed)

    def weights(self, forest: Sequence[Stage]) -> dict[str, float]:
        """Each prediction's weight, as the recipe or else the method says."""
        stages = predictions(forest)
        given = self.settings.weights or tuple(stage.weight for stage in stages)
        if len(given) != len(stages):
            raise UserError(
                f"loss.weights has {len(given)} numbers and the drafter {len(stages)} predictions; give one for each."
            )
        found = {stage.name: self.settings.scale * w for stage, w in zip(stages, given, strict=True)}
        return found | {NEXT: self.settings.next_token}

    def counts(self, batches: Sequence[Batch]) -> dict[str, int]:
        """Labels of each prediction in these batches."""
        stages = [*predictions(self.forest(batches[0])), self.own()]
        found = [torch.stack([(stage.labels(b) != IGNORED).sum() for stage in stages]) for b in batches]
        return dict(zip([stage.name for stage in stages], torch.stack(found).sum(0).tolist(), strict=True))

    def gradient(
        self, batch: Batch, total: dict[str, int], trunk_learns: bool, autocast: Autocast, tally: Tally | None = None
    ) -> dict[str, Tensor]:
        """Add a batch's gradient to all parameters that learn; the sum of each prediction's loss over its labels.

        total  labels of each prediction in the whole step, on all processes: what the sums are divided by
        tally  counts what the predictions say, if given
        """
        sums: dict[str, Tensor] = {}
        learns = trunk_learns and self.trunk.learns
        self.trunk.thaw(learns)
        forest = self.forest(batch)
        weights = self.weights(forest)
        with autocast():
            shown = self.trunk(batch.tokens, self.layers, learns)
            features, final = leaf(self.noisy(shown.features), learns), leaf(shown.final, learns)

            def loss(stage: Stage, hidden: Tensor) -> Tensor:
                value = self.value(stage, hidden, batch, shown)
                sums[stage.name] = value.detach()
                if tally is not None:
                    tally.see(stage, hidden, batch)
                return value * (weights[stage.name] / max(1, total[stage.name]))

            backpropagate(forest, features, loss)
            if learns:
                backpropagate([self.own()], final, loss)
                if self.settings.keep_target > 0:
                    sums[KEPT] = self.keep(batch, final, total[NEXT])
        join([(shown.features, features), (shown.final, final)])
        if tally is not None:
            tally.close(batch)
        return sums

    def value(self, stage: Stage, hidden: Tensor, batch: Batch, shown: Shown) -> Tensor:
        """The sum of a prediction's losses, a scalar, over its labels."""
        assert stage.unembed is not None
        labels, rows = stage.labels(batch).flatten(), hidden.flatten(0, 1)
        if stage.name == NEXT:
            return cross_entropy(rows, stage.unembed, labels, self.settings.implementation)
        behind = stage.offset - 1  # the target's law of token i + offset stands at row i + offset - 1
        teacher = torch.nn.functional.pad(shown.final.detach()[:, behind:], (0, 0, 0, behind)).flatten(0, 1)
        keep = labels != IGNORED
        if self.settings.kind == "cross_entropy":
            value = cross_entropy(rows, stage.unembed, labels, self.settings.implementation)
        else:
            whole, tokens = self.trunk.target.unembed, stage.unembed.tokens
            kind = cast(Literal["kl", "tv"], self.settings.kind)
            value = divergence(
                rows, stage.unembed, teacher, whole if tokens is None else whole.limited(tokens), keep, kind
            )
        if self.settings.near > 0:
            away = torch.nn.functional.smooth_l1_loss(rows[keep], teacher[keep].to(rows.dtype), reduction="none")
            value = value + self.settings.near * away.mean(-1).sum()
        return value

    def noisy(self, features: Tensor) -> Tensor:
        """The features [B, T, F] with uniform noise, if there shall be some."""
        if self.settings.noise == 0:
            return features
        return features + self.settings.noise * (2 * torch.rand_like(features) - 1)

    def keep(self, batch: Batch, final: Tensor, total: int) -> Tensor:
        """KL of the target to what it was before training, added to the gradient (Medusa's self-distillation)."""
        before, original = self.trunk.before(batch.tokens)
        keep = (batch.labels(1) != IGNORED).flatten()
        unembed = self.trunk.target.unembed
        value = divergence(final.flatten(0, 1), unembed, before.flatten(0, 1), original, keep, "kl")
        (value * (self.settings.keep_target / max(1, total))).backward()
        return value.detach()

    @torch.no_grad()
    def measure(self, batches: Iterable[Batch], tally: Tally, autocast: Autocast) -> Tally:
        """Add what every prediction says on these batches to `tally`; nothing learns, dropout is off."""
        for batch in batches:
            with autocast():
                shown = self.trunk(batch.tokens, self.layers, learn=False)
                visit([self.own()], shown.final, batch, tally)
                visit(self.forest(batch), shown.features, batch, tally)
            tally.close(batch)
        return tally


def visit(forest: Sequence[Stage], given: Tensor, batch: Batch, tally: Tally) -> None:
    """Run stages and those that follow them, and count what they say."""
    for stage in forest:
        output = stage.run(given)
        if stage.unembed is not None:
            tally.see(stage, output if stage.ready is None else stage.ready(output), batch)
        visit(stage.then, output, batch, tally)
