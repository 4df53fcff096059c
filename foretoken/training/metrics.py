"""What a run reports at each step, and when its losses say that it must stop."""

import json
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from foretoken.training.checkpoint import write_text

METRICS = "metrics.jsonl"
BOARD = "tensorboard"
FACTOR, SLACK = 3.0, 1.0
"""A smoothed loss that is more than this many times its lowest, and this much more, ends the run."""
SMOOTH = 0.95


class Log:
    """Rows of JSON, one per step, and the same for TensorBoard; those of steps that are run again are dropped."""

    def __init__(self, folder: Path, step: int, *, board: bool) -> None:
        """step: how many steps the run has behind it. board: whether to write for TensorBoard, if it is installed."""
        self.path = folder / METRICS
        if self.path.is_file():
            lines = self.path.read_text("utf-8").splitlines()
            rows = [line for line in lines if line.endswith("}")]  # a kill may have cut the last one short
            write_text(self.path, "".join(line + "\n" for line in rows if json.loads(line)["step"] <= step))
        self._board: Any = tracker(folder, step) if board else None

    def __call__(self, row: dict[str, float]) -> None:
        """Add a row."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if self._board is not None:
            self._board.log({k: v for k, v in row.items() if k != "step"}, step=int(row["step"]))

    def close(self) -> None:
        """Finish writing."""
        if self._board is not None:
            self._board.finish()


def tracker(folder: Path, step: int) -> Any:
    """Accelerate's tracker for TensorBoard; None if that is not installed."""
    if find_spec("tensorboard") is None and find_spec("tensorboardX") is None:
        return None
    from accelerate.tracking import TensorBoardTracker

    found = TensorBoardTracker(BOARD, str(folder), purge_step=step + 1)
    found.start()
    return found


class Watch:
    """Each prediction's loss, smoothed, and the lowest that this has been."""

    def __init__(self) -> None:
        self.smoothed: dict[str, float] = {}
        self.lowest: dict[str, float] = {}

    def judge(self, losses: dict[str, float]) -> str | None:
        """Why to stop, in words that name the prediction; None if all is well."""
        for name, loss in losses.items():
            if not math.isfinite(loss):
                return f"The loss of {name} is {loss}"
            self.smoothed[name] = SMOOTH * self.smoothed.get(name, loss) + (1 - SMOOTH) * loss
            self.lowest[name] = min(self.lowest.get(name, math.inf), self.smoothed[name])
            if self.smoothed[name] > FACTOR * self.lowest[name] + SLACK:
                return f"The loss of {name} grew from {self.lowest[name]:.3g} to {self.smoothed[name]:.3g}"
        return None
