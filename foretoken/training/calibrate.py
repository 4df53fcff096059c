"""`foretoken calibrate`: how often each guess of a drafter is right, and the trees that follow from it.

The accuracy of depth d at rank r is the share of steps in which the token d places behind the root was the drafter's
r-th choice behind the right tokens of the depths before, ranked exactly as drafting ranks it: at temperature 1 under
the target's own noise. The best tree for them is `paths.best_paths` (Medusa, Cai et al. 2024, arXiv:2401.10774, section
2.3.3).
"""

import dataclasses
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from foretoken import saved as store
from foretoken.costs import Costs, measure
from foretoken.decode import Request, Session
from foretoken.drafter import Feed, Needs
from foretoken.drafters import make_drafter
from foretoken.errors import UserError
from foretoken.generation import decode_all
from foretoken.grow import Growth
from foretoken.loading import load
from foretoken.paths import best_paths, expected
from foretoken.plan import Guesser, Plan
from foretoken.prompts import batch
from foretoken.rules import Match
from foretoken.sampling import Sampling
from foretoken.target import Target
from foretoken.training.prompts import Prompt, ids_of, prompts_of
from foretoken.training.sources import documents
from foretoken.tree import Draft, chain

RANKS = 10
"""Choices of each depth that are looked at, as in the paper's code."""
ROWS = 8
"""Texts that are decoded together."""


@dataclasses.dataclass(frozen=True, slots=True)
class Tree:
    """What was measured at one temperature.

    accuracy            [D, R]
    paths               chosen for it, best first
    tokens_per_forward  that they yield, if how often a guess is right does not depend on which choices came before it
    speed               tokens per second over plain decoding's, if the size was chosen by time
    """

    accuracy: Tensor
    paths: list[list[int]]
    tokens_per_forward: float
    speed: float | None = None


class Probe:
    """Decodes plainly what is known already, and counts which of the drafter's choices it was."""

    def __init__(self, drafter: Guesser) -> None:
        self.drafter, self.depth = drafter, drafter.plan.shape.depth
        self.texts: list[list[int]] = []  # prompt and output of each row, to their end
        self.right = torch.zeros(self.depth, RANKS, dtype=torch.float64)
        self.places = 0
        self.first: list[float] = []  # seconds of the first depth's guesses
        self.further: list[float] = []  # and of every other's

    @property
    def needs(self) -> Needs:
        own = self.drafter.needs
        return Needs(max(own.width, 1 + self.depth), own.features)

    def start(self, batch: int, capacity: int) -> Any:
        return self.drafter.start(batch, capacity)

    def propose(self, feed: Feed, state: Any) -> Draft:
        """Only the root; on the way, guesses are taken at each depth behind the tokens that will be emitted."""
        clock = perf_counter()
        logits, extend = self.drafter.begin(feed, state)
        ahead = [text[len(seen) : len(seen) + self.depth] for text, seen in zip(self.texts, feed.texts, strict=True)]
        if not (rows := [b for b, tokens in enumerate(ahead) if len(tokens) == self.depth]):
            return chain(feed.root[:, None])
        said = torch.tensor([t + [0] * (self.depth - len(t)) for t in ahead], device=feed.root.device)
        whole = chain(torch.cat([feed.root[:, None], said], 1))
        for d in range(1, self.depth + 1):
            if d > 1:
                ancestors = whole.ancestors[:, :d, :d]
                logits = extend(Growth(whole.tokens[:, :d], whole.parent[:, :d], ancestors, d - 1, d - 1))
            ranked = feed.rank(feed.values(logits), d)
            best = ranked.topk(min(RANKS, ranked.shape[-1]), -1).indices[:, 0]  # [B, R]
            hits = (best == said[:, d - 1, None])[rows].sum(0).cpu()
            self.right[d - 1, : len(hits)] += hits
            (self.further if d > 1 else self.first).append(perf_counter() - clock)
            clock = perf_counter()
        self.places += len(rows)
        return chain(feed.root[:, None])

    def watch(self, target: Target, requests: Sequence[Request], texts: Sequence[list[int]]) -> None:
        """Count over these requests, whose texts become `texts`."""
        self.texts = list(texts)
        session = Session(target, self, requests)
        session.run()

    def accuracy(self) -> Tensor:
        """[D, R] over the steps whose next D tokens were emitted in the end."""
        if not self.places:
            raise UserError(
                f"No output is {self.depth + 1} tokens long, so nothing was measured; ask for more new tokens."
            )
        return self.right / self.places


def accuracies(
    target: Target,
    drafter: Any,
    prompts: Sequence[Sequence[int]],
    *,
    temperature: float,
    max_new_tokens: int,
    seed: int,
) -> Tensor:
    """[D, R]: how often the r-th choice of depth d, behind the right tokens, is what the target emits there."""
    if not isinstance(getattr(drafter, "plan", None), Plan):
        raise UserError(
            "Only drafters that give the probability of every guess have such accuracies; use mtp, eagle, ..."
        )
    requests, texts = written(target, prompts, temperature=temperature, max_new_tokens=max_new_tokens, seed=seed)
    probe = Probe(drafter)
    for start in range(0, len(requests), ROWS):
        probe.watch(target, requests[start : start + ROWS], texts[start : start + ROWS])
    return probe.accuracy()


