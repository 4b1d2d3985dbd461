"""Other tools' names of a study's fields: understood where they mean one field, else named with what to give."""

from pathlib import Path
from typing import Any

import pytest

from rankscope.errors import StudyError
from rankscope.spec.models import StudySpec
from rankscope.spec.names import _FIELDS, INSTEAD, field_of, type_of
from rankscope.spec.options import assemble, read_study_file, rename
from rankscope.spec.resolve import resolve_spec

BASE = {"model": {"id": "a/model"}, "data": {"id": "a/dataset"}}

OTHERS = """
base_model: a/model
dataset: [a.jsonl, b.jsonl]
r: 8..32
lora_alpha: 2r
lora_target: q_proj,v_proj
lora_dropout: 0.1
learning_rate: 1e-4
cutoff_len: 512
training:
  num_train_epochs: 2
  per_device_train_batch_size: 4
  seed: 7
weight_decay: 0.1
"""


def test_a_file_of_other_tools_names_is_a_study(tmp_path: Path) -> None:
    """Flat as of Axolotl and LLaMA-Factory, and in groups."""
    (tmp_path / "study.yaml").write_text(OTHERS)
    spec = assemble(read_study_file(tmp_path / "study.yaml"), {}, file=tmp_path / "study.yaml")
    assert (spec.model.id, spec.data.id, spec.data.max_length) == ("a/model", ("a.jsonl", "b.jsonl"), 512)
    assert (spec.ranks, spec.learning_rates, spec.seeds) == ((8, 16, 32), (1e-4,), (7,))
    adapter, training = spec.adapter, spec.training
    assert (adapter.alpha, adapter.target_modules, adapter.lora_dropout) == ("2r", ("q_proj", "v_proj"), 0.1)
    assert (training.epochs, training.batch_size, training.weight_decay) == (2, 4, 0.1)


def test_an_error_has_the_line_of_the_name_that_is_there(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(OTHERS.replace("num_train_epochs: 2", "num_train_epochs: two").replace("r: 8..32", "r: [8, x]"))
    with pytest.raises(StudyError) as caught:
        assemble(read_study_file(file), {}, file=file)
    assert "line 11, training.epochs: " in str(caught.value)
    assert "line 4, ranks, 2nd value: " in str(caught.value)


@pytest.mark.parametrize("name", ["lr", "training.lr", "adapter.learning_rate", "learning_rates"])
def test_names_hold_in_any_group_of_a_study(name: str) -> None:
    assert field_of(name) == "learning_rates"


@pytest.mark.parametrize("name", ["steps", "id", "nothing", "training.r.x", "training.margin", "adapter.peft.r"])
def test_what_means_no_field_or_several_stays(name: str) -> None:
    assert field_of(name) == name


def test_every_name_is_of_one_field_and_not_another_ones_own() -> None:
    for name, field in _FIELDS.items():
        assert type_of(field), field
        own = [own for own in _leaves(StudySpec) if own.rpartition(".")[2] == name]
        assert own in ([], [field]), name
    assert all(field_of(name) == name for name in INSTEAD), "warmup_steps is not measure.warmup_steps"


def _leaves(model: Any, prefix: str = "") -> list[str]:
    found: list[str] = []
    for name, field in model.model_fields.items():
        below = hasattr(field.annotation, "model_fields")
        found += _leaves(field.annotation, f"{name}.") if below else [prefix + name]
    return found


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (BASE | {"ranks": [8], "r": 4}, "r and ranks are the same field"),
        (
            BASE | {"training": {"epochs": 1, "num_train_epochs": 3}},
            "num_train_epochs and training.epochs are",
        ),
        ({"model": "x", "model_name": "y", "data": "z"}, "model_name and model.id are the same field"),
    ],
)
def test_two_names_of_one_field_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(StudyError, match=said):
        assemble(values, {})


def test_a_study_s_own_names_are_left_alone() -> None:
    values = {**BASE, "adapter": {"alpha": 16, "peft": {"r": 8}}, "seeds_by_rank": {8: [3]}, "data.id": 3}
    assert rename(values) == {}


