"""Where a study's jobs run: local child processes, one for each device, or a Ray cluster.

    jobs -> queue -> local or ray -> process -> worker

A job is what one child process does (`rankscope.jobs.worker`). A launcher starts it in one of its places, of which
each is one device; the queue keeps the places busy. To add another launcher, write its two classes in one file and name
it in `make_launcher`: tests/launch/test_contract.py holds for all.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from rankscope.errors import RankscopeError
from rankscope.measure.machine import Site


class Job(NamedTuple):
    """What one child process does."""

    content: Mapping[str, Any]
    """job.json: see `rankscope.jobs.worker`."""
    folder: str
    """Of the study, such as `packs/p000`: job.json, log.txt (all that the process prints), and error.json after a
    failure."""
    reads: Sequence[str] = ()
    """Files and folders of the study that it needs besides study.yaml and data/, and what it goes on from."""
    memory_bytes: int = 0
    """Of the host, as predicted."""
    alone: bool = False
    """What it measures must not be disturbed: nothing else may run on its device, nor beside it on a CPU."""


class Running(Protocol):
    """A job that has been started."""

    job: Job

    def is_running(self) -> bool:
        """Brings what is new into the study's directory, and says whether the job goes on."""
        ...

    def error(self) -> RankscopeError | None:
        """What went wrong, of a job that has ended."""
        ...

    def stop(self) -> None:
        """Asks it to stop at a checkpoint. It goes on to run until it has."""
        ...

    def kill(self) -> None:
        """Ends it at once."""
        ...


class Launcher(Protocol):
    """Starts jobs. Use as a context manager: leaving it lets go of what it holds."""

    loads_once: bool
    """Whether packs that follow one another on one device should be one job, which loads the model once. Where a job
    may be lost each is one of its own."""

    def site(self) -> Site:
        """Where jobs run. May take seconds."""
        ...

    def places(self) -> int:
        """Devices now: so many jobs may run at a time."""
        ...

    def start(self, study: Path, job: Job) -> Running:
        """Starts a job of the study in `study`. No more than `places()` may run at a time.

        Raises:
            StudyDirectoryError: the job's folder cannot be written.
        """
        ...

    def __enter__(self) -> "Launcher": ...

    def __exit__(self, *error: object) -> None: ...
