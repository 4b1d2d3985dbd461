"""One job in a child process: started, watched, stopped, and its end told."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGTERM
from types import MappingProxyType
from typing import Any

from rankscope.errors import KilledError, OutOfMemoryError, RankscopeError, StudyDirectoryError, WorkerError
from rankscope.files import read_json, write_json, writing

ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
    "THP_MEM_ALLOC_ENABLE": "1",  # torch's CPU allocator asks for huge pages: half the page faults, docs/lab-notes.md
}
"""Of a child process; the user's own environment comes first."""


class JobProcess:
    """The child process of one job.

    It holds the other end of a pipe that closes when this process ends, however it ends: it never outlives it.
    `folder` receives job.json, log.txt and, after a failure, error.json.

    Raises:
        StudyDirectoryError: one of these cannot be written.
    """

    def __init__(
        self,
        study: Path,
        content: Mapping[str, Any],
        folder: Path,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._name, self._folder = f"{content['kind']} {folder.name}", folder
        self._kills = _memory_kills()
        job_file, log_file = folder / "job.json", folder / "log.txt"
        write_json(job_file, content)
        with writing(log_file):
            self._error_file.unlink(missing_ok=True)
            log = log_file.open("ab")
        command = [sys.executable, "-m", "rankscope.jobs.worker", str(study), str(job_file)]
        with log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=ENVIRONMENT | os.environ | dict(environment),
            )

    @property
    def _error_file(self) -> Path:
        return self._folder / "error.json"

    def is_running(self, seconds: float = 0.0) -> bool:
        """Whether it still runs after so many seconds at most."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return True
        assert self._process.stdin is not None  # for mypy: it is a pipe
        self._process.stdin.close()
        return False

    def stop(self) -> None:
        """Training stops after its step, with a checkpoint."""
        self._process.terminate()

    def kill(self) -> None:
        """Ends it at once, and waits until it has ended."""
        self._process.kill()
        self._process.wait()
        self.is_running()

    def error(self) -> RankscopeError | None:
        """What went wrong, once it has ended."""
        code, log_hint = self._process.returncode, f"Its log: {self._folder / 'log.txt'}"
        if code == 0:
            return None
        if self._error_file.exists():
            error = read_json(self._error_file)
            kind = {kind.__name__: kind for kind in RankscopeError.all_kinds()}.get(error["kind"], WorkerError)
            return kind(error["what"], error["todo"] or log_hint)
        if -code == SIGKILL and _memory_kills() > self._kills:
            return OutOfMemoryError(f"{self._name}: the system ended it for lack of memory", log_hint)
        if -code in (SIGKILL, SIGTERM, SIGINT):
            return KilledError(f"{self._name} was killed (signal {-code})", log_hint)
        if code == StudyDirectoryError.exit_code:  # and no room for error.json
            return StudyDirectoryError(
                f"{self._folder}: cannot be written", "Make room on its disk and run the study again."
            )
        return WorkerError(f"{self._name} ended without a word (exit code {code})", log_hint)


def _memory_kills() -> int:
    """How many processes the kernel has ended for lack of memory since it started; 0 where it does not tell."""
    try:
        counters = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    except OSError:
        return 0
    return int(counters.get("oom_kill", 0))
