"""MLflow: the study is an experiment, each trial a run; extra `mlflow`."""

import os
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rankscope.text.catalogue import Catalogue
from rankscope.track import Point, Tracker, flat

MOST = 100  # MLflow accepts 100 parameters in a batch, and 1000 metrics
STATUSES = {"done": "FINISHED", "interrupted": "KILLED"}  # MLflow's status for a trial's; all others are FAILED


class Client(Tracker):
    """Runs in MLFLOW_TRACKING_URI, or in a SQLite file in the study's folder; a run is MLflow's id. Tags hold our own
    run id, as MLflow has ids of its own, and the trial's status, as it has fewer."""

    def __init__(self, folder: Path, text: Catalogue) -> None:
        from mlflow import MlflowClient

        given = os.environ.get("MLFLOW_TRACKING_URI")
        folder.mkdir(parents=True, exist_ok=True)
        uri = given or f"sqlite:///{folder / 'mlflow.db'}"
        self._client = MlflowClient(tracking_uri=uri)
        self._artifacts = None if given else (folder / "mlflow-artifacts").as_uri()
        self.destination = given or "study"
        show = f"mlflow ui --backend-store-uri {shlex.quote(uri)}"
        self.note = text("track.mlflow") if given else text("track.runs", command=show)

    def begin(self, name: str, run_id: str, group: str, config: Mapping[str, Any], again: bool) -> str:
        known = self._client.get_experiment_by_name(group)
        experiment = known.experiment_id if known else self._client.create_experiment(group, self._artifacts)
        if again and (found := self._client.search_runs([experiment], f"tags.`rankscope.run_id` = '{run_id}'")):
            own: str = found[0].info.run_id
            self._client.update_run(own, status="RUNNING")
            return own
        own = self._client.create_run(experiment, run_name=name, tags={"rankscope.run_id": run_id}).info.run_id
        from mlflow.entities import Param

        params = [Param(field, str(value)) for field, value in flat(config).items()]
        for first in range(0, len(params), MOST):
            self._client.log_batch(own, params=params[first : first + MOST])
        return own

    def log(self, run: str, points: Sequence[Point]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)  # the clock that MLflow has
        metrics = [Metric(name, value, now, step) for _, step, found in points for name, value in found.items()]
        for first in range(0, len(metrics), 10 * MOST):
            self._client.log_batch(run, metrics=metrics[first : first + 10 * MOST])

    def conclude(self, run: str, sentence: str, pages: Sequence[Path]) -> None:
        """Attach them as MLflow shows them: the run's description, and an artifact that it opens."""
        self._client.set_tag(run, "mlflow.note.content", sentence)
        for page in pages:
            self._client.log_artifact(run, str(page), "report")

    def finish(self, run: str, summary: Point, status: str) -> None:
        self.log(run, [summary])
        self._client.set_tag(run, "rankscope.status", status)
        self._client.set_terminated(run, STATUSES.get(status, "FAILED"))
