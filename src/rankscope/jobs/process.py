"""The child process of one job: start it, watch it, stop it, and find out how it ended."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGTERM
from types import MappingProxyType

from rankscope.errors import KilledError, OutOfMemoryError, RankscopeError, StudyDirectoryError, WorkerError
from rankscope.files import read_json, text_or_empty, write_json, writing
from rankscope.jobs.job import Job
from rankscope.measure.cores import job_environment


class JobProcess:
    """The child process of one job of the study in `study`. It reads from a pipe that closes when this process ends, in
    whatever way, and then ends too. The job's folder receives job.json, log.txt and, after a failure, error.json.
    Raises StudyDirectoryError: one of these files cannot be written."""

    def __init__(self, study: Path, job: Job, environment: Mapping[str, str] = MappingProxyType({})) -> None:
        self.job, self._folder, self._kills = job, study / job.folder, _memory_kills()
        job_file, log_file = self._folder / "job.json", self._folder / "log.txt"
        write_json(job_file, {"kind": job.module.rpartition(".")[2]} | dict(job.content))
        with writing(log_file):
            (self._folder / "error.json").unlink(missing_ok=True)
            log = log_file.open("ab")
        command = [sys.executable, "-m", "rankscope.jobs.worker", job.module, str(study), str(job_file)]
        variables = job_environment() | dict(environment)
        with log:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=variables)

    def is_running(self, seconds: float = 0.0) -> bool:
        """Wait for so many seconds at most, and return whether the process still runs."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return True
        assert self._process.stdin is not None  # for mypy: it is a pipe
        self._process.stdin.close()
        return False

    def stop(self) -> None:
        """Ask the process to stop; training does after its step, with a checkpoint."""
        self._process.terminate()

    def kill(self) -> None:
        """Kill the process, and wait until it has ended."""
        self._process.kill()
        self._process.wait()
        self.is_running()

    def error(self) -> RankscopeError | None:
        code, log_hint = self._process.returncode, f"Its log: {self._folder / 'log.txt'}"
        if code == 0:
            return None
        if (error_file := self._folder / "error.json").exists():
            error = read_json(error_file)
            kinds = {kind.__name__: kind for kind in RankscopeError.all_kinds()}
            return kinds.get(error["kind"], WorkerError)(error["what"], error["todo"] or log_hint)
        if -code == SIGKILL and _memory_kills() > self._kills:
            return OutOfMemoryError(f"{self.job.folder}: killed by the system for lack of memory", log_hint)
        if -code in (SIGKILL, SIGTERM, SIGINT):
            return KilledError(f"{self.job.folder} was killed (signal {-code})", log_hint)
        if code == StudyDirectoryError.exit_code:  # and no room for error.json
            return StudyDirectoryError(f"{self._folder}: cannot be written", "Make room on its disk, and run again.")
        return WorkerError(f"{self.job.folder} ended without a word (exit code {code})", log_hint)


def _memory_kills() -> int:
    """Number of processes that the kernel has killed for lack of memory since boot; 0 where it keeps no count."""
    counters = dict(line.split() for line in text_or_empty(Path("/proc/vmstat")).splitlines())
    return int(counters.get("oom_kill", 0))
