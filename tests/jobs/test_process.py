"""How a child process ended, and what the process that started it makes of it."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from launchers import run_alone
from rankscope.errors import KilledError, OutOfMemoryError, RankscopeError, StudyDirectoryError, WorkerError
from rankscope.jobs import packs, process, worker
from rankscope.jobs.job import Job

pytestmark = pytest.mark.own_processes


def end(folder: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> RankscopeError | None:
    """Error of a job with a child process that ends by the shell command `how`."""
    child = folder / "child"
    child.write_text(f"#!/bin/sh\n{how}\n")
    child.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(child))
    return run_alone(folder, Job("rankscope.jobs.profiles", {}, "r008"))


def test_a_process_that_the_kernel_ended_for_memory_is_told_from_one_that_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel ends a process with SIGKILL, and counts it in /proc/vmstat."""
    counted = iter([3, 4])
    monkeypatch.setattr(process, "_memory_kills", lambda: next(counted))
    error = end(tmp_path, monkeypatch, "kill -KILL $$")
    assert isinstance(error, OutOfMemoryError)
    assert "r008: killed by the system for lack of memory" in error.what
    monkeypatch.setattr(process, "_memory_kills", lambda: 4)
    error = end(tmp_path, monkeypatch, "kill -KILL $$")
    assert isinstance(error, KilledError)
    assert "was killed (signal 9)" in error.what


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_the_kernel_s_counter_is_read() -> None:
    (line,) = (line for line in Path("/proc/vmstat").read_text().splitlines() if line.startswith("oom_kill "))
    assert process._memory_kills() >= int(line.split()[1])


def test_other_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert end(tmp_path, monkeypatch, "exit 0") is None
    assert isinstance(end(tmp_path, monkeypatch, "exit 2"), StudyDirectoryError)  # with no room for error.json
    error = end(tmp_path, monkeypatch, "exit 7")
    assert type(error) is WorkerError
    assert "exit code 7" in error.what


def test_a_log_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "r008" / "log.txt").mkdir(parents=True)
    with pytest.raises(StudyDirectoryError, match=r"r008/log.txt: cannot be written: Is a directory"):
        end(tmp_path, monkeypatch, "exit 0")
    (tmp_path / "file").touch()
    with pytest.raises(StudyDirectoryError, match="cannot be written"):
        run_alone(tmp_path, Job("rankscope.jobs.profiles", {}, "file/r008"))


def test_torch_itself_says_that_there_is_no_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert isinstance(worker.known_error(caught.value), OutOfMemoryError)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
    ],
    ids=lambda error: f"{type(error).__name__} {error}"[:40],
)
def test_a_lack_of_memory_is_known_by_its_class_or_its_text(error: Exception) -> None:
    known = worker.known_error(error)
    assert isinstance(known, OutOfMemoryError)
    assert known.status == "oom"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_a_disk_that_fails_is_no_fault_of_the_trial(code: int) -> None:
    """No pack is divided for it, and no trial is recorded as failed."""
    known = worker.known_error(OSError(code, os.strerror(code), "adapter_config.json"))
    assert isinstance(known, StudyDirectoryError)
    assert known.exit_code == 2
    assert known.what == f"adapter_config.json: cannot be read or written: {os.strerror(code)}"


def test_any_other_error_is_the_trial_s() -> None:
    for error in (RuntimeError("odd shape"), FileNotFoundError(errno.ENOENT, "No such file or directory", "x")):
        assert type(worker.known_error(error)) is WorkerError


def test_the_exit_code_tells_where_the_log_and_error_json_have_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    process.write_json(tmp_path / "job.json", {"kind": "packs"})
    monkeypatch.setattr(packs, "work", full)
    monkeypatch.setattr(worker.faulthandler, "enable", lambda: None)
    monkeypatch.setattr(worker.traceback, "print_exc", full)
    monkeypatch.setattr("rankscope.files._flush", full)
    assert worker.main(packs.__name__, str(tmp_path), str(tmp_path / "job.json")) == 2
    assert not (tmp_path / "error.json").exists()


def test_a_job_s_process_imports_no_more_than_it_needs() -> None:
    """Memory is measured in it: pandas and its kin alone are 120 MB."""
    code = (
        "import sys, rankscope.jobs.worker, rankscope.jobs.packs, rankscope.jobs.profiles, rankscope.measure.profile;"
        "print(*{'pandas', 'pyarrow', 'altair', 'datasets', 'rich', 'optuna', 'ray', 'scipy.stats'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
