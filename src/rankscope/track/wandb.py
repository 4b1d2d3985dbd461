"""Weights & Biases: the study is a group, each trial a run; extra `wandb`.

Runs are offline where WANDB_MODE says so, and where there is no API key: the user is not prompted for one.
"""

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankscope.text.catalogue import Catalogue
from rankscope.track import PROFILE_STEP, RANK, STEP, Point, Tracker

if TYPE_CHECKING:
    import wandb

AXES = {STEP: ("train/*", "eval/*"), PROFILE_STEP: ("system/*",), RANK: ("by_rank/*",)}
"""Axis of each group of charts."""


class Client(Tracker):
    """Runs in WANDB_PROJECT (`rankscope`) of WANDB_ENTITY, with files in WANDB_DIR (the study's folder)."""

    def __init__(self, folder: Path, text: Catalogue) -> None:
        os.environ.setdefault("WANDB_CACHE_DIR", str(folder / "wandb-cache"))  # its logs, to which each run has a link
        os.environ.setdefault("WANDB_DATA_DIR", str(folder / "wandb-data"))  # artifacts, until they are uploaded
        import wandb

        self._folder = Path(os.environ.get("WANDB_DIR") or folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        settings = wandb.setup().settings
        self._project = settings.project or "rankscope"
        has_no_key = settings.mode == "online" and not wandb.login(prompt=False, verify=False)
        self._offline = has_no_key or settings.mode in ("offline", "dryrun")
        self.destination = f"{settings.base_url}/{settings.entity or ''}/{self._project}"
        self.note = text("track.wandb", address=settings.base_url, project=self._project)
        if self._offline:
            self.destination = "offline"
            sync = f"wandb sync {shlex.quote(str(self._folder / 'wandb'))}/offline-run-*"
            self.note = text("track.wandb_offline", command=sync)

    def begin(self, name: str, run_id: str, group: str, config: Mapping[str, Any], again: bool) -> "wandb.Run":
        import wandb

        # What W&B would measure is this process, not the one that trains; and links would lead out of the study.
        off = ("disable_git", "disable_code", "x_disable_stats", "x_disable_meta", "x_disable_machine_info", "silent")
        settings = {"console": "off", "symlink": False, "x_save_requirements": False, **dict.fromkeys(off, True)}
        run = wandb.init(
            project=self._project,
            group=group,
            name=name,
            id=run_id,
            dir=self._folder,
            config=dict(config),
            allow_val_change=True,
            mode="offline" if self._offline else None,  # None: what WANDB_MODE says
            resume="allow",
            reinit="create_new",
            settings=settings,
        )
        for axis, metrics in AXES.items():
            run.define_metric(axis)
            for metric in metrics:
                run.define_metric(metric, step_metric=axis)
        self._remove_links()
        return run

    def _remove_links(self) -> None:
        """Remove the client's symbolic links: a study with links is refused when it is opened."""
        for link in self._folder.glob("wandb/*run-*/logs/debug-core.log"):
            if link.is_symlink():
                link.unlink()

    def log(self, run: "wandb.Run", points: Sequence[Point]) -> None:
        for axis, step, metrics in points:
            run.log({axis: step, **metrics})

    def conclude(self, run: "wandb.Run", sentence: str, pages: Sequence[Path]) -> None:
        import wandb

        run.summary.update({"verdict": sentence})
        artifact = wandb.Artifact(f"report-{run.id}", "report", description=sentence)
        for page in pages:
            artifact.add_file(str(page))
        if pages:
            run.log_artifact(artifact)

    def finish(self, run: "wandb.Run", summary: Point, status: str) -> None:
        run.summary.update({**summary.metrics, "status": status})
        run.finish(exit_code=0 if status == "done" else 1)

    def close(self) -> None:
        import wandb

        wandb.teardown()
        self._remove_links()
