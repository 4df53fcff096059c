"""Document 002: a course page, and its exercises."""

# ruff: noqa: RUF001

import math

from foretoken.analysis.claims.claim import (
    ALPHA,
    CORRECT,
    IMPRECISE,
    PARAMETERS,
    SEVEN,
    VOCAB,
    WRONG,
    Claim,
    accepted,
    llama_parameters,
)
from foretoken.analysis.sizes import TRAINED, linear, logits_bytes, mtp
from foretoken.analysis.speedup import (
    accepted_law,
    alpha_of,
    beta_survival,
    chain_speedup,
    chain_tokens,
    geometric,
    head_tokens,
    most_tokens,
    pooled_alpha,
    speedup,
    tokens_per_forward,
)


def course_speed() -> list[Claim]:
    """Of the course page: what heads bring."""
    four, eight = (accepted(ALPHA, n) for n in (4, 8))
    mixed = beta_survival(2.1, 0.9, 4)
    pooled = pooled_alpha(mixed)
    law, limit = accepted_law(geometric(ALPHA, 4)), most_tokens(ALPHA)
    return [
        Claim(
            "002",
            "up to [k] drafts. Then [E[A_k] = α(1 - α^k) / (1 - α)]",
            CORRECT,
            f"α = {ALPHA}, k = 4: {four:.4f}; k → ∞: {limit - 1:.3f}",
            "The sum of survivals α^j; the same as Σ j P(A = j) = "
            f"{math.fsum(j * p for j, p in enumerate(law)):.4f} of the capped geometric law.",
            "chain_tokens, accepted_law",
        ),
        Claim(
            "002",
            "bounded above by [1 + α / (1 - α)]",
            CORRECT,
            f"tokens per forward ≤ 1 / (1 - α) = {limit:.3f} at α = {ALPHA}",
            "1 + α / (1 - α) = 1 / (1 - α). It bounds tokens per forward, hence speed too as v >= 1.",
            "most_tokens",
        ),
        Claim(
            "002",
            "expected wall-clock speedup over single-token decoding is [1 + E[A_k]]",
            WRONG,
            f"(1 + E[A]) / (v + γc); at α = {ALPHA}, γ = 4, c = 0.1: {chain_speedup(ALPHA, 4, 0.1):.3f}, not "
            f"{chain_tokens(ALPHA, 4):.3f}; with v = 1.2 besides {chain_speedup(ALPHA, 4, 0.1, 1.2):.3f}",
            "Equal only if guesses cost nothing and a wide forward takes as long as a narrow one (arXiv:2211.17192, "
            "theorem 3.8).",
            "chain_speedup",
        ),
        Claim(
            "002",
            "Expected Speedup from k-Head Speculative Decoding [...] up to [k] drafts",
            WRONG,
            f"k heads guess k - 1 tokens: (1 - α^k) / (1 - α) per forward, {head_tokens(ALPHA, 4):.3f} and not "
            f"{chain_tokens(ALPHA, 4):.3f} at k = 4, α = {ALPHA}",
            "Head 1 verifies, as the page says further down. Medusa's K heads are besides and do guess K.",
            "head_tokens, chain_tokens",
        ),
        Claim(
            "002",
            "generate [k - 1] draft tokens in parallel (one forward pass)",
            CORRECT,
            "heads 2 to k guess k - 1 tokens",
            "arXiv:2404.19737, section 2.",
        ),
        Claim(
            "002",
            "only moves expected accepted drafts from [1.93] to [2.25]",
            WRONG,
            f"{four:.4f} to {eight:.4f} (tokens per forward {four + 1:.3f} to {eight + 1:.3f}, "
            f"{(eight + 1) / (four + 1) - 1:+.1%})",
            f".7 (1 - .7^4) / .3 and .7 (1 - .7^8) / .3. No α gives both: 1.93 at k = 4 needs {alpha_of(2.93, 4):.3f}, "
            f"2.25 at k = 8 {alpha_of(3.25, 8):.3f}.",
            "chain_tokens, alpha_of",
        ),
        Claim(
            "002",
            "Real acceptance events are positively correlated: [...] This makes the bound an upper estimate",
            WRONG,
            f"at the same mean α it under-estimates: with α ~ Beta(2.1, .9) over contexts, k = 4, E[A] is "
            f"{tokens_per_forward(mixed) - 1:.3f} and the formula at the mean {mixed[0]:.3f} says "
            f"{accepted(mixed[0], 4):.3f}. It over-estimates with the pooled α = {pooled:.3f}: "
            f"{accepted(pooled, 4):.3f}",
            "E[α^j] >= E[α]^j (Jensen). Pooling accepted / tried weighs easy contexts more, where more guesses are "
            "tried. What follows the first rejection counts for nothing, so its correlation is irrelevant. Real τ is "
            "lower because α falls with depth; real speed because of v and c.",
            "beta_survival, pooled_alpha, chain_tokens",
        ),
        Claim(
            "002",
            "Medusa and EAGLE papers use [k] in the range of 3 to 5",
            IMPRECISE,
            "Medusa 5 heads, trees of depth 4; EAGLE depth 5; EAGLE-2 6; EAGLE-3 up to 8",
            "Published: arXiv:2401.10774, 2401.15077, 2406.16858, 2503.01840 and their code.",
        ),
    ]


