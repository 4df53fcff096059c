"""A run that is killed at any moment goes on as if it had not been."""

import errno
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from foretoken.errors import UserError
from foretoken.training import checkpoint
from foretoken.training.loop import Run
from foretoken.training.processes import Processes
from foretoken.training.recipe import Recipe, written
from tests import tiny

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    tiny.walking(folder / "walking.txt")
    tiny.save(folder / "target")
    return folder


def of(place: Path, name: str, **settings: Any) -> Recipe:
    """Eight steps with dropout, two optimisers and all that a checkpoint holds."""
    base: dict[str, Any] = {"target": place / "target", "out": place / name, "data__source": place / "walking.txt"}
    base |= {"architecture": {"heads": 3}, "mode": "lora", "lora__dropout": 0.3, "lora__rank": 2}
    base |= {"steps": 8, "save_every": 2, "log_every": 3, "optimizer__name": "muon", "optimizer__heads_first": 1}
    return tiny.recipe(place, **base | settings)


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    """The folder of a run that nothing disturbed."""
    return tiny.trained(of(place, "whole"))[0]


def same_run(one: Path, other: Path) -> None:
    """Equal metrics, equal weights, bit by bit, and nothing left lying about."""
    assert tiny.rows(one) == tiny.rows(other)
    for name in ("drafter.safetensors", "model.safetensors"):
        ours, theirs = load_file(one / name), load_file(other / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert sorted(p.name for p in (one / "checkpoints").iterdir()) == ["step-00000006", "step-00000008"]
    assert not [p for p in one.rglob(".*") if p.name != ".gitattributes"]


@pytest.mark.parametrize("stop", [1, 2, 5])
def test_a_run_that_was_broken_off_goes_on_as_if_it_had_not_been(stop: int, place: Path, whole: Path):
    """At a step with a checkpoint, after one, and before the first."""
    settings = of(place, f"stopped-{stop}")
    real, done = Run.once, 0

    def once(self: Run) -> dict[str, float]:
        nonlocal done
        if done == stop:
            raise KeyboardInterrupt
        done += 1
        return real(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "once", once)
        with pytest.raises(KeyboardInterrupt):
            tiny.trained(settings)
    same_run(tiny.trained(settings)[0], whole)


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from foretoken.training import checkpoint, loop
if len(sys.argv) > 2:
    what, when = sys.argv[2].split(":")
    owner, name = {"fsync": (os, "fsync"), "rename": (Path, "rename"), "save": (torch, "save")}[what]
    real, calls = getattr(owner, name), []
    def deadly(*args, **kwargs):
        calls.append(1)
        if len(calls) == int(when):
            if what == "save":
                args[1].write(b"half of it")
                args[1].flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    setattr(owner, name, deadly)
loop.run(Path(sys.argv[1]))
"""


def started(recipe: Path, *more: str) -> subprocess.Popen[bytes]:
    """A run in a process of its own; its working directory is the repository."""
    command = [sys.executable, "-c", KILLED, str(recipe), *more]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.parametrize("moment", ["save:2", "rename:2", pytest.param("fsync:4", marks=pytest.mark.slow)])
def test_a_kill_inside_a_write_loses_nothing_before_it(moment: str, place: Path, whole: Path):
    """In the middle of the file, before the rename, and after the sync of the file (the recipe is synced first)."""
    name = moment.replace(":", "-")
    settings = of(place, name)
    (place / f"{name}.yaml").write_text(written(settings))
    process = started(place / f"{name}.yaml", moment)
    _, error = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, error.decode()
    kept = [p.name for p in checkpoint.all_of(place / name / "checkpoints")]
    assert kept == ["step-00000002"]
    assert checkpoint.read(place / name / "checkpoints" / kept[0])["step"] == 2
    same_run(tiny.trained(settings)[0], whole)


@pytest.mark.slow
def test_kills_at_random_moments_change_nothing(place: Path, whole: Path):
    """Killed again and again, from outside, until it is done."""
    settings, draw = of(place, "random", save_every=1), random.Random(0)
    (place / "random.yaml").write_text(written(settings))
    kills = 0
    for _ in range(40):
        process = started(place / "random.yaml")
        metrics = place / "random" / "metrics.jsonl"
        size, patience = metrics.stat().st_size if metrics.exists() else 0, time.monotonic() + 60
        while process.poll() is None and time.monotonic() < patience:
            if metrics.exists() and metrics.stat().st_size != size:
                break
            time.sleep(0.005)
        time.sleep(draw.random() * 0.1)
        process.kill()
        process.communicate()
        if process.returncode == 0:
            break
        kills += 1
    else:
        raise AssertionError("the run never came to its end")
    assert kills >= 2
    out = tiny.trained(settings)[0]
    assert tiny.rows(out) == tiny.rows(whole)
    ours, theirs = load_file(out / "drafter.safetensors"), load_file(whole / "drafter.safetensors")
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_a_longer_run_goes_on_from_the_end_of_a_shorter_one(place: Path, whole: Path):
    settings = of(place, "longer", steps=4)
    first = Run(settings, Processes())
    for _ in range(4):
        first.advance()
    first.save()
    run = Run(of(place, "longer", steps=8), Processes())
    run.resume()
    assert run.step == 4
    assert (run.watch.smoothed, run.watch.lowest) == (first.watch.smoothed, first.watch.lowest)
    assert len(run.watch.lowest) == 3
    out, _ = tiny.trained(of(place, "longer", steps=8))
    assert [row["step"] for row in tiny.rows(out)] == list(range(5, 9))


def damaged(place: Path, name: str, how: str) -> Path:
    """The newest of two checkpoints, damaged."""
    settings = of(place, name, steps=4)
    if not (place / name).exists():
        tiny.trained(settings)
    newest = place / name / "checkpoints" / "step-00000004" / checkpoint.FILE
    data = newest.read_bytes()
    at = data.index(
        load_file(place / name / "drafter.safetensors")["layers.0.mlp.up_proj.weight"].numpy().tobytes()[:64]
    )
    broken = {"cut": data[: len(data) // 2], "empty": b"", "bit": data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]}
    newest.write_bytes(broken[how])
    return newest


@pytest.mark.parametrize("how", ["cut", "empty", "bit"])
def test_a_damaged_checkpoint_is_told_and_the_one_before_serves(how: str, place: Path, whole: Path):
    newest = damaged(place, f"damaged-{how}", how)
    settings = of(place, f"damaged-{how}")
    with pytest.raises(
        UserError, match=r"^The checkpoint '\S+step-00000004' cannot be read \([^\n]+\); delete it to go on "
    ):
        tiny.trained(settings)
    newest.unlink()
    newest.parent.rmdir()
    out, _ = tiny.trained(settings)
    assert [row["step"] for row in tiny.rows(out)] == list(range(1, 9))


def limited(size: int) -> None:
    """Let no file grow beyond `size` bytes: what a full disk does, at any byte one likes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.parametrize("size", [100, 20_000, 100_000])
def test_a_write_that_fails_leaves_the_checkpoints_before_it(size: int, place: Path, whole: Path):
    name = f"full-{size}"
    run = Run(of(place, name), Processes())
    for _ in range(2):
        run.advance()
    run.save()
    run.advance()
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        limited(size)
        with pytest.raises(
            UserError, match=r"^The checkpoint of step 3 could not be written to '\S+' \([^\n]+\); earlier"
        ):
            run.save()
    finally:
        limited(resource.RLIM_INFINITY)
        signal.signal(signal.SIGXFSZ, handler)
    assert [p.name for p in run.checkpoints.iterdir()] == ["step-00000002"]
    out, _ = tiny.trained(of(place, name))
    assert tiny.rows(out)[-1] == tiny.rows(whole)[-1]


def test_a_full_disk_is_called_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    checkpoint.write(tmp_path, 1, {"step": 1})
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"\(the disk is full\); earlier ones are whole: make room"):
        checkpoint.write(tmp_path, 2, {"step": 2})
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert checkpoint.read(tmp_path / "step-00000001") == {"step": 1}


