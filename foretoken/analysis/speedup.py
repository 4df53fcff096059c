"""What drafts are worth: expected tokens per forward, the time they take, and the draft that pays best.

`survival` [i - 1] is P(the first i guesses are accepted), unconditional; `conditional` [i - 1] the same given that the
i - 1 before it were; `alpha` is one conditional rate for all depths, every guess independent of the others. A is the
number of accepted guesses, tokens per forward (τ) is A + 1: the token that the target emits behind them is always one.
Every function here that ends in `tokens` or returns tokens returns expected τ, not A.

`c` is the time of one draft (a level of guesses) and `v(width)` that of the target's forward, both over the time of a
width-1 forward.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from foretoken.errors import UserError

MOST = 256
"""Guesses of the longest chain that is tried."""

Ratio = Callable[[int], float] | Sequence[float]
"""v: a function of the width, or its values at widths 1, 2, 3, ..."""


def free(width: int) -> float:
    """v = 1: reading the weights takes all the time, however many tokens are judged."""
    return 1.0


# ---------------------------------------------------------------------------------------------------- expected tokens


def tokens_per_forward(survival: Sequence[float]) -> float:
    """1 + the sum of survivals. Assumes nothing."""
    return 1 + math.fsum(survival)


def survival_of(conditional: Sequence[float]) -> list[float]:
    """Survival: the running products of conditional rates."""
    found, product = list[float](), 1.0
    for rate in conditional:
        product *= rate
        found.append(product)
    return found


def conditional_of(survival: Sequence[float]) -> list[float]:
    """Conditional rates of a survival; 0 behind a depth that nothing reaches."""
    before = [1.0, *survival[:-1]]
    return [s / b if b > 0 else 0.0 for s, b in zip(survival, before, strict=True)]


def geometric(alpha: float, guesses: int) -> list[float]:
    """Survival α, α², ... of a chain of `guesses`."""
    return [alpha**i for i in range(1, guesses + 1)]


def accepted_law(survival: Sequence[float]) -> list[float]:
    """P(A = 0), ..., P(A = γ); for one α the capped geometric law α^j (1 - α), and α^γ at γ."""
    ends = [1.0, *survival, 0.0]
    return [here - further for here, further in pairwise(ends)]


def chain_tokens(alpha: float, guesses: int) -> float:
    """(1 - α^(γ+1)) / (1 - α), E[A] + 1 of a chain of γ guesses (Leviathan et al. 2022, arXiv:2211.17192, equation 1).

    K Medusa heads beside the target's own are a chain of γ = K guesses.
    """
    return float(guesses + 1) if alpha == 1 else (1 - alpha ** (guesses + 1)) / (1 - alpha)


def head_tokens(alpha: float, heads: int) -> float:
    """(1 - α^n) / (1 - α) of n heads that include the target's own (Gloeckle et al. 2024, arXiv:2404.19737).

    Head 1 says what follows for certain; the others guess n - 1 tokens.
    """
    return chain_tokens(alpha, heads - 1)


def parallel_tokens(alpha: float, guesses: int, chains: int) -> float:
    """(γ + 1) - Σ_{i=1..γ} (1 - α^i)^b of b independent chains of γ guesses each, the best of which is kept.

    Lookahead's guesses (Fu et al. 2024, arXiv:2402.02057, section 4): the longest of b capped geometric runs, plus 1.
    """
    return guesses + 1 - math.fsum((1 - alpha**i) ** chains for i in range(1, guesses + 1))


def tree_tokens(parent: Sequence[int], acceptance: Sequence[float]) -> float:
    """1 + the sum over nodes of the product of acceptances along their paths.

    parent      [N], as a draft has it: node 0 is the root (-1), parent < node, -1 elsewhere is never accepted
    acceptance  [N], P(the node is accepted | its parent is); the root's is not read. Siblings' add up to 1 at most
    """
    value = [1.0, *[0.0] * (len(parent) - 1)]
    for node in range(1, len(parent)):
        value[node] = value[parent[node]] * acceptance[node] if parent[node] >= 0 else 0.0
    return math.fsum(value)


def most_tokens(alpha: float) -> float:
    """1 / (1 - α): no chain yields more, however long."""
    return math.inf if alpha == 1 else 1 / (1 - alpha)


# --------------------------------------------------------------------------------------------------------- estimating α


def counted_survival(accepted: Sequence[int], guesses: int) -> list[float]:
    """Survival as measured: the share of forwards that accepted i guesses or more, of chains that all had `guesses`."""
    return [sum(a >= i for a in accepted) / len(accepted) for i in range(1, guesses + 1)]


def pooled_alpha(survival: Sequence[float]) -> float:
    """Σ accepted / Σ tried, where a chain's first refused guess is the last one tried.

    Put into `chain_tokens` it over-estimates τ where α differs between contexts: easy contexts try more guesses.
    """
    tried = 1 + math.fsum(survival[:-1])
    return math.fsum(survival) / tried


def mean_alpha(accepted: Sequence[float], tried: Sequence[float]) -> float:
    """The mean over contexts of accepted / tried.

    Put into `chain_tokens` it under-estimates τ where α differs between contexts: E[α^i] >= E[α]^i (Jensen).
    """
    return math.fsum(a / t for a, t in zip(accepted, tried, strict=True)) / len(accepted)


def beta_survival(a: float, b: float, guesses: int) -> list[float]:
    """Survival where each context has its own α, drawn from Beta(a, b): E[α^i] = Π_{j<i} (a + j) / (a + b + j)."""
    return survival_of([(a + j) / (a + b + j) for j in range(guesses)])


def alpha_of(tokens: float, guesses: int) -> float:
    """The α whose chains of `guesses` yield so many tokens per forward, between 1 and guesses + 1."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if chain_tokens(middle, guesses) < tokens else (low, middle)
    return (low + high) / 2