def course_costs() -> list[Claim]:
    """Of the course page: what heads cost, and what they are good for."""
    extra, all_four = linear(SEVEN, 3), linear(SEVEN, 4)
    llama, layer = llama_parameters(SEVEN), mtp(SEVEN, 3)
    logits, single = (logits_bytes(2048, VOCAB, n) for n in (4, 1))
    trunk = TRAINED * PARAMETERS
    return [
        Claim(
            "002",
            "By linearity of the gradient and the chain rule",
            CORRECT,
            "the trunk's gradient is the sum over heads, exactly",
            "Hence head-by-head training: tests/test_backward.py compares it with the joint loss.",
        ),
        Claim(
            "002",
            "a separate linear layer mapping from the trunk's hidden dimension",
            IMPRECISE,
            f"Meta's heads are a transformer layer each, {layer.each / 1e6:.1f}M at 7B, 3 of them "
            f"{layer.parameters / 1e6:.0f}M = {layer.parameters / llama:.1%} of Llama-2-7B; the output head is shared "
            "and the trunk as many layers shorter. k - 1 are additional, not k",
            "4d² + 3dF + 2d with F = 11,008. Plain d × V heads are the paper's variants (arXiv:2404.19737, section 2).",
            "mtp",
        ),
        Claim(
            "002",
            "(393M extra parameters) adds about 5.6% to the model size",
            CORRECT,
            f"{extra.parameters:,} ({extra.parameters + 3 * VOCAB:,} with biases); {extra.parameters / PARAMETERS:.3%} "
            f"of 7e9, {extra.parameters / llama:.2%} of Llama-2-7B's {llama:,}",
            "3dV, for plain d × V heads.",
            "linear",
        ),
        Claim(
            "002",
            "GB of activations in float32, on top of the trunk's activations",
            CORRECT,
            f"{logits:,} B = {logits / 1e9:.3f} GB = {logits / 2**30:.3f} GiB per sequence",
            f"4 · 2048 · 32000 · 4 B. Their gradients take as much again ({2 * logits / 1e9:.2f} GB in all).",
            "logits_bytes",
        ),
        Claim(
            "002",
            "This reduces peak memory from [O(kTV)] to [O(TV)]",
            CORRECT,
            f"{logits / 1e9:.3f} GB to {single / 1e9:.3f} GB",
            "One head's logits at a time (arXiv:2404.19737, section 2).",
            "logits_bytes",
        ),
        Claim(
            "002",
            "GFLOP per token.\n\nHead forward + backward: [6kdV] [≈ 3.15] GFLOP per token",
            CORRECT,
            f"{all_four.training / 1e9:.4f} GFLOP, beside {trunk / 1e9:.0f} of the trunk; ratio kdV / N = "
            f"{all_four.training / trunk:.2%}",
            "6 operations per weight and token, forward and backward. All four heads: see the next row.",
            "linear",
        ),
        Claim(
            "002",
            "The auxiliary heads add about [3.15 / 42 ≈ 7.5%] to the per-token compute",
            WRONG,
            f"{extra.training / 1e9:.3f} GFLOP = {extra.training / trunk:.2%}",
            "6 · 3 · dV: the first of the four heads is in the 42 already.",
            "linear",
        ),
        Claim(
            "002",
            "Open-ended text: marginal improvement",
            IMPRECISE,
            "none to negative at 7B: 2 heads on par, 4 worse on choice tasks; summaries better (ROUGE-L +.28 to +.51)",
            "Measured: arXiv:2404.19737, section 3.7.",
        ),
        Claim(
            "002",
            "accepts drafts under speculative-decoding rejection sampling",
            IMPRECISE,
            "typical acceptance by default at temperatures above 0, which is not exact; exact at 0",
            "Rejection is possible too (arXiv:2401.10774): [acceptance](acceptance.md).",
        ),
    ]


def exercises() -> list[tuple[str, str]]:
    """(exercise of document 002, answer)."""
    extra = linear(SEVEN, 3)
    two = chain_tokens(ALPHA, 4)
    return [
        (
            "Core: parameters of heads 2, 3, 4 at d = 4096, V = 32,000, and their share of 7B",
            f"3dV = {extra.parameters:,}; {extra.parameters / PARAMETERS:.1%}.",
        ),
        (
            "Advanced: trained with k = 8, decoded with head 1 alone: better than k = 1?",
            "Not clearly on code: at 7B and 200B tokens MBPP pass@1 30.7 against 30.0 and HumanEval 20.0 against 22.8, "
            "while 4 heads have 33.8 and 24.0 (arXiv:2404.19737, table 1). On open-ended text no: 2 heads are on par, "
            "4 worse on choice tasks. Heads weigh tokens that decide the next ones more, n(n + 1) / 2 = "
            f"{8 * 9 // 2} against n = 8, but far targets are noisy and take capacity; below about 1.3B parameters "
            "they hurt. On bytes 8 heads are the best of those tried (32.3 against 19.3).",
        ),
        (
            "Research: expected tokens and speed-up of Medusa's k heads",
            "E[A] = α(1 - α^k) / (1 - α), tokens per forward (1 - α^(k+1)) / (1 - α), speed-up that over v where "
            f"verification dominates. α = {ALPHA}, k = 4: {two - 1:.3f}, {two:.3f}, and {speedup(two, 1.2, 0):.3f} "
            "times at v = 1.2. With a tree 1 + Σ over nodes of the product of acceptances along the path. Under "
            "typical acceptance α belongs to the rule, and the output's law is not the target's.",
        ),
    ]
