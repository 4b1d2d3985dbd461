"""One table of options serves the command line and `rankscope.run`."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from rankscope.errors import StudyError
from rankscope.spec.models import StudySpec
from rankscope.spec.option_table import OPTIONS, Option
from rankscope.ui.options import CRITERIA, PLAN, RESIZE, RUN, SEARCH, resolve_study, study_values, with_options


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_sets_a_field_of_a_study(name: str) -> None:
    model: Any = StudySpec
    for part in OPTIONS[name].field.split("."):
        assert part in model.model_fields, OPTIONS[name].field
        model = model.model_fields[part].annotation


def test_options_of_the_commands() -> None:
    criteria = {"margin", "margin_of", "confidence", "max_gpu_memory", "max_runtime"}
    assert set(RUN) - set(PLAN) == criteria == set(CRITERIA), "plan judges nothing"
    assert all(option.help for option in SEARCH.values())
    assert OPTIONS.keys() - set(RUN) == {"name", "revision", "loss_on", "lora_dropout", "use_rslora"}


def test_a_command_receives_its_options_by_name() -> None:
    received: dict[str, Any] = {}
    app = typer.Typer()

    @app.command()
    @with_options({"batch_size": Option("", int, "Examples."), "isolated": Option("", bool, "Alone.")})
    def train(options: dict[str, Any], folder: Path, json_: bool = False) -> None:
        """Train."""
        received.update(options, folder=folder, json_=json_)

    assert list(inspect.signature(train).parameters) == ["batch_size", "isolated", "folder", "json_"]
    result = CliRunner().invoke(app, ["here", "--batch-size", "3"])
    assert result.exit_code == 0, result.output
    assert received == {"batch_size": 3, "isolated": None, "folder": Path("here"), "json_": False}
    assert CliRunner().invoke(app, ["here", "--isolated"]).exit_code == 0
    assert received["isolated"] is True
    assert CliRunner().invoke(app, ["here", "--no-isolated"]).exit_code == 2
    assert "Examples." in CliRunner().invoke(app, ["--help"]).output


def test_model_and_data_go_together() -> None:
    assert study_values(None, {"model": "a", "dataset": "b"}) == {}
    assert study_values(None, {"model": None, "dataset": None})["model"]["id"] == "embedded"
    with pytest.raises(StudyError, match="--dataset is missing"):
        study_values(None, {"model": "a", "dataset": None})


def test_a_second_data_file_is_no_study(tmp_path: Path) -> None:
    """As the shell gives it for `--dataset *.jsonl`."""
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    with pytest.raises(StudyError, match="repeat --dataset for each file"):
        study_values(tmp_path / "b.jsonl", {"model": "a", "dataset": ["a.jsonl"]})
    with pytest.raises(StudyError, match="not valid YAML") as raised:
        study_values(tmp_path / "b.jsonl", {"model": None, "dataset": None})
    assert "--dataset" not in str(raised.value)


DATA = ["dataset", "eval_dataset", "columns", "chat_template", "skip_bad_rows", "force"]


@pytest.mark.parametrize("table", [RUN, PLAN, SEARCH], ids=["run", "plan", "search"])
def test_commands_that_read_data_take_its_options(table: Any) -> None:
    received: dict[str, Any] = {}
    app = typer.Typer()

    @app.command()
    @with_options(table)
    def command(options: dict[str, Any]) -> None:
        received.update({name: options[name] for name in DATA})

    arguments = ["--dataset", "a.jsonl", "--dataset", "b,*.csv", "--eval-dataset", "e", "--chat-template", "chatml"]
    arguments += ["--columns", "prompt=q,completion=a", "--skip-bad-rows", "--force"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    expected = [["a.jsonl", "b,*.csv"], ["e"], ["prompt=q,completion=a"], "chatml", True, True]
    assert received == dict(zip(DATA, expected, strict=True))
    given = dict.fromkeys(OPTIONS) | received | {"model": "m"}
    spec = resolve_study(None, given, ()).data
    assert (spec.ids, spec.eval_dataset, spec.chat_template) == (("a.jsonl", "b,*.csv"), "e", "chatml")
    assert (spec.columns, spec.skip_bad_rows, spec.force) == ({"prompt": "q", "completion": "a"}, True, True)
    CliRunner().invoke(app, [])
    assert received == dict.fromkeys(DATA)


def test_resize_names_its_own_data() -> None:
    assert [name for name in RESIZE if name in DATA] == ["dataset"]