# ----------------------------------------------------------------------------------------------------------- wall clock


def speedup(tokens: float, judging: float, drafting: float, own: float = 0.0, plain: float = 1.0) -> float:
    """How many times faster than plain decoding, which takes `plain` per token.

    A step brings `tokens` and takes `judging` (the target's forward) + `drafting` + `own` (the rest of a step), all in
    the unit of `plain`.
    """
    return tokens * plain / (judging + drafting + own)


def chain_speedup(alpha: float, guesses: int, c: float, v: float = 1.0) -> float:
    """(1 - α^(γ+1)) / ((1 - α) (γc + v)) (arXiv:2211.17192, theorem 3.8, where v = 1)."""
    return speedup(chain_tokens(alpha, guesses), v, guesses * c)


def operations(tokens: float, guesses: int, c: float) -> float:
    """How many times plain decoding's arithmetic: (γĉ + γ + 1) / τ (arXiv:2211.17192, theorem 3.11).

    c is the arithmetic of one guess over that of one token of the target, not its time.
    """
    return (guesses * c + guesses + 1) / tokens


def pays(alpha: float, c: float) -> bool:
    """Whether some chain is faster than none while v = 1: iff α > c (arXiv:2211.17192, corollary 3.9)."""
    return alpha > c


@dataclass(frozen=True, slots=True)
class Yield:
    """What drafts of one size bring.

    guesses     nodes besides the root, so the forward's width is 1 more
    levels      guesses on the longest path: drafts that are made one after the other
    tokens      expected tokens per forward
    speedup     over plain decoding
    operations  arithmetic, over plain decoding's
    """

    guesses: int
    levels: int
    tokens: float
    speedup: float
    operations: float


PLAIN = Yield(0, 0, 1.0, 1.0, 1.0)
"""No guesses: plain decoding."""


def chains(
    acceptance: float | Sequence[float],
    c: float,
    v: Ratio = free,
    own: float = 0.0,
    arithmetic: float | None = None,
    most: int = MOST,
) -> list[Yield]:
    """Chains of 0, 1, 2, ... guesses: as many as survivals are given, at most `most`, and as v is known for.

    acceptance  α, or a survival
    own         the rest of a step that plain decoding does not have, heads of all depths included
    arithmetic  of one guess over one token of the target (None: c)
    """
    survival = geometric(acceptance, most) if isinstance(acceptance, float | int) else list(acceptance)
    found = [PLAIN]
    for n in range(1, known(v, min(len(survival), most)) + 1):
        tokens = tokens_per_forward(survival[:n])
        fast = speedup(tokens, at_width(v, n + 1), n * c, own)
        found.append(Yield(n, n, tokens, fast, operations(tokens, n, c if arithmetic is None else arithmetic)))
    return found


