"""A drafter whose whole proposal is one compiled call: what was committed is read, and every level of guesses drawn.

The drafter itself is traced, with caches whose lengths are tensors, for one shape of draft. What a trace cannot hold
is left to the drafter as it is: prompts, guesses drawn from its law for rejection rules, trees whose size depends on
the guesses.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.export import Dim

from foretoken.cache import SlotCache
from foretoken.compiled import CompiledTarget, described, held, traceable, unshared
from foretoken.drafter import Feed, Needs
from foretoken.noise import Noise
from foretoken.plan import Guesser, Plan
from foretoken.planned import PlannedCache
from foretoken.program import Program, Recipe, is_there, program
from foretoken.sampling import Sampler, Sampling
from foretoken.target import Target
from foretoken.tree import Draft, chain

LONG = 64
"""More committed tokens at once are a prompt, or nearly: the drafter reads them itself."""


class Traced(Sampler):
    """What a drafter asks of a sampler: noise and temperature, as tensors of a trace."""

    def __init__(self, settings: Sampling, noise: Noise, vocab: int, temperature: Tensor) -> None:
        self.settings, self.noise, self.vocab, self.temperature = [settings], noise, vocab, temperature
        self.sampled, self.truncated, self.penalised = settings.temperature > 0, False, False
        self.bias = self.counts = None


class Proposal(nn.Module):
    """What is traced."""

    def __init__(self, drafter: Any, modules: Sequence[nn.Module], settings: Sampling, vocab: int) -> None:
        super().__init__()
        self.drafter, self.parts = drafter, nn.ModuleList(modules)
        self.settings, self.vocab = settings, vocab
        with torch.no_grad():
            state = drafter.start(1, 8)
        self.state, self.heads = state, list[Any](getattr(state, "unembeds", []))
        for number, head in enumerate(self.heads):
            self.register_buffer(f"head_{number}", head.weight.detach())

    def forward(
        self,
        tokens: Tensor,
        count: Tensor,
        features: Tensor,
        root: Tensor,
        length: Tensor,
        key: Tensor,
        temperature: Tensor,
        carry: Tensor,
        lengths: list[Tensor],
        stores: list[list[Tensor]],
    ) -> tuple[Tensor, ...]:
        """(tokens, parent, ancestors) of the draft, then carry and lengths; the arguments are a feed's and the state's.

        lengths  per cache of the drafter, [B] committed rows
        stores   its slots, which are written
        """
        caches = [
            PlannedCache(held, at, cache.windows)
            for held, at, cache in zip(stores, lengths, caches_of(self.state), strict=True)
        ]
        state = self._state(caches, carry)
        sampler = Traced(self.settings, Noise(key), self.vocab, temperature)
        counts, none = cast(Any, count), cast(Any, None)  # tensors stand for what a drafter asks of the host
        feed = Feed(tokens, counts, features, root, length, [], 1 << 20, sampler, False, root[:, None], root, none)
        draft = self.drafter.propose(feed, state)
        last = getattr(state, "carry", carry)
        after = [cache.length for cache in caches]
        return draft.tokens, draft.parent.contiguous(), draft.ancestors.contiguous(), last, *after

    def _state(self, caches: list[Any], carry: Tensor) -> Any:
        """The drafter's state over the tensors of the trace."""
        if hasattr(self.state, "cache"):
            return replace(self.state, cache=caches[0])
        if not hasattr(self.state, "caches"):
            return self.state
        if not hasattr(self.state, "carry"):
            return replace(self.state, caches=caches)
        heads = [replace(h, weight=self.get_buffer(f"head_{i}")) for i, h in enumerate(self.heads)]
        return replace(self.state, caches=caches, carry=carry, unembeds=heads)


def caches_of(state: Any) -> list[SlotCache]:
    """A drafter's own caches."""
    return [state.cache] if hasattr(state, "cache") else list(getattr(state, "caches", []))


