"""Cores that this process may use: for threads of a job, and their division over the jobs of several GPUs."""

import math
import os
import time
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path

from rankscope.files import text_or_empty
from rankscope.measure.allocator import preloaded

ROOT = Path("/")

ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
    "GOMP_SPINCOUNT": "1000",  # of OpenMP: threads that wait sleep soon, or a busy machine takes many times as long
    "KMP_BLOCKTIME": "0",  # the same of Intel's
}
"""Environment of a job's process; variables that the user has set win."""


def threads(root: Path = ROOT) -> int:
    """Threads of a job where OMP_NUM_THREADS does not say: the physical cores among the CPUs that the process may run
    on (two hyperthreads of one core share its matrix units), at most its container's quota, rounded up. `root` is that
    of the file system."""
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return max(1, math.ceil(min(_physical(cpus, root), _quota(root))))


def job_environment() -> dict[str, str]:
    """Environment variables of a job's process."""
    return ENVIRONMENT | preloaded() | {"OMP_NUM_THREADS": str(threads())} | os.environ


def _physical(cpus: Collection[int], root: Path) -> int:
    """Physical cores among CPUs; each is one of its own where the kernel does not say."""
    files = {cpu: root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list" for cpu in cpus}
    return len({text_or_empty(file) or str(cpu) for cpu, file in files.items()})


def _quota(root: Path) -> float:
    """CPUs' worth of time that the control groups of this process allow, of cgroup v2 (cpu.max) and v1
    (cpu.cfs_quota_us); infinity without a limit. A group's limit holds for all groups below it."""
    found = [math.inf]
    for folder in _groups(root):
        limit = text_or_empty(folder / "cpu.max")
        limit = limit or f"{text_or_empty(folder / 'cpu.cfs_quota_us')} {text_or_empty(folder / 'cpu.cfs_period_us')}"
        with suppress(ValueError):  # `max 100000`, or no such file
            quota, period = map(int, limit.split())
            found += [quota / period] if quota > 0 and period > 0 else []  # -1 for none in v1
    return min(found)


def _groups(root: Path) -> Iterator[Path]:
    """Folders of this process's groups that may limit its CPU time, and of those above them. In a container only the
    mount itself may be there."""
    for line in text_or_empty(root / "proc/self/cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / controllers
        mount = mount if mount.is_dir() else root / "sys/fs/cgroup/cpu" if controllers else mount
        parts = [part for part in group.split("/") if part not in ("", "..")]
        yield from (mount.joinpath(*parts[:length]) for length in range(len(parts) + 1))


def stalled_seconds() -> float | None:
    """Time in which any program of this machine waited for a processor, since boot; None where the system does not
    count it (Linux: https://docs.kernel.org/accounting/psi.html)."""
    some = text_or_empty(ROOT / "proc/pressure/cpu").splitlines()[:1]
    return int(some[0].rpartition("total=")[2]) / 1e6 if some else None


def cpu_pressure(began: float, stalled: float | None) -> float | None:
    """Share of the time since `began` (of `time.perf_counter`, when `stalled_seconds` was `stalled`) in which a program
    waited for a processor."""
    waited = stalled_seconds()
    return None if stalled is None or waited is None else (waited - stalled) / (time.perf_counter() - began)
