"""Documents 003 and 004: an article, a paper's summary."""

# ruff: noqa: RUF001

import torch

from foretoken.analysis.claims.claim import CORRECT, HIDDEN, IMPRECISE, SEVEN, VOCAB, WRONG, Claim
from foretoken.analysis.enumeration import best_head, head_overlap, joint, marginal
from foretoken.analysis.sizes import logits_bytes
from foretoken.analysis.speedup import blockwise_calls


def article() -> list[Claim]:
    m, k = 1000, 4
    apart, merged = blockwise_calls(m, k, merged=False), blockwise_calls(m, k)
    attention, mlp = 4 * HIDDEN**2, 3 * HIDDEN * SEVEN.inner
    logits, single = (logits_bytes(2048, VOCAB, n) / 1e9 for n in (4, 1))
    return [
        Claim(
            "003",
            "a pretrained decoder‑only Transformer",
            IMPRECISE,
            "an encoder-decoder Transformer for translation, a decoder for images",
            "arXiv:1811.03115, section 7.",
        ),
        Claim(
            "003",
            "a shared FFN for widening the logit dimension",
            WRONG,
            "one layer with hidden size k·d_h and output k·d, split in k; the residual is the layer's input, a hidden "
            "state and no logit",
            "arXiv:1811.03115, section 6.",
        ),
        Claim(
            "003",
            "reduces to 2m/k steps, yielding a 1× speed‑up when k=4",
            WRONG,
            f"{m / apart:.0f} times: {apart} calls for {m} tokens",
            "m / (2m / 4). The article counts what is gained beyond 1.",
            "blockwise_calls",
        ),
        Claim(
            "003",
            "further reduces steps to 1 + m/k, achieving up to 3× acceleration for k=4",
            WRONG,
            f"{m / merged:.2f} times at m = {m} ({merged} calls), 4m / (m + 4) < 4 in general; measured 2.69 at k = 4, "
            "3.31 at most (k = 8)",
            "m / (1 + m / 4); measurements of arXiv:1811.03115, newstest2014.",
            "blockwise_calls",
        ),
        Claim(
            "003",
            "full Transformer layer (self‑attention + two FFNs)",
            IMPRECISE,
            f"self-attention and one feed-forward network: {attention / 1e6:.1f}M + {mlp / 1e6:.1f}M at 7B",
            f"4d² + 3dF, and 2d of norms: {SEVEN.last.parameters / 1e6:.1f}M.",
            "Target.llama_layer",
        ),
        Claim(
            "003",
            "Training loss is computed for all heads in parallel",
            WRONG,
            f"one head after the other, so that memory holds one head's logits: {single:.3f} GB, not {logits:.3f}",
            "arXiv:2404.19737, section 2 (4 heads, 2,048 tokens, V = 32,000, float32).",
            "logits_bytes",
        ),
        Claim(
            "003",
            "residual connections in the embedding layer",
            WRONG,
            "the normed embedding and the normed state are concatenated and projected",
            "arXiv:2412.19437, equation 21.",
        ),
        Claim(
            "003",
            "linearly project with matrix M_k ∈ ℝ^{d×2d}",
            CORRECT,
            "M_k ∈ R^{d×2d}",
            "arXiv:2412.19437, equation 21. The released weights concatenate the embedding first.",
        ),
        Claim(
            "003",
            "to get token probabilities for position i+k",
            WRONG,
            "position i + k + 1",
            "The module has read the embedding of t_{i+k} (arXiv:2412.19437, equation 23).",
        ),
        Claim(
            "003",
            "label indices ranging from 2+k to T+1",
            CORRECT,
            "2 + k to T + 1",
            "arXiv:2412.19437, equation 24.",
        ),
        Claim(
            "003",
            "(the sequence length plus an EOS token)",
            WRONG,
            "T is the number of inputs; token T + 1 is the last label, whatever it is",
            "arXiv:2412.19437, equation 24.",
        ),
        Claim(
            "003",
            "the sum of cross‑entropy losses over all heads",
            WRONG,
            "(λ / D) Σ_k L_k, λ = 0.3 for the first 10T tokens, then 0.1",
            "arXiv:2412.19437, equation 25 and section 4.2.",
        ),
        Claim(
            "003",
            "Each head’s loss is computed independently, allowing parallel gradient updates",
            WRONG,
            "modules are chained: module k reads the states of module k - 1",
            "arXiv:2412.19437, equation 21.",
        ),
    ]


def paper() -> list[Claim]:
    first = torch.tensor([0.6, 0.395, 0.005], dtype=torch.float64)
    then = torch.tensor([[0.8, 0.1, 0.1], [0.1, 0.9, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    whole = joint([first, then]).sum(0)
    off = float((whole - marginal(first, then)).abs().max())
    cut = float((whole - marginal(first, then, mass=0.99)).abs().sum())
    ours, ceiling = head_overlap(first, then, whole), head_overlap(first, then, best_head(first, then))
    return [
        Claim(
            "004",
            "marginalizing over intermediate token probabilities",
            CORRECT,
            f"p(x_2) = Σ p(x_1) p(x_2 | x_1), exactly: on a toy model of 3 tokens {off:.12f} apart",
            "The law of total probability.",
            "marginal, joint",
        ),
        Claim(
            "004",
            "i.e. tokens in the top 0.99",
            CORRECT,
            f"leaving out the rest moves the law by 0.01 in L1 at most; on the toy model, which loses 0.005, {cut:.4f}",
            "Exactly the mass left out; renormalised, the total variation distance is no larger.",
            "marginal",
        ),
        Claim(
            "004",
            "marginalization-based MTP remains a strong baseline",
            CORRECT,
            "no head that is not told x_1 has a smaller expected KL than the exact marginal; but one can be accepted "
            f"more often: {ceiling:.4f} against {ours:.4f} on the toy model",
            "E_x KL(p(.|x) ‖ q) = I + KL(marginal ‖ q); E_x Σ min(p(.|x), q) has another maximiser.",
            "head_overlap, best_head",
        ),
    ]
