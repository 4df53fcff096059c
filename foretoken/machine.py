"""What a measurement was made on, and the bandwidth that bounds it."""

import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from time import perf_counter

import psutil
import torch


@dataclass(frozen=True, slots=True)
class Machine:
    """The processor, its threads and the versions that were used."""

    processor: str
    threads: int
    memory_gib: float
    python: str
    torch: str
    transformers: str
    foretoken: str

    @staticmethod
    def here() -> "Machine":
        return Machine(
            processor(),
            torch.get_num_threads(),
            round(psutil.virtual_memory().total / 2**30, 1),
            platform.python_version(),
            str(torch.__version__),
            version("transformers"),
            version("foretoken"),
        )

    def as_dict(self) -> dict[str, object]:
        return asdict(self)

    def line(self) -> str:
        return (
            f"{self.processor}, {self.threads} threads, {self.memory_gib} GiB; Python {self.python}, "
            f"torch {self.torch}, transformers {self.transformers}, foretoken {self.foretoken}"
        )


def processor() -> str:
    """The name of the GPU in use, or of the processor and its vector extensions."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    name = names[0].split(":", 1)[1].strip() if names else platform.processor() or platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def read_bandwidth(device: torch.device, size: int = 1 << 29, repeats: int = 7) -> float:
    """GB/s at which `size` bytes are read once: the sum of a large integer tensor, the median of `repeats`."""
    data = torch.ones(size // 8, dtype=torch.int64, device=device)
    seconds: list[float] = []
    for _ in range(repeats + 1):
        began = perf_counter()
        data.sum()
        synchronise(device)
        seconds.append(perf_counter() - began)
    return size / median(seconds[1:]) / 1e9


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
