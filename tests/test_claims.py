"""The page on the documents' claims: as generated, its numbers as worked out by hand, its quotations as written."""

# ruff: noqa: RUF001

import re
from pathlib import Path

import pytest

from foretoken.analysis import enumeration, sizes, speedup
from foretoken.analysis.claims.claim import SEVEN, VOCAB, llama_parameters
from foretoken.analysis.claims.page import claims, page

ROOT = Path(__file__).parents[1]
SEEDS = ROOT.parent / "shared" / "seeds"

RIGHT = {
    "GPU compute utilization": ["0.49%"],
    "Draft model: 10×": ["70 times", "17.5 and 143"],
    "Speedup ∝": ["2.773", "3.199", "+15.4%", "3.333"],
    "heads are tiny": ["147.85M", "6.6%", "11.0%", "16.8M = 0.25%"],
    "Multi-token (Meta)": ["2.67 to 3.05", "6.39"],
    "four predicted tokens": ["5.0 times", "2.5 with"],
    "up to [k] drafts. Then": ["1.7731", "2.333"],
    "bounded above by": ["3.333"],
    "expected wall-clock": ["1.981", "2.773", "1.733"],
    "Expected Speedup from": ["2.533", "2.773"],
    "only moves expected": ["1.7731 to 2.1988", "2.773 to 3.199", "+15.4%"],
    "positively correlated": ["2.065", "0.700", "1.773", "0.769", "2.162"],
    "a separate linear layer": ["202.4M", "607M = 9.0%"],
    "(393M extra": ["393,216,000", "393,312,000", "5.617%", "5.84%"],
    "GB of activations": ["1,048,576,000", "1.049 GB", "0.977 GiB"],
    "This reduces peak memory": ["1.049 GB to 0.262 GB"],
    "Head forward + backward": ["3.1457", "beside 42", "7.49%"],
    "The auxiliary heads add": ["2.359", "5.62%"],
    "reduces to 2m/k": ["2 times", "500"],
    "further reduces": ["3.98", "251", "2.69", "3.31"],
    "two FFNs": ["67.1M + 135.3M"],
    "computed for all heads": ["0.262 GB, not 1.049"],
    "to get token probabilities": ["i + k + 1"],
    "top 0.99": ["0.0050"],
    "strong baseline": ["0.6795 against 0.6146"],
}
"""What stands in the column of right values, by a piece of the claim."""

OTHERS = [
    "prepended",
    "Mathematically exact",
    "Head K (new)",
    "trained on next-token prediction",
    "Accept longest valid prefix",
    "P(x_{t+1}",
    "Lookahead",
    "Eagle",
    "HBM",
    "2x to 5x",
    "range of 3 to 5",
    "Open-ended text",
    "generate [k - 1]",
    "marginalizing over",
    "K next-token",
    "All tokens up to",
    "By linearity",
    "rejection sampling",
    "decoder‑only",
    "a shared FFN",
    "residual connections",
    "M_k",
    "2+k to T+1",
    "EOS",
    "cross‑entropy",
    "parallel gradient updates",
]
"""The claims that have words for an answer."""


def test_every_claim_is_looked_at():
    assert len(claims()) == len(RIGHT) + len(OTHERS)


def test_the_page_is_as_generated():
    """python -m foretoken.analysis.claims docs/claims.md"""
    assert (ROOT / "docs" / "claims.md").read_text("utf-8") == page()


@pytest.mark.parametrize("says", RIGHT)
def test_right_values_are_those_worked_out_by_hand(says: str):
    (claim,) = [c for c in claims() if says in c.says]
    for value in RIGHT[says]:
        assert re.search(rf"(?<![\d.]){re.escape(value)}(?!\d)", claim.right + " " + claim.why), claim.right


@pytest.mark.parametrize("says", OTHERS)
def test_other_claims_are_answered_once(says: str):
    (claim,) = [c for c in claims() if says in c.says]
    assert claim.right
    assert claim.why


def pieces(quotation: str) -> list[str]:
    """What stands outside [brackets], which may nest."""
    found, depth = [""], 0
    for letter in quotation:
        depth += (letter == "[") - (letter == "]")
        if depth == 0 and letter != "]":
            found[-1] += letter
        elif found[-1]:
            found.append("")
    return [piece.strip() for piece in found if piece.strip()]


def test_brackets_are_not_quoted():
    assert pieces("up to [k] drafts. Then [E[A_k] = α]") == ["up to", "drafts. Then"]
    assert pieces("whole") == ["whole"]


@pytest.mark.skipif(not SEEDS.is_dir(), reason="the documents are not beside this checkout")
@pytest.mark.parametrize("claim", claims(), ids=lambda c: f"{c.document} {c.says[:30]}")
def test_quotations_stand_in_the_documents(claim):
    (path,) = SEEDS.glob(f"{claim.document}_*.txt")
    text, at = " ".join(path.read_text("utf-8").split()), 0
    for piece in pieces(" ".join(claim.says.split())):
        found = text.find(piece, at)
        assert found >= 0, piece
        at = found + len(piece)


def test_functions_that_are_named_exist():
    for claim in claims():
        for name in filter(None, claim.by.split(", ")):
            owner, _, method = name.partition(".")
            module = next(m for m in (speedup, enumeration, sizes) if hasattr(m, owner))
            assert not method or hasattr(getattr(module, owner), method)


def test_the_model_of_the_documents():
    """Llama-2-7B: 32 layers of 4 d² + 3 d F + 2 d, two embeddings and a norm."""
    d, F = 4096, 11008
    assert (SEVEN.inner, VOCAB) == (F, 32000)
    assert llama_parameters(SEVEN) == 32 * (4 * d * d + 3 * d * F + 2 * d) + 2 * VOCAB * d + d == 6_738_415_616
