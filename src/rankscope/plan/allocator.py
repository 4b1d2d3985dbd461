"""What the C library's allocator holds while tensors come and go: asked of the allocator itself.

glibc keeps freed tensors of up to 32 MB for later ones, and sequences of varying lengths leave holes that the next
forward's tensors do not fit (docs/lab-notes.md). How much that is depends on sizes and order, so a list of allocations
is replayed in a small process by the same calls as torch's. No memory is touched, and so almost none is taken.

This file is also the program of that process, which imports nothing but the standard library.
"""

import ctypes
import mmap
import subprocess
import sys
from array import array
from collections.abc import Iterable

HUGE = 2 << 20
"""From this size on torch aligns a tensor to a page, below to 64 bytes (c10/core/impl/alloc_cpu.cpp)."""

STARTS = tuple(24_640 * start for start in range(1, 8))
"""Bytes already on the heap where a replay begins. What the allocator keeps can hang on that: of sizes near its limits
up to twice as much, so that the middle of several replays is told and not one."""

_THP_DISABLE = 41  # of prctl(2): a header that is written must not take a huge page


def held_bytes(allocations: Iterable[tuple[int, int]]) -> list[int] | None:
    """Bytes held from the system after each of `allocations`: (number, bytes), bytes below 0 where it is freed.

    Of replays from all `STARTS`, the one with the median peak. Numbers count up from 0 in the order in which storages
    come. None where that cannot be known: without glibc, or where the system does not grant so much.
    """
    if sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"):
        return None
    numbers = array("q", (number for allocation in allocations for number in allocation))
    replays = []
    for start in STARTS:
        command = [sys.executable, "-I", "-S", __file__, str(start)]
        done = subprocess.run(command, input=numbers.tobytes(), capture_output=True, check=False)
        if done.returncode:
            return None
        replays.append(array("q", done.stdout))
    return sorted(replays, key=lambda held: max(held, default=0))[len(STARTS) // 2].tolist()


def _replay(numbers: "array[int]", already: int) -> "array[int]":
    """What `held_bytes` returns, of one replay. The heap's end tells its size; what lies outside was mapped by
    itself."""
    libc = ctypes.CDLL(None)
    libc.prctl(_THP_DISABLE, 1, 0, 0, 0)
    libc.sbrk.restype, libc.sbrk.argtypes = ctypes.c_size_t, [ctypes.c_ssize_t]
    libc.free.argtypes = [ctypes.c_size_t]
    libc.posix_memalign.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
    steps = len(numbers) // 2
    held, pointer = array("q", bytes(8 * steps)), ctypes.c_size_t()
    address, outside = array("Q", bytes(8 * steps)), 0  # made before, so that Python's own needs do not interfere
    libc.posix_memalign(ctypes.byref(pointer), 64, already)
    start = libc.sbrk(0)
    for step in range(steps):
        number, size = numbers[2 * step], numbers[2 * step + 1]
        if size > 0:
            alignment = mmap.PAGESIZE if size >= HUGE else 64
            if libc.posix_memalign(ctypes.byref(pointer), alignment, size):
                sys.exit(1)
            address[number] = pointer.value
        if not start <= address[number] < libc.sbrk(0):
            outside += size
        if size < 0:
            libc.free(address[number])
        held[step] = libc.sbrk(0) - start + outside
    return held


if __name__ == "__main__":
    given = array("q")
    given.frombytes(sys.stdin.buffer.read())
    sys.stdout.buffer.write(_replay(given, int(sys.argv[1])).tobytes())
