"""Which job runs on which of N equal devices: the longest first, one queue, and a device that is free takes the next.

No job waits for another and none is moved, so that the makespan is at most (4 - 1/N) / 3 of the best one (Graham 1969,
"Bounds on Multiprocessing Timing Anomalies"), where the times are those that the order was made by.
"""

import heapq
from collections.abc import Iterable, Mapping
from typing import NamedTuple


class Placed(NamedTuple):
    """Where and when a job runs."""

    device: int
    """From 0."""
    start: float
    """In seconds after the first."""
    end: float


class Schedule(NamedTuple):
    """What a queue makes of jobs on `devices` equal devices. Times are in seconds."""

    devices: int
    jobs: dict[str, Placed]
    """By name, in the order in which they begin."""

    @property
    def makespan(self) -> float:
        """From the beginning to the end of the last job; 0 without jobs."""
        return max((job.end for job in self.jobs.values()), default=0.0)

    @property
    def busy_seconds(self) -> float:
        """Of all devices together."""
        return sum(job.end - job.start for job in self.jobs.values())


def longest_first(seconds: Mapping[str, float]) -> list[str]:
    """Names of jobs in the order in which they are to begin: by falling time, then by name."""
    return sorted(seconds, key=lambda name: (-seconds[name], name))


def simulate(order: Iterable[str], seconds: Mapping[str, float], devices: int) -> Schedule:
    """Runs jobs in this order, each taking its `seconds`, on the device that is free first; of several the first.

    The order may have been made by other times, such as predicted ones.
    """
    free = [(0.0, device) for device in range(devices)]  # equal, in order: a heap
    jobs = {}
    for name in order:
        start, device = free[0]
        end = start + seconds[name]
        heapq.heapreplace(free, (end, device))
        jobs[name] = Placed(device, start, end)
    return Schedule(devices, jobs)


def lower_bound(seconds: Mapping[str, float], devices: int) -> float:
    """What no schedule is shorter than: all devices busy all the time, and the longest job, which is not divided."""
    return max(sum(seconds.values()) / devices, max(seconds.values(), default=0.0))
