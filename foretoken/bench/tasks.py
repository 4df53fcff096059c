"""The prompts that methods are compared on, task by task: pieces of documents, questions, a user's own file.

Nothing here needs data beside the package but the tasks whose text may not travel with it; those say where they look.
"""

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from foretoken.bench.files import prompts_in, said
from foretoken.errors import UserError, at_least, unknown
from foretoken.prompts import read
from foretoken.target import Target
from foretoken.text import decode
from foretoken.training.encode import Encoder
from foretoken.training.prompts import ids_of
from foretoken.training.records import Message
from foretoken.training.sources import documents

TASKS: dict[str, str] = {
    "code": "pieces of Python's standard library, of packages that the models of this package were not trained on",
    "copy": "such a piece and its first quarter again, which a look-up can continue",
    "random": "random tokens: nothing to learn from, made to defeat drafting",
    "stories": "beginnings of children's stories (TinyStories, validation)",
    "shakespeare": "pieces of Shakespeare's plays",
    "translation": "German sentences to be put into English (Spec-Bench)",
    "summarisation": "news to be summarised (Spec-Bench)",
    "qa": "questions without their sources (Spec-Bench)",
    "mathematics": "word problems to be worked out (Spec-Bench)",
    "rag": "questions with found passages (Spec-Bench)",
    "chat": "what a user says first: writing, roles, reasoning, code and more (Spec-Bench)",
    "mt_bench": "the same in MT-bench's own file",
}
"""Every task by name, in the order in which reports show them."""

GROUPS = {
    "all": "every task that is available here, MT-bench once",
    "spec_bench": "Spec-Bench's six tasks",
}
"""Names for several tasks."""

MT_BENCH = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
CATEGORIES: dict[str, tuple[str, ...]] = {
    "translation": ("translation",),
    "summarisation": ("summarization",),
    "qa": ("qa",),
    "mathematics": ("math_reasoning",),
    "rag": ("rag",),
    "chat": MT_BENCH,
}
"""The categories of Spec-Bench's file (arXiv:2401.07851) that make a task; each category's own name works too."""

QUESTIONS = "prompts/spec_bench_question.jsonl"
FILES = dict.fromkeys(CATEGORIES, QUESTIONS) | {
    "mt_bench": "prompts/mt_bench_question.jsonl",
    "stories": "text/tinystories_validation_0.8M.txt",
    "shakespeare": "text/tinyshakespeare_input.txt",
}
"""Where tasks lie in the data folder; the others need none."""
FOLDER = "FORETOKEN_DATA"
"""The environment variable that names the data folder."""

TAIL = 400
"""Characters of a prompt that reports show."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt.

    task  its task's name, or that of the user's file
    id    names it within the task, whatever the limit
    ids   what the target reads, a chat in its template
    text  the end of it, for reports
    """

    task: str
    id: str
    ids: list[int]
    text: str


@dataclass(frozen=True, slots=True)
class Frame:
    """How long prompts are: `length` tokens of a document, at most `room` of a question."""

    length: int
    room: int | None

    @property
    def piece(self) -> int:
        return self.length if self.room is None else min(self.length, self.room)


Found = tuple[str, list[int]]
"""A prompt's id and tokens."""
Ask = Callable[[Target, int, Frame, int], list[Found]]
"""(target, limit, frame, seed) -> at most `limit` prompts."""


def prompts(target: Target, asked: str, *, limit: int, length: int = 96, new: int = 128, seed: int = 0) -> list[Prompt]:
    """At most `limit` prompts of each task of `asked`, the same ones for the same seed.

    asked   names of `TASKS` and `GROUPS` and paths of files (.txt: one per line; .jsonl: "prompt", "turns" or a chat),
            separated by commas
    length  tokens of a piece of a document
    new     tokens to be emitted: what the context cannot hold beside them is cut off in front
    """
    at_least("The benchmark's prompts", limit=(limit, 1), length=(length, 4), new=(new, 1))
    context = target.context
    if context is not None and context - new < 4:
        raise UserError(
            f"The model's context is {context} tokens and {new} new ones were asked for; ask for {context - 4} or "
            "fewer."
        )
    frame = Frame(length, None if context is None else context - new)
    return [
        Prompt(task, id_, ids, shown(target, ids))
        for task, ask in resolved(asked).items()
        for id_, ids in ask(target, limit, frame, seed)
    ]


def resolved(asked: str) -> dict[str, Ask]:
    """What finds each task's prompts, by the name that reports give it; `UserError` for what is no task and no file."""
    found: dict[str, Ask] = {}
    names = [part.strip() for part in asked.split(",") if part.strip()]
    if not names:
        raise unknown("task", asked, [*TASKS, *GROUPS])
    for name in names:
        for task in group(name):
            label, ask = source_of(task)
            found[label] = ask
    return found


