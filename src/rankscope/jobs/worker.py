"""The child process of one job.

    python -m rankscope.jobs.worker KIND STUDY_DIRECTORY JOB_FILE

KIND is the module whose `work` does the job: it comes from the process that started this one, never from a file. A
failure is recorded in error.json beside the job's file.
"""

import errno
import faulthandler
import importlib
import logging
import os
import sys
import threading
import traceback
from contextlib import suppress
from pathlib import Path

from rankscope.errors import OutOfMemoryError, RankscopeError, StudyDirectoryError, WorkerError, lacks_memory
from rankscope.files import read_json, write_json

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)
"""Error numbers of the disk itself, which another job would hit too."""


def main(kind: str, study_path: str, job_file: str) -> int:
    """Do the job and return the exit code: 0, or that of its error."""
    faulthandler.enable()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    content = read_json(Path(job_file))
    try:
        importlib.import_module(kind).work(Path(study_path), content)
    except Exception as error:
        with suppress(OSError):  # the log is on the same disk, which may be full
            traceback.print_exc()
        known = known_error(error)
        report = {"kind": type(known).__name__, "what": known.what, "todo": known.todo}
        with suppress(StudyDirectoryError):  # on a full disk the exit code has to do
            write_json(Path(job_file).with_name("error.json"), report)
        return known.exit_code
    return 0


def known_error(error: Exception) -> RankscopeError:
    """Return the error as one that says what to do."""
    if isinstance(error, RankscopeError):
        return error
    what = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        what = f"{error.filename or 'a file'}: cannot be read or written: {error.strerror}"
        return StudyDirectoryError(what, "Mend that and run the study again: it goes on where it was.")
    return OutOfMemoryError(what) if lacks_memory(error) else WorkerError(what)


def end_with_parent() -> None:
    """End this process when its standard input closes, which is when the process that started it ends."""

    def wait() -> None:
        while os.read(0, 1):  # not sys.stdin, whose lock a waiting thread would hold at this process's own end
            pass
        os._exit(1)

    threading.Thread(target=wait, name="rankscope-parent", daemon=True).start()


if __name__ == "__main__":
    end_with_parent()
    sys.exit(main(*sys.argv[1:]))
