"""One queue of jobs over a launcher's slots."""

import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from rankscope.errors import RankscopeError
from rankscope.jobs.job import Job, Kind, Launcher, Run, Running

POLL_SECONDS = 0.5


def run_kind(kind: Kind, run: Run, jobs: Iterable[Job], launcher: Launcher, poll: Callable[[], None]) -> None:
    """Run jobs of one kind, and those that follow from them, to the end."""
    run_jobs(launcher, run.study.path, jobs, poll, partial(kind.ended, run))


def run_jobs(
    launcher: Launcher,
    study: Path,
    jobs: Iterable[Job],
    poll: Callable[[], None],
    ended: Callable[[Job, RankscopeError | None, Sequence[Job]], list[Job]],
) -> None:
    """Run all jobs in their order, each as soon as a slot is free.

    `poll` is called twice a second. `ended` is called with each job that has ended, its error and the jobs that still
    wait; it returns the jobs to run from here on. On an interruption, or where one of the two raises, the running jobs
    are asked to stop, and waited for; a second interruption kills them.
    """
    waiting, running = list(jobs), list[Running]()
    try:
        while waiting or running:
            while waiting and len(running) < launcher.slots():
                running.append(launcher.start(study, waiting.pop(0)))
            done = _first_done(running, poll)
            running = [one for one in running if one not in done]
            for one in done:
                waiting = ended(one.job, one.error(), waiting)
    except BaseException:
        _stop(running)
        raise


def _first_done(running: list[Running], poll: Callable[[], None]) -> list[Running]:
    """Wait until at least one job has ended, and return those that have."""
    while True:
        due = time.monotonic() + POLL_SECONDS
        done = [one for one in running if not one.is_running()]
        poll()
        if done:
            return done
        while time.monotonic() < due and all(one.is_running() for one in running):
            time.sleep(POLL_SECONDS / 10)


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
