"""A progress bar that keeps out of the way: on terminals only, and only for work that takes a while."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from time import monotonic

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from foretoken.decode import Session

AFTER = 2.0
"""Seconds of work before a bar appears."""

Update = Callable[[str, int, int], None]
"""What is being done, how much of it is done, and how much there is."""


@contextmanager
def progress(console: Console | None = None, after: float = AFTER) -> Generator[Update]:
    """A function to report to: from `after` seconds on it draws a bar on stderr, if that is a terminal."""
    console = console or Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
    task, began = bar.add_task(""), monotonic()

    def update(what: str, done: int, total: int) -> None:
        bar.update(task, description=what, completed=done, total=total)
        if console.is_terminal and not bar.live.is_started and monotonic() - began >= after:
            bar.start()

    try:
        yield update
    finally:
        if bar.live.is_started:
            bar.stop()


def batch_progress(update: Update, prompts: int, max_new_tokens: int) -> Callable[[Session], None]:
    """An `on_step` that reports tokens: a prompt that ends early counts as all of its tokens."""
    finished = 0

    def on_step(session: Session) -> None:
        nonlocal finished
        finished += sum(row.finish is not None for row in session.rows)  # each leaves the session after this call
        running = sum(row.emitted for row in session.rows if row.finish is None)
        what = f"{finished} of {prompts} prompts, tokens"
        update(what, finished * max_new_tokens + running, prompts * max_new_tokens)

    return on_step
