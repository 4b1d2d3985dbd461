"""Trackio: the study is a group, each trial a run; extra `trackio`."""

import os
import shlex
import warnings
from collections.abc import Mapping, Sequence
from contextvars import Context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankscope.text.catalogue import Catalogue
from rankscope.track import Point, Tracker, flat

if TYPE_CHECKING:
    from trackio.run import Run


class Client(Tracker):
    """Runs in TRACKIO_PROJECT (`rankscope`), and in TRACKIO_SPACE_ID or TRACKIO_SERVER_URL where one is set. Local
    files are in TRACKIO_DIR, or in the study's folder."""

    def __init__(self, folder: Path, text: Catalogue) -> None:
        remote = os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL")
        given = os.environ.get("TRACKIO_DIR")
        here = os.environ.setdefault("TRACKIO_DIR", str(folder / "trackio"))  # read when it is imported
        self._project = os.environ.get("TRACKIO_PROJECT") or "rankscope"
        self._failures: list[str] = []
        warnings.simplefilter("always")
        warnings.showwarning = self._hear
        import trackio  # noqa: F401

        self.destination = f"{remote or given or 'study'}/{self._project}"
        show = f"TRACKIO_DIR={shlex.quote(here)} trackio show --project {shlex.quote(self._project)}"
        self.note = text("track.trackio") if remote else text("track.runs", command=show)

    def _hear(self, message: Warning | str, category: type[Warning], filename: str, *_: Any, **__: Any) -> None:
        """Record a warning: Trackio writes from a thread, and warns of what it could not write."""
        if "trackio" in Path(filename).parts:
            self._failures.append(str(message))

    def begin(self, name: str, run_id: str, group: str, config: Mapping[str, Any], again: bool) -> "Run":
        import trackio

        return Context().run(  # in a context of its own, since it ends the run of the present one
            trackio.init,
            project=self._project,
            name=name,
            group=group,
            config=flat(config),
            resume="allow" if again else "never",
            embed=False,
            auto_log_gpu=False,  # of this process, not of the one that trains
            auto_log_cpu=False,
        )

    def log(self, run: "Run", points: Sequence[Point]) -> None:
        for axis, step, metrics in points:
            run.log({axis: step, **metrics}, step=step)
        self._check()

    def conclude(self, run: "Run", sentence: str, pages: Sequence[Path]) -> None:
        from trackio import Artifact, Markdown

        run.log({"verdict": Markdown(sentence)})
        artifact = Artifact(f"report-{run.id}", "report", sentence)
        for page in pages:
            artifact.add_file(page)
        if pages:  # it takes none without a file
            run.log_artifact(artifact)

    def finish(self, run: "Run", summary: Point, status: str) -> None:
        run.log({**summary.metrics, "status": status}, step=summary.step)
        run.finish()
        self._check()

    def _check(self) -> None:
        if self._failures:
            raise RuntimeError(self._failures[0])
