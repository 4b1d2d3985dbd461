"""One process for each tracker of a study. The study waits for none of them before its end."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

from rankscope.jobs.job import Progress
from rankscope.study.folder import StudyFolder

FINISH_SECONDS, STOPPED_SECONDS = 120.0, 20.0
"""Time that a study waits at its end for all trackers together: after success, and after a stop or failure."""


@contextmanager
def run_trackers(study: StudyFolder, names: Sequence[str], progress: Progress) -> Iterator[Progress]:
    """Send the study to the trackers `names` while the body runs. The progress that it yields also shows their output.
    The failure of a tracker is said once; the rest of the run goes on without it."""
    if not names:
        yield progress
        return
    relay = _Relay(progress, [process for name in names if (process := _start(study, name, progress))])
    seconds = STOPPED_SECONDS
    try:
        yield relay
        seconds = FINISH_SECONDS
    finally:
        relay.finish(seconds)


def _start(study: StudyFolder, name: str, progress: Progress) -> "_Process | None":
    try:
        return _Process(study.path, name)
    except OSError as error:  # no room for another process
        progress.say(f"{name} cannot be started: {error}. The study goes on without it.")
        return None


class _Process:
    """The process of one tracker and its output. It ends by itself when this process does, in whatever way."""

    def __init__(self, study_path: Path, name: str) -> None:
        self.name = name
        self._ended = False
        self._process = subprocess.Popen(
            [sys.executable, "-m", "rankscope.track", str(study_path), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the study; this one still has to send the rest
        )
        assert self._process.stdin is not None  # for mypy: both are pipes
        assert self._process.stdout is not None
        self.stdin, self._stdout = self._process.stdin, self._process.stdout
        os.set_blocking(self._stdout.fileno(), False)

    def new_messages(self) -> Iterator[str]:
        """Yield the new lines of output, and how the process ended."""
        if self._ended:
            return
        code = self._process.poll()
        yield from (self._stdout.read() or b"").decode("utf-8", "replace").splitlines()  # the reason of a failure too
        if code is not None:
            self._let_go()
        if code:
            ended = f"The study goes on without {self.name}, whose process ended (exit code {code})"
            yield f"{ended}; run it again to send what is missing."

    def wait(self, seconds: float) -> bool:
        """Return whether the process ended in time. Else kill it: it might wait for its server without end."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            self._let_go()
            return False
        return True

    def _let_go(self) -> None:
        self._ended = True
        self._stdout.close()


class _Relay:
    """Progress of a run that also shows the output of trackers."""

    def __init__(self, progress: Progress, processes: Sequence[_Process]) -> None:
        self._progress, self._processes = progress, processes
        self.say = progress.say

    def poll(self) -> None:
        for line in chain.from_iterable(process.new_messages() for process in self._processes):
            self.say(line)
        self._progress.poll()

    def finish(self, seconds: float) -> None:
        for process in self._processes:
            process.stdin.close()  # asks it to end
        deadline = time.monotonic() + seconds
        for process in self._processes:
            if not process.wait(max(0.0, deadline - time.monotonic())):
                self.say(f"{process.name}: still sending after {seconds:.0f} s, and ended; the last may be missing.")
            for line in process.new_messages():
                self.say(line)
