"""Tables of many trials, and the lines of metrics.jsonl that they are made of."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from rankscope.errors import DamagedError
from rankscope.files import file_sha256, read_json, write_json
from rankscope.jobs.repair import remove_corrupt
from rankscope.study.metrics import read_rows, read_steps
from rankscope.study.study import Study

FIXTURE = Path(__file__).parents[1] / "fixtures" / "study-0.1"


@pytest.fixture
def study(tmp_path: Path) -> Study:
    shutil.copytree(FIXTURE, tmp_path / "study")
    return Study.open(tmp_path / "study")


PLAIN = '{"step": 0, "epoch": 0.0, "eval_loss": 5.7}\n{"step": 1, "train_loss": 0.1, "tokens": 7}\n'
LINES = {
    "plain": PLAIN,
    "an evaluation's line": PLAIN + '{"step": 1, "eval_loss": 2.5}\n{"step": 2, "train_loss": 1e-320}\n',
    "given twice": PLAIN + '{"step": 1, "train_loss": 0.3}\n{"step": 1, "tokens": 8}\n',
    "out of order": PLAIN + '{"step": 5, "tokens": 1}\n{"step": 3, "tokens": 2}\n{"step": 5, "tokens": 9}\n',
    "digits": PLAIN + '{"step": 2, "train_loss": 0.30000000000000004, "grad_norm": 123456789.12345679}\n',
}


@pytest.mark.parametrize("text", LINES.values(), ids=LINES.keys())
def test_what_is_parsed_at_once_is_what_stands_there(text: str, tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text(text)
    parsed = read_steps(file)
    rows = [json.loads(line) for line in text.splitlines()]
    assert parsed.step.tolist() == sorted({row["step"] for row in rows})
    last = [row["tokens"] for row in rows if row["step"] == 1 and "tokens" in row][-1]
    assert parsed.values["tokens"][1] == last


@pytest.mark.parametrize("line", ['{"step": 2, "train_loss": null}\n', '{"step": 2, "other": 1.0}\n', '{"step": 2'])
def test_what_a_line_may_also_be(line: str, tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text(PLAIN + line)
    assert [row["step"] for row in read_rows(file)] == ([0, 1, 2] if line.endswith("\n") else [0, 1])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"step": "2"}\n', "line 3: step: Input should be a valid integer"),
        ('{"step": 2.0}\n', "line 3: step: Input should be a valid integer"),
        ('{"train_loss": 2.0}\n', "line 3: step: Field required"),
        ('{"step": 2, "train_loss": "1"}\n', "line 3: train_loss: Input should be a valid number"),
        ('{"step": 2, "train_loss": true}\n', "line 3: train_loss: Input should be a valid number"),
        ('{"step": 2, "train_loss": [1]}\n', "line 3: train_loss: Input should be a valid number"),
        ('{"step": 2} {"step": 3}\n', "at line 3"),
        ('\n{"step": 2}\n', "at line 3"),
        ('{"step":\n2}\n', "at line 3"),
        ('{"step": 2\n"epoch": 3}\n', "4 lines hold 3 objects"),
        ("x\n", "at line 3"),
    ],
)
def test_a_corrupt_line_is_named(line: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text(PLAIN + line)
    with pytest.raises(DamagedError, match=rf"metrics.jsonl: damaged: .*{message}"):
        read_rows(file)


def test_curves_have_the_steps_of_all_trials(study: Study) -> None:
    curves = study.curves()
    assert len(curves) == 8 * 5
    assert curves["trial"].cat.categories.tolist() == sorted(trial.name for trial in study.trials)
    assert curves.dtypes["step"] == np.int64
    assert curves.dtypes["eval_loss"] == np.float64


def test_a_trial_that_was_trained_again_is_read_anew(study: Study) -> None:
    folder = study.trial_folder(study.trials[3])
    file = folder / "metrics.jsonl"
    file.write_text(file.read_text().replace('"epoch": 0.0,', '"epoch": 0.25,') + '{"step": 9, "train_loss": 1.5}\n')
    record = read_json(folder / "trial.json")
    record["files"]["metrics.jsonl"] = file_sha256(file)
    write_json(folder / "trial.json", record)
    curves = study.curves()
    own = curves[curves["trial"] == study.trials[3].name]
    assert own["epoch"].iloc[0] == 0.25
    assert own["step"].tolist() == [0, 1, 2, 3, 4, 9]


def test_a_trial_that_trains_is_read_as_far_as_it_is(study: Study) -> None:
    folder = study.trial_folder(study.trials[2])
    record = read_json(folder / "trial.json") | {"status": "running", "results": None, "files": {}}
    write_json(folder / "trial.json", record)
    (folder / "metrics.jsonl").write_text(PLAIN + '{"step": 2, "tra')
    curves = study.curves()
    assert curves[curves["trial"] == study.trials[2].name]["step"].tolist() == [0, 1]
    assert len(curves) == 7 * 5 + 2
    (folder / "metrics.jsonl").unlink()
    assert len(study.curves()) == 7 * 5


def test_tables_that_older_versions_kept_are_ignored(study: Study) -> None:
    whole = study.curves()
    (study.path / "data").rename(study.path / "aside")  # of the fixture, which has no tokens
    (study.path / "tables").mkdir()
    for name in ("curves.parquet", "curves.json"):
        (study.path / "tables" / name).write_text("{}")
    again = Study.open(study.path)
    pd.testing.assert_frame_equal(again.curves(), whole, check_exact=True)
    assert remove_corrupt(again) == []


def test_a_harmed_file_is_named(study: Study) -> None:
    file = study.trial_folder(study.trials[5]) / "metrics.jsonl"
    file.write_text(file.read_text().replace("1", "2", 1))
    with pytest.raises(DamagedError, match=r"metrics\.jsonl: damaged: its content does not match its hash"):
        study.curves()
    assert f"trials/{study.trials[5].name}" in remove_corrupt(study)


def test_a_record_is_read_anew(study: Study) -> None:
    file, trial = study.trial_folder(study.trials[0]) / "trial.json", study.trials[0]
    assert study.trial_record(trial).status == "done"
    write_json(file, read_json(file) | {"status": "failed"})
    assert study.trial_record(trial).status == "failed"
    file.unlink()
    assert study.trial_record(trial).status == "pending"


def test_the_hash_of_a_file_is_of_what_it_says(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    write_json(file, {"schema": 1, "a": {"sha256": "b"}, "c": [1.5, "é"]})
    whole = file.read_text()
    assert read_json(file)["c"] == [1.5, "é"]
    file.write_text(json.dumps(json.loads(whole)))  # the same in other white space
    assert read_json(file)["c"] == [1.5, "é"]
    for harmed in (
        whole.replace("1.5", "1.6"),
        whole.replace('\n "sha256"', '\n "sha257"'),
        whole.replace("c", "d", 1),
    ):
        assert harmed != whole
        file.write_text(harmed)
        with pytest.raises(DamagedError, match="does not match its sha256"):
            read_json(file)
