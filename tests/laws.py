"""Laws on a tiny vocabulary: exact, by enumeration, and tested, by sampling.

A toy language model is a table with one law per prefix. The exact way enumerates every draft that can come and, for
each, everything a rule may do with it, by asking the rule itself: a threshold of a uniform is found by bisection, the
law of the last token by bisection of the exponential race that draws it. The rule is a black box, so wrong rules go the
same way.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from foretoken.drafter import Feed
from foretoken.grow import Growth
from foretoken.noise import Noise
from foretoken.plan import Plan
from foretoken.rules import Rule
from foretoken.sampling import Sampler, Sampling, Scores
from foretoken.tree import Draft, fresh, tree

LOW, HIGH, NEVER = 1e-300, 1 - 2.0**-53, 1e30
"""A uniform that accepts whatever can be; one that rejects whatever can be; an exponential that never wins."""

ALARM = 1e-8
"""Rate at which one right sampler would be called wrong: 1e-6 for all such tests together, fewer than a hundred."""


class ToyLM:
    """Logits [V] for every prefix of at most `depth` tokens. The empty one has code 0, t after code c cV + t + 1."""

    def __init__(self, vocab: int, depth: int, seed: int, spread: float = 1.0) -> None:
        self.vocab = vocab
        codes = (vocab ** (depth + 1) - 1) // (vocab - 1)
        generator = torch.Generator().manual_seed(seed)
        self.table = spread * torch.randn(codes, vocab, generator=generator, dtype=torch.float64)

    def logits(self, code: Tensor) -> Tensor:
        """[..., V]; deeper prefixes than the table has, which no test looks at, get its last law."""
        return self.table[code.clamp(max=len(self.table) - 1)]

    def law(self, code: Tensor) -> Tensor:
        return self.logits(code).softmax(-1)

    def after(self, code: Tensor, token: Tensor | int) -> Tensor:
        return code * self.vocab + token + 1

    def prefixes(self, length: int) -> Tensor:
        """[V ** length]: the codes of all prefixes of that length, in lexicographic order."""
        code = torch.zeros(1, dtype=torch.int64)
        for _ in range(length):
            code = self.after(code[:, None], torch.arange(self.vocab)).flatten()
        return code

    def joint(self, length: int) -> Tensor:
        """[V ** length]: the probability of every sequence, in lexicographic order."""
        law = torch.ones(1, dtype=torch.float64)
        for n in range(length):
            law = (law[:, None] * self.law(self.prefixes(n))).flatten()
        return law

    def nodes(self, prefix: Tensor, tokens: Tensor, ancestors: Tensor) -> Tensor:
        """[B, n] codes of nodes that follow `prefix` [B] by those of `tokens` [B, m] that they see [B, n, m]."""
        code = prefix[:, None].expand(ancestors.shape[:2])
        for j in range(tokens.shape[1]):
            code = torch.where(ancestors[..., j], self.after(code, tokens[:, j, None]), code)
        return code

    def at_draft(self, prefix: Tensor, draft: Draft) -> Tensor:
        """[B, N] codes of a draft's nodes; the root is the last token of `prefix` [B]."""
        return self.nodes(prefix, draft.tokens[:, 1:], draft.ancestors[:, :, 1:])


def table(logits: Tensor) -> ToyLM:
    """The toy model with these logits [codes, V]."""
    lm = ToyLM(logits.shape[1], 0, 0)
    lm.table = logits
    return lm


def distance(a: Tensor, b: Tensor) -> float:
    """Total variation distance."""
    return float((a - b).abs().sum() / 2)


# ----------------------------------------------------------------------------------------------------------- exact laws


class Dial:
    """Noise set by hand: u [B, N] uniforms of the accept tests, race [B, V] log-exponentials of every draw."""

    def __init__(self, u: Tensor, race: Tensor) -> None:
        self.u, self.race, self.key = u, race, torch.zeros(len(u), dtype=torch.int64)

    def uniform(self, position: Tensor, index: Tensor, stream: int = 0) -> Tensor:
        return self.u[:, None, index]

    def log_exponential(self, position: Tensor, tokens: Tensor, stream: int = 0) -> Tensor:
        return self.race[:, None, tokens].expand(-1, position.shape[1], -1)