def trees(
    accuracy: Sequence[Sequence[float]],
    c: float,
    v: Ratio = free,
    own: float = 0.0,
    arithmetic: float | None = None,
    most: int = 63,
) -> list[Yield]:
    """The best trees of 0, 1, 2, ... guesses by accuracy [D, R] (`paths.best_paths`), which each begin with the last.

    c is the time of one level, however many guesses it holds.
    """
    import torch  # here, because the formulas need none of it and the command line starts at once without

    from foretoken.paths import best_paths

    paths = best_paths(torch.tensor(accuracy, dtype=torch.float64), known(v, most))
    found, tokens, levels = [PLAIN], 1.0, 0
    for n, path in enumerate(paths, 1):
        tokens += math.prod(accuracy[depth][rank] for depth, rank in enumerate(path))
        levels = max(levels, len(path))
        fast = speedup(tokens, at_width(v, n + 1), levels * c, own)
        found.append(Yield(n, levels, tokens, fast, operations(tokens, n, c if arithmetic is None else arithmetic)))
    return found


def best(tried: Sequence[Yield]) -> Yield:
    """The fastest; of equally fast ones the smallest."""
    return max(tried, key=lambda y: (y.speedup, -y.guesses))


def best_length(
    acceptance: float | Sequence[float], c: float, v: Ratio = free, own: float = 0.0, most: int = MOST
) -> Yield:
    """The chain that is fastest; `PLAIN` (no guesses) where none is faster than plain decoding."""
    return best(chains(acceptance, c, v, own, most=most))


def at_width(v: Ratio, width: int) -> float:
    """v(width)."""
    return v(width) if callable(v) else v[width - 1]


def known(v: Ratio, most: int) -> int:
    """How many guesses, up to `most`, v is known for: their forward is 1 wider."""
    return most if callable(v) else min(most, len(v) - 1)


def between(measured: Mapping[int, float]) -> list[float]:
    """v at widths 1, 2, 3, ... up to the widest that was measured, by straight lines between those (`costs.Costs`).

    Beyond it nothing is known. Times may be in any unit.
    """
    from foretoken.costs import Costs

    if 1 not in measured:
        widths = ", ".join(str(w) for w in sorted(measured)) or "none"
        raise UserError(f"v is given at the widths {widths}; it must be given at width 1 too, where it is 1.")
    order = sorted(measured)
    found = Costs(order, [measured[w] / measured[1] for w in order])
    return found.judging(range(1, order[-1] + 1)).tolist()


def busy(rows: int, operations: float, bandwidth: float, size: int = 2) -> float:
    """The share of a device's peak arithmetic that a forward over `rows` tokens uses, at most.

    operations  per second at the peak
    bandwidth   bytes per second
    size        bytes of a weight, which is read once and does 2 operations per row
    """
    return min(1.0, 2 * rows / size * bandwidth / operations)


# ------------------------------------------------------------------------------------------------------ counting calls


def blockwise_calls(tokens: int, block: float, merged: bool = True) -> int:
    """Forwards that blockwise decoding takes for `tokens` tokens in blocks of k = `block` (on average).

    m / k + 1 if the forward that verifies a block predicts the next one, else 2 m / k (Stern et al. 2018,
    arXiv:1811.03115, sections 3 and 4).
    """
    blocks = math.ceil(tokens / block)
    return blocks + 1 if merged else 2 * blocks


def lookahead_width(window: int, ngram: int, guesses: int) -> int:
    """(W + G)(N - 1) rows of one forward of lookahead decoding (arXiv:2402.02057)."""
    return (window + guesses) * (ngram - 1)


def lookahead_tokens(alpha: float, guesses: int, chains: int, every: float) -> float:
    """(f - 1 + τ) / f, where b guesses are found at every f-th step only and other steps bring one token."""
    return (every - 1 + parallel_tokens(alpha, guesses, chains)) / every
