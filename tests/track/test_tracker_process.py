"""Trackers cannot stop a study, delay it, or reveal secrets."""

import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

import rankscope
from folders import write_data, write_model
from rankscope.cli import app
from rankscope.errors import MissingExtraError, StudyError
from rankscope.files import read_json, write_json
from rankscope.spec.models import StudySpec
from rankscope.study.study import Study
from rankscope.text.catalogue import load
from rankscope.track import choose_trackers, flat
from rankscope.track import tracker_process as beside
from rankscope.track.__main__ import open_tracker, redacted
from rankscope.track.follow import TrackerSync, costs, memory_points
from rankscope.track.tracker_process import run_trackers
from rankscope.track.trackio import Client
from recording import RecordingProgress
from track.readers import READERS, clear_environment
from track.test_contract import copy_study

CANDIDATE = StudySpec.model_validate({"model": {"id": "m"}, "data": {"id": "d"}}).candidates()[0]

CLIENT = """
import os, time
{at_import}
class MlflowClient:
    def __init__(self, tracking_uri): pass
    def get_experiment_by_name(self, name): return None
    def create_experiment(self, name, artifacts): return "1"
    def create_run(self, *arguments, **named):
        {at_begin}
"""
"""A client of MLflow's name that does what it is told."""


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    (tmp_path / "home").mkdir()
    clear_environment(monkeypatch, tmp_path / "home")
    return copy_study(tmp_path / "study")