@dataclass
class Guesses:
    """Every draft that may follow each of some prefixes, R in all, with the target's logits at its nodes.

    prefix  [R] codes
    draft   of R rows
    weight  [R] probability of the draft given its prefix
    logits  [R, N, V]
    """

    prefix: Tensor
    draft: Draft
    weight: Tensor
    logits: Tensor

    def judge(self, rule: Rule, u: Tensor, race: Tensor):
        """What `rule` makes of the drafts with these uniforms and exponentials."""
        one = torch.ones(len(u), 1, 1)
        position = torch.zeros(len(u), dtype=torch.int64)
        scores = Scores(self.draft, self.logits, one, Dial(u, race), position, sampled=True)  # pyright: ignore
        return rule(self.draft, scores)

    def repeated(self, times: int) -> "Guesses":
        d = self.draft
        q = None if d.q is None else d.q.repeat(times, 1, 1)
        certain = None if d.certain is None else d.certain.repeat(times, 1)
        draft = Draft(
            d.tokens.repeat(times, 1),
            d.parent.repeat(times, 1),
            d.ancestors.repeat(times, 1, 1),
            d.height,
            d.chained,
            q,
            certain,
        )
        return Guesses(self.prefix.repeat(times), draft, self.weight.repeat(times), self.logits.repeat(times, 1, 1))


def guesses(
    target: ToyLM,
    drafter: ToyLM,
    prefixes: Tensor,
    depth: int,
    width: int = 1,
    *,
    stop: float = 0.0,
    drop: bool = False,
    law: bool = True,
    best: bool = False,
    change: Callable[[Draft, Tensor], Draft] = lambda draft, prefix: draft,
) -> Guesses:
    """All drafts of `width` paths drawn at the root without replacement, each going on alone to `depth`.

    stop  a row ends behind a level whose tokens are all less likely than this
    drop  and loses that level (a wrong thing)
    law   whether the drafts carry q
    best  instead of drawing, the likeliest tokens, in order (with a law: a wrong thing)
    change  what becomes of the drafts behind their prefixes [R]
    """
    rows = [
        (int(prefix), *draft)
        for prefix in prefixes
        for draft in paths(drafter, int(prefix), depth, width, stop, drop, best)
    ]
    tokens = torch.tensor([[0, *r[1]] for r in rows])
    parent = torch.tensor([r[2] for r in rows])
    prefix, weight = torch.tensor([r[0] for r in rows]), torch.tensor([r[3] for r in rows], dtype=torch.float64)
    draft = tree(tokens, parent)
    q = drafter.law(drafter.at_draft(prefix, draft)) if law else None
    draft = change(Draft(tokens, parent, draft.ancestors, draft.height, draft.chained, q), prefix)
    return Guesses(prefix, draft, weight, target.logits(target.at_draft(prefix, draft)))


