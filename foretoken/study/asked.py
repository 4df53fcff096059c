"""Which trained drafters to analyse, from the text of the command line, and what they are called."""

from dataclasses import dataclass
from pathlib import Path

from foretoken import saved
from foretoken.drafters import settled
from foretoken.errors import UserError
from foretoken.study.rows import name_of
from foretoken.training.setup import trainable


@dataclass(frozen=True, slots=True)
class Asked:
    """
    drafter   NAME[:PATH]
    settings  key=value of it
    """

    drafter: str
    settings: dict[str, str]

    @property
    def method(self) -> str:
        return self.drafter.partition(":")[0]

    @property
    def path(self) -> str:
        """Where its weights are; "" if it names none."""
        return self.drafter.partition(":")[2] or self.settings.get("path", "")

    def trained_on(self, model: str) -> str:
        """The name of the target that its folder tells of; `model`'s if it tells of none."""
        known = (Path(self.path) / saved.DESCRIPTION).is_file() if self.path else False
        return name_of(saved.read(Path(self.path)).target["name"] if known else model)

    def label(self, model: str) -> str:
        """Short, and its own: the folder's name without the target's, the method's before it if it does not say."""
        folder = name_of(self.path) if self.path else ""
        own = folder.removeprefix(self.trained_on(model)).lstrip("-_.")
        first = own if self.method in own else " ".join(filter(None, (self.method, own)))
        return " ".join([first, *(f"{k}={v}" for k, v in self.settings.items() if k not in ("path", "other_target"))])


def parsed(text: str) -> Asked:
    """The drafter that NAME[:PATH][,key=value ...] asks for; what can be refused without a model is refused here."""
    drafter, *parts = (part.strip() for part in text.split(","))
    settings = dict[str, str]()
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals:
            raise UserError(f"--drafter has {part!r} behind a comma; write NAME:PATH,key=value, and one per --drafter.")
        settings[key] = value
    settled(drafter, settings)
    trainable(drafter.partition(":")[0])
    return Asked(drafter, settings)
