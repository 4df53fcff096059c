"""Documents 000 and 001: a knowledge base, an assistant's answer."""

# ruff: noqa: RUF001

import torch

from foretoken.analysis.claims.claim import ALPHA, CORRECT, H200, IMPRECISE, SEVEN, WRONG, Claim, llama_parameters
from foretoken.analysis.enumeration import head_overlap, information, marginal
from foretoken.analysis.sizes import medusa, medusa_shared
from foretoken.analysis.speedup import busy, chain_tokens, most_tokens, speedup, tokens_per_forward


def drafting() -> list[Claim]:
    """Of the knowledge base: decoding with drafts."""
    full = next(rows for rows in range(1, 999) if busy(rows, *H200) >= 0.3)
    four, eight = (chain_tokens(ALPHA, n) for n in (4, 8))
    return [
        Claim(
            "000",
            "GPU compute utilization: often <30% during decoding",
            IMPRECISE,
            f"{busy(1, *H200):.2%} of the peak arithmetic at batch 1 on an H200, 30% from {full} rows on",
            f"A bfloat16 weight is 2 bytes and does 2 operations per row, the card {H200[0] / H200[1]:.0f} operations "
            "per byte that it reads (989 TFLOP/s, 4.8 TB/s). It depends on the batch.",
            "busy",
        ),
        Claim(
            "000",
            "Draft model: 10× smaller (e.g., 1B drafting for 70B)",
            WRONG,
            f"1B is {70 / 1:.0f} times smaller than 70B; published pairs: {70 / 4:.1f} and {11e9 / 77e6:.0f} times",
            "Chinchilla 70B with 4B (arXiv:2302.01318), T5-XXL 11B with 77M (arXiv:2211.17192).",
        ),
        Claim(
            "000",
            "single forward pass with K draft tokens prepended",
            WRONG,
            "appended behind the context",
            "A causal model judges guess i from what stands before it.",
        ),
        Claim(
            "000",
            "Mathematically exact: output distribution = target model distribution",
            CORRECT,
            "exact in law, up to rounding",
            "Accepting with min(1, p/q) and drawing from norm(max(p - q, 0)) otherwise gives p: "
            "[acceptance](acceptance.md), enumerated in tests/test_laws.py.",
        ),
        Claim(
            "000",
            "Speedup ∝ acceptance rate × (K / overhead of draft + verify)",
            WRONG,
            f"α = {ALPHA}: {four:.3f} tokens per forward at K = 4, {eight:.3f} at K = 8 "
            f"({eight / four - 1:+.1%}), never more than {most_tokens(ALPHA):.3f}",
            "A guess counts only if all before it were right, so A is capped geometric: τ = (1 - α^(K+1)) / (1 - α), "
            "which saturates at 1 / (1 - α).",
            "chain_tokens, most_tokens",
        ),
    ]


