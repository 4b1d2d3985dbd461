"""W&B with a server: online, and `wandb sync` of what was written offline. The server is our own, on this machine."""

import base64
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rankscope.study.metrics import read_rows
from rankscope.study.study import Study
from rankscope.track.tracker_process import run_trackers
from recording import RecordingProgress
from track.readers import SECRETS, clear_environment
from track.test_contract import FIXTURE, TRIAL, copy_study, cut_back, restore
from track.wandb_server import Received, WandbServer, wandb_server


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    (tmp_path / "home").mkdir()
    clear_environment(monkeypatch, tmp_path / "home")
    with wandb_server() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        yield server


def interrupt_and_go_on(path: Path, told: RecordingProgress) -> Study:
    """Two sessions of one study."""
    study = copy_study(path)
    (path / "report").mkdir()
    (path / "report" / "index.html").write_text("the page", encoding="utf-8")
    cut_back(study, 4)
    with run_trackers(study, ["wandb"], told.say):
        pass
    restore(study)
    with run_trackers(study, ["wandb"], told.say):
        pass
    return study


def the_run(server: WandbServer) -> Received:
    assert len(server.runs) == 4
    (run,) = [run for run in server.runs.values() if run.asked["displayName"] == TRIAL]
    return run


def check(server: WandbServer, study: Study) -> None:
    run = the_run(server)
    assert run.asked["groupName"] == study.spec.name
    assert json.loads(run.asked["config"])["rank"]["value"] == 8
    rows = [row for _, row in sorted(run.history.items())]
    expected = read_rows(FIXTURE / "trials" / TRIAL / "metrics.jsonl")
    for name, field in (("train/loss", "train_loss"), ("eval/loss", "eval_loss")):
        seen = [(row["train/global_step"], row[name]) for row in rows if name in row]
        assert seen == [(row["step"], row[field]) for row in expected if field in row]
    assert [row["_step"] for row in rows] == sorted({row["_step"] for row in rows})


@pytest.mark.slow
def test_online_a_run_goes_on_where_it_was(
    server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    told = RecordingProgress()
    study = interrupt_and_go_on(tmp_path / "study", told)
    assert told.lines == [f"W&B sends the runs to {server.url}, project rankscope"] * 2
    check(server, study)
    assert the_run(server).summary["cost/average_cpu_memory_gb"] > 0
    (by_rank,) = [run for run in server.runs.values() if run.asked["displayName"] == "by-rank"]
    assert by_rank.summary["verdict"] == study.sentence()
    assert [artifact["description"] for artifact in server.artifacts] == [study.sentence()]
    key = base64.b64encode(f"api:{SECRETS['WANDB_API_KEY']}".encode()).decode()
    assert server.keys <= {f"Basic {key}", ""}
    for file in study.path.rglob("*"):
        assert not file.is_file() or SECRETS["WANDB_API_KEY"].encode() not in file.read_bytes()


@pytest.mark.slow
def test_what_was_written_offline_is_synced_whole(server: WandbServer, tmp_path: Path) -> None:
    study = interrupt_and_go_on(tmp_path / "study", RecordingProgress())
    assert not server.runs
    folders = sorted(str(folder) for folder in (study.path / "tracking" / "wandb").glob("offline-run-*"))
    command = [sys.executable, "-m", "wandb", "sync", *folders]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=120, capture_output=True)
    check(server, study)


def test_without_a_key_it_is_offline_and_asks_nobody(
    server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.delenv("WANDB_MODE")
    told = RecordingProgress()
    with run_trackers(copy_study(tmp_path / "study"), ["wandb"], told.say):
        pass
    assert ["offline" in line and "wandb sync" in line for line in told.lines] == [True]
    assert not server.runs
