"""What a command says and checks before it imports anything that takes seconds, such as torch."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankscope.ui.console import error_console

if TYPE_CHECKING:
    from rankscope.spec.models import StudySpec
    from rankscope.study.folder import StudyFolder
    from rankscope.study.study import Study


def announce(sentence: str) -> None:
    """Say on a terminal what begins now."""
    if error_console.is_terminal:
        error_console.print(f"{sentence} …", style="dim", soft_wrap=True)


def check_names(language: str = "en", launcher: str = "local", ray_address: str | None = None) -> None:
    """Raise StudyError for an unknown language or launcher; MissingExtraError where Ray is not installed."""
    from rankscope.jobs.launchers import check_launcher
    from rankscope.text.catalogue import load

    load(language)
    check_launcher(launcher, ray_address)


def check_inputs(spec: "StudySpec", data: bool = True) -> "StudySpec":
    """The question with the commits of its hub ids. Raises ModelError where the model, DataError where `data`, are not
    there, or a local one cannot be used."""
    from rankscope.data.sources import check_local
    from rankscope.model.checks import check_folder, pinned

    check_folder(spec.model)
    if data:
        check_local(spec.data)
    return pinned(spec) if data else spec


def check_adapter(name: str) -> None:
    """Raise ModelError where a local folder holds no adapter."""
    from rankscope.hub import HUB_ID
    from rankscope.model.checks import check_adapter_folder

    if os.path.isdir(name) or not HUB_ID.fullmatch(name):
        check_adapter_folder(Path(name))
    announce(f"Reading {name}")


def open_study(directory: Path, language: str = "en", launcher: str = "local", address: str | None = None) -> "Study":
    """Open a study once the names that a command was given are known to be good."""
    from rankscope.study.folder import StudyFolder

    check_names(language, launcher, address)
    return _with_tables(StudyFolder.open(directory))


def begun_at(path: Path, asked: "StudySpec") -> "Study | None":
    """`Study.begun_at`, refused before pandas is imported."""
    from rankscope.study.folder import StudyFolder

    there = StudyFolder.begun_at(path, asked)
    return _with_tables(there) if there else None


def _with_tables(study: "StudyFolder") -> "Study":
    announce(f"Reading {study.path}/")
    from rankscope.study.study import Study

    return Study(study.path, study.spec, study.log)


def show_plan(spec: "StudySpec", begun: "Study | None", as_json: bool, rows: int = 0, **options: Any) -> None:
    """Print the plan of a study: `rankscope.ui.plan`, whose `plan_study` takes the options."""
    spec = check_inputs(spec, data=begun is None)
    announce("Planning")
    from rankscope.ui.plan import plan_study, show_plan

    show_plan(plan_study(spec, begun, **options), begun, as_json, rows)
