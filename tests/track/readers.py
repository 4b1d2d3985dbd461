"""Reads back what trackers have written, with each tool's own reader."""

import json
import os
import struct
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest


class Seen(NamedTuple):
    """One run, as its tool shows it."""

    group: str
    config: dict[str, Any]
    curves: dict[str, list[tuple[int, float]]]
    """`(place on the axis, value)`, in the order in which they were written."""
    summary: dict[str, float]
    status: str
    """The trial's, in rankscope's words."""
    state: str
    """The run's, in the tool's."""
    verdict: str = ""
    report: str = ""
    """The page, or what stands for it. Of the study's own run alone, as is the verdict."""


def read_tensorboard(folder: Path, trial: str) -> Seen:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import api_pb2, metadata
    from tensorboard.util.tensor_util import make_ndarray

    (path,) = folder.glob(f"tensorboard/*/{trial}")
    events = EventAccumulator(str(path), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    curves = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    told = events.PluginTagToContent("hparams")
    start = metadata.parse_session_start_info_plugin_data(told[metadata.SESSION_START_INFO_TAG])
    end = metadata.parse_session_end_info_plugin_data(told[metadata.SESSION_END_INFO_TAG])
    config = {name: getattr(value, str(value.WhichOneof("kind"))) for name, value in start.hparams.items()}
    said = {tag: events.Tensors(tag)[-1].tensor_proto for tag in events.Tags()["tensors"]}
    texts = {tag: make_ndarray(proto).item().decode() for tag, proto in said.items() if proto.string_val}
    summary = {tag: values[-1][1] for tag, values in curves.items()}
    ended = texts["status"], api_pb2.Status.Name(end.status), texts.get("verdict", ""), texts.get("report", "")
    return Seen(path.parent.name, config, curves, summary, *ended)


def read_mlflow(folder: Path, trial: str) -> Seen:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SQLAlchemy's, on MLflow's tables
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
        groups = {experiment.experiment_id: experiment.name for experiment in client.search_experiments()}
        (run,) = client.search_runs(list(groups), f"attributes.run_name = '{trial}'")
        names = list(run.data.metrics)
        points = {name: client.get_metric_history(run.info.run_id, name) for name in names}
        files = [file.path for file in client.list_artifacts(run.info.run_id, "report")]
        pages = [Path(client.download_artifacts(run.info.run_id, file)).read_text() for file in files]
    curves = {name: [(point.step, point.value) for point in points[name]] for name in names}
    group, status = groups[run.info.experiment_id], run.data.tags["rankscope.status"]
    said = run.info.status, run.data.tags.get("mlflow.note.content", ""), "".join(pages)
    return Seen(group, run.data.params, curves, run.data.metrics, status, *said)


def read_trackio(folder: Path, trial: str) -> Seen:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(folder / "trackio"))
        import trackio
        from trackio import sqlite_storage, utils

        for module in (utils, sqlite_storage):  # which have kept it from an earlier import
            patch.setattr(module, "TRACKIO_DIR", folder / "trackio")
        (run,) = [run for run in trackio.Api().runs("rankscope") if run.name == trial]
        rows = sqlite_storage.SQLiteStorage.get_logs("rankscope", trial, run_id=run.id)
        config = dict(run.config or {})
        linked = sqlite_storage.SQLiteStorage.get_run_artifacts("rankscope", trial, run.id)["output"]
    pages = [file.read_text() for file in (folder / "trackio").rglob("sha256/*/*")] if linked else []
    verdicts = [row["verdict"]["_value"] for row in rows if "verdict" in row]
    curves: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for row in rows:
        for name, value in row.items():
            if isinstance(value, int | float):
                curves[name].append((row["step"], value))
    statuses = [row["status"] for row in rows if "status" in row]
    summary = {name: values[-1][1] for name, values in curves.items()}
    return Seen(config["_Group"], config, curves, summary, statuses[-1], "", "".join(verdicts), "".join(pages))


def read_wandb(folder: Path, trial: str) -> Seen:
    """Records of all fragments of the run, in the order in which `wandb sync` sends them."""
    group, config, exit_code, report = "", {}, 0, ""
    curves: dict[str, list[tuple[int, float]]] = defaultdict(list)
    summary: dict[str, Any] = {}
    for file in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        records = list(wandb_records(file))
        (run,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
        if run.display_name != trial:
            continue
        group, config = run.run_group, {item.key: json.loads(item.value_json) for item in run.config.update}
        for record in records:
            kind = record.WhichOneof("record_type")
            if kind == "history":
                row = _items(record.history.item)
                (axis,) = {"train/global_step", "system/step", "rank"} & row.keys()
                for name, value in row.items():
                    curves[name].append((row[axis], value))
            elif kind == "summary":
                summary |= _items(record.summary.update)
            elif kind == "artifact":
                report = Path(record.artifact.manifest.contents[0].local_path).read_text()
            elif kind == "exit":
                exit_code = record.exit.exit_code
    said = summary["status"], str(exit_code), summary.get("verdict", ""), report
    return Seen(group, config, curves, summary, *said)


def _items(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def wandb_records(file: Path) -> Iterator[Any]:
    """W&B has no reader of its files for Python: these are its own messages, in LevelDB's log format."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, parts = file.read_bytes(), 7, b""
    assert content[:4] == b":W&B"
    while place + 7 <= len(content):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        _, size, kind = struct.unpack("<IHB", content[place : place + 7])
        parts += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last of several
            yield Record.FromString(parts)
            parts = b""


READERS: dict[str, Callable[[Path, str], Seen]] = {
    "wandb": read_wandb,
    "tensorboard": read_tensorboard,
    "mlflow": read_mlflow,
    "trackio": read_trackio,
}

QUIET = {
    "WANDB_MODE": "offline",
    "WANDB_ERROR_REPORTING": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
"""No client of a test calls anybody."""

SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "MLFLOW_TRACKING_PASSWORD": "mlflow-password",
    "TRACKIO_WRITE_TOKEN": "trackio-token",
    "HF_TOKEN": "hf_secret",
}


def clear_environment(patch: pytest.MonkeyPatch, home: Path) -> None:
    """Set an environment for trackers that has nobody's settings, and secrets."""
    for name in list(os.environ):
        if name.startswith(("WANDB_", "MLFLOW_", "TRACKIO_", "TENSORBOARD_")):
            patch.delenv(name)
    for name, value in (QUIET | SECRETS | {"HOME": str(home)}).items():
        patch.setenv(name, value)
