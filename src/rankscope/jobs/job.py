"""Contracts of this folder: a job, the launcher that starts it, and the kind that makes it.

    kind.jobs -> queue.run_jobs -> launcher.start -> worker -> kind.work -> kind.ended

A job is the work of one child process. A kind of job is one module, which knows which jobs a study still needs, does
the work in the child, and decides what follows when a job has ended. A launcher starts jobs in its slots, one for each
device, and `run_jobs` keeps the slots busy. tests/jobs/test_kinds.py holds for every kind, and
tests/jobs/test_contract.py for both launchers.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

from rankscope.errors import RankscopeError, WorkerError
from rankscope.study.folder import StudyFolder
from rankscope.study.records import Failure

if TYPE_CHECKING:  # torch takes seconds, and what shows a study needs none
    from rankscope.jobs.queue import TimeLimit
    from rankscope.measure.machine import Site
    from rankscope.plan.plan import Plan
    from rankscope.text.catalogue import Catalogue

FATAL_EXIT_CODES = (2, 3)  # exit codes of errors in the study, the model or the data, which every job would hit


class Job(NamedTuple):
    module: str  # module whose `work` does the job, such as `rankscope.jobs.packs`
    content: Mapping[str, Any]  # arguments of `work`, published as job.json
    folder: str  # of the study, for job.json, log.txt (all output of the process) and, after a failure, error.json
    reads: Sequence[str] = ()  # files and folders of the study that the job needs beside `shared` and its own folder
    memory_bytes: int = 0  # predicted peak of the host's memory; 0 where it is not predicted
    seconds: float = 0.0  # forecast of a run with a time limit; 0 where there is none
    alone: bool = False  # whether nothing else may run on the job's device, nor beside it on a CPU: it measures
    shared: Sequence[str] = ("study.yaml", "data")  # files and folders that all jobs read and none changes


class Progress(Protocol):
    """Callbacks of a run. What is done so far stands in the study's files, where `poll` can look it up."""

    def say(self, message: str) -> None:
        """Keep a sentence for the user."""

    def poll(self) -> None:
        """Look again: called twice a second while jobs run."""


Say: TypeAlias = Callable[[str], None]  # tells the user a sentence


class Settings(NamedTuple):
    """How a study is run. What it asks is its `StudySpec`."""

    trackers: Sequence[str] = ()  # names
    language: str = "en"  # of what the run says, and of the report
    remeasure: bool = False  # measure all costs again
    until_settled: bool = False  # add seeds to the ranks in contention, look by planned look, until nothing is open
    limit: "TimeLimit | None" = None  # nothing starts whose forecast would end later
    allow_code: Sequence[str | Path] = ()  # what `measure.task` may run
    approve: "Callable[[Plan], None] | None" = None  # called with a new study's plan, before it is written; may raise


class Run(NamedTuple):
    study: StudyFolder
    plan: "Plan"
    say: Say
    text: "Catalogue"  # words of what is said


class Kind(Protocol):
    """A kind of job: a module with these three functions."""

    def jobs(self, run: Run) -> list[Job]:
        """Return the jobs that the study still needs, in the order in which they start."""

    def work(self, study_path: Path, content: Mapping[str, Any]) -> None:
        """Do one job, in the child process. `study_path` is the study's directory."""

    def ended(self, run: Run, job: Job, error: RankscopeError | None, waiting: Sequence[Job]) -> list[Job]:
        """Record how a job ended, and return the jobs to run from here on, given those that still wait. Raises
        RankscopeError: the run cannot go on."""


class Running(Protocol):
    job: Job

    def is_running(self) -> bool:
        """Bring what is new into the study's directory, and return whether the job still runs."""

    def error(self) -> RankscopeError | None:
        """Return what went wrong in a job that has ended."""

    def stop(self) -> None:
        """Ask the job to stop at a checkpoint. It keeps running until it has."""

    def kill(self) -> None:
        """End the job at once."""


class Launcher(Protocol):
    """Starts jobs. A context manager: leaving it releases what it holds."""

    def site(self) -> "Site":
        """Return where jobs run. May take seconds."""

    def slots(self) -> int:
        """Return how many jobs can run concurrently: one for each device."""

    def start(self, study: Path, job: Job) -> Running:
        """Start a job of the study in `study`, in a free slot. Raises StudyDirectoryError: the job's folder cannot be
        written."""

    def __enter__(self) -> "Launcher": ...

    def __exit__(self, *error: object) -> None: ...


def raise_fatal(error: RankscopeError | None) -> None:
    """Raise an error that every other job would hit too."""
    if error is not None and error.exit_code in FATAL_EXIT_CODES:
        raise error


def failure_of(error: RankscopeError) -> Failure:
    return Failure(status=getattr(error, "status", WorkerError.status), reason=error.what)