class CompiledDrafter:
    """A drafter of a compiled target. Its proposals are compiled where a trace can hold them.

    Such guesses do not see a request's bias and truncation, nor how little may still be emitted; no output changes.
    """

    def __init__(self, drafter: Guesser, target: CompiledTarget) -> None:
        self.drafter, self.target = drafter, target
        self.plan: Plan = drafter.plan
        self.programs: dict[float, Program] = {}
        self.absent: set[float] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["drafter"], name)

    @property
    def needs(self) -> Needs:
        return self.drafter.needs

    def start(self, batch: int, capacity: int) -> Any:
        return self.drafter.start(batch, capacity)

    def propose(self, feed: Feed, state: Any) -> Draft:
        caches = caches_of(state)
        M = feed.tokens.shape[1]
        short = all(c.stores and c.longest + M + self.plan.slots <= c.capacity for c in caches)
        if feed.samples or self.plan.worth is not None or self.plan.shape.stop > 0 or M > LONG or not short:
            return self.drafter.propose(feed, state)  # pyright: ignore
        work = self.work(self.heat(feed.sampler), feed)
        if work is None:
            return self.drafter.propose(feed, state)  # pyright: ignore
        features = feed.root.new_zeros(feed.batch, M, 0) if feed.features is None else feed.features
        carry = getattr(state, "carry", feed.root.new_zeros(feed.batch, 0, 0))
        fixed = (feed.tokens, torch.tensor(feed.count), features, feed.root, feed.length)
        sampler = feed.sampler
        out = work(
            *fixed,
            sampler.noise.key,
            sampler.temperature,
            carry,
            *(cache.length for cache in caches),
            *(store for cache in caches for store in cache.stores),
        )
        return self.taken(out, work.facts, state)

    def taken(self, out: list[Tensor], facts: dict[str, Any], state: Any) -> Draft:
        """The draft that the program returned; the state moves on as it did."""
        for cache, lengths in zip(caches_of(state), out[4:], strict=True):
            cache.resize(lengths.tolist(), lengths)
        if hasattr(state, "carry"):
            state.carry = out[3]
        if facts["chained"]:
            return chain(out[0])
        return Draft(out[0], out[1], out[2], facts["height"], False)

    def heat(self, sampler: Sampler) -> float:
        """The temperature that decides the shape of a draft: 0, or that of the nearest tree."""
        hottest = max(s.temperature for s in sampler.settings)
        trees = self.plan.trees
        if not sampler.sampled:
            return 0.0
        return max(1e-3, min(trees, key=lambda t: abs(t - hottest))) if trees else 1.0

    def work(self, heat: float, feed: Feed) -> Program | None:
        """The program for draws of this kind, compiled now if sessions wait for that; None if there is none."""
        if heat not in self.programs and heat not in self.absent:
            if not self.target.programs:  # this session decodes eagerly
                return None
            key = key_of(self.drafter, self.target, heat)
            if not (self.target.wait or is_there(key)):
                self.absent.add(heat)
                return None
            recipe = recipe_for(self.drafter, self.target, key, heat, feed)
            self.programs[heat] = program(recipe, self.target.progress, inductor=self.target.inductor)
        return self.programs.get(heat)


def key_of(drafter: Any, target: CompiledTarget, heat: float) -> tuple[object, ...]:
    """All that the trace of a proposal depends on."""
    plan: Plan = drafter.plan
    network: Any = drafter.model if hasattr(drafter, "model") else drafter.heads
    own = described(network) if isinstance(network, Target) else (repr(network.architecture), held(network))
    how = (type(drafter).__name__, plan.shape, sorted(plan.trees.items()), plan.candidates, heat)
    return ("proposal", *how, *own, *described(target.eager))


def recipe_for(drafter: Any, target: CompiledTarget, key: tuple[object, ...], heat: float, feed: Feed) -> Recipe:
    """How the drafter's proposal is compiled; `feed` shows how large its parts are."""
    known: dict[int, Any] = {}
    settings = Sampling(temperature=heat)
    twin = traceable(target.eager, known)
    made, modules = twin_of(drafter, twin, known)
    B, M, capacity = 2, 3, 48
    size = 0 if feed.features is None else feed.features.shape[2]
    features = torch.zeros(B, M, size, dtype=target.dtype)
    tokens, root = torch.zeros(B, M, dtype=torch.int64), torch.zeros(B, dtype=torch.int64)
    length, noise = torch.full((B,), M), torch.zeros(B, dtype=torch.int64)
    with torch.inference_mode(False), torch.no_grad():
        proposal = Proposal(made, modules, settings, target.vocab)
        state = made.start(B, capacity)
        sampler = Sampler([settings] * B, Noise(noise), target.vocab)
        given = None if feed.features is None else features
        first = Feed(tokens, [M] * B, given, root, length, [], 1 << 20, sampler, False, tokens, root, feed.cache)
        draft = made.propose(
            first, state
        )  # caches get their shapes, and what is kept between calls is not of the trace
        facts = {"height": draft.height, "chained": draft.chained}
    batch, read = Dim("batch"), Dim("read")
    slots, ring = Dim("slots"), Dim("ring")
    caches = caches_of(state)
    stores = [[torch.zeros_like(s) for s in cache.stores] for cache in caches]
    by_cache = [[{0: batch, 2: slots if w is None else ring} for w in c.windows for _ in range(2)] for c in caches]
    carry = getattr(state, "carry", torch.zeros(B, 0, 0, dtype=torch.int64))
    args = (tokens, torch.tensor([M, 2]), features, root, length, noise, torch.ones(B, 1, 1), carry)
    row, rows = {0: batch}, {0: batch, 1: read}
    dynamic = (rows, row, rows, row, row, row, row, row, [row for _ in caches], by_cache)
    return Recipe(key, proposal.eval(), (*args, [c.length for c in caches], stores), dynamic, facts)


def twin_of(drafter: Any, target: Target, known: dict[int, Any]) -> tuple[Any, list[nn.Module]]:
    """The same drafter on copies of its modules over the same weights, and those modules."""
    if hasattr(drafter, "model"):
        model = traceable(drafter.model, known)
        return type(drafter)(model, drafter.plan), [model.model]
    heads = unshared(drafter.heads, known)
    return type(drafter)(target, heads, drafter.plan), [target.model, heads]
