"""MLflow: the study is an experiment, each trial a run; extra `mlflow`."""

import os
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankscope.track import Point, flat

if TYPE_CHECKING:
    from mlflow import MlflowClient

BATCH_METRICS, BATCH_PARAMS = 1000, 100  # largest batch of metrics and of parameters that MLflow accepts

ID_TAG = "rankscope.run_id"
STATUS_TAG = "rankscope.status"
"""Tag of a run with the trial's status: MLflow has fewer statuses, and run ids of its own."""

STATUSES = {"done": "FINISHED", "interrupted": "KILLED"}  # MLflow's status for a trial's; all others are FAILED


class MlflowTracker:
    """Runs in MLFLOW_TRACKING_URI, or in a SQLite file in the study's folder."""

    def __init__(self, folder: Path) -> None:
        from mlflow import MlflowClient

        given = os.environ.get("MLFLOW_TRACKING_URI")
        folder.mkdir(parents=True, exist_ok=True)
        uri = given or f"sqlite:///{folder / 'mlflow.db'}"
        self._client = MlflowClient(tracking_uri=uri)
        self._artifacts = None if given else (folder / "mlflow-artifacts").as_uri()
        self.destination = given or "study"
        show = f"To look at the runs: mlflow ui --backend-store-uri {shlex.quote(uri)}"
        self.note = "MLflow's runs go to MLFLOW_TRACKING_URI" if given else show

    def begin(self, name: str, run_id: str, group: str, config: Mapping[str, Any], again: bool) -> "_Run":
        known = self._client.get_experiment_by_name(group)
        experiment = known.experiment_id if known else self._client.create_experiment(group, self._artifacts)
        if again and (found := self._client.search_runs([experiment], f"tags.`{ID_TAG}` = '{run_id}'")):
            self._client.update_run(found[0].info.run_id, status="RUNNING")
            return _Run(self._client, found[0].info.run_id)
        run = self._client.create_run(experiment, run_name=name, tags={ID_TAG: run_id})
        from mlflow.entities import Param

        for batch in _batches([Param(field, str(value)) for field, value in flat(config).items()], BATCH_PARAMS):
            self._client.log_batch(run.info.run_id, params=batch)
        return _Run(self._client, run.info.run_id)

    def close(self) -> None:
        pass


class _Run:
    def __init__(self, client: "MlflowClient", mlflow_id: str) -> None:
        self._client, self._id = client, mlflow_id

    def log(self, points: Sequence[Point]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)  # the clock that MLflow has
        metrics = [Metric(name, value, now, step) for _, step, found in points for name, value in found.items()]
        for batch in _batches(metrics, BATCH_METRICS):
            self._client.log_batch(self._id, metrics=batch)

    def conclude(self, sentence: str, pages: Sequence[Path]) -> None:
        """Attach them as MLflow shows them: the run's description, and an artifact that it opens."""
        self._client.set_tag(self._id, "mlflow.note.content", sentence)
        for page in pages:
            self._client.log_artifact(self._id, str(page), "report")

    def finish(self, summary: Point, status: str) -> None:
        self.log([summary])
        self._client.set_tag(self._id, STATUS_TAG, status)
        self._client.set_terminated(self._id, STATUSES.get(status, "FAILED"))


def _batches(values: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [values[first : first + size] for first in range(0, len(values), size)]
