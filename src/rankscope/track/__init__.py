"""Trackers: a study's measurements in the experiment trackers that people use. One file for each.

A tracker has one run for each trial, and one with the ranks and the verdict, grouped by study. It lives in a process of
its own (`rankscope.track.tracker_process`), which follows the study's files (`rankscope.track.follow`): training does
not know of it, and goes on whether it waits or crashes.
"""

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from rankscope.errors import StudyError, did_you_mean, require
from rankscope.text.catalogue import flatten

STEP = "train/global_step"
RANK = "rank"
PROFILE_STEP = "system/step"
"""Axes of points: the optimizer step, the candidate's rank, the step of its profile."""


class Point(NamedTuple):
    """Metrics at one position on an axis."""

    axis: str
    step: int
    metrics: dict[str, float]


class Run(Protocol):
    """One trial, or a study by rank, in a tracker. Methods return when the client has accepted the data."""

    def log(self, points: Sequence[Point]) -> None:
        """Append points, in order."""

    def conclude(self, sentence: str, pages: Sequence[Path]) -> None:
        """Attach the verdict's sentence, and the report: its page in each language, beside which report.md lies."""

    def finish(self, summary: Point, status: str) -> None:
        """End the run with the trial's status, such as `done` or `diverged`. A later session may begin it again. The
        summary is a point at the last step, with metrics of its own: none where the trial has no result, or where an
        earlier session has sent them."""


class Tracker(Protocol):
    """A tool that keeps runs. Any method may raise its client's errors."""

    destination: str  # of the runs, in any words without a key: where it changes, everything is sent again
    note: str  # one line for the user: the destination, and how to look at it

    def begin(self, name: str, run_id: str, group: str, config: Mapping[str, Any], again: bool) -> Run:
        """Begin a run, or, with `again`, resume the one that an earlier session began as `run_id`. `config` may hold
        mappings: see `flat`."""

    def close(self) -> None:
        """Release the client, when all runs have been finished."""


TRACKERS = {
    "wandb": "WandbTracker",
    "tensorboard": "TensorBoardTracker",
    "mlflow": "MlflowTracker",
    "trackio": "TrackioTracker",
}
"""Class of each tracker in rankscope.track.NAME, by the name of the client's module, which must be installed."""


def choose_trackers(asked: str | Sequence[str]) -> list[str]:
    """Return the names of trackers in a list or in comma-separated text. None is imported. Raises StudyError: a name is
    unknown, or stands twice. Raises MissingExtraError: the client is not installed; the message has the command that
    installs it."""
    names = [name.strip() for name in (asked.split(",") if isinstance(asked, str) else asked)]
    for number, name in enumerate(names):
        if name not in TRACKERS:
            what = f"--report-to {name}: unknown tracker{did_you_mean(name.lower(), TRACKERS)}"
            raise StudyError(what, f"Known: {', '.join(TRACKERS)}.")
        if name in names[:number]:
            raise StudyError(f"--report-to {name}: listed twice", "Name each tracker once.")
        require(name, name, f"--report-to {name}")
    return names


def open_tracker(name: str, folder: Path) -> Tracker:
    """Import a tracker's client and create the tracker. `folder` is the absolute path of the study's for trackers."""
    tracker: Tracker = getattr(import_module(f"rankscope.track.{name}"), TRACKERS[name])(folder)
    return tracker


def flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten nested mappings to `{"training.steps": 200}`; lists become words, None is left out."""
    return {
        key: ",".join(map(str, value)) if isinstance(value, list | tuple) else value
        for key, value in flatten(config).items()
        if value is not None
    }
