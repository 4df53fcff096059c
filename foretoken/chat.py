"""`foretoken chat`: turn by turn on a terminal, in the model's chat format if its tokenizer has one."""

import re
import sys
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from foretoken.answer import Ask, Printer, print_summary, remark
from foretoken.drafter import Drafter
from foretoken.errors import UserError
from foretoken.generation import stream, tokenize
from foretoken.show import Spans
from foretoken.target import Target

HELP = "/reset forgets what was said; Ctrl-C stops an answer; /exit or Ctrl-D leaves."


@dataclass(slots=True)
class Talk:
    """What was said: messages for a chat template, and the plain text for models that have none."""

    target: Target
    messages: list[dict[str, str]] = field(default_factory=list[dict[str, str]])
    text: str = ""
    turn: int = 0

    @property
    def templated(self) -> bool:
        return getattr(self.target.tokenizer, "chat_template", None) is not None

    def ask(self, said: str) -> list[int]:
        """The tokens to continue after the user said this."""
        self.messages.append({"role": "user", "content": said})
        self.text += said
        self.turn += 1
        if not self.templated:
            return tokenize(self.target, self.text)
        tokenizer: Any = self.target.tokenizer
        return list(tokenizer.apply_chat_template(self.messages, add_generation_prompt=True, return_dict=False))

    def answered(self, said: str) -> None:
        self.messages.append({"role": "assistant", "content": said})
        self.text += said

    def unsaid(self, said: str) -> None:
        """Take back what the user said last: it could not be answered."""
        self.messages.pop()
        self.text = self.text.removesuffix(said)

    def reset(self) -> None:
        self.messages.clear()
        self.text = ""


def chat(ask: Ask, *, show: bool) -> None:
    """Talk until the input ends."""
    target, drafter = ask.prepare()
    console, talk = Console(stderr=True, highlight=False, markup=False), Talk(target)
    console.print(HELP, style="dim")
    if not talk.templated:
        console.print(
            f"{target.name} has no chat template: it continues the text, yours and its own.",
            style="dim",
            soft_wrap=True,
        )
    while (line := next_line()) is not None:
        if line in ("/exit", "/quit"):
            break
        if line == "/reset":
            talk.reset()
            console.print("Forgotten.", style="dim")
        elif re.fullmatch(r"/\w*", line):
            console.print(HELP, style="dim")
        elif line.strip():
            reply(ask, target, drafter, talk, line, show=show)
    remark(target)


def next_line() -> str | None:
    """The user's next line, None at the end. Ctrl-C gives up the line, not the talk."""
    terminal = sys.stdin.isatty()
    if terminal:
        import readline  # noqa: F401  # pyright: ignore[reportUnusedImport]  # gives `input` its keys
    while True:
        try:
            return input("> " if terminal else "")
        except EOFError:
            if terminal:
                print()
            return None
        except KeyboardInterrupt:
            print()


def reply(ask: Ask, target: Target, drafter: Drafter, talk: Talk, line: str, *, show: bool) -> None:
    """Print the answer to `line` as it comes. A stopped answer stays as far as it came."""
    console = Console(stderr=True, highlight=False, markup=False)
    said = ""
    try:
        prompt = talk.ask(line)
        assert target.tokenizer is not None
        printer = Printer(Spans(target.tokenizer, prompt) if show else None)
        try:
            for piece in stream(target, prompt, drafter=drafter, number=talk.turn, **ask.keywords()):
                said += piece.text
                printer.print(piece)
                if piece.output is not None:
                    printer.end()
                    print_summary(ask, [piece.output])
        except KeyboardInterrupt:
            printer.end()
            console.print("Stopped.", style="dim")
        talk.answered(said)
    except UserError as error:
        talk.unsaid(line)
        console.print(f"{error} /reset starts again.", style="red", soft_wrap=True)