def methods() -> list[Claim]:
    """Of the knowledge base: the methods."""
    llama = llama_parameters(SEVEN)
    three, five = (medusa(SEVEN, n) for n in (3, 5))
    shared = medusa_shared(SEVEN, 1).parameters
    two, weight = torch.eye(2, dtype=torch.float64), torch.full((2,), 0.5, dtype=torch.float64)
    product = head_overlap(weight, two, marginal(weight, two))
    return [
        Claim(
            "000",
            "Head K (new):      predicts token at position t+K+1",
            CORRECT,
            "head k: t + k + 1",
            "Heads stand beside the model's own, which predicts t + 1 (arXiv:2401.10774).",
        ),
        Claim(
            "000",
            "trained on next-token prediction",
            WRONG,
            "head k is trained on the token k + 1 ahead",
            "arXiv:2401.10774, section 2.2.",
        ),
        Claim(
            "000",
            "Accept longest valid prefix",
            CORRECT,
            "the longest path of the tree that passes",
            "arXiv:2401.10774.",
        ),
        Claim(
            "000",
            "heads are tiny (<1% extra parameters)",
            WRONG,
            f"{three.each / 1e6:.2f}M per head at 7B: 3 heads {three.parameters / llama:.1%}, 5 heads "
            f"{five.parameters / llama:.1%}; with a shared output head {shared / 1e6:.1f}M = {shared / llama:.2%} each",
            f"d² + d + dV, of Llama-2-7B's {llama:,} parameters; the published heads have output heads of their own.",
            "medusa, medusa_shared",
        ),
        Claim(
            "000",
            "P(x_{t+1}, x_{t+2}, ..., x_{t+K} | x_{1:t})",
            IMPRECISE,
            "the product of the marginals P(x_{t+i} | x_{1:t}); for two equally likely phrases with no token in common "
            f"it puts {1 - product:.2f} of its mass on phrases that never occur",
            f"The heads see no other's token. Here I(x_1; x_2) = ln 2 = {information(weight, two):.3f} nats.",
            "head_overlap, information",
        ),
        Claim(
            "000",
            "sum of K next-token-prediction losses",
            IMPRECISE,
            "the sum over i = 1..K of the losses at the token i ahead",
            "Only the first is next-token prediction (arXiv:2404.19737, section 2).",
        ),
        Claim(
            "000",
            "Multi-token (Meta) [...] 2-3×",
            IMPRECISE,
            "2.67 to 3.05 times at 7B with 4 heads, 6.39 on bytes with 8",
            "Measured: arXiv:2404.19737, table S2. By τ: 3.50 tokens per forward on code, "
            f"1 + .94 + .84 + .72 = {tokens_per_forward([0.94, 0.84, 0.72]):.2f}.",
            "tokens_per_forward",
        ),
        Claim(
            "000",
            "Lookahead [...] 1.5-2× [...] Near-exact",
            WRONG,
            "exact; 1.5 to 2.3 times claimed, 1.13 to 1.34 measured by others",
            "It verifies like any draft (arXiv:2402.02057); Spec-Bench on an A100 and an RTX 3090.",
        ),
        Claim(
            "000",
            "Eagle [...] 0.5B extra",
            IMPRECISE,
            "0.24B beside 7B, 0.37B beside 13B, 0.56B beside 33B, 0.99B beside 70B",
            "Published sizes, arXiv:2401.15077. It grows with the target: a layer and a projection.",
        ),
    ]


def answer() -> list[Claim]:
    merged, separate = speedup(5, judging=1, drafting=0), speedup(5, judging=1, drafting=1)
    return [
        Claim(
            "001",
            "must be loaded into the processor's high-bandwidth memory (HBM)",
            WRONG,
            "weights lie in that memory; each step streams them from it to the processor",
            "The rest of the argument stands: a step takes at least bytes of weights / bandwidth.",
        ),
        Claim(
            "001",
            "All tokens up to the first mismatch are accepted",
            CORRECT,
            "the longest matching prefix",
            "Greedy speculative decoding; when sampling, a rejection rule or shared noise decides what matches.",
        ),
        Claim(
            "001",
            "four predicted tokens are verified and accepted in one go, the model has achieved a nearly 4x speedup",
            WRONG,
            f"4 + 1 = 5 tokens: {merged:.1f} times where one pass verifies and predicts, {separate:.1f} with a pass "
            "for each as the text describes",
            "The verifying pass emits the token behind the last accepted one too; 5 / 1 and 5 / 2 passes, if a wide "
            "pass takes no longer than a narrow one.",
            "speedup",
        ),
        Claim(
            "001",
            "speedups ranging from **2x to 5x** in decoding speed across various models and tasks",
            IMPRECISE,
            "at batch 1 and with strong drafters; EAGLE-3 in SGLang 2.36 times at batch 1, 1.34 to 1.38 at 48 to 64; "
            "DFlash 5.1 times for 1 client, 2.8 for 32",
            "Measured: arXiv:2503.01840 (H100), arXiv:2602.06036 (B200). The range mixes temperatures and baselines. "
            "Document 000 says the same.",
        ),
    ]
