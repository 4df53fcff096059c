"""`foretoken generate`: what the command line asks for, answered on the terminal, as JSON or as a page."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from foretoken.compiled import CompiledTarget
from foretoken.drafter import Drafter
from foretoken.drafters import make_drafter, settled
from foretoken.errors import UserError
from foretoken.generation import Output, Piece, generate, stream, tokenize
from foretoken.graphs import GraphedTarget
from foretoken.loading import load
from foretoken.page import Answer, write_page
from foretoken.progress import batch_progress, progress
from foretoken.rules import make_rule
from foretoken.sampling import Sampling
from foretoken.show import Spans, coloured, counts, legend, spans_of, visible
from foretoken.target import Target

LARGE = 1 << 30
"""Bytes of weights that take a while to load."""
TAIL = 400
"""Characters of a prompt that are shown before its continuation."""


@dataclass(frozen=True, slots=True)
class Ask:
    """How a model is to answer; the fields are those of `load` and `generate`, `settings` as key=value texts.

    wait  for a step that is compiled; or else decode eagerly until it is
    """

    model: str
    drafter: str
    settings: Sequence[str]
    rule: str
    max_new_tokens: int
    stop: Sequence[str]
    sampling: dict[str, Any]
    dtype: str | None = None
    device: str | None = None
    attention: str | None = None
    quantize: str | None = None
    compile: bool = False
    wait: bool = False

    def prepare(self) -> tuple[Target, Drafter]:
        """The loaded target and drafter. What can be refused without weights is refused before they load."""
        settings = parsed(self.settings)
        settled(self.drafter, settings)
        make_rule(self.rule)
        Sampling(**self.sampling)
        if self.max_new_tokens < 1:
            raise UserError(f"--max-new-tokens is {self.max_new_tokens}; ask for at least 1.")
        quiet_loading(self.model)
        with progress() as update:
            target = load(
                self.model,
                dtype=self.dtype,
                device=self.device,
                attention=self.attention,
                quantize=self.quantize,
                compile=self.compile,
                wait=self.wait,
                progress=lambda stage: update(f"compiling the step: {stage}", 0, 1),
            )
            if target.tokenizer is None:
                raise UserError(f"{self.model!r} has no tokenizer; save the model's own tokenizer beside its weights.")
            drafter = make_drafter(self.drafter, target, settings)
            target.settled(drafter.needs.features)
        return target, drafter

    def keywords(self) -> dict[str, Any]:
        """The arguments that `generate` and `stream` share."""
        return {"rule": self.rule, "max_new_tokens": self.max_new_tokens, "stop": self.stop, **self.sampling}

    def described(self, target: Target) -> dict[str, str]:
        """What would have to be typed again, in words. Sampling that is off is left out."""
        off = {f.name: f.default for f in fields(Sampling)}
        on = {k: str(v) for k, v in self.sampling.items() if v != off[k] or k in ("temperature", "seed")}
        return {
            "model": self.model,
            "drafter": " ".join([self.drafter, *self.settings]),
            "rule": self.rule,
            "max_new_tokens": str(self.max_new_tokens),
            **({"stop": ", ".join(map(repr, self.stop))} if self.stop else {}),
            **on,
            "dtype": str(target.dtype).removeprefix("torch."),
            "device": str(target.device),
            **({"attention": self.attention} if self.attention else {}),
            **({"quantized": self.quantize} if self.quantize else {}),
            **(
                {"compiled": str(isinstance(target.settled(), CompiledTarget | GraphedTarget)).lower()}
                if self.compile
                else {}
            ),
            "versions": ", ".join(f"{name} {version(name)}" for name in ("foretoken", "torch", "transformers")),
        }


def quiet_loading(model: str) -> None:
    """Leave out transformers' loading bar for a folder that loads in a moment."""
    folder = Path(model)
    if folder.is_dir() and sum(f.stat().st_size for f in folder.glob("*.safetensors")) < LARGE:
        disable_progress_bar()


def parsed(settings: Sequence[str]) -> dict[str, Any]:
    """{key: value} of key=value texts."""
    found: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise UserError(f"--set {setting!r} has no key and value; write it as key=value.")
        found[key.strip()] = value.strip()
    return found


