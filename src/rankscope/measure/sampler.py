"""Samples a process's memory at a fixed interval, from a thread beside the work."""

import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil
import torch

INTERVAL_SECONDS = 0.02


def reset_peak_rss() -> bool:
    """Starts the kernel's own high-water mark of this process anew (Linux: proc(5), clear_refs); False elsewhere."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_rss() -> int:
    """The kernel's high-water mark of resident memory since `reset_peak_rss`, in bytes: no sample can miss it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM")


class MemorySampler:
    """Rows of (phase, step, seconds, rss_bytes, gpu_allocated_bytes, gpu_reserved_bytes), one each 20 ms.

    `rss_bytes` is the resident set of this process: what the operating system holds in RAM for it, shared libraries
    included. The GPU columns are the caching allocator's, None without a GPU. The work says in which phase and step
    it is by setting `phase` and `step`.
    """

    def __init__(self, device: torch.device) -> None:
        self.phase, self.step = "load", 0
        self.rows: list[tuple[str, int, float, int, int | None, int | None]] = []
        self._device = device
        self._process = psutil.Process()
        self._start = time.perf_counter()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rankscope-memory", daemon=True)

    def take(self) -> None:
        """Takes one sample now."""
        gpu = self._device.type == "cuda" and torch.cuda.is_initialized()
        self.rows.append(
            (
                self.phase,
                self.step,
                round(time.perf_counter() - self._start, 4),
                self._process.memory_info().rss,
                torch.cuda.memory_allocated(self._device) if gpu else None,
                torch.cuda.memory_reserved(self._device) if gpu else None,
            )
        )

    def _run(self) -> None:
        while not self._stop.wait(INTERVAL_SECONDS):
            self.take()

    def __enter__(self) -> Self:
        self.take()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self.take()
