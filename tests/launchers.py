"""A launcher without processes: a test decides how its jobs end. And one job in a process of its own."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

from rankscope.errors import RankscopeError
from rankscope.jobs.job import Job, Kind, Progress, Run
from rankscope.jobs.process import JobProcess
from rankscope.jobs.queue import run_jobs
from rankscope.measure.machine import Site
from rankscope.study.folder import StudyFolder
from rankscope.study.missing import missing_profiles, without_result
from rankscope.text.catalogue import load

HERE = Site("cpu", True, 1 << 33, "cpu", "float32", {}, {})


class FakeLauncher:
    """Ends every job at once, with the error or None that `ends` returns for the study's path and the job."""

    def __init__(self, ends: Callable[[Path, Job], RankscopeError | None], site: Site = HERE) -> None:
        self._ends, self._site = ends, site
        self.started: list[Job] = []

    def site(self) -> Site:
        return self._site

    def slots(self) -> int:
        return 1

    def start(self, study: Path, job: Job) -> Any:
        self.started.append(job)
        error = self._ends(study, job)
        return SimpleNamespace(job=job, is_running=lambda: False, error=lambda: error)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None: ...


def run_alone(study: Path, job: Job) -> RankscopeError | None:
    """Run one job in a child process to its end, and return what went wrong."""
    process = JobProcess(study, job)
    while process.is_running(0.05):
        pass
    return process.error()


def do(kind: Kind, study: StudyFolder, launcher: FakeLauncher, progress: Progress) -> None:
    """Run one kind of job of a study, by a plan that predicts nothing."""
    plan: Any = SimpleNamespace(
        spec=study.spec,
        site=launcher.site(),
        profiles=missing_profiles(study.spec, study),
        remeasure=False,
        timed=False,
        reference=without_result(study, study.reference_trials),
        prediction=SimpleNamespace(device="cpu", base_bytes=0, base_params=0, process_bytes=0),
        host_bytes=lambda *_: 0,
        fitting=lambda _, names: [list(names)],
    )
    run = Run(study, plan, progress.say, load("en"))
    run_jobs(launcher, study.path, kind.jobs(run), progress.poll, partial(kind.ended, run))
