"""Repair of a study before a run goes on: removal of corrupt files that a run makes again, and of leftovers of kills.

The study's lock must be held.
"""

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial

from rankscope.data.tokens import load
from rankscope.errors import DamagedError
from rankscope.files import damaged_error, exists, leftovers
from rankscope.spec.candidates import TIME, AnyTrial
from rankscope.study import tables
from rankscope.study.folder import AGAIN, CURVE, StudyFolder
from rankscope.study.metrics import read_rows
from rankscope.study.records import ChoicesRecord, MachineRecord, TaskRecord
from rankscope.study.scores import task_file

STALE_TEMP_SECONDS = 3600.0
"""Age from which a temporary file below report/ has no living writer: `rankscope report` runs without the lock."""


def remove_corrupt(study: StudyFolder) -> list[str]:
    """Remove corrupt files that a run makes again, and return their names. Raises as `find_corrupt`."""
    removed = []
    for name in find_corrupt(study):
        file = study.file(name)
        shutil.rmtree(file) if file.is_dir() else file.unlink()
        removed.append(name)
    return removed


def find_corrupt(study: StudyFolder) -> Iterator[str]:
    """Names of corrupt files and folders that a run makes again. Raises StudyDirectoryError: a file cannot be read, or
    a newer version wrote it."""
    packs = [file.parent.name for file in study.path.glob("packs/*/pack.json")]
    profiles = (*study.spec.profiled(), TIME)
    scored = [task_file(study, trial) for trial in (None, *study.trials)]
    records: dict[str, Callable[[], object]] = {
        "machine.json": lambda: study.machine,
        "prediction.json": lambda: study.prediction,
        "answers/answers.json": partial(tables.answers, study),
        "verdict.json": study.find_verdict,
        "failures.json": study.failures,
        "packs/division.json": study.division,
        **{f"profiles/{name}.json": partial(study.whole_repeats, name) for name in profiles},
        **{f"{AGAIN}/{name}.json": partial(study.whole_repeats, name, again=True) for name in profiles},
        **{str(file.relative_to(study.path)): partial(TaskRecord.find, file) for file in scored},
        "task/choices.json": lambda: ChoicesRecord.find(study.file("task", "choices.json")),
        f"{AGAIN}/machine.json": lambda: MachineRecord.content(study.file(AGAIN, "machine.json")),
        **{f"packs/{name}/pack.json": partial(study.pack_record, name) for name in packs},
    }
    for name, read in records.items():
        file = study.file(name)
        if exists(file) and not _is_whole(read):
            yield name
    data = study.file("data")
    if exists(data) and not (_is_whole(partial(load, data)) and _is_whole(lambda: study.data_facts)):
        yield "data"
    for trial in study.all_trials():
        folder = study.trial_folder(trial)
        metrics = folder / "metrics.jsonl"
        if not _is_whole(partial(_check_trial, study, trial)):
            yield str(folder.relative_to(study.path))
        elif study.find_file(trial, metrics.name)[1] is None and not _is_whole(partial(read_rows, metrics)):
            yield str(metrics.relative_to(study.path))
    if exists(study.rank_curve_file) and not _is_whole(partial(tables.cut_examples, study)):  # reads trial.json as well
        yield CURVE


def _check_trial(study: StudyFolder, trial: AnyTrial) -> None:
    """Raise DamagedError where a file of the trial is corrupt."""
    record = study.trial_record(trial)
    files = record.files or {}
    if record.status == "done" and not files.keys() >= {"metrics.jsonl", "eval.json"}:
        raise damaged_error(study.trial_folder(trial) / "trial.json", "no hashes of its files")
    for name in files:
        study.whole_file(trial, name)
    if "metrics.jsonl" in files:
        tables.trial_steps(study, trial)
    if record.status == "done":
        study.held_out(trial)


def remove_leftovers(study: StudyFolder) -> None:
    """Remove temporary files that kills left behind; of those that `rankscope report` writes only stale ones, for it
    runs without the lock."""
    for file in leftovers(study.path):
        name = file.relative_to(study.path)
        of_report = name.parts[0] == "report" or file.name.startswith((".verdict.json.", ".README.md."))
        with suppress(FileNotFoundError):  # another `report` has just published it
            if not of_report or file.lstat().st_mtime < time.time() - STALE_TEMP_SECONDS:
                file.unlink()


def _is_whole(read: Callable[[], object]) -> bool:
    """Whether `read` finds its file whole. Errors that say nothing of the file's content are raised."""
    try:
        read()
    except DamagedError:
        return False
    return True