def written(
    target: Target, prompts: Sequence[Sequence[int]], *, temperature: float, max_new_tokens: int, seed: int
) -> tuple[list[Request], list[list[int]]]:
    """Requests, and the texts that plain decoding makes of them."""
    sampling = Sampling(temperature=temperature, seed=seed)
    requests = [Request(tuple(p), sampling, i, max_new_tokens) for i, p in enumerate(prompts)]
    rows = decode_all(target, make_drafter("none", target), requests, Match(), batch_size=ROWS)
    return requests, [row.text for row in rows]


def calibrate(
    target: Target,
    name: str,
    prompts: Sequence[Sequence[int]],
    *,
    nodes: int = 63,
    depth: int = 0,
    temperatures: Sequence[float] = (0.0, 1.0),
    max_new_tokens: int = 128,
    seed: int = 0,
) -> dict[str, Tree]:
    """Measure the drafter NAME:PATH and store its best trees beside it, by temperature.

    nodes  guesses of a tree; 0: as many as pay on this machine, for one row
    depth  guesses on the longest path (0: the drafter's own)
    """
    drafter: Any = make_drafter(name, target, {"tree": "chain"} | ({"depth": depth} if depth else {}))
    saved = description(name, target)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "seed": seed}
    trees: dict[str, Tree] = {}
    for temperature in temperatures:
        found = accuracies(target, drafter, prompts, temperature=temperature, **options)
        if nodes:
            paths = best_paths(found, nodes)
            speed = None
        else:
            timed = timings(target, drafter, prompts[:1], temperature=temperature, **options)
            paths, speed = paying_paths(found, timed)
        trees[f"{temperature:g}"] = Tree(found, paths, expected(found, paths), speed)
    store.describe(
        folder_of(name),
        dataclasses.replace(saved, trees=saved.trees | {t: tree.paths for t, tree in trees.items()}),
    )
    return trees


def folder_of(name: str) -> Path:
    """Where the drafter NAME:PATH lies, and its trees will."""
    folder = Path(name.partition(":")[2])
    if not folder.is_dir():
        raise UserError(f"The trees are stored beside the drafter and '{folder}' is no folder; copy the drafter there.")
    return folder


def description(name: str, target: Target) -> store.Saved:
    """What is stored of the drafter NAME:PATH; of a plain model, or one calibrated for another target, nothing yet."""
    method, folder = name.partition(":")[0], folder_of(name)
    new = store.Saved(method, {}, store.identity(target))
    if not (folder / store.DESCRIPTION).is_file():
        return new
    saved = store.read(folder)
    if saved.method != method:
        raise UserError(
            f"'{folder}' describes a {saved.method} drafter, which the trees of {method} would replace; copy the model "
            "to a folder of its own and calibrate that."
        )
    return saved if saved.architecture or store.trees_in(folder, method, target, required=False) else new


def timings(target: Target, drafter: Any, prompts: Sequence[Sequence[int]], **options: Any) -> Costs:
    """Seconds of the target's forwards and of one level of the drafter's guesses, for one row."""
    requests, texts = written(target, prompts, **options)
    probe = Probe(drafter)
    probe.watch(target, requests, texts)
    probe.accuracy()  # something was measured
    return dataclasses.replace(measure(target), once=median(probe.first), level=median(probe.further or [0.0]))


def paying_paths(accuracy: Tensor, costs: Costs) -> tuple[list[list[int]], float]:
    """The best tree of the size that yields most tokens per second, and how often it yields plain decoding's.

    The best tree of n paths begins with that of n - 1, so every size is a prefix of one list.
    """
    paths = best_paths(accuracy, costs.most)
    tokens = torch.tensor([expected(accuracy, paths[:n]) for n in range(len(paths) + 1)], dtype=torch.float64)
    levels = torch.tensor([max((len(p) for p in paths[:n]), default=1) for n in range(len(paths) + 1)])
    rates = costs.rates(tokens, levels)
    n = int(rates[1:].argmax()) + 1
    return paths[:n], float(rates[n] * costs.judging([1])[0])


def run(
    model: str,
    drafter: str,
    *,
    prompts: Path | None,
    source: str,
    limit: int,
    prompt_tokens: int,
    nodes: int,
    depth: int,
    temperatures: Sequence[float],
    max_new_tokens: int,
    seed: int,
    dtype: str | None,
    device: str | None,
) -> None:
    """Calibrate on the prompts of a file, or on pieces of a source's training documents, and print what was found."""
    if not drafter.partition(":")[2]:
        raise UserError(f"{drafter!r} names no drafter's folder; give NAME:PATH, such as medusa:runs/medusa.")
    texts = None if prompts is None else batch(prompts)
    target = load(model, dtype=dtype, device=device)
    asked: Iterable[Prompt] = texts or prompts_of(documents(source), target, length=prompt_tokens, cuts=4, seed=seed)
    ids = [ids_of(target, prompt) for prompt in islice(asked, limit)]
    trees = calibrate(
        target,
        drafter,
        ids,
        nodes=nodes,
        depth=depth,
        temperatures=temperatures,
        max_new_tokens=max_new_tokens,
        seed=seed,
    )
    console = Console(highlight=False)
    for temperature, tree in trees.items():
        table = Table("depth", *(f"choice {r + 1}" for r in range(4)), title=f"temperature {temperature}")
        for depth, row in enumerate(tree.accuracy.tolist(), 1):
            table.add_row(str(depth), *(f"{share:.3f}" for share in row[:4]))
        console.print(table)
        found = f"{len(tree.paths)} nodes; {tree.tokens_per_forward:.2f} tokens per forward expected"
        if tree.speed is not None:
            found += f", {tree.speed:.2f} times plain decoding's speed on this machine"
        console.print(f"{found}\n")
