"""Several tokens per forward pass from any transformers causal LM, with the output unchanged.

Shapes, everywhere: B rows, N tree nodes, D depth, S cache slots, T sequence, V vocabulary, H hidden, K heads,
M tokens committed since the drafter was last asked.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from foretoken.errors import UserError

if TYPE_CHECKING:
    from foretoken.decode import Request, Session
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
    "generate",
    "load",
    "stream",
]
__version__ = "0.1.0"

HOMES = {
    "Output": "generate",
    "Piece": "generate",
    "Request": "decode",
    "Sampling": "sampling",
    "Session": "decode",
    "Target": "target",
    "generate": "generate",
    "load": "load",
    "stream": "generate",
}
"""Public name -> its module, imported when the name is first used: torch takes seconds, `foretoken --help` must not."""


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Keeps `generate` and `load` the functions when the import system binds their modules to the same names."""

    def __setattr__(self, name: str, value: Any) -> None:
        same = isinstance(value, ModuleType) and name in __all__
        super().__setattr__(name, getattr(value, name) if same else value)


sys.modules[__name__].__class__ = _Package
