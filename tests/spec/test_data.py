"""The part of a study that asks for data: what it accepts, what it refuses, and what each refusal says."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from rankscope.errors import StudyError
from rankscope.spec.models import DEFAULT_TEMPLATE, DataSpec
from rankscope.spec.options import assemble, read_study_file
from rankscope.spec.resolve import resolve_spec, write_yaml

MODEL = {"model": {"id": "a/model"}}
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def data(**values: Any) -> DataSpec:
    return resolve_spec(MODEL | {"data": {"id": "x.jsonl"} | values}).data


def refused(**values: Any) -> str:
    with pytest.raises(StudyError) as caught:
        data(**values)
    return str(caught.value)


@pytest.mark.parametrize(
    ("id", "ids", "name"),
    [
        ("a.jsonl", ("a.jsonl",), "a.jsonl"),
        (["a.jsonl"], ("a.jsonl",), "a.jsonl"),
        (["a.jsonl", "owner/b"], ("a.jsonl", "owner/b"), "a.jsonl + owner/b"),
    ],
)
def test_one_source_or_several(id: Any, ids: tuple[str, ...], name: str) -> None:
    spec = resolve_spec(MODEL | {"data": {"id": id}})
    assert (spec.data.ids, spec.data.name) == (ids, name)
    assert resolve_spec(yaml.safe_load(write_yaml(spec))) == spec


def test_a_list_of_one_source_is_the_same_study() -> None:
    assert data(id=["x.jsonl"], eval_dataset=["e"]) == data(eval_dataset="e")


def test_a_study_of_several_sources_is_named_after_them() -> None:
    assert assemble(MODEL | {"data": {"id": ["d/one.jsonl", "two.csv"]}}, {}).name == "model-one-two"


@pytest.mark.parametrize("id", ["", [], [""], [3], None, {"a": "b"}])
def test_names_of_data_that_are_none(id: Any) -> None:
    assert "data.id: expected a name, or a list of names" in refused(id=id)


def test_a_source_given_twice_is_refused() -> None:
    assert "data.id: listed twice: a" in refused(id=["a", "b", "a"])


@pytest.mark.parametrize("field", ["template", "template_without_input"])
@pytest.mark.parametrize("word", ["output", "question"])
def test_unknown_placeholders_are_named(field: str, word: str) -> None:
    message = refused(**{field: f"{{instruction}} {{input}} {{{word}}}"})
    assert f"data.{field}: unknown placeholder {{{word}}}" in message
    assert "the answer follows by itself" in message


@pytest.mark.parametrize("text", ["{ }", "{}", "{a: 1}", "{{", '{"a b"}', "[INST]"])
def test_other_braces_are_text(text: str) -> None:
    assert data(template=f"{text}{{instruction}}{{input}}").template.startswith(text)


@pytest.mark.parametrize("field", ["template", "template_without_input"])
def test_a_backslash_and_an_n_are_no_line_break(field: str) -> None:
    message = refused(**{field: r"{instruction}\n### Answer:"})
    assert f"data.{field}: holds a backslash and an n" in message
    assert "double quotes" in message


@pytest.mark.parametrize("template", ["{instruction}", "{input}", "Question:"])
def test_a_template_needs_both_placeholders(template: str) -> None:
    assert "data.template: must contain {instruction} and {input}" in refused(template=template)


@pytest.mark.parametrize("template", ["{instruction}\n{input}", "Question:"])
def test_a_template_without_input_has_none(template: str) -> None:
    assert "must contain {instruction}, and no {input}" in refused(template_without_input=template)


def test_alpaca_s_own_templates() -> None:
    head = "Below is an instruction.\n\n### Instruction:\n{instruction}\n\n"
    both = {"template": head + "### Input:\n{input}\n\n### Response:", "template_without_input": head + "### Response:"}
    assert data(**both).model_dump(include=set(both)) == both


@pytest.mark.parametrize(
    "columns",
    [
        {"prompt": "question", "completion": "answer"},
        "prompt=question,completion=answer",
        "prompt=question, completion = answer",
        ["prompt=question", "completion=answer"],
    ],
)
def test_columns_as_a_mapping_or_text(columns: Any) -> None:
    spec = resolve_spec(MODEL | {"data": {"id": "x", "columns": columns}})
    assert spec.data.columns == {"prompt": "question", "completion": "answer"}
    assert resolve_spec(yaml.safe_load(write_yaml(spec))) == spec


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"question": "prompt"}, "data.columns.question: no format reads a column of that name: expected one of instr"),
        ({"prompt": ""}, "data.columns.prompt"),
        ({"prompt": 3}, "data.columns.prompt"),
        ({"prompt": "q", "completion": "q"}, "data.columns: listed twice: q"),
        ("prompt=a,prompt=b", "data.columns: listed twice: prompt"),
        ("prompt=", "data.columns.prompt"),
        ("prompt", "'prompt' is no pair such as prompt=question"),
        ("", "'' is no pair"),
        (["prompt=a", 3], "expected names of columns such as prompt=question"),
        (7, "expected names of columns such as prompt=question"),
    ],
)
def test_wrong_columns(columns: Any, message: str) -> None:
    assert message in refused(columns=columns)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"eval_dataset": "e", "eval_split": "test"}, "give eval_dataset or eval_split, not both"),
        ({"eval_split": "test", "split": "test"}, "eval_split: test is the split to train on"),
        ({"eval_split": "train"}, "eval_split: train is the split to train on"),
        ({"eval_split": ""}, "data.eval_split"),
        ({"split": ""}, "data.split"),
        ({"eval_dataset": "x.jsonl"}, "eval_dataset: x.jsonl is what is trained on"),
        ({"id": ["a", "b"], "eval_dataset": ["c", "b"]}, "eval_dataset: b is what is trained on"),
        ({"eval_dataset": ["e", "e"]}, "data.eval_dataset: listed twice: e"),
        ({"eval": "e"}, "data.eval: unknown field; did you mean eval_dataset?"),
        ({"eval_id": "e"}, "data.eval_id: unknown field; did you mean eval_dataset?"),
    ],
)
def test_wrong_evaluation_sets(values: dict[str, Any], message: str) -> None:
    assert message in refused(**values)


def test_evaluation_sets() -> None:
    assert data(eval_dataset=["a", "b"]).eval_dataset == ("a", "b")
    assert data(eval_split="train", split="other").eval_split == "train"


@pytest.mark.parametrize("template", ["chatml", TEMPLATE, "{{ messages }}", "{%- x %}", None])
def test_chat_templates(template: str | None) -> None:
    assert data(chat_template=template).chat_template == template


def test_a_chat_template_that_is_none() -> None:
    message = refused(chat_template="no/such.jinja")
    assert "data.chat_template: no such file" in message
    assert "chatml" in message
    assert "'no/such.jinja'" in message


def test_a_chat_template_s_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is looked for beside the study that names it, then in the working directory; for options only there."""
    here, study = tmp_path / "here", tmp_path / "studies" / "study.yaml"
    for folder in (here, study.parent):
        folder.mkdir()
    monkeypatch.chdir(here)
    values: dict[str, Any] = MODEL | {"data": {"id": "x", "chat_template": "t.jinja"}}
    study.write_text(yaml.safe_dump(values))

    def text(values: dict[str, Any], options: dict[str, Any], *sets: str, file: Path | None = None) -> str | None:
        return assemble(values, options, sets, file).data.chat_template

    Path("t.jinja").write_text("here {{ messages }}\n")
    assert text(read_study_file(study), {}, file=study) == "here {{ messages }}\n"
    (study.parent / "t.jinja").write_bytes(b"\xef\xbb\xbfbeside {{ messages }}")
    spec = assemble(read_study_file(study), {}, (), study)
    assert spec.data.chat_template == "beside {{ messages }}"
    assert resolve_spec(yaml.safe_load(write_yaml(spec))) == spec, "the resolved study needs no file"
    assert text(read_study_file(study), {"chat_template": "t.jinja"}, file=study) == "here {{ messages }}\n"
    assert text(values, {}, "data.chat_template=t.jinja", file=study) == "here {{ messages }}\n"
    assert text(values, {"chat_template": "chatml"}, file=study) == "chatml"
    assert values["data"]["chat_template"] == "t.jinja", "the caller's values stay"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.jinja", b"Hello", "t.jinja is no Jinja template"),
        ("tokenizer_config.json", b'{"chat_template": "{{ messages }}"}', "tokenizer_config.json is no Jinja template"),
        ("t.jinja", b"{{ messages }}\n\xff", "t.jinja, line 2: not valid UTF-8"),
    ],
)
def test_files_that_hold_no_chat_template(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(StudyError) as caught:
        assemble(MODEL | {"data": {"id": "x"}}, {"chat_template": str(tmp_path / name)})
    assert message in str(caught.value)


def test_defaults() -> None:
    assert data().model_dump(exclude={"id", "max_length", "split_seed"}) == {
        "config": None, "revision": None, "commits": {}, "split": None, "format": "auto", "columns": {},
        "template": DEFAULT_TEMPLATE,
        "template_without_input": None, "chat_template": None, "loss_on": None, "max_rows": None, "eval_rows": None,
        "eval_dataset": None, "eval_split": None, "skip_bad_rows": False, "force": False,
    }  # fmt: skip
