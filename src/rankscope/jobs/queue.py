"""One queue of jobs over a launcher's places."""

import time
from collections.abc import Callable, Iterable
from pathlib import Path

from rankscope.errors import RankscopeError
from rankscope.jobs.job import Job, Launcher, Running

POLL_SECONDS = 0.5


def run_jobs(
    launcher: Launcher,
    study: Path,
    jobs: Iterable[Job],
    poll: Callable[[], None],
    ended: Callable[[Job, RankscopeError | None], Iterable[Job]],
    begun: Callable[[Job], None] = lambda job: None,
) -> None:
    """Runs all jobs, each as soon as a place is free, in their order.

    `poll` is called twice a second. `ended` is told how each job ended, and gives the jobs that follow from it: they
    come next. Where this is interrupted, or one of the three raises, those that run are asked to stop, and waited for;
    a second interruption ends them at once.
    """
    waiting, running = list(jobs), list[Running]()
    try:
        while waiting or running:
            while waiting and len(running) < launcher.places():
                job = waiting.pop(0)
                running.append(launcher.start(study, job))
                begun(job)
            done = _first_done(running, poll)
            running = [one for one in running if one not in done]
            for one in done:
                waiting = [*ended(one.job, one.error()), *waiting]
    except BaseException:
        _stop(running)
        raise


def run_one(one: Running, poll: Callable[[], None]) -> RankscopeError | None:
    """Waits for a job that has been started; what went wrong, or None. `poll` and interruptions: see `run_jobs`."""
    try:
        _first_done([one], poll)
    except BaseException:
        _stop([one])
        raise
    return one.error()


def _first_done(running: list[Running], poll: Callable[[], None]) -> list[Running]:
    """Waits until one has ended, or more."""
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
    except KeyboardInterrupt:  # asked a second time
        for one in running:
            one.kill()
