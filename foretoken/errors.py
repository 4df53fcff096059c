"""What a user did that cannot work, said in one sentence: what came, what is needed, what to do."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """The command line prints its message alone and exits with 2."""


def unknown(what: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that is not among `known`, with the nearest one that is."""
    names = sorted(known)
    near = get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}?" if near else "choose one of them."
    return UserError(f"{name!r} is no {what}; there are {', '.join(names) or 'none'}: {hint}")


def at_least(name: str, **minima: tuple[float, float]) -> None:
    """`UserError` for the first setting whose (value, minimum) is out of order."""
    for key, (value, least) in minima.items():
        if value < least:
            raise UserError(f"{name}: {key} is {value}; it must be {least} or more.")
