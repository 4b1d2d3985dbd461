"""Child processes that need no seconds for imports: forked from a server that has imported already.

They have their own memory and output, and are killed and waited for as other processes are. The mark `own_processes`
gives a test's jobs real processes, where the process itself is tested.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import IO, Any

import drawing

HOOK = "RANKSCOPE_TEST_HOOK"
"""Environment variable with the path of a Python file that a forked job runs first."""

own_processes = False
"""Whether jobs of the current test have real processes."""

_NAME = "_forkserver"
_server: Any = getattr(forkserver, _NAME)
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "rankscope.jobs.worker",
        "rankscope.train.loop",
        "rankscope.measure.profile",
        "rankscope.pipeline",
        "rankscope.cli",
        "torch._dynamo",  # which every optimizer's first step imports
    ]
)


def start(command: Sequence[str], **options: Any) -> "subprocess.Popen[bytes] | Forked":
    """Start a job's process, forked or real, in place of `subprocess.Popen`."""
    return subprocess.Popen(command, **options) if own_processes else Forked(command, **options)


instead_of_subprocess = SimpleNamespace(Popen=start, PIPE=subprocess.PIPE, TimeoutExpired=subprocess.TimeoutExpired)
"""Replacement of the module `subprocess` in `rankscope.jobs.process`."""


class Forked:
    """A forked process with the part of `subprocess.Popen` that jobs use."""

    def __init__(
        self, command: Sequence[str], stdin: int, stdout: IO[bytes], stderr: IO[bytes], env: Mapping[str, str]
    ) -> None:
        assert command[1:3] == ["-m", "rankscope.jobs.worker"]
        assert (stdin, stderr) == (subprocess.PIPE, stdout)
        ours, theirs = os.pipe()
        self.stdin = os.fdopen(theirs, "wb")
        with Connection(ours) as end:
            arguments = (end, stdout.name, dict(env), list(command[3:]))
            self._process = _context.Process(target=_run_job, args=arguments)
            self._process.start()
        self.pid = self._process.pid
        self.terminate, self.kill = self._process.terminate, self._process.kill

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("a job", timeout or 0.0)
        return self._process.exitcode


def rankscope(arguments: Sequence[str], cwd: Path, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end in a process of its own; its jobs are forked too."""
    with TemporaryDirectory() as folder:
        out, error = Path(folder, "out"), Path(folder, "error")
        out.touch()
        error.touch()
        texts = (os.devnull, str(out), str(error))
        _server.ensure_running()
        given = (list(arguments), str(cwd), dict(environment), texts, _address(), drawing.asked)
        process = _context.Process(target=_run_command, args=given)
        process.start()
        process.join(240)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired("rankscope", 240)
        return subprocess.CompletedProcess(arguments, process.exitcode, out.read_text(), error.read_text())


def _run_job(end: Connection, log: str, environment: dict[str, str], arguments: list[str]) -> None:
    from rankscope.jobs import worker
    from rankscope.measure import timing

    def work() -> int:
        timing.MAX_EXTRA_SECONDS = 0.0  # `measure.rounds` and no more: they are to be taken, not to be precise
        os.dup2(end.fileno(), 0)
        worker.end_with_parent()
        sys.argv = ["rankscope.jobs.worker", *arguments]
        if hook := environment.get(HOOK):
            runpy.run_path(hook)
        return worker.main(*arguments)

    _become(work, environment, (os.devnull, log, log))


def _address() -> dict[str, Any]:
    """Address of the server, by the names of `multiprocessing`; newer versions of Python have a key too."""
    return {name: value for name, value in vars(_server).items() if name in (f"{_NAME}_address", f"{_NAME}_authkey")}


def _run_command(
    arguments: list[str],
    cwd: str,
    environment: dict[str, str],
    texts: tuple[str, str, str],
    address: dict[str, Any],
    images: bool,
) -> None:
    from rankscope.jobs import process
    from rankscope.report import write

    vars(_server).update(address)  # else this process would start a server of its own, which imports everything again
    _server.ensure_running = lambda: None

    def work() -> int:
        os.chdir(cwd)
        sys.argv = ["rankscope", *arguments]
        process.subprocess = instead_of_subprocess  # type: ignore[assignment]
        drawing.asked = images
        vars(write).update(drawing.INSTEAD)
        from rankscope import cli

        try:
            cli.main()
        except SystemExit as ended:
            return int(ended.code or 0)
        return 0

    _become(work, environment, texts)


def _become(work: Callable[[], int], environment: dict[str, str], texts: tuple[str, str, str]) -> None:
    """Run `work` with the given environment and standard streams, and end this process with its exit code."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(environment)
    for number, (text, mode) in enumerate(zip(texts, (os.O_RDONLY, os.O_WRONLY, os.O_WRONLY), strict=True)):
        os.dup2(os.open(text, mode | os.O_APPEND), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    code = 1
    try:
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):  # a disk that is full
                stream.flush()
        os._exit(code)