def paths(
    lm: ToyLM, prefix: int, depth: int, width: int, stop: float, drop: bool, best: bool
) -> Iterator[tuple[list[int], list[int], float]]:
    """(tokens, parent, probability) of every draft behind `prefix`, level by level; a lost node has parent -1."""

    def law(code: int) -> list[float]:
        return lm.law(torch.tensor(code)).tolist()

    def level(n: int, codes: list[int]) -> Iterator[tuple[list[int], float, float]]:
        """(tokens, probability, likeliest token's) of one level behind the last one's codes."""
        laws = [law(c) for c in codes]
        if n > 0:
            every = itertools.product(range(lm.vocab), repeat=width)
        else:
            every, laws = itertools.permutations(range(lm.vocab), width), laws * width
        if best:
            order = [sorted(range(lm.vocab), key=lambda t, q=q: -q[t]) for q in laws]
            every = [tuple(order[i][i if n == 0 else 0] for i in range(width))]
        for tokens in every:
            chance, used = 1.0, 0.0
            for i, (q, t) in enumerate(zip(laws, tokens, strict=True)):
                if n == 0 and used > 1 - 1e-12:  # all that the drafter can say is drawn: any other token
                    chance *= 1 / (lm.vocab - i)
                else:
                    chance *= q[t] / (1 - used)
                used += q[t] if n == 0 else 0.0
            if best or chance > 0:
                yield list(tokens), 1.0 if best else chance, max(q[t] for q, t in zip(laws, tokens, strict=True))

    def rest(n: int, codes: list[int], going: bool) -> Iterator[tuple[list[int], list[int], float]]:
        if n == depth:
            yield [], [], 1.0
            return
        first = 0 if n == 0 else 1 + (n - 1) * width
        parent = [first + (i if n else 0) for i in range(width)]
        if not going:
            for tokens, parents, chance in rest(n + 1, codes, False):
                yield [0] * width + tokens, [-1] * width + parents, chance
            return
        for tokens, chance, most in level(n, codes):
            deeper = [
                int(lm.after(torch.tensor(c), t)) for c, t in zip(codes * (1 if n else width), tokens, strict=True)
            ]
            ends = most < stop
            for more, parents, later in rest(n + 1, deeper, not ends):
                yield tokens + more, ([-1] * width if ends and drop else parent) + parents, chance * later

    for tokens, parents, chance in rest(0, [prefix], True):
        yield tokens, [-1, *parents], chance


@dataclass
class Branch:
    """One thing that a rule may do with each of R drafts: its probability [R], last node [R], next law [R, V]."""

    chance: Tensor
    last: Tensor
    law: Tensor | None


def branches(rule: Rule, given: Guesses, laws: bool = True) -> list[Branch]:
    """Everything that a rule which judges nodes in order, one uniform each, may do."""
    R, N = given.draft.tokens.shape
    found: list[Branch] = []

    def walk(n: int, at: Tensor, chance: Tensor, u: Tensor) -> None:
        if not bool((chance > 0).any()):
            return
        if n == N:
            found.append(Branch(chance, at, next_law(rule, given, u) if laws else None))
            return
        asked = given.draft.parent[:, n] == at
        accept = torch.where(asked, threshold(rule, given, u, n), 0.0)
        for share, level, end in ((accept, LOW, torch.where(asked, n, at)), (1 - accept, HIGH, at)):
            turned = u.clone()
            turned[:, n] = level
            walk(n + 1, end, chance * share, turned)

    root = torch.zeros(R, dtype=torch.int64)
    walk(1, root, torch.ones(R, dtype=torch.float64), torch.full((R, N), HIGH, dtype=torch.float64))
    return found


def block_branches(rule: Rule, given: Guesses, laws: bool = True) -> list[Branch]:
    """Everything that a rule which keeps a chain up to the last node whose own uniform passes may do."""
    R, N = given.draft.tokens.shape
    u = torch.full((R, N), HIGH, dtype=torch.float64)
    later, found = torch.ones(R, dtype=torch.float64), []
    for n in range(N - 1, -1, -1):
        share = threshold(rule, given, u, n) if n else torch.ones(R, dtype=torch.float64)
        share = torch.where(given.draft.parent[:, n] >= 0, share, float(n == 0))
        turned = u.clone()
        turned[:, n] = LOW
        law = next_law(rule, given, turned) if laws else None
        found.append(Branch(later * share, torch.full((R,), n), law))
        later = later * (1 - share)
    return found


def threshold(rule: Rule, given: Guesses, u: Tensor, n: int) -> Tensor:
    """[R]: the probability that node n is on the accepted path, given the other uniforms."""
    R, V = len(u), given.logits.shape[-1]
    low, high = torch.zeros(R, dtype=torch.float64), torch.ones(R, dtype=torch.float64)
    for step in range(56):
        middle = torch.full_like(low, HIGH) if step == 0 else (low + high) / 2
        turned = u.clone()
        turned[:, n] = middle.clamp(min=LOW)
        accepted = given.judge(rule, turned, torch.zeros(R, V, dtype=torch.float64))
        kept = torch.arange(given.draft.width) < accepted.count[:, None]
        taken = ((accepted.path == n) & kept).any(-1)
        low, high = torch.where(taken, middle, low), torch.where(taken, high, middle)
        if step == 0:  # certain, but for a uniform of 1
            low, high = torch.where(taken, 1.0, low), torch.where(taken, 1.0, torch.ones_like(high))
    return low


