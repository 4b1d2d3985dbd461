"""The process of one tracker, `python -m rankscope.track STUDY NAME LANGUAGE`: see `rankscope.track.tracker_process`.

It ends when its standard input ends, and so with the process that started it. Its output is shown to the user. Output
of clients is discarded: it may contain anything.
"""

import os
import re
import select
import signal
import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import TextIO

from filelock import FileLock

from rankscope.errors import first_line
from rankscope.files import write_atomic
from rankscope.study.folder import StudyFolder
from rankscope.text.catalogue import Catalogue, load
from rankscope.track import Tracker
from rankscope.track.follow import TrackerSync

FOLLOW_SECONDS = 1.0  # interval of reading the study's files
LAST_SECONDS = 300
"""Time for the rest when the study has ended. A run waits for less; this ends a process that nobody waits for."""

REASON_LENGTH = 300  # longest reason of a client's failure: some append the page that a server answered with
NICENESS = 10  # niceness of the process: training comes first where processors are few


def main(path: Path, name: str, language: str) -> int:
    """Follow the study until standard input ends. Return 1, after one line of output, where the tracker failed."""
    os.nice(NICENESS)
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as user:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(nowhere, stream)
        try:
            follow(StudyFolder.open(path), name, user, load(language))
        except Exception as error:  # whatever a client raises
            reason = redacted(first_line(error))
            print(f"{name}: {reason[:REASON_LENGTH]}", file=user, flush=True)
            write_atomic(path / "tracking" / f"{name}.log", redacted(traceback.format_exc()))
            return 1
    return 0


def follow(study: StudyFolder, name: str, user: TextIO, text: Catalogue) -> None:
    folder = study.file("tracking").absolute()
    folder.mkdir(exist_ok=True)
    with FileLock(folder / f"{name}.lock"):  # the process of a run that was killed may still be sending
        tracker = open_tracker(name, folder, text)
        sync = TrackerSync(study, tracker, name)
        print(redacted(tracker.note), file=user, flush=True)
        while not select.select([0], [], [], FOLLOW_SECONDS)[0]:
            sync.poll()
        signal.alarm(LAST_SECONDS)
        sync.finish()
        tracker.close()


def open_tracker(name: str, folder: Path, text: Catalogue) -> Tracker:
    """Import a tracker's client and create the tracker. `folder` is the absolute path of the study's for trackers."""
    tracker: Tracker = import_module(f"rankscope.track.{name}").Client(folder, text)
    return tracker


def redacted(text: str) -> str:
    """`text` without the environment's secrets, and without passwords in addresses."""
    secret = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)
    for name, value in os.environ.items():
        if secret.search(name) and len(value) >= 4:
            text = text.replace(value, "***")
    text = re.sub(r"//[^/@\s]+@", "//***@", text)
    return re.sub(r"(?i)((?:token|key|password)=)[^&\s'\"]+", r"\1***", text)


if __name__ == "__main__":
    if code := main(Path(sys.argv[1]), *sys.argv[2:]):
        os._exit(code)  # a client that failed may wait for its server without end
