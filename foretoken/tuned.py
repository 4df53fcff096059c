"""A file that `foretoken tune` wrote: which drafter, with which settings, is best on one machine."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from foretoken.errors import UserError

TUNED = "@"
"""In front of a file's name, where a drafter is asked for."""


@dataclass(frozen=True, slots=True)
class Tuned:
    """A choice and what it was made from.

    drafter      NAME or NAME:PATH
    settings     of the drafter
    model        it was chosen for
    temperature  and batch, likewise
    predicted    speed over plain decoding's, computed from measured costs and acceptance
    measured     the same, measured; 1 where plain decoding was chosen
    machine      it was chosen on
    """

    drafter: str
    settings: dict[str, Any]
    model: str
    temperature: float
    batch: int
    predicted: float
    measured: float
    machine: dict[str, Any] = field(default_factory=dict[str, Any])

    def write(self, file: Path) -> None:
        try:
            file.write_text(json.dumps(asdict(self), indent=1) + "\n", "utf-8")
        except OSError as error:
            raise UserError(f"{str(file)!r} cannot be written ({error.strerror}); give --out another path.") from error


def read_tuned(name: str) -> Tuned:
    """The choice in the file of "@FILE"."""
    file = Path(name.removeprefix(TUNED))
    try:
        return Tuned(**json.loads(file.read_text("utf-8")))
    except OSError as error:
        raise UserError(f"{str(file)!r} cannot be read ({error.strerror}); `foretoken tune` writes it.") from error
    except (ValueError, TypeError) as error:
        raise UserError(f"{str(file)!r} was not written by `foretoken tune` of this version; tune again.") from error


def opened(drafter: str, settings: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """NAME[:PATH] and its settings, from the file where @FILE was asked for; `settings` come before the file's."""
    if not drafter.startswith(TUNED):
        return drafter, settings
    choice = read_tuned(drafter)
    return choice.drafter, choice.settings | settings
