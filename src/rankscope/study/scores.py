"""Scores of trials on the study's task (`measure.task`): their files, and what is missing of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankscope.spec.candidates import AnyTrial, Trial
from rankscope.spec.task import BASE, code_sha256
from rankscope.study.folder import StudyFolder
from rankscope.study.records import TaskRecord

if TYPE_CHECKING:
    import pandas as pd

SCORED = "scored.json"  # in a job's folder: how many models it has scored whose scores are not written yet
SCORE_FIELDS = ("example", "score", "task")


def task_scores(study: StudyFolder) -> "pd.DataFrame":
    """One row per trial and item of the study's task: `trial candidate variant rank learning_rate seed example score
    task`. `score` is from 0 to 1; `example` is the held-out row's number, or with `lm_eval` that of the document within
    `task`. Empty without a task, or before anything is scored."""
    return _table(study, _done(study))


def untrained_scores(study: StudyFolder) -> "pd.DataFrame":
    """One row per item before training: `example score task`."""
    return _table(study, [None])[list(SCORE_FIELDS)]


def _table(study: StudyFolder, trials: Sequence[Trial | None]) -> "pd.DataFrame":
    import pandas as pd  # jobs import this module, and their memory is measured

    from rankscope.study.tables import IDENTITY_FIELDS, identity

    frames = []
    for trial in trials:
        record = task_record(study, trial)
        if record is not None:
            own = {"example": record.items.example, "score": record.items.score}
            tasks = record.items.task or record.task
            frames.append(pd.DataFrame(own).assign(task=tasks, **(identity(trial) if trial else {})))
    columns = [*IDENTITY_FIELDS, *SCORE_FIELDS]
    return (pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()).reindex(columns=columns)


def _done(study: StudyFolder) -> list[Trial]:
    return [trial for trial in study.trials if study.trial_record(trial).status == "done"]


def asked(study: StudyFolder) -> dict[str, Any]:
    """What scores depend on beside the task, its code and the adapter."""
    measure, tokens = study.spec.measure, study.data_facts["tokens_sha256"]
    return {"items": measure.task_items, "tokens": measure.task_tokens, "tokens_sha256": tokens}


def task_file(study: StudyFolder, trial: AnyTrial | None) -> Path:
    return study.file("task", f"{BASE}.json") if trial is None else study.trial_folder(trial) / "task.json"


def task_record(study: StudyFolder, trial: Trial | None) -> TaskRecord | None:
    """Scores of a trial, or of the model without an adapter; None where it has none, or those of another task, of other
    rows, or of an adapter that was trained again."""
    record = TaskRecord.find(task_file(study, trial)) if study.spec.measure.task else None
    if record is None or (record.task, record.asked) != (study.spec.measure.task, asked(study)):
        return None
    return record if record.adapter_sha256 == (study.adapter_sha256(trial) if trial else None) else None


def unscored(study: StudyFolder) -> list[Trial | None]:
    """Finished trials without scores, or with those of other code than is there now; None first for the model without
    an adapter."""
    task = study.spec.measure.task
    if task is None or not (done := _done(study)):
        return []
    code, found = code_sha256(task), list[Trial | None]()
    for trial in (None, *done):
        record = task_record(study, trial)
        if record is None or (code is not None and record.code_sha256 != code):
            found.append(trial)
    return found