def test_two_checkpoints_stay_and_the_same_step_is_written_again(tmp_path: Path):
    for step in (1, 2, 3, 3):
        checkpoint.write(tmp_path, step, {"step": step, "weights": torch.full((3,), float(step))})
    assert [p.name for p in checkpoint.all_of(tmp_path)] == ["step-00000002", "step-00000003"]
    assert torch.equal(checkpoint.read(tmp_path / "step-00000003")["weights"], torch.full((3,), 3.0))


def test_another_recipe_does_not_take_over_a_run(place: Path, whole: Path):
    before = tiny.rows(whole)
    for change, says in (
        ({"optimizer__lr": 1e-2}, r"holds a run with optimizer.lr = 0.003, and this recipe says 0.01; give this one"),
        ({"architecture": {"heads": 2}}, r"holds a run with architecture.heads = 3, and this recipe says 2"),
        ({"drafter": "medusa"}, r"holds a run with drafter = 'mtp', and this recipe says 'medusa'"),
    ):
        with pytest.raises(UserError, match=says):
            tiny.trained(of(place, "whole", **change))
    with pytest.raises(UserError, match="has 4 rows in a step and this one 8; set rows and accumulate"):
        tiny.trained(of(place, "whole", rows=8))
    assert tiny.rows(whole) == before
    again, _ = tiny.trained(of(place, "whole", rows=2, accumulate=2, log_every=1))  # the same rows, grouped otherwise
    same_run(again, whole)


def test_a_checkpoint_of_other_weights_is_not_read(place: Path, whole: Path):
    settings = of(place, "stray", architecture={"heads": 2})
    state = checkpoint.read(whole / "checkpoints" / "step-00000008")
    checkpoint.write(place / "stray" / "checkpoints", 8, state)
    with pytest.raises(UserError, match="is of other weights than this recipe's; give it an `out` of its own"):
        tiny.trained(settings)


def test_a_recipe_that_never_got_to_a_checkpoint_may_change(place: Path):
    """And the tokenizer that it had made goes with it."""
    base: dict[str, Any] = {"mode": "scratch", "model": tiny.LLAMA, "target": "", "optimizer__heads_first": 0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "once", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            tiny.trained(of(place, "changed", tokenizer="260", **base))
    out, _ = tiny.trained(of(place, "changed", tokenizer="300", steps=2, **base))
    assert load_file(out / "model.safetensors")["model.embed_tokens.weight"].shape[0] > 260
