"""What a command says and checks before it imports anything that takes seconds, such as torch."""

import errno
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankscope.errors import OutOfMemoryError, RankscopeError, StudyDirectoryError, lacks_memory, shortened
from rankscope.ui.console import error_console

if TYPE_CHECKING:
    from rankscope.plan.plan import Plan
    from rankscope.spec.models import StudySpec
    from rankscope.study.folder import StudyFolder
    from rankscope.study.study import Study
    from rankscope.text.catalogue import Catalogue
    from rankscope.ui.progress import Display


_TODO = {
    errno.ENAMETOOLONG: "Give a shorter name.",
    errno.ENOSPC: "Make room there, and run again: a study that has begun goes on where it was.",
    errno.EIO: "See what is wrong with that device, and run again.",
}


def explained(error: Exception) -> RankscopeError | None:
    """The error with a way out: rankscope's own, one of the system, or that memory ran out; None for any other."""
    if isinstance(error, RankscopeError):
        return error
    if isinstance(error, OSError) and error.errno in _TODO:
        if error.filename is None:  # the output failed: else Python writes the rest of it at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        name = "the output" if error.filename is None else shortened(str(error.filename))
        return StudyDirectoryError(f"{name}: {error.strerror}", _TODO[error.errno])
    if lacks_memory(error):
        what = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
        return OutOfMemoryError(what, "Use a machine with more memory, or --device cpu in place of a GPU.")
    return None


def announce(sentence: str) -> None:
    """Say on a terminal what begins now."""
    if error_console.is_terminal:
        error_console.print(f"{sentence} …", style="dim")


def check_names(language: str = "en", launcher: str = "local", ray_address: str | None = None) -> "Catalogue":
    """The language's texts. Raises StudyError: a language or launcher is unknown; MissingExtraError: Ray is missing."""
    from rankscope.jobs.launchers import check_launcher
    from rankscope.text.catalogue import load

    check_launcher(launcher, ray_address)
    return load(language)


def check_adapter(name: str, text: "Catalogue") -> None:
    """Raise ModelError where a local folder holds no adapter."""
    from rankscope.hub import HUB_ID
    from rankscope.model.checks import check_adapter_folder

    if os.path.isdir(name) or not HUB_ID.fullmatch(name):
        check_adapter_folder(Path(name))
    announce(text("plan.reading", what=name))


def open_study(directory: Path, text: "Catalogue") -> "Study":
    """The study in a directory, with its tables."""
    from rankscope.study.folder import StudyFolder

    return _with_tables(StudyFolder.open(directory), text)


def begun_at(path: Path, asked: "StudySpec", text: "Catalogue") -> "Study | None":
    """`Study.begun_at`, which refuses before pandas is imported."""
    from rankscope.study.folder import StudyFolder

    there = StudyFolder.begun_at(path, asked)
    return _with_tables(there, text) if there else None


def _with_tables(study: "StudyFolder", text: "Catalogue") -> "Study":
    announce(text("plan.reading", what=f"{study.path}/"))
    from rankscope.study.study import Study

    return Study.of(study)


def show_plan(spec: "StudySpec", begun: "StudyFolder | None", as_json: bool, text: "Catalogue", **options: Any) -> None:
    """Print the plan of a study; `options` are those of `rankscope.ui.plan.show_plan`."""
    from rankscope.model.checks import check_inputs
    from rankscope.spec.task import check_code

    check_code(spec.measure.task, allowed=None)
    spec = check_inputs(spec, data=begun is None)
    announce(text("plan.planning"))
    from rankscope.ui.plan import show_plan

    show_plan(spec, begun, as_json, text, **options)


def approve(progress: "Display", text: "Catalogue", plan: "Plan") -> None:
    """`rankscope.ui.plan.approve`, imported where a plan has been made."""
    from rankscope.ui.plan import approve

    approve(progress, plan, text)
