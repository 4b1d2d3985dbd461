"""Device and dtype of the base model, and free memory."""

import ctypes
import sys
from pathlib import Path

import psutil
import torch

from rankscope.errors import StudyError


def resolve_device(device: str) -> torch.device:
    """Torch device by name; `auto` is the first GPU, or the CPU. Raises StudyError if it does not exist here."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.device(device)
    except RuntimeError:
        resolved = None
    if resolved is None or resolved.type not in ("cpu", "cuda", "mps"):
        raise StudyError(f"model.device: {device} is not a device here", "Use auto, cpu, cuda, cuda:1 or mps.")
    if resolved.type == "mps" and not torch.backends.mps.is_available():
        raise StudyError("model.device: mps asked for, but this torch finds no GPU of Apple's", "Use --device cpu.")
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        what = f"model.device: {device} asked for, but {torch.cuda.device_count()} CUDA devices are visible"
        raise StudyError(what, "Use --device cpu, or see `rankscope doctor`.")
    return resolved


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions for products of bfloat16: AVX512_BF16 or AMX on a CPU."""
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return device.type == "cuda" and torch.cuda.is_bf16_supported()


def free_bytes(device: torch.device) -> int:
    """Memory that this process can still allocate on `device`: on the GPU, or on the machine within its cgroup."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    available = psutil.virtual_memory().available
    cgroup = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((cgroup / name).read_text()) for name in ("memory.max", "memory.current"))
        statistics = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no cgroup v2, or no limit
        return available
    reclaimable = int(statistics.get("inactive_file", 0))  # the page cache counts as used but is reclaimed when needed
    return max(0, min(available, limit - used + reclaimable))


def give_back_freed(device: torch.device) -> None:
    """Return memory that freed CPU tensors leave with the allocator, glibc's or jemalloc, to the system. Not for every
    forward: allocating it again costs 10% of a step at opt-350m's size (docs/lab-notes.md)."""
    if device.type == "cpu" and sys.platform == "linux":
        library = ctypes.CDLL(None)
        if hasattr(library, "malloc_trim"):  # glibc
            library.malloc_trim(0)
        if hasattr(library, "mallctl"):  # jemalloc; 4096 stands for all of its arenas
            library.mallctl(b"arena.4096.purge", None, None, None, 0)
