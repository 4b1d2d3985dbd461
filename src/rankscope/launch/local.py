"""Jobs as child processes of this one, one after the other: a fresh process for every pack and profile."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGTERM
from typing import Any

from rankscope.errors import KilledError, OutOfMemoryError, RankscopeError, StudyDirectoryError, WorkerError
from rankscope.files import read_json, write_json, writing

POLL_SECONDS = 0.5

ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
    "THP_MEM_ALLOC_ENABLE": "1",  # torch's CPU allocator asks for huge pages: half the page faults, docs/lab-notes.md
}
"""Of a child process; the user's own environment comes first."""


def run_locally(
    study_path: Path, job: Mapping[str, Any], folder: Path, poll: Callable[[], None]
) -> RankscopeError | None:
    """Runs one job to its end, calling `poll` twice a second; returns what went wrong, or None.

    The child holds the other end of a pipe that closes when this process ends, however it ends: it never outlives it.
    `folder` receives job.json, log.txt (all that the process prints) and, after a failure, error.json.

    Raises:
        StudyDirectoryError: one of these cannot be written.
    """
    error_file, job_file, log_file = (folder / name for name in ("error.json", "job.json", "log.txt"))
    kills = _memory_kills()
    write_json(job_file, job)
    with writing(log_file):
        error_file.unlink(missing_ok=True)
        log = log_file.open("ab")
    command = [sys.executable, "-m", "rankscope.launch.worker", str(study_path), str(job_file)]
    environment = ENVIRONMENT | os.environ
    with (
        log,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment) as process,
    ):
        try:
            while _running(process):
                poll()
        except BaseException:
            process.terminate()
            try:
                process.wait()  # training stops after its step, with a checkpoint
            except KeyboardInterrupt:  # asked a second time
                process.kill()
            raise
    if process.returncode == 0:
        return None
    if error_file.exists():
        error = read_json(error_file)
        kind = {kind.__name__: kind for kind in RankscopeError.all_kinds()}.get(error["kind"], WorkerError)
        return kind(error["what"], error["todo"] or f"Its log: {log_file}")
    log_hint = f"Its log: {log_file}"
    if -process.returncode == SIGKILL and _memory_kills() > kills:
        return OutOfMemoryError(f"{job['kind']} {folder.name}: the system ended it for lack of memory", log_hint)
    if -process.returncode in (SIGKILL, SIGTERM, SIGINT):
        return KilledError(f"{job['kind']} {folder.name} was killed (signal {-process.returncode})", log_hint)
    if process.returncode == StudyDirectoryError.exit_code:  # and no room for error.json
        return StudyDirectoryError(f"{folder}: cannot be written", "Make room on its disk and run the study again.")
    return WorkerError(f"{job['kind']} {folder.name} ended without a word (exit code {process.returncode})", log_hint)


def _memory_kills() -> int:
    """How many processes the kernel has ended for lack of memory since it started; 0 where it does not tell."""
    try:
        counters = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    except OSError:
        return 0
    return int(counters.get("oom_kill", 0))


def _running(process: subprocess.Popen[bytes]) -> bool:
    try:
        process.wait(POLL_SECONDS)
    except subprocess.TimeoutExpired:
        return True
    return False
