"""One process for each tracker of a study. The study waits for none of them before its end."""

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

from rankscope.jobs.job import Say
from rankscope.study.folder import StudyFolder
from rankscope.text.catalogue import Catalogue, load
from rankscope.text.formats import about

FINISH_SECONDS, STOPPED_SECONDS = 120.0, 20.0
"""Time that a study waits at its end for all trackers together: after success, and after a stop or failure."""


@contextmanager
def run_trackers(study: StudyFolder, names: Sequence[str], say: Say, language: str = "en") -> Iterator[None]:
    """Send the study to the trackers `names` while the body runs; `say` is called with their output, from threads. The
    failure of a tracker is said once; the rest of the run goes on without it. Their processes end when this one does,
    in whatever way."""
    text, ended = load(language), set[str]()  # by this process
    started = {name: process for name in names if (process := _start(study.path, name, say, text))}
    own = {name: (name, process, say, ended, text) for name, process in started.items()}
    relays = {name: Thread(target=_relay, args=arguments, daemon=True) for name, arguments in own.items()}
    for relay in relays.values():
        relay.start()
    seconds = STOPPED_SECONDS
    try:
        yield
        seconds = FINISH_SECONDS
    finally:
        for process in started.values():
            assert process.stdin is not None  # for mypy: it is a pipe
            process.stdin.close()  # asks it to end
        deadline = time.monotonic() + seconds
        for name, relay in relays.items():
            relay.join(max(0.0, deadline - time.monotonic()))
            if relay.is_alive():  # it might wait for its server without end
                ended.add(name)
                started[name].kill()
                relay.join()
                say(text("track.late", name=name, time=about(seconds, text)))


def _start(path: Path, name: str, say: Say, text: Catalogue) -> subprocess.Popen[str] | None:
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "rankscope.track", str(path), name, text.language],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # Ctrl-C is for the study; this one still has to send the rest
        )
    except OSError as error:  # no room for another process
        say(text("track.not_started", name=name, error=error))
        return None


def _relay(name: str, process: subprocess.Popen[str], say: Say, ended: set[str], text: Catalogue) -> None:
    """Say what the process does, line by line, and how it ended."""
    with process:
        for line in process.stdout or ():
            say(line.rstrip())
    if process.returncode and name not in ended:
        say(text("track.ended", name=name, code=process.returncode))
