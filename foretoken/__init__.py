"""Several tokens per forward pass from any transformers causal LM, with the output unchanged.

Shapes, everywhere: B rows, N tree nodes, D depth, S cache slots, T sequence, V vocabulary, H hidden, K heads,
M tokens committed since the drafter was last asked.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from foretoken.errors import UserError

if TYPE_CHECKING:
    from foretoken.custom import custom_generate
    from foretoken.decode import Request, Session
    from foretoken.generation import Output, Piece, generate, stream
    from foretoken.loading import load
    from foretoken.sampling import Sampling
    from foretoken.target import Target

HOMES = {
    "Output": "generation",
    "Piece": "generation",
    "Request": "decode",
    "Sampling": "sampling",
    "Session": "decode",
    "Target": "target",
    "custom_generate": "custom",
    "generate": "generation",
    "load": "loading",
    "stream": "generation",
}
"""Public name -> its module, imported when the name is first used: torch takes seconds, `foretoken --help` must not."""

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


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
