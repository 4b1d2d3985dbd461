"""A launcher without processes: a test decides how its jobs end."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

from rankscope.errors import RankscopeError
from rankscope.jobs.context import Place
from rankscope.jobs.job import Job
from rankscope.measure.machine import Site

HERE = Site("cpu", True, 1 << 33, "cpu", "float32", {}, {})


class FakeLauncher:
    """Ends every job at once, with the error or None that `ends` returns for the study's path and the job's content."""

    loads_once = True

    def __init__(self, ends: Callable[[Path, dict[str, Any]], RankscopeError | None], site: Site = HERE) -> None:
        self._ends, self._site = ends, site
        self.started: list[Job] = []

    def site(self) -> Site:
        return self._site

    def places(self) -> int:
        return 1

    def start(self, study: Path, job: Job) -> Any:
        self.started.append(job)
        error = self._ends(study, dict(job.content))
        return SimpleNamespace(job=job, is_running=lambda: False, error=lambda: error)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None: ...


def place(launcher: FakeLauncher) -> Place:
    """Run context of a fake launcher, with a prediction of zeros."""
    prediction: Any = SimpleNamespace(device="cpu", base_bytes=0, base_params=0, peak_bytes=lambda *_: 0)
    return Place(launcher, launcher.site(), prediction)
