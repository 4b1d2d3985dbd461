"""Two processes at one study, and a user who asks twice: with real processes and real signals."""

import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from folders import write_data, write_model
from rankscope.errors import StudyDirectoryError
from rankscope.study.question import lock_folder

pytestmark = pytest.mark.slow

RUN = [
    *("run", "--model", "model", "--dataset", "data.json", "--ranks", "2", "--seeds", "0", "--steps", "100000"),
    *("--out", "out", "--set", "measure.profiles=false", "--set", "measure.answers=0"),
]


def start(folder: Path, errors: Path) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with errors.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "rankscope.cli", *RUN],
            cwd=folder, stdout=subprocess.DEVNULL, stderr=file, env=environment, start_new_session=True,
        )  # fmt: skip


def until(found: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 120
    while not found():
        assert process.poll() is None, "ended too early"
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_second_run_is_refused_and_a_second_ctrl_c_ends_the_first_at_once(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    write_data(tmp_path / "data.json")
    first = start(tmp_path, tmp_path / "first.txt")
    try:
        metrics = tmp_path / "out" / "trials" / "r002-lr2e-4-s0" / "metrics.jsonl"
        until(lambda: metrics.exists() and metrics.stat().st_size > 0, first)
        second = start(tmp_path, tmp_path / "second.txt")
        assert second.wait(timeout=120) == 2
        told = (tmp_path / "second.txt").read_text()
        assert f"another run is writing to it (process {first.pid} on {platform.node()})" in told
        assert "Traceback" not in told
        assert first.poll() is None
        (child,) = psutil.Process(first.pid).children()
        child.suspend()  # a step without end
        first.send_signal(signal.SIGINT)
        until(lambda: b"Stopping after this step" in (tmp_path / "first.txt").read_bytes(), first)
        time.sleep(1)
        assert first.poll() is None, "the first Ctrl-C waits for the step"
        first.send_signal(signal.SIGINT)
        assert first.wait(timeout=30) == 130
        psutil.wait_procs([child], timeout=10)
        assert not child.is_running()
        assert "Traceback" not in (tmp_path / "first.txt").read_text()
    finally:
        for process in psutil.Process(first.pid).children() if first.poll() is None else []:
            process.kill()
        first.kill()
        first.wait()


def test_the_lock_of_a_dead_process_holds_nobody_up(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom rankscope.study.folder import lock_folder\n"
        f"with lock_folder(Path({str(tmp_path)!r})):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        named = rf"another run is writing to it \(process {process.pid} on {platform.node()}\)"
        with pytest.raises(StudyDirectoryError, match=named), lock_folder(tmp_path):
            pass
        process.kill()
    assert (tmp_path / ".lock-holder").exists()
    with lock_folder(tmp_path):
        assert f"process {os.getpid()} on" in (tmp_path / ".lock-holder").read_text()
