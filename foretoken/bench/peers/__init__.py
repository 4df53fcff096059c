"""Other libraries that decode the same prompts on this machine, each method in a process of its own.

A worker is a script in `workers/`, run by the Python of its peer's environment (`environments.py`). It loads, then
decodes groups of prompts as token ids, and says how long they took by its own clock.
"""

import json
import os
import signal
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from threading import Timer
from types import TracebackType
from typing import Any

from foretoken.bench.peers.eagle import exported
from foretoken.bench.peers.environments import TABLE, peer_of, require
from foretoken.bench.peers.files import folder_of, made_of
from foretoken.bench.peers.gguf import write
from foretoken.errors import UserError, unknown

PEERS = tuple(TABLE)
PATIENCE = 1800.0
"""Seconds after which a worker that says nothing is ended."""


@dataclass(frozen=True, slots=True)
class Ran:
    """One group of prompts, decoded together.

    tokens    emitted by each prompt, the end token included
    seconds   from handing over the prompts to the last token, measured inside the worker
    first     seconds to every prompt's first token; None where the peer does not tell
    forwards  of the target after those that read the prompts; None where the peer does not tell
    accepted  guesses at each depth; None for plain decoding or where the peer does not tell
    """

    tokens: list[list[int]]
    seconds: float
    first: float | None
    forwards: int | None
    accepted: list[int] | None


