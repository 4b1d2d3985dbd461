"""What commands import: nothing that takes seconds before all that can be checked without it."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from folders import write_data, write_model
from rankscope.report.finish import finish_again
from rankscope.spec.models import StudySpec
from rankscope.study.missing import nothing_missing
from rankscope.study.study import Study

TRAINS = ("torch", "transformers", "peft", "datasets", "optuna", "scipy.stats")
HEAVY = (*TRAINS, "pandas")

SCRIPT = """
import json, sys
from rankscope import cli
found, (commands, heavy_ones) = [], map(json.loads, sys.argv[1:])
for arguments in commands:
    sys.argv = ["rankscope", *arguments]
    try:
        code = cli.main()
    except SystemExit as end:
        code = end.code
    heavy = set(heavy_ones) & set(sys.modules)
    found.append([code, sorted(heavy)])
print(json.dumps(found), file=sys.stderr)
"""


def in_one_child(
    commands: list[list[str]], folder: Path, heavy_ones: Sequence[str] = HEAVY
) -> tuple[list[tuple[int, list[str]]], list[str]]:
    """Exit code and heavy modules after each command, run one after the other; and the lines of their errors."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    command = [sys.executable, "-c", SCRIPT, json.dumps(commands), json.dumps(heavy_ones)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    *errors, found = done.stderr.strip().splitlines()
    return [(code, heavy) for code, heavy in json.loads(found)], errors


def test_what_cannot_be_is_refused_before_torch_and_pandas_are_imported(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    write_data(tmp_path / "data.json")
    for name, broken in (("torn", "config.json"), ("mute", "tokenizer.json")):
        shutil.copytree(tmp_path / "model", tmp_path / name)
        (tmp_path / name / broken).unlink()
    (tmp_path / "torn" / "config.json").write_text("{")
    for name in ("cut", "pickled", "divided"):
        shutil.copytree(tmp_path / "model", tmp_path / name)
    os.truncate(tmp_path / "cut" / "model.safetensors", 50_000)
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    (tmp_path / "divided" / "model.safetensors").rename(tmp_path / "divided" / "model-00001-of-00002.safetensors")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("mine")
    (tmp_path / "data.xyz").write_text("?")
    good = ["--model", "model", "--dataset", "data.json"]
    refused: dict[tuple[str, ...], str] = {
        ("run", *good, "--lang", "xx"): "no report language 'xx'",
        ("run", *good, "--report-to", "wandbee"): "unknown tracker",
        ("run", *good, "--launcher", "slurm"): "--launcher slurm: unknown",
        ("run", *good, "--out", "taken"): "exists and is not a study",
        ("run", "--model", "./no", "--dataset", "data.json"): "model ./no: no such folder",
        ("run", "--model", "torn", "--dataset", "data.json"): "configuration of torn cannot be loaded",
        ("plan", "--model", "cut", "--dataset", "data.json"): "cut/model.safetensors: corrupt or incomplete",
        (
            "plan",
            "--model",
            "pickled",
            "--dataset",
            "data.json",
        ): "neither model.safetensors nor model.safetensors.index",
        (
            "plan",
            "--model",
            "divided",
            "--dataset",
            "data.json",
        ): "neither model.safetensors nor model.safetensors.index",
        ("run", "--model", "mute", "--dataset", "data.json"): "no file of a tokenizer",
        ("run", "--model", "model", "--dataset", "no.json"): "no.json: no such file",
        ("run", "--model", "model", "--dataset", "data.xyz"): "unknown file type .xyz",
        ("run", *good, "--set", "data.eval_dataset=none.csv"): "none.csv: no such file",
        ("plan", "--model", "model", "--dataset", "*.csv"): "no file matches",
        ("plan", *good, "--task", "my.py:score"): "my.py: no such file",
        ("curve", "taken"): "not a study",
        ("report", "taken"): "not a study",
        ("watch", "taken"): "not a study",
        ("compare", "taken", "model"): "not a study",
        ("spectrum", "adapter"): "no adapter_config.json",
        ("resize", "adapter"): "one rule is needed",
        ("resize", "adapter", "--rank", "4"): "no adapter_config.json",
    }
    ended, errors = in_one_child(list(map(list, refused)), tmp_path)
    told = [line.removeprefix("error: ") for line in errors if line.startswith("error: ")]
    assert len(told) == len(ended) == len(refused)
    for (command, message), (code, heavy), line in zip(refused.items(), ended, told, strict=True):
        assert message in line, command
        assert code in (2, 3), command
        assert heavy == [], command


def test_a_finished_study_is_told_again_from_its_files(trained: Study) -> None:
    """Without torch, and without drawing its report again; `trained` stays as it is."""
    before = _files(trained.path)
    (ended,), _ = in_one_child([["run", str(trained.path)]], trained.path.parent, TRAINS)
    assert ended == (0, [])
    assert _files(trained.path) == before


def _files(folder: Path) -> dict[str, int]:
    found = (file for file in folder.rglob("*") if file.is_file() and not file.name.startswith("."))
    return {str(file): file.stat().st_mtime_ns for file in found}


def _remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    "change",
    [
        _remove("machine.json"),
        _remove("data/facts.json"),
        _remove("answers/answers.json"),
        _remove("trials/r002-lr3e-2-s0/trial.json"),
        lambda folder: (folder / "profiles" / "again").mkdir(parents=True),
    ],
    ids=["machine", "tokens", "answers", "trial", "costs being measured again"],
)
def test_what_is_missing_makes_a_study_unfinished(
    trained: Study, change: Callable[[Path], None], tmp_path: Path
) -> None:
    shutil.copytree(trained.path, tmp_path / "study")
    assert nothing_missing(Study.open(tmp_path / "study"))
    change(tmp_path / "study")
    assert not nothing_missing(Study.open(tmp_path / "study"))


def test_another_seed_is_missing_and_another_margin_is_not(trained: Study) -> None:
    asked = trained.spec.model_dump(mode="json")
    assert not nothing_missing(trained.grown(StudySpec.model_validate(asked | {"seeds": [0, 1, 2]})))
    other = asked | {"verdict": asked["verdict"] | {"margin": 0.2}}
    assert nothing_missing(trained.grown(StudySpec.model_validate(other)))


def test_a_report_is_drawn_again_where_a_file_of_it_or_of_the_study_changed(
    trained: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = Study.open(shutil.copytree(trained.path, tmp_path / "study"))
    drawn: list[str] = []
    monkeypatch.setattr("rankscope.report.finish.build", lambda *_, **__: drawn.append("drawn"))
    for _ in range(2):  # the first time it has another directory
        finish_again(study)
    assert len(drawn) == 1
    (study.path / "report" / "report.md").write_text("mine")
    for _ in range(2):
        finish_again(study)
    assert len(drawn) == 2
    finish_again(study, "ko")
    assert len(drawn) == 3