def group(name: str) -> list[str]:
    """The tasks that a name stands for."""
    if name == "spec_bench":
        return list(CATEGORIES)
    if name == "all":
        return [task for task in available() if task != "mt_bench" or "chat" not in available()]
    return [name]


def available() -> list[str]:
    """The tasks whose data are here."""
    folder = data_folder()
    return [task for task in TASKS if task not in FILES or (folder is not None and (folder / FILES[task]).is_file())]


def source_of(name: str) -> tuple[str, Ask]:
    """The label of a task or file, and what finds its prompts."""
    if name in ("code", "copy"):
        return name, partial(of_code, task=name)
    if name == "random":
        return name, of_chance
    if name in ("stories", "shakespeare"):
        return name, partial(of_text, task=name, file=data_file(name))
    if name == "mt_bench":
        return name, partial(of_questions, file=data_file(name), categories=MT_BENCH)
    if name in CATEGORIES:
        return name, partial(of_questions, file=data_file(name), categories=CATEGORIES[name])
    if task := next((task for task, own in CATEGORIES.items() if name in own), None):
        label = task if len(CATEGORIES[task]) == 1 else name
        return label, partial(of_questions, file=data_file(task), categories=(name,))
    path = Path(name).expanduser()
    if path.exists() or path.suffix or os.sep in name:
        return label_of(path), partial(of_file, path=checked_file(path))
    raise unknown("task", name, [*TASKS, *GROUPS])


def label_of(path: Path) -> str:
    """The file's name without its ending, unless a task is called so."""
    taken = {*TASKS, *GROUPS, *MT_BENCH}
    return path.name if path.stem in taken else path.stem


def data_folder() -> Path | None:
    """The data folder: $FORETOKEN_DATA, or shared/data beside or above the current directory or the checkout."""
    if given := os.environ.get(FOLDER):
        folder = Path(given).expanduser()
        if not folder.is_dir():
            raise UserError(f"{FOLDER} is {given!r}, which is no folder; set it to one that holds prompts and text.")
        return folder
    for start in (Path.cwd(), Path(__file__).resolve().parents[2]):
        for above in (start, *start.parents):
            if (above / "shared" / "data").is_dir():
                return above / "shared" / "data"
    return None


def data_file(task: str) -> Path:
    """The file of a task; `UserError` if it is not here."""
    folder = data_folder()
    if folder is None or not (folder / FILES[task]).is_file():
        where = "no folder shared/data was found" if folder is None else f"{str(folder)!r} does not hold it"
        raise UserError(
            f"The task {task!r} needs {FILES[task]}, and {where}; set {FOLDER} to a folder that holds it, or ask for "
            "code, copy or random."
        )
    return folder / FILES[task]


