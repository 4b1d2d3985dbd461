"""Trackers: a study's measurements in the experiment trackers that people use. One file for each.

A tracker has one run for each trial, and one with the ranks and the verdict, grouped by study. It lives in a process of
its own (`rankscope.track.tracker_process`), which follows the study's files (`rankscope.track.follow`): training does
not know of it, and goes on whether it waits or crashes.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from rankscope.errors import StudyError, did_you_mean, require
from rankscope.text.catalogue import flatten

STEP, RANK, PROFILE_STEP = "train/global_step", "rank", "system/step"
"""Axes of points: the optimizer step, the candidate's rank, the step of its profile."""


class Point(NamedTuple):
    """Metrics at one position on an axis."""

    axis: str
    step: int
    metrics: dict[str, float]


class Tracker(Protocol):
    """A tool that keeps runs, each one trial, or a study by rank. Any method may raise its client's errors; those on a
    `run`, which is the client's own object, return when the client has accepted the data."""

    destination: str  # of the runs, in any words without a key: where it changes, everything is sent again
    note: str  # one line for the user: the destination, and how to look at it

    def begin(self, name: str, run_id: str, group: str, config: Mapping[str, Any], again: bool) -> Any:
        """Begin a run, or, with `again`, resume the one that an earlier session began as `run_id`. `config` may hold
        mappings: see `flat`."""

    def log(self, run: Any, points: Sequence[Point]) -> None:
        """Append points, in order."""

    def conclude(self, run: Any, sentence: str, pages: Sequence[Path]) -> None:
        """Attach the verdict's sentence, and the report: its page in each language, beside which report.md lies."""

    def finish(self, run: Any, summary: Point, status: str) -> None:
        """End the run with the trial's status, such as `done` or `diverged`. A later session may begin it again. The
        summary is a point at the last step, with metrics of its own: none where the trial has no result, or where an
        earlier session has sent them."""

    def close(self) -> None:
        """Release the client, when all runs have been finished."""


TRACKERS = ("wandb", "tensorboard", "mlflow", "trackio")
"""Names of the clients' modules. Each has a module of that name here, with a class `Client`, a `Tracker`."""


def choose_trackers(asked: str | Sequence[str]) -> list[str]:
    """Names of trackers in a list or in comma-separated text. None is imported. Raises StudyError: a name is unknown,
    or stands twice; MissingExtraError: the client is not installed; the message has the command that installs it."""
    names = [name.strip() for name in (asked.split(",") if isinstance(asked, str) else asked)]
    for number, name in enumerate(names):
        if name not in TRACKERS:
            what = f"--report-to {name}: unknown tracker{did_you_mean(name.lower(), TRACKERS)}"
            raise StudyError(what, f"Known: {', '.join(TRACKERS)}.")
        if name in names[:number]:
            raise StudyError(f"--report-to {name}: listed twice", "Name each tracker once.")
        require(name, name, f"--report-to {name}")
    return names


def flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten nested mappings to `{"training.steps": 200}`; lists become words, None is left out."""
    return {
        key: ",".join(map(str, value)) if isinstance(value, list | tuple) else value
        for key, value in flatten(config).items()
        if value is not None
    }