def next_law(rule: Rule, given: Guesses, u: Tensor) -> Tensor:
    """[R, V]: the law of the token behind the accepted path, from where each token starts to beat the likeliest."""
    R, V = len(u), given.logits.shape[-1]
    peak = given.judge(rule, u, torch.zeros(R, V, dtype=torch.float64)).next.repeat(V)
    rival = torch.arange(V).repeat_interleave(R)
    many, us = given.repeated(V), u.repeat(V, 1)
    low, high = torch.full((R * V,), -700.0, dtype=torch.float64), torch.ones(R * V, dtype=torch.float64)
    everywhere = torch.arange(R * V)

    def wins(handicap: Tensor) -> Tensor:
        race = torch.full((R * V, V), NEVER, dtype=torch.float64)
        race[everywhere, peak] = 0.0
        race[everywhere, rival] = handicap
        return many.judge(rule, us, race).next == rival

    possible = wins(low)
    for _ in range(64):
        middle = (low + high) / 2
        won = wins(middle)
        low, high = torch.where(won, middle, low), torch.where(won, high, middle)
    mass = torch.where(possible, low.exp(), 0.0).where(rival != peak, 1.0).view(V, R).T
    return mass / mass.sum(-1, keepdim=True)


def output_law(rule: Rule, target: ToyLM, drafter: ToyLM, length: int, *, in_order: bool = True, **how) -> Tensor:
    """[V ** length]: the law of the first `length` tokens that come out of round after round; `how` as in `guesses`."""
    V = target.vocab
    starts = [int(target.prefixes(n)[0]) for n in range(length + 1)]
    given = guesses(target, drafter, torch.arange(starts[length]), **how)
    out = [torch.zeros(V**n, V ** (length - n), dtype=torch.float64) for n in range(length)]
    out.append(torch.ones(V**length, 1, dtype=torch.float64))
    ways = (branches if in_order else block_branches)(rule, given)
    for r in reversed(range(len(given.weight))):  # longer prefixes first: shorter ones go on with their laws
        prefix = int(given.prefix[r])
        done = max(n for n in range(length) if starts[n] <= prefix)
        for branch in ways:
            assert branch.law is not None
            if (chance := float(given.weight[r] * branch.chance[r])) > 0:
                on_path = given.draft.ancestors[r, int(branch.last[r])].nonzero().flatten()[1:]
                tokens = given.draft.tokens[r, on_path].tolist()
                add(out[done:], prefix - starts[done], tokens, chance * branch.law[r], V)
    return out[0][0]


def add(laws: list[Tensor], row: int, tokens: list[int], last: Tensor, V: int) -> None:
    """Add to laws[0][row] the accepted `tokens`, a last one of mass [V], and laws[n] behind n of them."""
    left = len(laws) - 1
    index = 0
    for t in tokens[:left]:
        index = index * V + t
    if len(tokens) >= left:
        laws[0][row, index] += last.sum()
        return
    taken = len(tokens) + 1
    size = V ** (left - taken)
    for t in range(V):
        at = index * V + t
        laws[0][row, at * size : (at + 1) * size] += last[t] * laws[taken][row * V**taken + at]


def expected_count(rule: Rule, given: Guesses, *, in_order: bool = True) -> float:
    """Expected tokens of one round behind the one prefix of `given`."""
    found = (branches if in_order else block_branches)(rule, given, laws=False)
    depth = given.draft.depth
    return sum(
        float((given.weight * b.chance * (1 + depth.gather(1, b.last[:, None]).squeeze(1))).sum()) for b in found
    )


# ------------------------------------------------------------------------------------------------------------- sampling


@dataclass
class Samples:
    """tokens [B, length] of B requests, and `count` [B], the tokens of each one's first round."""

    tokens: Tensor
    count: Tensor


