"""The allocator of a job's process: jemalloc where the system has it, else that of its C library.

glibc keeps freed pieces of memory between live tensors, more with every batch of other lengths. With jemalloc a study
on a CPU takes less memory and time (docs/results/memory-prediction.md). It is preloaded, as PyTorch's own launcher for
CPUs does, where the user has not set LD_PRELOAD.
"""

import os
import subprocess
import sys
from ctypes.util import find_library
from functools import cache
from pathlib import Path

LIBRARY = "libjemalloc.so.2"


@cache
def jemalloc() -> str | None:
    """jemalloc's library, as LD_PRELOAD takes it: of the environment that Python runs in (conda's), or the system's.
    None where there is none, or where no program starts with it, since it was built for other pages or processors."""
    if sys.platform != "linux":
        return None
    own = Path(sys.prefix, "lib", LIBRARY)
    found = str(own) if own.exists() else find_library("jemalloc")
    if found is None:
        return None
    tried = subprocess.run([sys.executable, "-ISc", ""], env={"LD_PRELOAD": found}, capture_output=True, check=False)
    return found if tried.returncode == 0 and not tried.stderr else None


def preloaded() -> dict[str, str]:
    """Environment of a job: with jemalloc, or with huge pages for the C library's allocator, which halve its page
    faults (docs/lab-notes.md) and which jemalloc does not need."""
    library = os.environ["LD_PRELOAD"] if "LD_PRELOAD" in os.environ else jemalloc()
    return {"THP_MEM_ALLOC_ENABLE": "1"} if library is None else {"LD_PRELOAD": library}


def allocator() -> str:
    """Libraries that a job preloads, by name; `system` where it preloads none."""
    names = preloaded().get("LD_PRELOAD", "").replace(":", " ").split()
    return ", ".join(Path(name).name for name in names) or "system"
