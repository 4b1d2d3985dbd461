"""One table of options serves the command line and `rankscope.run`."""

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from rankscope.cli import app
from rankscope.errors import StudyError
from rankscope.spec.models import StudySpec, TrainingSpec
from rankscope.spec.option_table import OPTIONS, Option
from rankscope.spec.options import assemble
from rankscope.ui.options import (
    CRITERIA,
    PLAN,
    RESIZE,
    RUN,
    SEARCH,
    STUDY,
    own_names,
    study_and_path,
    study_values,
    with_options,
)


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_sets_a_field_of_a_study(name: str) -> None:
    model: Any = StudySpec
    for part in OPTIONS[name].field.split("."):
        assert part in model.model_fields, OPTIONS[name].field
        model = model.model_fields[part].annotation


def test_options_of_the_commands() -> None:
    criteria = {"margin", "margin_of", "by", "confidence", "max_gpu_memory", "max_runtime"}
    assert set(STUDY) - set(PLAN) == criteria == set(CRITERIA), "plan judges nothing"
    assert set(STUDY) < set(RUN)
    assert all(option.help for option in SEARCH.values())
    assert OPTIONS.keys() - set(STUDY) == {"name", "revision", "loss_on", "alphas", "lora_dropout", "use_rslora"}


@pytest.mark.parametrize("name", [name for name in STUDY if OPTIONS[name].type is not bool])
def test_the_help_shows_the_default_that_holds(name: str) -> None:
    """Either it is the field's own, or in words where the field has none."""
    option, base = OPTIONS[name], {"model": {"id": "a"}, "data": {"id": "b"}}
    default: Any = assemble(base, {})
    for part in option.field.split("."):
        default = getattr(default, part)
    if name in ("model", "dataset"):
        assert option.default == "the study's; else embedded"
    elif default in (None, (), {}):
        words = ("none", "no limit", "1", "those of --epochs", "rows held out", "the tokenizer's", "names as they are")
        assert option.default in (*words, "task where there is one")
        assert name != "epochs" or "Default without either: 1." in str(TrainingSpec.model_fields[name].description)
    else:
        assert assemble(base, {name: option.default}) == assemble(base, {})


@pytest.mark.parametrize("command", typer.main.get_command(app).commands.values(), ids=lambda command: command.name)
def test_every_option_says_what_holds_without_it(command: Any) -> None:
    context = typer.Context(command)
    shown = [one.get_help_record(context) for one in command.params if one.param_type_name == "option"]
    assert [words for words in shown if "[default: " not in words[1]] == []


OWN = {"--ranks", "--learning-rates", "--model", "--dataset", "--batch-size", "--alpha", "--set", "--out", "--isolated"}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--lr 1e-4 --lora_r=8", "--learning-rates 1e-4 --ranks=8"),
        ("--per_device_train_batch_size 4", "--batch-size 4"),
        ("--batch_size=4", "--batch-size=4"),
        ("--model_name_or_path m --data d.jsonl", "--model m --dataset d.jsonl"),
        ("--gradient-accumulation-steps 2", "--set training.gradient_accumulation_steps=2"),
        ("--lora_dropout=0.1 --out x", "--set adapter.lora_dropout=0.1 --out x"),
        ("--use_rslora --out x", "--set adapter.use_rslora=true --out x"),
        ("study.yaml --alphas 16,2r -h", "study.yaml --alpha 16,2r -h"),
        ("--nothing 3 -x --", "--nothing 3 -x --"),
    ],
)
def test_a_command_line_by_other_tools_names(words: str, expected: str) -> None:
    assert list(own_names(words.split(), OWN)) == expected.split()


def test_a_command_without_a_study_has_its_own_names_alone() -> None:
    assert list(own_names(["--lr", "3", "--max_gpu_memory", "2GB"], {"--max-gpu-memory"})) == [
        "--lr", "3", "--max-gpu-memory", "2GB",
    ]  # fmt: skip


def test_an_option_of_another_tool_names_what_to_give() -> None:
    with pytest.raises(StudyError, match=r"(?s)--load_in_4bit is no option of rankscope.*Give model\.quantization"):
        list(own_names(["--load_in_4bit"], OWN))


@pytest.mark.parametrize("words", [["export", "study", "--merge", "--out", "y"], ["run", "--lr", "--dataset", "z"]])
def test_an_option_is_no_value_of_the_one_before(words: list[str]) -> None:
    found = CliRunner().invoke(app, words)
    assert found.exit_code == 2
    assert re.search(r"--(merge|learning-rates) needs a value before --(out|dataset)\.", found.output)


def test_a_study_by_its_directory_and_a_quick_look_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = dict.fromkeys(STUDY)
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "study.yaml").write_text("name: other\nmodel: m\ndata: d\nseeds: 0..4\n")
    spec, path = study_and_path(tmp_path / "s", None, options, None, quick=False)
    assert (spec.name, spec.seeds, path) == ("other", (0, 1, 2, 3, 4), tmp_path / "s")
    spec, path = study_and_path(tmp_path / "s" / "study.yaml", None, options, None, quick=True)
    assert (spec.name, spec.seeds, path) == ("other", (0, 1), Path("other-quick"))
    assert study_and_path(tmp_path / "s", None, options, None, quick=True)[1] == tmp_path / "s-quick"
    assert study_and_path(tmp_path / "s", Path("x"), options, None, quick=True)[1] == Path("x-quick")
    monkeypatch.chdir(tmp_path / "s")
    assert study_and_path(Path(), None, options, None, quick=True)[1] == tmp_path / "s-quick"
    assert study_and_path(None, Path(), options, None, quick=True)[1] == tmp_path / "s-quick"
    assert study_and_path(None, Path(".."), options, None, quick=True)[1] == Path(f"{tmp_path}-quick")


@pytest.mark.parametrize(
    ("option", "value"), [("seeds", "0..4"), ("steps", 500), ("epochs", 2.0), ("set", "training.steps=500")]
)
def test_a_quick_look_refuses_more_than_it_takes(option: str, value: Any) -> None:
    options = dict.fromkeys(STUDY) | ({} if option == "set" else {option: value})
    with pytest.raises(StudyError, match=f"(?s)--{option}.* asks for more.*Leave out --{option}"):
        study_and_path(None, None, options, [value] if option == "set" else None, quick=True)


def test_a_quick_look_takes_less() -> None:
    options = dict.fromkeys(STUDY) | {"seeds": "3,4", "steps": 50, "ranks": "4..256"}
    spec, _ = study_and_path(None, None, options, None, quick=True)
    assert (spec.seeds, spec.training.steps, spec.ranks) == ((3, 4), 50, (4, 32, 256))


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
    spec = assemble(study_values(None, given), given).data
    assert (spec.ids, spec.eval_dataset, spec.chat_template) == (("a.jsonl", "b,*.csv"), "e", "chatml")
    assert (spec.columns, spec.skip_bad_rows, spec.force) == ({"prompt": "q", "completion": "a"}, True, True)
    CliRunner().invoke(app, [])
    assert received == dict.fromkeys(DATA)


def test_resize_names_its_own_data() -> None:
    assert [name for name in RESIZE if name in DATA] == ["dataset"]


def test_fewer_rows_than_none_are_refused() -> None:
    done = CliRunner().invoke(app, ["plan", "--show-rows", "-1"])
    assert done.exit_code == 2
    assert "Invalid value for '--show-rows'" in " ".join(done.output.split())