def pretend(monkeypatch: pytest.MonkeyPatch, folder: Path, at_import: str = "", at_begin: str = "pass") -> None:
    """Puts a client before the real one, for the processes that are started."""
    (folder / "clients" / "mlflow").mkdir(parents=True)
    code = CLIENT.format(at_import=at_import, at_begin=at_begin)
    (folder / "clients" / "mlflow" / "__init__.py").write_text(code, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", f"{folder / 'clients'}:{Path(beside.__file__).parents[2]}")


def follow_until_said(study: Study, names: list[str], said: str) -> RecordingProgress:
    """A run that goes on until a line has `said` in it, and ends."""
    told, end = RecordingProgress(), time.monotonic() + 60
    with run_trackers(study, names, told.say):
        while not any(said in line for line in told.lines) and time.monotonic() < end:
            time.sleep(0.05)
    return told


@pytest.mark.parametrize(
    ("at_import", "at_begin", "reason"),
    [
        ("", "raise ValueError('no route to https://me:hunter2@server: mlflow-password')", ["mlflow: no route to"]),
        ("raise ImportError('half installed')", "pass", ["mlflow: half installed"]),
        ("os._exit(3)", "pass", []),
    ],
)
def test_a_client_that_fails_is_told_of_once_and_the_others_go_on(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_import: str, at_begin: str, reason: list[str]
) -> None:
    pretend(monkeypatch, tmp_path, at_import, at_begin)
    told = follow_until_said(study, ["mlflow", "tensorboard"], "goes on without mlflow")
    assert sum("goes on without mlflow" in line for line in told.lines) == 1
    said = [line for line in told.lines if line.startswith("mlflow")]
    assert [line[: len(start)] for line, start in zip(said, reason, strict=True)] == reason
    assert "hunter2" not in "".join(told.lines)
    log = study.path / "tracking" / "mlflow.log"
    assert not log.exists() or "mlflow-password" not in log.read_text()
    assert len(read_json(study.path / "tracking" / "tensorboard.json")["trials"]) == 3


def test_a_client_that_waits_holds_up_nothing_but_the_end(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, tmp_path, at_begin="time.sleep(3600)")
    monkeypatch.setattr(beside, "FINISH_SECONDS", 0.5)
    told, start = RecordingProgress(), time.monotonic()
    with run_trackers(study, ["mlflow"], told.say):
        assert time.monotonic() - start < 5
    assert time.monotonic() - start < 30
    assert "still sending" in told.lines[-1]
    assert not any("goes on without" in line for line in told.lines)


def test_an_error_of_the_study_passes_and_what_there_is_is_sent(study: Study) -> None:
    def run() -> None:
        with run_trackers(study, ["tensorboard"], RecordingProgress().say):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert len(read_json(study.path / "tracking" / "tensorboard.json")["trials"]) == 3


def test_a_tracker_ends_with_the_process_that_started_it(study: Study) -> None:
    command = [sys.executable, "-m", "rankscope.track", str(study.path), "tensorboard", "en"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(60) == 0


def test_a_damaged_record_of_what_was_sent_begins_new_runs(study: Study) -> None:
    (study.path / "tracking").mkdir()
    (study.path / "tracking" / "tensorboard.json").write_text("{", encoding="utf-8")
    with run_trackers(study, ["tensorboard"], RecordingProgress().say):
        pass
    assert len(read_json(study.path / "tracking" / "tensorboard.json")["trials"]) == 3


def test_notes_are_in_the_language_of_the_run(study: Study) -> None:
    told = RecordingProgress()
    with run_trackers(study, ["tensorboard"], told.say, "ko"):
        pass
    assert [line.partition("`")[0] for line in told.lines] == ["곡선을 보는 명령: "]


def test_a_broken_trackio_is_told_when_it_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    monkeypatch.setitem(sys.modules, "trackio", None)
    with warnings.catch_warnings(), pytest.raises(ImportError):
        Client(tmp_path, load("en"))


def test_names_are_checked() -> None:
    assert choose_trackers("wandb, tensorboard") == ["wandb", "tensorboard"]
    assert choose_trackers(["mlflow", "trackio"]) == ["mlflow", "trackio"]
    assert choose_trackers(()) == []
    with pytest.raises(StudyError, match="did you mean tensorboard"):
        choose_trackers(["TensorBord"])
    with pytest.raises(StudyError, match="listed twice"):
        choose_trackers(["wandb", "wandb"])


@pytest.mark.parametrize("folder_of_that_name", [False, True])
def test_a_client_that_is_missing_is_named_with_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder_of_that_name: bool
) -> None:
    if folder_of_that_name:  # as W&B leaves one where it was used
        (tmp_path / "wandb").mkdir()
    for name in [name for name in sys.modules if name.partition(".")[0] == "wandb"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(MissingExtraError, match=r"pip install '.*\[wandb\].*'") as raised:
        choose_trackers(["wandb"])
    assert raised.value.exit_code == 2


def test_memory_of_a_gpu_has_a_curve_of_its_own() -> None:
    samples = pd.DataFrame({
        "phase": ["load", "warmup", "train", "train", "train"],
        "step": [0, 0, 1, 1, 1],
        "rss_bytes": [1e9, 2e9, 3e9, 5e9, 9e9],
        "gpu_allocated_bytes": [0, 1e9, 2e9, 2e9, 9e9],
    }).assign(rank=[8, 8, 8, 8, 4], variant="lora")  # fmt: skip
    assert [(point.step, point.metrics) for point in memory_points(samples, CANDIDATE)] == [
        (0, {"system/cpu_memory_gb": 2.0, "system/gpu_memory_gb": 1.0}),
        (1, {"system/cpu_memory_gb": 4.0, "system/gpu_memory_gb": 2.0}),
    ]
    without = memory_points(samples.assign(gpu_allocated_bytes=None), CANDIDATE)
    assert [point.metrics for point in without] == [{"system/cpu_memory_gb": 2.0}, {"system/cpu_memory_gb": 4.0}]


def test_costs_are_means_over_repeats_and_peaks_the_highest() -> None:
    one = {
        "rss_mean_bytes": 1e9,
        "rss_peak_bytes": 2e9,
        "gpu_allocated_mean_bytes": 3e9,
        "gpu_allocated_peak_bytes": 4e9,
        "runtime_seconds": 60.0,
        "tokens_per_second": 100.0,
    }
    other = {name: 3 * value for name, value in one.items()}
    rows = pd.DataFrame([one, other, {name: 9 * value for name, value in one.items()}])
    profiles = rows.assign(candidate="r008", control=[False, False, True])
    expected = {
        "average_cpu_memory_gb": 2.0,
        "peak_cpu_memory_gb": 6.0,
        "average_gpu_memory_gb": 6.0,
        "peak_gpu_memory_gb": 12.0,
        "train_runtime": 120.0,
        "train_tokens_per_second": 200.0,
    }
    assert costs(profiles) == {"r008": expected}
    assert costs(profiles.assign(runtime_seconds=np.nan)) == {}, "not timed yet"
    assert costs(pd.DataFrame()) == {}


def test_a_later_verdict_has_a_run_of_its_own(study: Study) -> None:
    tracking = study.path / "tracking"
    tracking.mkdir()
    for margin in (study.verdict["margin"], 0.5, 0.5):
        write_json(study.path / "verdict.json", study.verdict | {"margin": margin})
        TrackerSync(study, open_tracker("tensorboard", tracking, load("en")), "tensorboard").finish()
    assert sorted(run.name for run in tracking.glob("tensorboard/*/by-rank*")) == ["by-rank", "by-rank-2"]
    said = [READERS["tensorboard"](tracking, name).verdict for name in ("by-rank", "by-rank-2")]
    assert "within 1% of the best" in said[0]
    assert said[1] == study.sentence() != said[0]


def test_a_process_that_cannot_be_started_is_told_of(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    told = RecordingProgress()
    with run_trackers(study, ["wandb"], told.say):
        pass
    assert ["cannot be started" in line for line in told.lines] == [True]


def test_secrets_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "abcdef123")
    text = "http://user:pw@host/?write_token=xyz&a=1 abcdef123"
    assert redacted(text) == "http://***@host/?write_token=***&a=1 ***"


def test_flat() -> None:
    assert flat({"a": 1, "b": {"c": {"d": [1, 2]}, "e": None}}) == {"a": 1, "b.c.d": "1,2"}


def test_the_command_refuses_an_unknown_tracker_before_it_looks_at_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["run", "--model", "nowhere", "--dataset", "nowhere", "--report-to", "wandb,tensorbord"]
    done = CliRunner().invoke(app, command)
    assert isinstance(done.exception, StudyError)
    assert "did you mean tensorboard" in str(done.exception)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_real_run_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clear_environment(monkeypatch, tmp_path / "home")
    told = RecordingProgress()
    study = rankscope.run(
        model=str(write_model(tmp_path / "model")),
        dataset=str(write_data(tmp_path / "data.json")),
        ranks=[2],
        seeds=[0],
        steps=3,
        sets=["measure.profiles=false", "measure.answers=0"],
        out=tmp_path / "out",
        report_to=["wandb", "tensorboard"],
        progress=told,
    )
    assert any("wandb sync" in line for line in told.lines)
    assert "wandb" not in (study.path / "study.yaml").read_text(encoding="utf-8"), "it is no part of the question"
    curve = study.curves().dropna(subset="train_loss")
    for name in ("wandb", "tensorboard"):
        seen = READERS[name](study.path / "tracking", "r002-lr2e-4-s0")
        assert [step for step, _ in seen.curves["train/loss"]] == [1, 2, 3]
        assert [value for _, value in seen.curves["train/loss"]] == pytest.approx(list(curve["train_loss"]), rel=1e-6)
        assert seen.status == "done"
