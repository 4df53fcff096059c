"""`foretoken calibrate`: how often each guess of trained heads is right, and the trees that follow from it.

The accuracy of depth d at rank r is the share of steps in which the token d places behind the root was the head's r-th
choice, ranked exactly as drafting ranks it: at temperature 1 under the target's own noise. The best tree for them is
`heads.best_paths` (Medusa, Cai et al. 2024, arXiv:2401.10774, section 2.3.3).
"""

import dataclasses
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from foretoken import saved as store
from foretoken.decode import Request
from foretoken.drafter import Feed, Needs
from foretoken.drafters import make_drafter
from foretoken.errors import UserError
from foretoken.generation import decode_all
from foretoken.heads import Ahead, best_paths, expected
from foretoken.loading import load
from foretoken.prompts import batch
from foretoken.rules import Match
from foretoken.sampling import Sampling
from foretoken.target import Target
from foretoken.training.prompts import Prompt, ids_of, prompts_of
from foretoken.training.sources import documents
from foretoken.tree import Draft, chain

RANKS = 10
"""Choices of each head that are looked at, as in the paper's code."""


@dataclasses.dataclass(frozen=True, slots=True)
class Tree:
    """accuracy [D, R]; the paths chosen for it, best first; what they yield if the depths are independent."""

    accuracy: Tensor
    paths: list[list[int]]
    tokens_per_forward: float


class Probe:
    """Decodes plainly and keeps what the heads would have guessed."""

    def __init__(self, heads: Any) -> None:
        self.heads: Ahead = heads
        self.features = heads.needs.features
        self.guesses: list[tuple[list[int], int, Tensor]] = []  # a row's text, its length, choices [D, R]

    @property
    def needs(self) -> Needs:
        return Needs(1, self.features)

    def start(self, batch: int, capacity: int) -> Any:
        return self.heads.start(batch, capacity)

    def propose(self, feed: Feed, state: Any) -> Draft:
        logits = self.heads.logits(feed, state)
        values = feed.values(logits)
        ranked = [feed.rank(values[:, d : d + 1], d + 1) for d in range(logits.shape[1])]
        best = torch.cat(ranked, 1).topk(min(RANKS, values.shape[-1]), -1).indices.cpu()
        self.guesses += [(text, len(text), guess) for text, guess in zip(feed.texts, best, strict=True)]
        return chain(feed.root[:, None])

    def accuracy(self) -> Tensor:
        """[D, R] over the steps whose next D tokens were emitted in the end."""
        depths = len(self.guesses[0][2])
        whole = [(text[at : at + depths], guess) for text, at, guess in self.guesses if at + depths <= len(text)]
        if not whole:
            raise UserError(f"No output is {depths + 1} tokens long, so nothing was measured; ask for more new tokens.")
        said = torch.tensor([tokens for tokens, _ in whole])
        chosen = torch.stack([guess for _, guess in whole])  # [n, D, R]
        return (chosen == said[..., None]).double().mean(0)


def accuracies(
    target: Target,
    drafter: Any,
    prompts: Sequence[Sequence[int]],
    *,
    temperature: float,
    max_new_tokens: int,
    seed: int,
) -> Tensor:
    """[D, R]: how often the r-th choice of depth d is what the target emits there, over its own output."""
    if not hasattr(drafter, "logits"):
        raise UserError("Only heads that guess all depths from one state have such accuracies; use mtp, medusa, ...")
    probe = Probe(drafter)
    sampling = Sampling(temperature=temperature, seed=seed)
    requests = [Request(tuple(p), sampling, i, max_new_tokens) for i, p in enumerate(prompts)]
    decode_all(target, probe, requests, Match(), batch_size=8)
    return probe.accuracy()


def calibrate(
    target: Target,
    name: str,
    prompts: Sequence[Sequence[int]],
    *,
    nodes: int = 63,
    temperatures: Sequence[float] = (0.0, 1.0),
    max_new_tokens: int = 128,
    seed: int = 0,
) -> dict[str, Tree]:
    """Measure the drafter NAME:PATH and store its best trees beside it, by temperature."""
    path = Path(name.partition(":")[2])
    saved = store.read(path)
    drafter = make_drafter(name, target)
    trees: dict[str, Tree] = {}
    for temperature in temperatures:
        found = accuracies(target, drafter, prompts, temperature=temperature, max_new_tokens=max_new_tokens, seed=seed)
        paths = best_paths(found, nodes)
        trees[f"{temperature:g}"] = Tree(found, paths, expected(found, paths))
    store.describe(path, dataclasses.replace(saved, trees=saved.trees | {t: tree.paths for t, tree in trees.items()}))
    return trees


def run(
    model: str,
    drafter: str,
    *,
    prompts: Path | None,
    source: str,
    limit: int,
    prompt_tokens: int,
    nodes: int,
    temperatures: Sequence[float],
    max_new_tokens: int,
    seed: int,
    dtype: str | None,
    device: str | None,
) -> None:
    """Calibrate on the prompts of a file, or on pieces of a source's training documents, and print what was found."""
    if not drafter.partition(":")[2]:
        raise UserError(f"{drafter!r} names no trained heads; give NAME:PATH, such as medusa:runs/medusa.")
    texts = None if prompts is None else batch(prompts)
    target = load(model, dtype=dtype, device=device)
    asked: Iterable[Prompt] = texts or prompts_of(documents(source), target, length=prompt_tokens, cuts=4, seed=seed)
    ids = [ids_of(target, prompt) for prompt in islice(asked, limit)]
    trees = calibrate(
        target, drafter, ids, nodes=nodes, temperatures=temperatures, max_new_tokens=max_new_tokens, seed=seed
    )
    console = Console(highlight=False)
    for temperature, tree in trees.items():
        table = Table("depth", *(f"choice {r + 1}" for r in range(4)), title=f"temperature {temperature}")
        for depth, row in enumerate(tree.accuracy.tolist(), 1):
            table.add_row(str(depth), *(f"{share:.3f}" for share in row[:4]))
        console.print(table)
        console.print(f"{len(tree.paths)} nodes; {tree.tokens_per_forward:.2f} tokens per forward expected\n")
