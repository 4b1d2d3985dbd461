"""`rankscope init`: five questions, wrong answers are told at once, and the file is a study."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from folders import write_data, write_model
from rankscope import cli
from rankscope.errors import StudyError
from rankscope.spec.models import StudySpec
from rankscope.spec.options import assemble, read_study_file


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("init") / "model")


@pytest.fixture(autouse=True)
def folder(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "model").symlink_to(model)
    write_data(tmp_path / "data.json")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def init(*arguments: str, answers: str = "", terminal: bool = True) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rankscope.ui.init.sys", SimpleNamespace(stdin=SimpleNamespace(isatty=lambda: terminal)))
        return CliRunner().invoke(cli.app, ["init", *arguments], input=answers, env={"COLUMNS": "200"})


def written(name: str = "study.yaml") -> StudySpec:
    return assemble(read_study_file(Path(name)), {}, file=Path(name))


def test_five_questions_and_wrong_answers_are_asked_again() -> None:
    wrong = {
        "./nowhere": "no such folder",
        "missing.json": "no such file",
        "chatt": "no such task",
        "big": "hardware big",
    }
    said = "./nowhere\nmodel\nmissing.json\ndata.json\nchatt\ninstructions\nbig\n24GB\n0\nsoon\n3\n"
    result = init(answers=said)
    assert result.exit_code == 0, result.output
    assert [told for told in wrong if told not in result.output] == []
    assert "--hours 0: expected hours above 0" in result.output
    assert "hours soon: could not convert" in result.output
    assert result.output.endswith(
        "study.yaml is written. Next:\n  rankscope plan study.yaml\n  rankscope run study.yaml --hours 3\n"
    )
    spec = written()
    assert (spec.model.id, spec.data.id, spec.data.format, spec.name) == ("model", "data.json", "alpaca", "model-data")
    assert (spec.verdict.max_gpu_memory, spec.model.device) == (24_000_000_000, "auto")
    text = Path("study.yaml").read_text()
    assert "rankscope plan study.yaml --gpu-memory 24GB" in text
    assert sum(" # " in line for line in text.splitlines()) > 12, "it is commented"


def test_questions_comments_and_next_commands_are_in_korean() -> None:
    said = "model\ndata.json\ninstructions\n24GB\n3\n"
    english, korean = (init(f"{lang}.yaml", "--lang", lang, answers=said) for lang in ("en", "ko"))
    assert korean.exit_code == english.exit_code == 0, korean.output
    assert written("ko.yaml") == written("en.yaml")
    asked = [line for line in korean.output.splitlines() if line and not line.startswith("  rankscope ")]
    assert [line for line in asked if not re.search("[가-힣]", line)] == []
    assert korean.output.endswith("\n  rankscope plan ko.yaml --lang ko\n  rankscope run ko.yaml --hours 3 --lang ko\n")
    comments = re.findall("# (?!quantization|max_rows)(.*)", Path("ko.yaml").read_text())
    assert len(comments) == len(re.findall("# (?!quantization|max_rows)(.*)", Path("en.yaml").read_text()))
    assert [comment for comment in comments if not re.search("[가-힣]", comment)] == []


def test_the_defaults_are_the_embedded_study_s_model_and_data() -> None:
    result = init(answers="\n" * 5)
    assert result.exit_code == 0, result.output
    spec = written()
    assert (spec.model.id, spec.data.id) == ("embedded", "embedded")
    default = assemble({"model": "embedded", "data": "embedded"}, {})
    assert spec.model_copy(update={"name": default.name}) == default.model_copy(
        update={"training": default.training.model_copy(update={"epochs": 1})}
    )


def test_options_answer_and_nothing_is_asked_without_a_terminal() -> None:
    result = init("a.yaml", "--model", "model", "--dataset", "data.json", "--hours", "0.5", terminal=False)
    assert result.exit_code == 0, result.output
    assert (written("a.yaml").data.max_rows, written("a.yaml").seeds) == (1600, (0, 1)), "a quick look"
    assert [*Path().glob("*.yaml")] == [Path("a.yaml")]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "--model is missing"),
        (["--model", "model"], "--dataset is missing"),
        (["--model", "./nowhere", "--dataset", "data.json"], "./nowhere: no such folder"),
        (["--model", "model", "--dataset", "data.json", "--task", "chat"], "the format messages needs messages"),
        (["--model", "model", "--dataset", "data.json", "--hardware", "fast"], "hardware fast"),
        (
            ["--model", "model", "--dataset", "data.json", "--hardware", "24"],
            "hardware 24: expected a size such as 24GB",
        ),
        (["--model", "model", "--dataset", "data.json", "--hours", "-1"], "expected hours above 0"),
        (["data.json"], "data.json: exists already"),
    ],
)
def test_a_wrong_option_is_refused_and_nothing_is_written(folder: Path, arguments: list[str], told: str) -> None:
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    result = init(*arguments, terminal=False)
    assert isinstance(result.exception, StudyError)
    assert told in str(result.exception)
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == before
