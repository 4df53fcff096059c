"""What is compared: methods as data, from the text of the command line."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from foretoken.bench.rows import PLAIN
from foretoken.drafters import METHODS, settled
from foretoken.errors import UserError
from foretoken.rules import make_rule
from foretoken.tuned import TUNED, opened

REQUIRES = {
    "none": "nothing",
    "prompt_lookup": "nothing",
    "suffix": "nothing",
    "jacobi": "nothing",
    "lookahead": "nothing",
    "early_exit": "nothing",
    "marginal": "nothing",
    "draft_model": "a smaller model with the same tokenizer",
    "mtp": "heads trained with the model, or added to it",
    "blockwise": "heads trained for the model",
    "medusa": "heads trained for the model",
    "weighted_heads": "heads trained for the model",
    "deepseek_mtp": "modules trained for the model, or its own",
    "eagle": "a layer trained for the model",
    "hybrid": "what its trained part requires",
}


@dataclass(frozen=True, slots=True)
class Method:
    """A drafter with its settings and the rule that judges its guesses.

    label    short and the method's own: the name, its folder's name, its settings
    drafter  NAME, NAME:PATH or @FILE
    """

    label: str
    drafter: str
    settings: dict[str, str] = field(default_factory=dict[str, str])
    rule: str = "match"

    @property
    def name(self) -> str:
        return opened(self.drafter, {})[0].partition(":")[0]

    @property
    def path(self) -> str:
        """Where its weights are; "" if it names none."""
        drafter, settings = opened(self.drafter, dict(self.settings))
        return drafter.partition(":")[2] or str(settings.get("path", ""))

    @property
    def requires(self) -> str:
        return REQUIRES.get(self.name, "a package that adds it")


def methods(asked: Sequence[str]) -> list[Method]:
    """Plain decoding and the methods in `asked`: NAME[:PATH][,key=value ...] or @FILE, separated by commas.

    `rule` among the settings is the acceptance rule. What can be refused without a model is refused here.
    """
    found = [Method(PLAIN, PLAIN)]
    for pieces in split(asked):
        drafter, settings = pieces[0], dict(part.split("=", 1) for part in pieces[1:])
        rule = settings.pop("rule", "match")
        made = Method(label_of(drafter, settings, rule), drafter, settings, rule)
        check(made)
        if any(m.label == made.label for m in found[1:]):
            raise UserError(f"{made.label!r} was asked for twice; give every method once.")
        if made.label != PLAIN:
            found.append(made)
    return found


def split(asked: Sequence[str]) -> list[list[str]]:
    """[[drafter, key=value, ...], ...]: a part with "=" behind a plain word is a setting of the drafter before it."""
    found: list[list[str]] = []
    for text in asked:
        for part in text.split(","):
            part = part.strip()
            key, equals, _ = part.partition("=")
            if equals and key.isidentifier():
                if not found:
                    raise UserError(f"The setting {part!r} came before any drafter; write NAME[:PATH],key=value.")
                found[-1].append(part)
            elif part:
                found.append([part])
    if not found:
        raise UserError("No drafter was named; give --drafters a list such as suffix,draft_model:PATH.")
    return found


def label_of(drafter: str, settings: dict[str, str], rule: str) -> str:
    """The drafter with its path's last name, and what was set."""
    if drafter.startswith(TUNED):
        return TUNED + Path(drafter.removeprefix(TUNED)).stem
    *names, path = drafter.split(":") if ":" in drafter else [drafter, ""]
    own = Path(path).name
    short = ":".join(names if not own or own.endswith(names[-1]) else [*names, own])  # a folder called as its method
    extra = [f"{k}={Path(v).name if '/' in v else v}" for k, v in settings.items()]
    return " ".join([short, *extra, *([rule] if rule != "match" else [])])


def check(method: Method) -> None:
    """`UserError` for a name, setting or rule that does not exist."""
    make_rule(method.rule)
    settled(method.drafter, method.settings)


assert set(REQUIRES) == set(METHODS), "every method says what it requires"