@pytest.mark.parametrize("name", INSTEAD)
def test_what_to_give_instead_is_said(name: str) -> None:
    for group in ({name: 1}, {"training": {name: 1}}):
        with pytest.raises(StudyError) as caught:
            resolve_spec(BASE | group)
        assert f"unknown field; {INSTEAD[name]}" in str(caught.value)


def test_options_and_assignments_by_other_names() -> None:
    spec = assemble(BASE, {"lr": "1e-3,1e-4", "gradient_accumulation_steps": 2}, ["num_train_epochs=3", "data=x.jsonl"])
    assert (spec.learning_rates, spec.training.gradient_accumulation_steps) == ((1e-3, 1e-4), 2)
    assert (spec.training.epochs, spec.data.id) == (3, "x.jsonl")
    with pytest.raises(StudyError, match=r"load_in_4bit: unknown option; give model\.quantization: nf4 or int8"):
        assemble(BASE, {"load_in_4bit": True})


@pytest.mark.parametrize(
    ("given", "field", "expected"),
    [
        ("4..64", "ranks", (4, 8, 16, 32, 64)),
        ([2, "8..32", "full"], "ranks", (2, 8, 16, 32)),
        ("8, 64,full", "ranks", (8, 64)),
        ("0..2", "seeds", (0, 1, 2)),
        (["0..2", 7], "seeds", (0, 1, 2, 7)),
        ("1e-4,3e-4", "learning_rates", (1e-4, 3e-4)),
        ("pissa,rslora", "variants", ("pissa", "rslora")),
        ("8..32", "adapter.alpha", (8, 16, 32)),
        ("1r..4r", "adapter.alpha", ("1r", "2r", "4r")),
        ("16,2r", "adapter.alpha", (16, "2r")),
        ("q_proj, v_proj", "adapter.target_modules", ("q_proj", "v_proj")),
        ({8: "3..4"}, "seeds_by_rank", {8: (3, 4)}),
    ],
)
def test_lists_as_text(given: Any, field: str, expected: object) -> None:
    """In a study's file and from Python as on the command line."""
    group, _, name = field.rpartition(".")
    spec: Any = resolve_spec(BASE | ({group: {name: given}} if group else {name: given}))
    assert getattr(getattr(spec, group) if group else spec, name) == expected
    if isinstance(given, str):
        spec = assemble(BASE, {}, [f"{field}={given}"])
        assert getattr(getattr(spec, group) if group else spec, name) == expected


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"ranks": "64..8"}, "ranks: 64..8: no such range"),
        ({"ranks": "0..8"}, "ranks: 0..8: no such range"),
        ({"ranks": "1r..4r"}, "ranks, 1st value: "),
        ({"ranks": [8, "x"]}, "ranks, 2nd value: "),
        ({"ranks": [*range(1, 22), 0]}, "ranks, 22nd value: "),
        ({"ranks": [*range(1, 12), 0]}, "ranks, 12th value: "),
        ({"ranks": [*range(1, 111), 0]}, "ranks, 111th value: "),
        ({"seeds": "0..1..2"}, "seeds: 0..1..2: no such range"),
        ({"seeds": "0..9999999"}, "no such range"),
        ({"seeds": "-1..2"}, "no such range"),
        ({"learning_rates": "1e-5..1e-3"}, "learning_rates: 1e-5..1e-3: no such range; ranges are 8..64 of ranks"),
        ({"adapter": {"alpha": "4r..1r"}}, "adapter.alpha: 4r..1r: no such range"),
        ({"ranks": "8", "seeds_by_rank": {8: [1, -1]}}, "seeds_by_rank.8, 2nd value: "),
    ],
)
def test_wrong_lists_name_their_place(values: dict[str, Any], said: str) -> None:
    with pytest.raises(StudyError) as caught:
        resolve_spec(BASE | values)
    assert said in str(caught.value)
