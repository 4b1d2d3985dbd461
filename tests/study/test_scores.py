"""Scores on a task: tables, and what makes them stale."""

import shutil
from pathlib import Path

import pytest

from rankscope.errors import DamagedError
from rankscope.files import read_json, write_json
from rankscope.spec.candidates import Trial
from rankscope.spec.task import code_sha256
from rankscope.study import scores, tables
from rankscope.study.missing import nothing_missing
from rankscope.study.records import TaskItems, TaskRecord
from rankscope.study.study import Study


def write_scores(study: Study, trial: Trial | None, values: list[float], code: str | None = None) -> None:
    """Give a trial, or the model without an adapter, these scores of the held-out rows from the first on."""
    record = TaskRecord(
        task=str(study.spec.measure.task),
        metric="exact_match",
        step=0,
        asked=scores.asked(study),
        adapter_sha256=study.adapter_sha256(trial) if trial else None,
        code_sha256=code,
        items=TaskItems(example=list(range(len(values))), score=values),
    )
    record.write(scores.task_file(study, trial))


def with_task(study: Study, folder: Path, task: str, **measure: int) -> Study:
    """A copy of the study that asks for a task."""
    shutil.copytree(study.path, folder)
    own = study.spec.measure.model_copy(update={"task": task, **measure})
    copy = Study(folder, study.spec.model_copy(update={"measure": own}), study.log)
    copy.publish()
    return copy


@pytest.fixture
def study(trained: Study, tmp_path: Path) -> Study:
    return with_task(trained, tmp_path / "study", "exact_match")


def test_a_table_has_one_row_per_trial_and_item(study: Study) -> None:
    assert study.task_scores().empty
    assert study.untrained_scores().empty
    assert scores.unscored(study) == [None, *study.trials]
    for number, trial in enumerate(study.trials):
        write_scores(study, trial, [float(number % 2), 0.5, 1.0])
    write_scores(study, None, [0.0, 0.0, 1.0])
    table = study.task_scores()
    assert list(table) == [*tables.IDENTITY_FIELDS, "example", "score", "task"]
    assert list(table["trial"]) == [trial.name for trial in study.trials for _ in range(3)]
    assert list(table["example"]) == [0, 1, 2] * len(study.trials)
    assert list(table["score"][:6]) == [0.0, 0.5, 1.0, 1.0, 0.5, 1.0]
    assert study.untrained_scores().to_dict("list") == {
        "example": [0, 1, 2], "score": [0.0, 0.0, 1.0], "task": ["exact_match"] * 3
    }  # fmt: skip
    assert scores.unscored(study) == []


def test_a_study_that_lacks_scores_is_not_complete(study: Study) -> None:
    assert not nothing_missing(study)
    for trial in (None, *study.trials):
        write_scores(study, trial, [1.0])
    assert nothing_missing(study)


def test_scores_of_another_task_or_adapter_do_not_count(study: Study, tmp_path: Path) -> None:
    trial = study.trials[0]
    write_scores(study, trial, [1.0])
    assert not study.task_scores().empty
    for update in ({"task": "choice"}, {"task_items": 7}, {"task_tokens": 7}, {"task": None}):
        measure = study.spec.measure.model_copy(update=update)
        assert Study(study.path, study.spec.model_copy(update={"measure": measure})).task_scores().empty
    file = study.trial_folder(trial) / "trial.json"
    record = read_json(file)
    record["files"]["adapter/adapter_model.safetensors"] = "another"
    write_json(file, record)
    assert study.task_scores().empty


def test_scores_of_changed_code_are_made_again_and_shown_until_then(trained: Study, tmp_path: Path) -> None:
    code = tmp_path / "my.py"
    code.write_text("def score(prompt, answer, reference): return 1\n")
    study = with_task(trained, tmp_path / "study", f"{code}:score")
    for trial in (None, *study.trials):
        write_scores(study, trial, [1.0], code_sha256(str(study.spec.measure.task)))
    assert scores.unscored(study) == []
    code.write_text("def score(prompt, answer, reference): return 0\n")
    assert scores.unscored(study) == [None, *study.trials]
    assert not study.task_scores().empty
    code.unlink()
    assert scores.unscored(study) == []


@pytest.mark.parametrize("items", [{"score": [1.5]}, {"score": [1.0, 0.0]}, {"answer": []}])
def test_a_corrupt_record_says_so(study: Study, items: dict[str, list[float]]) -> None:
    write_scores(study, study.trials[0], [1.0])
    file = scores.task_file(study, study.trials[0])
    record = read_json(file)
    write_json(file, record | {"items": record["items"] | items})
    with pytest.raises(DamagedError):
        study.task_scores()
