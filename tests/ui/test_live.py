"""Following a file that another process writes, cuts back and begins anew."""

import json
import os
import platform
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from rankscope.errors import StudyDirectoryError
from rankscope.files import read_json, write_json
from rankscope.study.study import Study
from rankscope.ui.live import Follower, LiveStudy
from rankscope.ui.progress import TerminalProgress

FIXTURE = Path(__file__).parents[1] / "fixtures" / "study-0.1"


def lines(first: int, last: int, width: int = 1) -> str:
    rows = ({"step": step, "train_loss": float(step), "step_seconds": 0.1} for step in range(first, last + 1))
    return "".join(json.dumps(row) + " " * width + "\n" for row in rows)


def test_only_whole_lines_are_read(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    follower = Follower(file)
    follower.read()
    assert follower.step == 0
    text = lines(1, 3)
    file.write_text(text[:-5])
    follower.read()
    assert follower.step == 2
    file.write_text(text)
    follower.read()
    assert follower.step == 3


def test_a_file_that_was_begun_anew_is_read_from_its_start(tmp_path: Path) -> None:
    """Also where it is longer by now than it was, and its lines end elsewhere."""
    file = tmp_path / "metrics.jsonl"
    for length in range(1, 12):
        follower = Follower(file)
        file.write_text(lines(1, 4))
        follower.read()
        file.write_text(lines(1, length, width=3))
        follower.read()
        assert follower.step == length


@pytest.fixture
def study(tmp_path: Path) -> Study:
    shutil.copytree(FIXTURE, tmp_path / "study")
    return Study.open(tmp_path / "study")


def hold(study: Study, pid: int, host: str) -> None:
    (study.path / ".lock-holder").write_text(f"process {pid} on {host}\n")


def test_the_holder_is_a_process_that_lives(study: Study) -> None:
    assert study.holder() is None
    hold(study, os.getpid(), platform.node())
    assert study.holder() == (os.getpid(), platform.node())
    hold(study, 2**22 + 1, platform.node())  # above the kernel's highest
    assert study.holder() is None
    hold(study, os.getpid(), "elsewhere")
    assert study.holder() == (os.getpid(), "elsewhere")
    hold(study, os.getpid(), platform.node())
    os.utime(study.path / ".lock-holder", (1, 1))  # the number is another process's by now
    assert study.holder() is None
    with study.lock():
        assert study.holder() == (os.getpid(), platform.node())
    assert study.holder() is None


def test_a_study_that_is_done(study: Study) -> None:
    (study.path / "verdict.json").exists() or write_json(study.path / "verdict.json", {})
    state = LiveStudy(study, read_json(next(study.path.glob("trials/*/trial.json")))["results"]["steps"]).read()
    assert state.doing == "done"
    assert {trial.step for trial in state.trials} == {state.steps}
    assert state.profiles_done == state.profiles > 0
    assert state.seconds_left == 0
    assert state.rss_bytes is None


def test_a_study_that_trains(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the steps of one of the trials are left: half of what its steps took is, too."""
    steps = read_json(next(study.path.glob("trials/*/trial.json")))["results"]["steps"]
    trial = study.spec.trials()[-1]
    folder = study.trial_folder(trial)
    record = read_json(folder / "trial.json")
    write_json(folder / "trial.json", record | {"status": "running", "results": None, "files": {}})
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["step"] <= steps // 2]
    (folder / "metrics.jsonl").write_text("".join(kept))
    hold(study, os.getpid(), platform.node())
    state = LiveStudy(study, steps).read()
    assert state.doing == "train"
    (now,) = [found for found in state.trials if found.name == trial.name]
    assert (now.status, now.step) == ("running", steps // 2)
    assert state.seconds_left is not None
    seconds = [json.loads(line).get("step_seconds", 0.0) for line in lines]
    assert state.seconds_left == pytest.approx(sum(seconds) / 2, rel=0.7), "packs of two share their steps' time"
    monkeypatch.setattr(LiveStudy, "_packs", lambda self: ["p000", "p001"])
    on_two = LiveStudy(study, steps).read()
    assert on_two.pack == "p000, p001"
    assert on_two.seconds_left == pytest.approx(state.seconds_left / 2)


@pytest.mark.parametrize("line", ["z", "3", '{"stdp": 5}', '{"step": 5, "train_loss": "x", "step_seconds": 1}'])
def test_a_damaged_line_ends_no_run_that_shows_it(line: str, study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    pack, (trial, *_) = next(iter(study.division().packs.items()))
    file = study.trial_folder(trial) / "metrics.jsonl"
    with TerminalProgress(Console()) as progress:
        progress.training(study, pack, [trial], 9)
        with file.open("a") as metrics:
            metrics.write(f"{line}\n")
        with pytest.raises(StudyDirectoryError, match=r"metrics\.jsonl: damaged"):
            Follower(file).read()
        progress.poll()
        with file.open("a") as metrics:
            metrics.write(lines(7, 7))
        progress._last_line = -1e9
        progress.poll()
    assert "step 7/9" in capsys.readouterr().out
