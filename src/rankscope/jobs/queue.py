"""One queue of jobs over a launcher's slots."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rankscope.errors import RankscopeError, StudyError
from rankscope.jobs.job import Job, Launcher, Running

POLL_SECONDS = 0.5


@dataclass
class TimeLimit:
    """Time after which nothing may run. Forecasts are scaled by how much longer than theirs the jobs so far took."""

    ends: float  # of `time.monotonic`
    forecast: float = 0.0  # seconds of the jobs that have ended well, and those that they took
    taken: float = 0.0

    def fits(self, job: Job) -> bool:
        """Whether the job would end in time if it started now."""
        scale = self.taken / self.forecast if self.forecast else 1.0
        return time.monotonic() + scale * job.seconds <= self.ends

    def count(self, job: Job, seconds: float) -> None:
        if job.seconds:
            self.forecast, self.taken = self.forecast + job.seconds, self.taken + seconds


def time_limit(hours: float | None) -> TimeLimit | None:
    """Limit of a run that begins now. Raises StudyError: no time is left to it."""
    if hours is None:
        return None
    if not 0 < hours < math.inf:
        raise StudyError(f"--hours {hours:g}: expected hours above 0", "For example --hours 2, or 0.5.")
    return TimeLimit(time.monotonic() + 3600 * hours)


def run_jobs(
    launcher: Launcher,
    study: Path,
    jobs: Iterable[Job],
    poll: Callable[[], None],
    ended: Callable[[Job, RankscopeError | None, Sequence[Job]], list[Job]],
    limit: TimeLimit | None = None,
) -> None:
    """Run all jobs in their order, each as soon as a slot is free; those that would end after the limit do not start.

    `poll` is called twice a second. `ended` is called with each job that has ended, its error and the jobs that still
    wait; it returns the jobs to run from here on. On an interruption, or where one of the two raises, the running jobs
    are asked to stop, and waited for; a second interruption kills them.
    """
    waiting, running = list(jobs), list[tuple[Running, float]]()  # with the time at which each started
    try:
        while waiting or running:
            while waiting and len(running) < launcher.slots():
                job = waiting.pop(0)
                if limit is None or limit.fits(job):
                    running.append((launcher.start(study, job), time.monotonic()))
            if not running:
                break
            due = time.monotonic() + POLL_SECONDS
            done = [one for one in running if not one[0].is_running()]
            poll()
            running = [one for one in running if one not in done]
            for one, began in done:
                error = one.error()
                if limit is not None and error is None:
                    limit.count(one.job, time.monotonic() - began)
                waiting = ended(one.job, error, waiting)
            while not done and time.monotonic() < due and all(one.is_running() for one, _ in running):
                time.sleep(POLL_SECONDS / 10)
    except BaseException:
        _stop([one for one, _ in running])
        raise


def _stop(running: list[Running]) -> None:
    for one in running:
        one.stop()
    try:
        while running:
            running = [one for one in running if one.is_running()]
            time.sleep(POLL_SECONDS / 10)
    except KeyboardInterrupt:  # the second one
        for one in running:
            one.kill()