def toy_feed(sampler: Sampler, length: Tensor, samples: bool) -> Feed:
    """What a drafter that looks at nothing but the noise is told."""
    nothing = torch.zeros(len(length), 1, dtype=torch.int64)
    return Feed(
        tokens=nothing,
        count=[1] * len(length),
        features=None,
        root=nothing[:, 0],
        length=length,
        texts=[[]] * len(length),
        budget=1 << 20,
        sampler=sampler,
        samples=samples,
        emitted=nothing,
        last=nothing[:, 0],
        cache=None,  # pyright: ignore
    )


def grown(plan: Plan, drafter: ToyLM, feed: Feed, prefix: Tensor) -> Draft:
    """The library's own trees over a toy drafter."""
    read = [1]

    def extend(growth: Growth) -> Tensor:
        assert growth.first == sum(read)
        read.append(growth.fresh.shape[1])
        assert torch.equal(growth.seen.sum(-1) - 1, growth.depth)
        assert bool((growth.above < growth.first).all())
        return drafter.logits(drafter.nodes(prefix, growth.tokens[:, 1:], growth.seen[..., 1:]))

    return plan.draft(feed, drafter.logits(prefix)[:, None], extend)


def sampled(
    rule: Rule,
    target: ToyLM,
    draft,
    count: int,
    *,
    length: int = 3,
    seed: int = 0,
    settings: tuple[Sampling, ...] = (Sampling(temperature=1.0),),
    wrap=lambda noise: noise,
) -> Samples:
    """`count` requests decoded round after round until each has `length` tokens.

    draft     (feed, prefix [B] codes) -> Draft
    settings  of request i, the entry i modulo their number
    wrap      what becomes of the noise before anyone sees it
    """
    noise = wrap(Noise.of([seed] * count, list(range(count)), torch.device("cpu")))
    sampler = Sampler([settings[i % len(settings)] for i in range(count)], noise, target.vocab)
    out = torch.zeros(count, length, dtype=torch.int64)
    done, prefix = torch.zeros(count, dtype=torch.int64), torch.zeros(count, dtype=torch.int64)
    first = None
    with torch.inference_mode():
        while bool((done < length).any()):
            guess = draft(toy_feed(sampler, done, rule.samples), prefix)
            logits = target.logits(target.at_draft(prefix, guess))
            accepted = rule(guess, sampler.scores(logits, guess, done + 1, [[]] * count))
            new = fresh(guess, accepted)
            for i in range(int(accepted.count.max())):
                real = (i < accepted.count) & (done < length)
                out[real, done[real]] = new[real, i]
                prefix = torch.where(real, target.after(prefix, new[:, i]), prefix)
                done = done + real
            first = accepted.count if first is None else first
    assert first is not None
    return Samples(out, first)


def counts_of(tokens: Tensor, vocab: int) -> Tensor:
    """[V ** length]: how often each sequence came, in lexicographic order."""
    code = torch.zeros(len(tokens), dtype=torch.int64)
    for i in range(tokens.shape[1]):
        code = code * vocab + tokens[:, i]
    return torch.bincount(code, minlength=vocab ** tokens.shape[1])


def chi_square(observed: Tensor, law: Tensor, least: float = 10.0) -> float:
    """The p-value of counts under a law, both [cells]; cells that expect fewer than `least` are pooled.

    A count where the law has no mass makes it 0.
    """
    observed, law = observed.double(), law.double()
    if bool((observed[law <= 0] > 0).any()):
        return 0.0
    expected = law / law.sum() * observed.sum()
    small = expected < least
    if bool(small.any()):
        observed = torch.cat([observed[~small], observed[small].sum()[None]])
        expected = torch.cat([expected[~small], expected[small].sum()[None]])
        observed, expected = observed[expected > 0], expected[expected > 0]
    statistic = ((observed - expected) ** 2 / expected).sum()
    freedom = torch.tensor(max(1, len(expected) - 1), dtype=torch.float64)
    return float(torch.special.gammaincc(freedom / 2, statistic / 2))


def p_value(samples: Samples, target: ToyLM) -> float:
    """Of the joint law of all sampled tokens under the target."""
    length = samples.tokens.shape[1]
    return chi_square(counts_of(samples.tokens, target.vocab), target.joint(length))
