"""The small real models, loaded once per test process."""

from functools import lru_cache
from pathlib import Path

import torch

import foretoken
from foretoken.target import Target

ASSETS = Path(foretoken.__file__).parent / "assets"
STORIES, BITSTORIES = str(ASSETS / "stories260K"), str(ASSETS / "bitstories3M")


@lru_cache
def asset(path: str, dtype: torch.dtype = torch.float64) -> Target:
    """One of the models that travel with the package."""
    return foretoken.load(path, dtype=dtype, device="cpu")
