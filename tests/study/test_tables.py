"""Tables of many trials: metrics parsed at once say what they say line by line, and what lies in tables/ is never
trusted over the trials' own files."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from rankscope import files
from rankscope.errors import DamagedError
from rankscope.files import file_sha256, read_json, write_json
from rankscope.jobs.repair import remove_corrupt
from rankscope.study import curve_table, tables
from rankscope.study.curve_table import find_table
from rankscope.study.metrics import FIELDS, Steps, parse_steps, read_steps
from rankscope.study.study import Study

FIXTURE = Path(__file__).parents[1] / "fixtures" / "study-0.1"


@pytest.fixture
def study(tmp_path: Path) -> Study:
    shutil.copytree(FIXTURE, tmp_path / "study")
    return Study.open(tmp_path / "study")


@pytest.fixture
def with_table(study: Study, monkeypatch: pytest.MonkeyPatch) -> Study:
    """Its table is made whatever the size, in several row groups."""
    monkeypatch.setattr(tables, "LEAST_BYTES", 0)
    monkeypatch.setattr(tables, "BATCH_BYTES", 1500)
    monkeypatch.setattr(curve_table, "GROUP_STEPS", 7)
    study.keep_tables()
    return study


def forbid_parsing(monkeypatch: pytest.MonkeyPatch) -> None:
    def parse(*_: Any) -> None:
        raise AssertionError("a file was parsed")

    monkeypatch.setattr(tables, "parse_steps", parse)
    monkeypatch.setattr(tables, "read_steps", parse)


def same(one: Steps, other: Steps) -> bool:
    values = [np.array_equal(one.values[name], other.values[name], equal_nan=True) for name in FIELDS]
    return one.counts == other.counts and one.step.tolist() == other.step.tolist() and all(values)


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
    found = []
    for number, content in enumerate((text, PLAIN, text)):
        (tmp_path / f"{number}.jsonl").write_text(content)
        found.append(read_steps(tmp_path / f"{number}.jsonl"))
    parsed = parse_steps([text.encode(), PLAIN.encode(), text.encode()])
    assert parsed is not None
    together = Steps(
        [count for steps in found for count in steps.counts],
        np.concatenate([steps.step for steps in found]),
        {name: np.concatenate([steps.values[name] for steps in found]) for name in FIELDS},
    )
    assert same(parsed, together)
    rows = [json.loads(line) for line in text.splitlines()]
    assert found[0].step.tolist() == sorted({row["step"] for row in rows})
    last = [row["tokens"] for row in rows if row["step"] == 1 and "tokens" in row][-1]
    assert found[0].values["tokens"][1] == last


@pytest.mark.parametrize(
    "line",
    [
        '{"step": 2, "train_loss": null}\n',
        '{"step": 2, "other": 1.0}\n',
        '{"step": "2"}\n',
        '{"step": 2.0}\n',
        '{"train_loss": 2.0}\n',
        '{"step": 2, "train_loss": "1"}\n',
        '{"step": 2, "train_loss": true}\n',
        '{"step": 2, "train_loss": [1]}\n',
        '{"step": 2} {"step": 3}\n',
        '\n{"step": 2}\n',
        '{"step":\n2}\n',
        '{"step": 2, "step": 3}\n',
        '{"step": 2',
        "x\n",
    ],
)
def test_all_else_is_left_to_be_read_line_by_line(line: str) -> None:
    assert parse_steps([PLAIN.encode()]) is not None
    assert parse_steps([PLAIN.encode(), (PLAIN + line).encode()]) is None


def test_the_table_has_what_the_files_have(with_table: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    again = Study.open(with_table.path)
    (with_table.path / "tables").rename(with_table.path.parent / "aside")
    from_files = Study.open(with_table.path).curves()
    (with_table.path.parent / "aside").rename(with_table.path / "tables")
    forbid_parsing(monkeypatch)
    pd.testing.assert_frame_equal(again.curves(), from_files, check_exact=True)
    assert len(from_files) == 8 * 5
    assert from_files["trial"].cat.categories.tolist() == sorted(trial.name for trial in with_table.trials)
    assert from_files.dtypes["eval_loss"] == np.float64
    table = find_table(with_table.path / "tables")
    assert table is not None
    import pyarrow.parquet as pq

    assert pq.read_metadata(table.file).num_row_groups > 2


def test_a_table_is_not_made_of_little(study: Study) -> None:
    study.keep_tables()
    assert not (study.path / "tables").exists()


def test_a_table_that_is_whole_is_not_made_again(with_table: Study) -> None:
    before = (with_table.path / "tables" / "curves.parquet").stat()
    with_table.keep_tables()
    assert (with_table.path / "tables" / "curves.parquet").stat().st_ino == before.st_ino


def rewrite(study: Study, number: int) -> None:
    """As if the trial had been trained again."""
    folder = study.trial_folder(study.trials[number])
    file = folder / "metrics.jsonl"
    file.write_text(file.read_text().replace('"epoch": 0.0,', '"epoch": 0.25,') + '{"step": 9, "train_loss": 1.5}\n')
    record = read_json(folder / "trial.json")
    record["files"]["metrics.jsonl"] = file_sha256(file)
    write_json(folder / "trial.json", record)


def test_a_trial_that_was_trained_again_is_read_from_its_file(with_table: Study) -> None:
    rewrite(with_table, 3)
    study = Study.open(with_table.path)
    curves = study.curves()
    own = curves[curves["trial"] == study.trials[3].name]
    assert own["epoch"].iloc[0] == 0.25
    assert own["step"].tolist() == [0, 1, 2, 3, 4, 9]
    shutil.rmtree(study.path / "tables")
    pd.testing.assert_frame_equal(curves, Study.open(study.path).curves(), check_exact=True)
    assert find_table(study.path / "tables") is None
    study.keep_tables()
    made = find_table(study.path / "tables")
    assert made is not None
    assert len(made.rows[study.trials[3].name]) == 6


def test_a_trial_that_trains_again_is_read_from_its_file(with_table: Study) -> None:
    folder = with_table.trial_folder(with_table.trials[2])
    record = read_json(folder / "trial.json") | {"status": "running", "results": None, "files": {}}
    write_json(folder / "trial.json", record)
    (folder / "metrics.jsonl").write_text(PLAIN + '{"step": 2, "tra')
    curves = Study.open(with_table.path).curves()
    assert curves[curves["trial"] == with_table.trials[2].name]["step"].tolist() == [0, 1]
    assert len(curves) == 7 * 5 + 2


@pytest.mark.parametrize("name", ["curves.parquet", "curves.json"])
def test_a_damaged_table_is_not_read_and_is_removed_by_a_run(with_table: Study, name: str) -> None:
    whole = with_table.curves()
    file = with_table.path / "tables" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    study = Study.open(with_table.path)
    pd.testing.assert_frame_equal(study.curves(), whole, check_exact=True)
    assert "tables" in remove_corrupt(study)
    assert not (study.path / "tables").exists()


def test_a_table_does_not_hide_a_damaged_file(with_table: Study) -> None:
    file = with_table.trial_folder(with_table.trials[5]) / "metrics.jsonl"
    file.write_text(file.read_text().replace("1", "2", 1))
    with pytest.raises(DamagedError, match=r"metrics\.jsonl: damaged: its content does not match its hash"):
        Study.open(with_table.path).curves()
    assert f"trials/{with_table.trials[5].name}" in remove_corrupt(Study.open(with_table.path))


def test_a_run_parses_no_metrics_that_are_in_the_table(with_table: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    (with_table.path / "data").rename(with_table.path / "aside")  # of the fixture, which has no tokens
    parsed: list[int] = []
    monkeypatch.setattr(tables, "parse_steps", lambda contents: parsed.append(len(contents)) or parse_steps(contents))  # type: ignore[func-returns-value]
    assert remove_corrupt(with_table) == []
    assert len(parsed) == len(with_table.reference_trials) > 0, "they are in no table"
    shutil.rmtree(with_table.path / "tables")
    parsed.clear()
    assert remove_corrupt(with_table) == []
    assert len(parsed) == len(with_table.all_trials())


def test_a_record_is_read_again_only_where_it_may_have_changed(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    file, trial = study.trial_folder(study.trials[0]) / "trial.json", study.trials[0]
    os.utime(file, (1, 1))
    assert study.trial_record(trial)["status"] == "done"
    study.trial_record(trial)["status"] = "changed by a caller"
    read, real = [], files.parse_json
    monkeypatch.setattr(files, "parse_json", lambda *arguments: read.append(arguments) or real(*arguments))  # type: ignore[func-returns-value]
    assert study.trial_record(trial)["status"] == "done"
    assert read == []
    write_json(file, read_json(file) | {"status": "failed"})
    read.clear()
    assert study.trial_record(trial)["status"] == "failed"
    assert time.time() - file.stat().st_mtime < 2
    assert study.trial_record(trial)["status"] == "failed"
    assert len(read) == 2, "one that was just written may be written again within the same tick of the clock"
    file.unlink()
    assert study.trial_record(trial) == {"status": "pending"}


def test_the_hash_of_a_file_is_of_its_text_or_of_what_it_says(tmp_path: Path) -> None:
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
