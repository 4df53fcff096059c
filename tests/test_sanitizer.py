"""The kernels touch no memory but their own: their tests once more, built with AddressSanitizer."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FIRST = ("libasan.so", "libstdc++.so")
"""Libraries that are in memory before the interpreter's own."""


def library(name: str) -> str:
    """Where the compiler has a library; the bare name if it has none."""
    done = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.skipif(
    not shutil.which("g++") or not all(Path(library(name)).is_absolute() for name in FIRST),
    reason="the compiler has no AddressSanitizer",
)
def test_kernels_touch_no_memory_but_their_own(tmp_path: Path):
    environment = os.environ | {
        "LD_PRELOAD": " ".join(map(library, FIRST)),
        "ASAN_OPTIONS": f"detect_leaks=0:log_path={tmp_path / 'report'}",
        "OMP_NUM_THREADS": "2",
    }
    options = ("-q", "-x", "-p", "tests.sanitized", "-p", "no:cacheprovider", "-p", "no:xdist")
    command = [sys.executable, "-m", "pytest", *options, "tests/test_kernels.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    reports = "\n".join(path.read_text()[:4000] for path in tmp_path.iterdir())
    assert (done.returncode, reports) == (0, ""), done.stdout[-2000:]