class Worker:
    """One method of a peer on one model, in a process of its own.

    facts  versions, settings, weights_bytes, extra_parameters (of what guesses), batched (whether it decodes several
           prompts together), exact (whether its output has the model's law)
    """

    def __init__(
        self, name: str, command: list[str], environment: Mapping[str, str], load: Mapping[str, Any], patience: float
    ) -> None:
        self.name = name
        self.patience = patience
        self.most: int = load["most"]
        self.errors = TemporaryFile()  # noqa: SIM115 - closed with the worker
        self.late = self.ended = False
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=dict(environment),
            start_new_session=True,  # so that it can be ended with all its children
            text=True,
        )
        try:
            self.facts: dict[str, object] = self._ask(load)
        except BaseException:
            self._end()
            raise

    def run(
        self, prompts: list[list[int]], *, max_new_tokens: int, temperature: float, seed: int, eos: list[int]
    ) -> Ran:
        """Decode the prompts together: greedily at temperature 0, to the end of each length where `eos` is empty."""
        if len(prompts) > 1 and not self.facts["batched"]:
            raise UserError(f"{self.name} decodes one prompt at a time and {len(prompts)} came; give it one.")
        longest = max(map(len, prompts)) + max_new_tokens
        if longest > self.most:
            raise UserError(
                f"{self.name} was started for {self.most} tokens in a row and the longest prompt needs {longest} with "
                "what it is to emit; start it for more."
            )
        group = {"prompts": prompts, "max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
        return Ran(**self._ask({**group, "eos": eos}))

    def close(self) -> None:
        """End the worker."""
        if self.process.poll() is None and self.process.stdin is not None:
            with suppress(OSError):
                self.process.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(5)
        self._end()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """The worker's answer; `UserError` with its reason if it has none."""
        assert self.process.stdin is not None and self.process.stdout is not None
        timer = Timer(self.patience, self._give_up)
        timer.daemon = True
        timer.start()
        line = ""
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except OSError:  # it died before it read all
            pass
        finally:
            timer.cancel()
        answer: dict[str, Any] = json.loads(line) if line.endswith("\n") else {}
        if "refused" in answer:
            raise UserError(answer["refused"])
        if not answer or "failed" in answer:
            silent = f"silent for {self.patience:g} seconds"
            why = answer.get("failed") or (silent if self.late else self._last_words())
            raise UserError(f"{self.name} died ({why}); leave it out, or give it a model and settings that it can run.")
        return answer

    def _last_words(self) -> str:
        """The last line on its stderr, and the signal that ended it."""
        self._end(close=False)
        self.errors.seek(0)
        lines = [line.strip() for line in self.errors.read().decode(errors="replace").splitlines() if line.strip()]
        code = self.process.returncode
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return f"{how}; {lines[-1]}" if lines else how

    def _give_up(self) -> None:
        self.late = True
        self._kill()

    def _kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def _end(self, *, close: bool = True) -> None:
        """End the process, its children too, and close what is open to it."""
        if self.ended:
            return  # its number may be another process's by now
        if self.process.poll() is None and not close:
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(5)  # its output has ended, so it is about to
        self._kill()
        self.process.wait()
        if close:
            self.ended = True
            for pipe in (self.process.stdin, self.process.stdout):
                if pipe is not None:
                    with suppress(OSError):
                        pipe.close()
            self.errors.close()


def methods(peer: str) -> tuple[str, ...]:
    """What a peer can decode with."""
    return tuple(peer_of(peer).methods)


def start(
    name: str,
    model: str,
    *,
    dtype: str,
    threads: int,
    most: int,
    batch: int,
    draft: str | None = None,
    eagle: str | None = None,
    settings: dict[str, Any] | None = None,
    patience: float = PATIENCE,
) -> Worker:
    """A worker that has loaded `model`, ready to run.

    name      PEER or PEER:METHOD
    model     a folder or a hub name
    dtype     float32 or bfloat16
    most      tokens of the longest prompt and what follows it
    batch     prompts of the largest group
    draft     folder of the draft model, for draft_model
    eagle     folder of an EAGLE drafter, an EAGLE-1 trained here or as others publish them, for eagle
    settings  of the method, in place of its defaults
    patience  seconds for each answer

    `UserError` if the peer is not installed or cannot run this.
    """
    peer, _, method = name.partition(":")
    method = method or "plain"
    known = peer_of(peer).methods
    if method not in known:
        raise unknown(f"method of the peer {peer!r}", method, known)
    if dtype not in peer_of(peer).dtypes:
        raise unknown(f"dtype that {peer} is measured in", dtype, peer_of(peer).dtypes)
    used = settings_of(name, known[method], settings or {})
    python = require(peer)
    folder = folder_of(model)
    load: dict[str, Any] = {"method": method, "model": str(folder), "dtype": dtype, "threads": threads, "most": most}
    load |= {"batch": batch, "settings": used, "files": str(made_of(folder)), "draft_files": None}
    load |= {"draft": None, "eagle": None}
    for need, given in (("draft", draft), ("eagle", eagle)):
        if method.startswith(need):
            if given is None:
                raise UserError(f"{name} needs a {need} model and none came; give it one, or leave {name} out.")
            other = folder_of(given)
            require_vocabulary(name, folder, other)
            load[need] = str(other if need == "draft" else exported(other, folder, made_of(other)))
            load["draft_files"] = str(made_of(other))
    if peer == "llama_cpp":
        load["files"] = str(written(folder, dtype))
    script = Path(__file__).with_name("workers") / f"{peer}_.py"
    worker = Worker(name, [str(python), str(script)], environment(threads), load, patience)
    worker.facts |= {"dtype": dtype, "threads": threads, "settings": used}
    return worker


def require_vocabulary(name: str, folder: Path, draft: Path) -> None:
    """`UserError` if a draft model's tokens are not the model's; a drafter trained here has none of its own."""
    config = draft / "config.json"
    if not config.is_file():
        return
    own, other = (json.loads(path.read_text()).get("vocab_size") for path in (folder / "config.json", config))
    if own != other:
        raise UserError(
            f"{name} was given a draft model of {other} tokens for a model of {own}; give one with the same tokenizer."
        )


def settings_of(name: str, defaults: Mapping[str, int], given: Mapping[str, Any]) -> dict[str, int]:
    """A method's settings, as given or else by default."""
    if strange := sorted(given.keys() - defaults.keys()):
        raise unknown(f"setting of {name}", strange[0], defaults)
    for key, value in given.items():
        if not str(value).isdigit() or int(value) < 1:
            raise UserError(f"{name}: {key} is {value!r}; it must be a whole number of 1 or more.")
    return {**defaults, **{key: int(value) for key, value in given.items()}}


def written(folder: Path, dtype: str) -> Path:
    """The model as a GGUF file, kept from the first time on."""
    path = made_of(folder) / f"{dtype}.gguf"
    if not path.exists():
        write(str(folder), path, dtype)
    return path


def environment(threads: int) -> dict[str, str]:
    """The variables of a worker: as many threads as asked, asleep when idle; no network, no reports of usage."""
    variables = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return variables | {
        **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads)),
        "OMP_WAIT_POLICY": "PASSIVE",
        "KMP_BLOCKTIME": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