def of_code(target: Target, limit: int, frame: Frame, seed: int, *, task: str) -> list[Found]:
    """Pieces of held-out code, for `copy` each with its first quarter behind it."""
    length = frame.piece
    if task == "copy" and frame.room is not None:
        length = min(length, frame.room * 4 // 5)
    texts = [text for text in documents("stdlib", split="held_out") if isinstance(text, str)]
    found = sampled(target, task, texts, length, limit, seed)
    if task == "copy":
        start = len(leading(target))
        found = [(id_, ids + ids[start : start + length // 4]) for id_, ids in found]
    return found


def of_text(target: Target, limit: int, frame: Frame, seed: int, *, task: str, file: Path) -> list[Found]:
    """Beginnings of stories, or pieces of Shakespeare."""
    text = read(file)
    if task == "shakespeare":
        return sampled(target, task, [text], frame.piece, limit, seed)
    stories = re.split(r"\n\n(?=Once upon a time)", text)[1:]  # the file begins within a story
    lines = [re.sub(r"\n\n+", "\n", story) for story in stories]  # as the training split has them
    return sampled(target, task, lines, frame.piece, limit, seed, begin=True)


def sampled(
    target: Target, task: str, texts: Sequence[str], length: int, limit: int, seed: int, *, begin: bool = False
) -> list[Found]:
    """Pieces of `length` tokens from as many texts as there are, named by text and first token.

    begin: their beginnings instead, at most half of a text.
    """
    require_tokenizer(target)
    first, found = leading(target), dict[str, list[int]]()
    for number, body, draw in visits(target, texts, limit, seed, once=begin):
        if len(found) == limit:
            break
        n = length - len(first) if not begin else min(length - len(first), len(body) // 2)
        if 0 < n <= len(body):
            start = 0 if begin else draw.randrange(len(body) - n + 1)
            found[f"{task}-{number}.{start}"] = [*first, *body[start : start + n]]
    if not found:
        raise UserError(f"The task {task!r} has no text of {length} tokens; ask for shorter prompts.")
    return list(found.items())


def visits(
    target: Target, texts: Sequence[str], limit: int, seed: int, *, once: bool
) -> Iterator[tuple[int, list[int], Random]]:
    """(number, tokens, chance) of each text in a random order, again and again unless `once`; read when needed."""
    assert target.tokenizer is not None
    encoder, skip, known = Encoder(target.tokenizer), len(leading(target)), dict[int, list[int]]()
    order = Random(seed).sample(range(len(texts)), len(texts))
    for time in range(1 if once else 1 + 2 * limit):
        for number in order:
            if number not in known:
                (ids,) = encoder.ids([texts[number]])
                known[number] = ids[skip:]
            yield number, known[number], Random(f"{seed} {number} {time}")


def of_chance(target: Target, limit: int, frame: Frame, seed: int) -> list[Found]:
    """Tokens of the vocabulary, each as likely as the others, special ones left out."""
    config, tokenizer = target.config, target.tokenizer
    special = {getattr(config, f"{name}_token_id", None) for name in ("bos", "eos", "pad")}
    size = target.vocab
    if tokenizer is not None:
        added: dict[int, Any] = tokenizer.added_tokens_decoder
        special |= {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
        size = min(size, len(tokenizer))
    known = [token for token in range(size) if token not in special]
    first = leading(target)
    draws = (Random(f"{seed} {i}").choices(known, k=frame.piece - len(first)) for i in range(limit))
    return [(f"random-{i}", [*first, *tokens]) for i, tokens in enumerate(draws)]


def of_questions(
    target: Target, limit: int, frame: Frame, seed: int, *, file: Path, categories: tuple[str, ...]
) -> list[Found]:
    """What a user says first in each conversation of these categories."""
    try:
        rows: list[dict[str, Any]] = [json.loads(line) for line in read(file).split("\n") if line]
        asked = [(str(r["question_id"]), said(target, r["turns"][0])) for r in rows if r["category"] in categories]
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{str(file)!r} holds no questions in Spec-Bench's format; fetch it again.") from error
    return drawn(target, asked, limit, frame, seed)


def of_file(target: Target, limit: int, frame: Frame, seed: int, *, path: Path) -> list[Found]:
    """The prompts of a user's file, numbered from 1."""
    numbered = [(f"{path.stem}-{i}", prompt) for i, prompt in enumerate(prompts_in(target, path), 1)]
    return drawn(target, numbered, limit, frame, seed)


def drawn(
    target: Target, asked: list[tuple[str, str | list[Message]]], limit: int, frame: Frame, seed: int
) -> list[Found]:
    """The first `limit` after a shuffle, as tokens, cut to the room there is."""
    require_tokenizer(target)
    chosen = Random(seed).sample(asked, len(asked))[:limit]
    return [(id_, cut(target, ids_of(target, prompt), frame.room)) for id_, prompt in chosen]


def checked_file(path: Path) -> Path:
    """`path` if it can be a file of prompts; `UserError` otherwise."""
    if not path.is_file():
        there = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"{str(path)!r} {there}; give a .txt or .jsonl file of prompts, or a task: {', '.join(TASKS)}.")
    if path.suffix not in (".txt", ".jsonl"):
        raise UserError(
            f'{str(path)!r} is no file of prompts; write a .txt with one per line, or a .jsonl with "prompt", "turns" '
            'or "messages".'
        )
    return path


def cut(target: Target, ids: list[int], room: int | None) -> list[int]:
    """The last `room` tokens, behind those that the tokenizer puts before every text."""
    if room is None or len(ids) <= room:
        return ids
    first = leading(target)
    kept = first if ids[: len(first)] == first else []
    return [*kept, *ids[len(ids) - room + len(kept) :]]


def leading(target: Target) -> list[int]:
    """The tokens that the tokenizer puts before every text."""
    return [] if target.tokenizer is None else Encoder(target.tokenizer).leading()


def require_tokenizer(target: Target) -> None:
    if target.tokenizer is None:
        raise UserError(f"{target.name!r} has no tokenizer, and this task is text; ask for the task 'random'.")


def shown(target: Target, ids: list[int]) -> str:
    """The end of a prompt as text."""
    return "" if target.tokenizer is None else decode(target.tokenizer, ids[-TAIL:])[-TAIL:]
