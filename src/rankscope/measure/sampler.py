"""Sampling of a process's memory at a fixed interval, from a thread beside the work."""

import os
import resource
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple, Self

import psutil
import pynvml
import torch

INTERVAL_SECONDS = 0.02


def reset_peak_rss() -> bool:
    """Reset the kernel's high-water mark of this process (Linux: proc(5), clear_refs); return False elsewhere."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_rss() -> int:
    """Kernel's high-water mark of resident memory since `reset_peak_rss`, in bytes, which sampling could miss."""
    on_linux = sys.platform.startswith("linux")
    return _status()["VmHWM"] if on_linux else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _status() -> dict[str, int]:
    """Sizes of this process by their names in proc(5), in bytes."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {name.rstrip(":"): int(rest[0]) * 1024 for name, *rest in lines if rest[-1:] == ["kB"]}


class Resident(NamedTuple):
    """Resident memory of this process, in bytes. What is mapped from files, libraries most of all, moves with the
    system's page cache; None where the system does not tell it from what is private."""

    rss: int
    private: int | None
    mapped: int | None


def resident() -> Resident:
    """Resident memory now: RssAnon, and RssFile with RssShmem, of proc(5); elsewhere psutil's unique set size."""
    if sys.platform.startswith("linux"):
        sizes = _status()
        return Resident(sizes["VmRSS"], sizes["RssAnon"], sizes["RssFile"] + sizes["RssShmem"])
    try:
        full = psutil.Process().memory_full_info()
    except psutil.Error:  # macOS lets only some users ask
        return Resident(psutil.Process().memory_info().rss, None, None)
    return Resident(full.rss, full.uss, max(0, full.rss - full.uss))


class Sample(NamedTuple):
    """Memory at one moment, in bytes; None for a GPU's memory without one."""

    phase: str
    step: int
    seconds: float  # since the sampler was created
    rss_bytes: int  # resident set of this process, private and mapped
    private_bytes: int | None  # see `Resident`
    mapped_bytes: int | None
    gpu_allocated_bytes: int | None  # by torch's caching allocator
    gpu_reserved_bytes: int | None  # by torch's caching allocator
    gpu_nvml_bytes: int | None  # see `Nvml.used_bytes`


class MemorySampler:
    """Thread that takes a `Sample` every 20 ms. The work sets `step`, and calls `begin` at the start of a phase.

    `peaks` has the peaks of each completed phase, in bytes, as counted by the kernel (`rss`, on Linux) and by torch's
    allocator (`gpu_allocated`, `gpu_reserved`).
    """

    def __init__(self, device: torch.device) -> None:
        self.phase, self.step = "load", 0
        self.rows: list[Sample] = []
        self.peaks: dict[str, dict[str, int]] = {}
        self.nvml = open_nvml(device)
        self._device, self._kernel = device, False
        self._start, self._stop = time.perf_counter(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="rankscope-memory", daemon=True)

    def take(self) -> Sample:
        """Take one sample now."""
        seconds, gpu = round(time.perf_counter() - self._start, 4), self._gpu()
        allocated = torch.cuda.memory_allocated(self._device) if gpu else None
        reserved = torch.cuda.memory_reserved(self._device) if gpu else None
        nvml = self.nvml.used_bytes() if self.nvml else None
        sample = Sample(self.phase, self.step, seconds, *resident(), allocated, reserved, nvml)
        self.rows.append(sample)
        return sample

    def begin(self, phase: str) -> None:
        """End the current phase, and begin `phase` with its peaks reset."""
        self._end_phase()
        self.phase = phase
        self._reset_peaks()

    def _end_phase(self) -> None:
        self.take()
        peaks = self.peaks[self.phase] = {"rss": peak_rss()} if self._kernel else {}
        mapped = [sample.mapped_bytes for sample in self.rows if sample.phase == self.phase and sample.mapped_bytes]
        if self._kernel and mapped:  # the kernel keeps no mark of private memory alone
            peaks["private"] = peaks["rss"] - max(mapped)
        if self._gpu():
            peaks["gpu_allocated"] = torch.cuda.max_memory_allocated(self._device)
            peaks["gpu_reserved"] = torch.cuda.max_memory_reserved(self._device)

    def _reset_peaks(self) -> None:
        self._kernel = reset_peak_rss()
        if self._gpu():
            torch.cuda.reset_peak_memory_stats(self._device)

    def _gpu(self) -> bool:
        return self._device.type == "cuda" and torch.cuda.is_initialized()

    def _run(self) -> None:
        while not self._stop.wait(INTERVAL_SECONDS):
            self.take()

    def __enter__(self) -> Self:
        self._reset_peaks()
        self.take()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self._end_phase()


class Nvml:
    """NVML's view of one GPU (https://docs.nvidia.com/deploy/nvml-api/)."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._used_at_start = self._device_used()

    def used_bytes(self) -> int:
        """GPU memory of this process, including the driver's, which torch's allocator does not count.

        If the driver does not report it (it knows no process of most containers), return the increase of the device's
        used memory since this object was created, which assumes that nothing else runs on it.
        """
        try:
            processes = pynvml.nvmlDeviceGetComputeRunningProcesses(self._handle)
        except pynvml.NVMLError:  # under WSL, for one
            processes = []
        for process in processes:
            if process.pid == os.getpid() and process.usedGpuMemory is not None:
                return int(process.usedGpuMemory)
        return max(0, self._device_used() - self._used_at_start)

    def energy_joules(self) -> float | None:
        """Energy used by the device since its driver was loaded; None if it does not count it (before Volta)."""
        try:
            return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1000
        except pynvml.NVMLError:
            return None

    def _device_used(self) -> int:
        return int(pynvml.nvmlDeviceGetMemoryInfo(self._handle).used)


def open_nvml(device: torch.device) -> Nvml | None:
    """NVML's view of a torch device; None on a CPU, without the driver, and for unknown devices (MIG, AMD)."""
    if device.type != "cuda":
        return None
    try:
        pynvml.nvmlInit()
        # by id: CUDA_VISIBLE_DEVICES renumbers torch's devices but not NVML's
        identity = torch.cuda.get_device_properties(device).uuid
        return Nvml(pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{identity}"))
    except pynvml.NVMLError:
        return None
