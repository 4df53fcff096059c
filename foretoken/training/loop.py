"""A training run, the same for every method: gradients, steps, measurements, checkpoints; one process or many."""

import math
import shutil
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from foretoken import saved as store
from foretoken.branch import blocks_of
from foretoken.errors import UserError
from foretoken.objective import Batch
from foretoken.progress import progress
from foretoken.training import checkpoint
from foretoken.training.evaluate import Tally
from foretoken.training.learner import NEXT
from foretoken.training.metrics import Log, Watch
from foretoken.training.optim import Group, Optimizers, finite
from foretoken.training.processes import Processes
from foretoken.training.recipe import Recipe, difference, plain, read_recipe, written
from foretoken.training.setup import TOKENIZER, prepare
from foretoken.training.shard import Sharding, gathered, like
from foretoken.training.trunk import save_target

CHECKPOINTS, RECIPE = "checkpoints", "recipe.yaml"


class Run:
    """A run between its first and last step."""

    def __init__(self, recipe: Recipe, processes: Processes) -> None:
        self.recipe, self.processes, self.folder = recipe, processes, Path(recipe.out)
        self.setup = prepare(recipe, processes)
        self.learner, trunk, heads = self.setup.learner, self.setup.trunk, self.setup.heads
        layers = {type(layer) for layer in blocks_of(trunk.target)[1]} if recipe.shard else set[type]()
        modules = [trunk.target.model, trunk.original.model, *([] if heads is None else [heads])]
        self.sharding = Sharding(dict.fromkeys(modules), layers, processes, recipe.shard)
        o = recipe.optimizer
        late = {"heads.": False, "target.": o.heads_first > 0}
        groups = [Group(self.under(part), o.trunk_ratio if part == "target." else 1.0, late[part]) for part in late]
        self.optimizers = Optimizers(groups, o, recipe.steps)
        self.watch, self.step = Watch(), 0
        self.found: dict[str, float] | None = None  # the held-out measurements after the last step

    @property
    def rows(self) -> int:
        """Rows of a step, over all forwards and processes."""
        return self.recipe.rows * self.recipe.accumulate * self.processes.world

    @property
    def checkpoints(self) -> Path:
        return self.folder / CHECKPOINTS

    @property
    def learnt(self) -> dict[str, nn.Parameter]:
        """Everything that learns, by name: what this process holds of it."""
        heads = [] if self.setup.heads is None else self.setup.heads.named_parameters()
        named = [*((f"heads.{n}", p) for n, p in heads), *((f"target.{n}", p) for n, p in self.setup.trunk.parameters)]
        return {name: self.sharding.part(p) for name, p in named}

    def under(self, prefix: str) -> list[tuple[str, nn.Parameter]]:
        """What learns under names that begin so."""
        return [(name, p) for name, p in self.learnt.items() if name.startswith(prefix)]

    def autocast(self) -> AbstractContextManager[Any]:
        """Where products are taken in the recipe's precision."""
        return torch.autocast(self.processes.device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16")

    def batches(self, step: int) -> list[Batch]:
        """This process's rows of a step, one batch per forward."""
        r = self.recipe
        return [
            self.setup.corpus.batch(
                step * r.accumulate + part,
                r.rows * self.processes.world,
                r.data.length,
                seed=r.seed,
                packed=r.data.packed,
                rank=self.processes.rank,
                world=self.processes.world,
                device=self.processes.device,
            )
            for part in range(r.accumulate)
        ]

    def advance(self, tally: Tally | None = None) -> tuple[dict[str, float], float]:
        """One optimiser step: each prediction's loss, and the norm of the gradient.

        tally  counts what the predictions said of this process's first batch, if given
        """
        torch.manual_seed(self.recipe.seed * 1_000_003 + self.step * self.processes.world + self.processes.rank)
        batches = self.batches(self.step)
        counts = self.learner.counts(batches)
        total = dict(zip(counts, map(int, self.processes.added(list(counts.values()))), strict=True))
        learns = self.step >= self.recipe.optimizer.heads_first
        sums: dict[str, Tensor] = {}
        with self.sharding.whole():
            for i, batch in enumerate(batches):
                found = self.learner.gradient(batch, total, learns, self.autocast, tally if i == 0 else None)
                sums = {name: value + sums.get(name, 0) for name, value in found.items()}
        summed = self.processes.added(torch.stack(list(sums.values())).tolist())
        losses = {n: v / max(1, total.get(n, total[NEXT])) for n, v in zip(sums, summed, strict=True)}
        self.stop_if(self.watch.judge(losses))
        self.processes.reduce(self.optimizers.parameters)
        norm = self.optimizers.step(self.step)
        self.stop_if(None if math.isfinite(norm) else f"The gradient's norm is {norm}")
        self.step += 1
        return losses, norm

    def stop_if(self, why: str | None) -> None:
        """`UserError` if there is a reason: nothing of this step is kept."""
        if why is None:
            return
        last = checkpoint.newest(self.checkpoints)
        kept = f"the checkpoint '{last}' is kept" if last else "there was no checkpoint yet"
        raise UserError(
            f"{why} at step {self.step}; {kept}: lower optimizer.lr and start again with an `out` of its own."
        )

    def once(self) -> dict[str, float]:
        """One step and what there is to say of it."""
        r, began = self.recipe, perf_counter()
        tally = Tally(NEXT) if (self.step + 1) % r.log_every == 0 or self.step + 1 == r.steps else None
        losses, norm = self.advance(tally)
        row: dict[str, float] = {"step": self.step, "lr": self.optimizers.lr(self.step - 1)} | losses
        row |= {"gradient": norm, "tokens/s": self.rows * r.data.length / (perf_counter() - began)}
        if tally is not None:
            row |= {k: v for k, v in self.measured(tally).items() if not k.endswith("/loss")}
        if r.evaluate_every and self.step % r.evaluate_every == 0:
            self.found = self.held_out()
            row |= {f"held out {k}": v for k, v in self.found.items()}
        else:
            self.found = None
        return row

    def save(self) -> None:
        """Write a checkpoint of this step."""
        own = {n: p.detach() for n, p in self.learnt.items()}
        lost = self.processes.added([float(not finite(p)) for p in own.values()])
        if (name := next((n for n, bad in zip(own, lost, strict=True) if bad), None)) is not None:
            self.stop_if(f"The weights {name} are no longer finite")
        main = self.processes.main
        state = {
            "step": self.step,
            "rows": self.rows,
            "weights": {n: gathered(p, main) for n, p in own.items()},
            "optimizers": [gathered(o.state_dict(), main) for o in self.optimizers.all],
            "smoothed": self.watch.smoothed,
            "lowest": self.watch.lowest,
        }
        if main:
            checkpoint.write(self.checkpoints, self.step, state)
        self.processes.wait()

    def resume(self) -> None:
        """Go on from the newest checkpoint, if there is one."""
        place = checkpoint.newest(self.checkpoints)
        if place is None:
            return
        state = checkpoint.read(place)
        own, stored = self.learnt, state["weights"]
        if {n: p.shape for n, p in own.items()} != {n: v.shape for n, v in stored.items()}:
            raise UserError(
                f"The checkpoint '{place}' is of other weights than this recipe's; give it an `out` of its own."
            )
        if state["rows"] != self.rows:
            raise UserError(
                f"The run in '{self.folder}' has {state['rows']} rows in a step and this one {self.rows}; set "
                "rows and accumulate so that, times the processes, they are as many."
            )
        with torch.no_grad():
            for name, value in stored.items():
                own[name].copy_(like(value, own[name]))
        for optimizer, kept in zip(self.optimizers.all, state["optimizers"], strict=True):
            load_optimizer(optimizer, kept)
        self.step, self.watch.smoothed, self.watch.lowest = state["step"], state["smoothed"], state["lowest"]

    def measured(self, tally: Tally) -> dict[str, float]:
        """What was counted, over all processes."""
        return tally.result(self.processes.added(tally.vector()))

    def held_out(self) -> dict[str, float]:
        """Loss, top-1 and top-5 of every prediction, and tokens per forward, on held-out text; empty without any."""
        r, world = self.recipe, self.processes.world
        if self.setup.held_out is None or r.evaluate == 0:
            return {}
        batches: Iterable[Batch] = self.setup.held_out.in_order(
            r.rows * world,
            r.data.length,
            packed=r.data.packed,
            rank=self.processes.rank,
            world=world,
            device=self.processes.device,
        )
        some = islice(batches, -(-r.evaluate // (r.rows * world)))
        with self.sharding.whole():
            return self.measured(self.learner.measure(some, Tally(NEXT), self.autocast))

    def finish(self) -> dict[str, float]:
        """Write what users load, the drafter and the target where it was trained; the held-out measurements."""
        found = self.held_out() if self.found is None else self.found
        self.sharding.dissolve()
        if self.processes.main:
            self.write(found)
        self.processes.wait()
        return found

    def write(self, found: dict[str, float]) -> None:
        """Save the drafter with how it was trained and what it measured, and the target if it learnt."""
        trunk, heads = self.setup.trunk, self.setup.heads
        trunk.merge()
        if trunk.learns:
            save_target(trunk.target, self.folder, self.setup.dtype)
        if heads is not None:
            identity = store.identity(trunk.target)
            if trunk.learns:
                identity["name"] = self.folder.name
            facts = {"recipe": plain(self.recipe), "held_out": found}
            description = store.Saved(self.recipe.drafter, plain(self.setup.architecture), identity, {}, facts)
            store.save(self.folder, description, heads, self.setup.dtype)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Give an optimiser back its state, of whole tensors; it keeps this process's parts of them."""
    parameters: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
    for number, moments in state["state"].items():
        for name, value in moments.items():
            moments[name] = like(value, parameters[number]) if isinstance(value, Tensor) else value
    optimizer.load_state_dict(state)


def claim(recipe: Recipe, processes: Processes) -> None:
    """Make the run's folder and put its recipe there; `UserError` if it holds the checkpoints of another run."""
    if not recipe.out:
        raise UserError("The recipe names no folder to write; set out=PATH.")
    folder = Path(recipe.out)
    place = folder / RECIPE
    if place.is_file() and (other := difference(recipe, read_recipe(place))) is not None:
        if checkpoint.all_of(folder / CHECKPOINTS):
            raise UserError(
                f"'{folder}' holds a run with {other}; give this one an `out` of its own, or delete that run."
            )
        if processes.main:
            shutil.rmtree(folder / TOKENIZER, ignore_errors=True)
    processes.wait()
    if processes.main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            checkpoint.write_text(place, written(recipe))
        except OSError as error:
            raise UserError(
                f"'{folder}' cannot be written ({checkpoint.reason(error)}); give another `out`."
            ) from error
    processes.wait()


def train(recipe: Recipe) -> dict[str, float]:
    """Train as the recipe says, from where it was left, and write `recipe.out`; the held-out measurements."""
    processes = Processes()
    claim(recipe, processes)
    run = Run(recipe, processes)
    run.resume()
    log = Log(run.folder, run.step, board=recipe.tensorboard) if processes.main else None
    with progress() as update:
        while run.step < recipe.steps:
            row = run.once()
            if log is not None:
                log(row)
            update(
                "loss " + " ".join(f"{run.watch.smoothed[n]:.2f}" for n in run.watch.smoothed), run.step, recipe.steps
            )
            if run.step % recipe.save_every == 0 or run.step == recipe.steps:
                run.save()
    if log is not None:
        log.close()
    return run.finish()


def run(path: Path, overrides: Sequence[str] = ()) -> None:
    """Train as a recipe file says, and print what held-out text says of the result."""
    recipe = read_recipe(path, overrides)
    found = train(recipe)
    if Processes().main:
        show(recipe, found, Console())


def show(recipe: Recipe, found: dict[str, float], console: Console) -> None:
    """Print a short table of the held-out measurements."""
    if found:
        table = Table("prediction", "loss", "top-1", "top-5", title="On held-out text", title_justify="left")
        for name in (key.removesuffix("/loss") for key in found if key.endswith("/loss")):
            rates = (f"{100 * found[f'{name}/{part}']:.1f} %" for part in ("top1", "top5"))
            table.add_row(name, f"{found[f'{name}/loss']:.3f}", *rates)
        console.print(table)
    if "tokens per forward" in found:
        console.print(
            f"Expected tokens per forward, of a chain, against the text itself: {found['tokens per forward']:.2f}"
        )
    console.print(f"Written to {recipe.out}", soft_wrap=True)