def answer(
    ask: Ask,
    prompts: Sequence[str],
    *,
    lines: bool,
    batch_size: int,
    logprobs: bool,
    as_json: bool,
    show: bool,
    html: Path | None,
) -> None:
    """Answer the prompts and print the answers.

    lines: the prompts are those of a batch file, so each answer is announced by its prompt.
    """
    if logprobs and not as_json:
        raise UserError("--logprobs are part of the JSON only; add --json.")
    if show and as_json:
        raise UserError("--show colours a terminal and --json is for programs; give one of them.")
    if html is not None and not html.parent.is_dir():
        raise UserError(f"{str(html.parent)!r} is no folder; give --html a path in one that exists.")
    target, drafter = ask.prepare()
    if lines or as_json:
        outputs = decoded(ask, target, drafter, prompts, batch_size, logprobs)
        if as_json:
            print_json(ask, prompts, outputs)
        else:
            print_outputs(target, prompts, outputs, show)
    else:
        outputs = [streamed(ask, target, drafter, prompts[0], show)]
    if not as_json:
        if show:
            Console(stderr=True).print(legend(), end="")
        print_summary(ask, outputs)
    remark(target)
    if html is not None:
        assert target.tokenizer is not None
        spans = [spans_of(target.tokenizer, tokenize(target, p), o) for p, o in zip(prompts, outputs, strict=True)]
        answers = [Answer(p, o, s) for p, o, s in zip(prompts, outputs, spans, strict=True)]
        write_page(html, answers, ask.described(target))


def decoded(
    ask: Ask, target: Target, drafter: Drafter, prompts: Sequence[str], batch_size: int, logprobs: bool
) -> list[Output]:
    """All outputs, with a bar if it takes a while."""
    with progress() as update:
        return generate(
            target,
            prompts,
            drafter=drafter,
            batch_size=batch_size,
            logprobs=logprobs,
            on_step=batch_progress(update, len(prompts), ask.max_new_tokens),
            on_read=reading(update),
            **ask.keywords(),
        )


def reading(update: Callable[[str, int, int], None]) -> Callable[[int, int], None]:
    """An `on_read` that reports to a progress bar."""
    return lambda done, total: update("reading the prompt, tokens", done, total)


def streamed(ask: Ask, target: Target, drafter: Drafter, prompt: str, show: bool) -> Output:
    """The output, printed as it came."""
    assert target.tokenizer is not None
    printer = Printer(Spans(target.tokenizer, tokenize(target, prompt)) if show else None)
    if show:
        printer.context(prompt)
    with progress() as update:
        pieces = stream(target, prompt, drafter=drafter, on_read=reading(update), **ask.keywords())
        piece = next(pieces)
    printer.print(piece)
    for piece in pieces:
        printer.print(piece)
    printer.end()
    assert piece.output is not None
    return piece.output


class Printer:
    """Prints pieces on standard output, coloured by `spans` if given, and as they are where no terminal listens."""

    def __init__(self, spans: Spans | None = None) -> None:
        self.spans, self.console = spans, Console(highlight=False, markup=False, emoji=False)

    def print(self, piece: Piece) -> None:
        if self.spans is not None:
            self.spans.push(piece.token_ids, piece.drafted)
            if piece.output is not None:
                self.spans.finish()
            self.console.print(coloured(self.spans.take(len(piece.text))), end="", soft_wrap=True)
        else:
            write(piece.text)

    def context(self, prompt: str) -> None:
        """The end of the prompt, dim, which the next piece continues."""
        shown = prompt if len(prompt) <= TAIL else "\u2026" + prompt[-TAIL:]
        self.console.print(visible(shown), style="dim", end="", soft_wrap=True)

    def end(self) -> None:
        write("\n")


def write(text: str) -> None:
    sys.stdout.write(visible(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def print_outputs(target: Target, prompts: Sequence[str], outputs: Sequence[Output], show: bool) -> None:
    """Each prompt, dim, with its text."""
    assert target.tokenizer is not None
    for prompt, output in zip(prompts, outputs, strict=True):
        printer = Printer(Spans(target.tokenizer, tokenize(target, prompt)) if show else None)
        printer.context(prompt)
        printer.print(Piece(output.text, output.token_ids, output.drafted, output))
        write("\n\n")


def print_json(ask: Ask, prompts: Sequence[str], outputs: Sequence[Output]) -> None:
    """One line of JSON per prompt."""
    for prompt, output in zip(prompts, outputs, strict=True):
        record = {"prompt": prompt, "drafter": ask.drafter, "rule": ask.rule, **asdict(output)}
        if output.logprobs is None:
            del record["logprobs"]
        print(json.dumps(record), flush=True)  # ASCII: no line separator of Unicode can split a line


def remark(target: Target) -> None:
    """One dim line on stderr if the answer could not wait for its compiled step."""
    if isinstance(target, CompiledTarget) and target.unready is not None:
        Console(stderr=True, highlight=False, markup=False).print(target.unready, style="dim", soft_wrap=True)


def print_summary(ask: Ask, outputs: Sequence[Output]) -> None:
    """One dim line on stderr; a lossy rule stands out."""
    console = Console(stderr=True, highlight=False, markup=False)
    console.print(counts(outputs) + ", ", style="dim", end="", soft_wrap=True)
    if all(o.exact for o in outputs):
        console.print("exact", style="dim")
    else:
        console.print(f"LOSSY ({ask.rule})", style="bold red")
