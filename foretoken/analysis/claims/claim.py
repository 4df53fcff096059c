"""What a claim is, and the model that the documents speak of."""

from dataclasses import dataclass

from foretoken.analysis.sizes import Target, usual_inner
from foretoken.analysis.speedup import chain_tokens

CORRECT, IMPRECISE, WRONG = "correct", "imprecise", "wrong"

DOCUMENTS = {
    "000": "“Multi-Token Prediction and Parallel Decoding”, a knowledge base",
    "001": "“Multi-Token Prediction Accelerates LLM Decoding”, an assistant's answer",
    "002": "“Multi-Token Prediction”, a course page",
    "003": "“How Multi-Token Prediction Boosts LLM Training and Inference Efficiency”, an article",
    "004": "“On multi-token prediction for efficient LLM inference” (arXiv:2502.09419), abstract, summary and captions",
}

ALPHA, HIDDEN, VOCAB, PARAMETERS = 0.7, 4096, 32000, 7e9
SEVEN = Target(HIDDEN, VOCAB, int(PARAMETERS), usual_inner(HIDDEN))
"""The model of document 002: d = 4096, V = 32,000, 7e9 parameters."""
H200 = 989e12, 4.8e12
"""Operations in bfloat16 and bytes read, per second."""


@dataclass(frozen=True, slots=True)
class Claim:
    """
    document  its number
    says      its words; what stands in [brackets] is ours: formulas that the copies garble, and joints
    verdict   correct, imprecise or wrong
    right     the right value or statement
    why       derivation, or where it was measured
    by        functions of this package that compute it ("": nothing to compute)
    """

    document: str
    says: str
    verdict: str
    right: str
    why: str
    by: str = ""


def llama_parameters(t: Target) -> int:
    """Of a Llama of these sizes, input and output embeddings apart and a final norm."""
    return t.layers * t.llama_layer().parameters + 2 * t.unembedding + t.hidden


def accepted(alpha: float, guesses: int) -> float:
    """E[A], without the token that comes in any case."""
    return chain_tokens(alpha, guesses) - 1
