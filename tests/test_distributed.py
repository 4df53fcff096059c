"""Several processes train what one would."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from foretoken.training.processes import BUCKET, buckets
from foretoken.training.recipe import Recipe, written
from tests import tiny

ROOT = Path(__file__).parent.parent
RECIPES: dict[str, dict[str, Any]] = {
    "joint": {
        "mode": "joint",
        "architecture": {"heads": 3, "kind": "causal"},
        "optimizer__name": "muon",
        "optimizer__heads_first": 2,
        "loss__keep_target": 0.2,
        "evaluate_every": 3,
        "log_every": 2,
    },
    "sharded": {
        "shard": True,
        "mode": "joint",
        "architecture": {"heads": 3, "kind": "causal"},
        "optimizer__heads_first": 2,
        "loss__keep_target": 0.2,
        "accumulate": 2,
    },
    "sharded-adapters": {"shard": True, "mode": "lora", "lora__rank": 2, "lora__dropout": 0.0, "steps": 3},
    "sharded-muon": {"shard": True, "mode": "joint", "optimizer__name": "muon", "steps": 3},
    "sharded-blockwise": {
        "shard": True,
        "mode": "scratch",
        "target": "",
        "model": tiny.LLAMA | {"tie_word_embeddings": True},
        "tokenizer": "280",
        "drafter": "blockwise",
        "architecture": {"heads": 3},
        "steps": 3,
    },
    "frozen": {"drafter": "medusa", "architecture": {"heads": 2}, "data__packed": False, "loss__kind": "kl"},
}
LATER: dict[str, Any] = {"mode": "joint", "architecture": {"heads": 3}}
WORKER = """
import sys
from pathlib import Path
from foretoken.training.loop import run
for path in sys.argv[1:]:
    run(Path(path))
print("done")
"""
HELD = """
import sys
from pathlib import Path
from foretoken.training.loop import Run
from foretoken.training.processes import Processes
from foretoken.training.recipe import read_recipe
run = Run(read_recipe(Path(sys.argv[-1])), Processes())
local = lambda p: p.to_local() if hasattr(p, "to_local") else p
modules = [run.setup.trunk.target.model, run.setup.heads]
resident = sum(local(p).numel() for m in modules for p in m.parameters())
learnt = sum(local(p).numel() for p in run.learnt.values())
print("whole", sum(p.numel() for p in run.learnt.values()), "learnt", learnt, "resident", resident)
"""


def of(place: Path, name: str, **settings: Any) -> Recipe:
    base: dict[str, Any] = {"target": place / "target", "out": place / name, "data__source": place / "walking.txt"}
    return tiny.recipe(place, **base | settings)


def launched(files: list[Path], world: int = 2, work: str = WORKER) -> list[str]:
    """Run recipes one after the other in `world` processes that know of each other as launchers tell them."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world), "ACCELERATE_USE_CPU": "true"}
    shared |= {"LOCAL_WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", work, *map(str, files)],
            cwd=ROOT,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    said = [worker.communicate(timeout=300)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * world, "\n".join(said)
    return said


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every recipe was run by two processes, in NAME-2."""
    folder = tmp_path_factory.mktemp("distributed")
    tiny.walking(folder / "walking.txt")
    tiny.save(folder / "target")
    files: list[Path] = []
    for name, settings in RECIPES.items():
        files.append(folder / f"{name}.yaml")
        files[-1].write_text(written(of(folder, f"{name}-2", rows=2, **settings)))
    tiny.trained(of(folder, "sharded-later", steps=3, **LATER))
    files.append(folder / "later.yaml")
    files[-1].write_text(written(of(folder, "sharded-later", rows=2, shard=True, steps=6, **LATER)))
    said = launched(files, work=WORKER + HELD)
    (folder / "held.txt").write_text(said[0].splitlines()[-1])
    return folder


ROUGH = {"sharded-muon": 1e-3}
"""Muon orthogonalises in bfloat16, whose rounding depends on how products are cut."""


def same_weights(one: Path, other: Path, tolerance: float = 1e-9) -> None:
    names = sorted(p.name for p in one.glob("*.safetensors"))
    assert names == sorted(p.name for p in other.glob("*.safetensors"))
    for name in names:
        ours, theirs = load_file(one / name), load_file(other / name)
        assert ours.keys() == theirs.keys()
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-7, atol=tolerance)


@pytest.mark.parametrize("name", RECIPES)
def test_two_processes_train_what_one_does(name: str, place: Path):
    """Losses, accuracies, held-out measurements and weights, of the same rows in all."""
    out, _ = tiny.trained(of(place, f"{name}-1", rows=4, **RECIPES[name]))
    ours, theirs = tiny.rows(place / f"{name}-2"), tiny.rows(out)
    assert len(ours) == len(theirs) == RECIPES[name].get("steps", 6)
    for mine, reference in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(reference, rel=ROUGH.get(name, 1e-9), abs=1e-12)
    same_weights(place / f"{name}-2", out, ROUGH.get(name, 1e-9))


def test_checkpoints_are_the_same_whatever_the_number_of_processes(place: Path):
    """One process, then two that share the weights; two, then one; and one all the time."""
    alone, _ = tiny.trained(of(place, "alone", steps=3, **LATER))
    alone, _ = tiny.trained(of(place, "alone", steps=6, **LATER))
    same_weights(place / "sharded-later", alone)
    for mine, reference in zip(tiny.rows(place / "sharded-later"), tiny.rows(alone), strict=True):
        assert mine == pytest.approx(reference, rel=1e-9, abs=1e-12)
    settings = RECIPES["sharded"] | {"rows": 4, "steps": 8}
    ours, _ = tiny.trained(of(place, "sharded-2", **settings))
    theirs, _ = tiny.trained(of(place, "sharded-1b", **settings | {"steps": 6}))
    theirs, _ = tiny.trained(of(place, "sharded-1b", **settings))
    same_weights(ours, theirs)


def test_each_of_two_processes_holds_half(place: Path):
    """Between steps: of what is learnt, of its gradients and moments, and of the modules' own weights."""
    _, whole, _, learnt, _, resident = (place / "held.txt").read_text().split()
    assert int(learnt) < 0.55 * int(whole)
    assert int(resident) <= int(learnt)


def test_gradients_travel_in_few_parcels():
    tensors = [torch.zeros(n, dtype=d) for n in (5, 1 << 20, 7) for d in (torch.float32, torch.float64)]
    found = buckets(tensors)
    assert sorted(id(t) for bucket in found for t in bucket) == sorted(map(id, tensors))
    assert all(len({t.dtype for t in bucket}) == 1 for bucket in found)
    assert len(found) == 2
    large = [torch.empty(BUCKET // 4 + 1), torch.empty(3), torch.empty(BUCKET // 8), torch.empty(BUCKET // 8)]
    assert [[t.numel() for t in bucket] for bucket in buckets(large)] == [
        [BUCKET // 4 + 1],
        [3, BUCKET // 8],
        [BUCKET // 8],
    ]


@pytest.mark.slow
def test_torchs_launcher_starts_a_run(place: Path):
    """As `accelerate launch` does on GPUs (with --cpu it starts one process, whatever number it is given)."""
    (place / "launch.py").write_text(
        "import sys; from pathlib import Path; from foretoken.training.loop import run; run(Path(sys.argv[1]))"
    )
    (place / "launch.yaml").write_text(written(of(place, "launched", rows=2, shard=True, **LATER)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(place / "launch.py"), str(place / "launch.yaml")],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Written to") == 1
    out, _ = tiny.trained(of(place, "not-launched", rows=4, **LATER))
    same_weights(place / "launched", out)
