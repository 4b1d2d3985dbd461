"""What the jobs of a run share: where they run, and how progress is reported."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from rankscope.errors import RankscopeError, WorkerError
from rankscope.jobs.job import Job, Launcher
from rankscope.jobs.queue import run_jobs
from rankscope.measure.machine import Site
from rankscope.plan.memory import CostModel
from rankscope.spec.candidates import Trial
from rankscope.study.folder import StudyFolder
from rankscope.study.records import Failure

if TYPE_CHECKING:
    pass

WRONG = (2, 3)
"""Exit codes of errors in the study, the model or the data: every job would meet them."""

GPU_HOST_BYTES = 4 << 30
"""Of the host, for a process that works on a GPU, beside the base model as it is loaded: taken, not measured."""


class Progress(Protocol):
    """Callbacks that a run makes to report progress. `rankscope.ui.progress` has the terminal's; a caller may pass its
    own. How far the run is, a callback reads from the study's files.
    """

    def say(self, message: str) -> None:
        """A line to keep, such as what a pack took or why it did not finish."""
        ...

    def poll(self) -> None:
        """Called twice a second while jobs run."""
        ...


class Place(NamedTuple):
    """What jobs need to know of where they run."""

    launcher: Launcher
    site: Site
    prediction: CostModel

    def host_bytes(self, trials: Sequence[Trial], step_tokens: float) -> int:
        """Memory of the host that a pack takes, as predicted."""
        if self.prediction.device == "cuda":
            return self.prediction.base_bytes + GPU_HOST_BYTES
        return self.prediction.peak_bytes(trials, self.site.free_bytes, step_tokens)


def run_alone(
    study: StudyFolder,
    place: Place,
    content: Mapping[str, Any],
    folder: str,
    reads: Sequence[str],
    trials: Sequence[Trial],
    progress: Progress,
) -> RankscopeError | None:
    """Run one job while nothing else runs, and return what went wrong, or None."""
    errors: list[RankscopeError | None] = []

    def ended(job: Job, error: RankscopeError | None) -> list[Job]:
        errors.append(error)
        return []

    job = Job(content, folder, reads, place.host_bytes(trials, math.inf), alone=True)
    run_jobs(place.launcher, study.path, [job], progress.poll, ended)
    return errors[0]


def failure_of(error: RankscopeError) -> Failure:
    """The error as failures.json records it."""
    return Failure(status=getattr(error, "status", WorkerError.status), reason=error.what)
