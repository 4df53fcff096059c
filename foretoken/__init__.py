"""Several tokens per forward pass from any transformers causal LM, with the output unchanged.

Shapes, everywhere: B rows, N tree nodes, D depth, S cache slots, T sequence, V vocabulary, H hidden, K heads,
M tokens committed since the drafter was last asked.
"""

from foretoken.custom import custom_generate
from foretoken.decode import Request, Session
from foretoken.errors import UserError
from foretoken.generate import Output, Piece, generate, stream
from foretoken.load import load
from foretoken.sampling import Sampling
from foretoken.target import Target

__all__ = [
    "Output",
    "Piece",
    "Request",
    "Sampling",
    "Session",
    "Target",
    "UserError",
    "custom_generate",
    "generate",
    "load",
    "stream",
]
__version__ = "0.1.0"
