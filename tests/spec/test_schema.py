"""The JSON schema that editors read: it is current, describes every field, and agrees with what rankscope accepts."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from rankscope.errors import StudyError
from rankscope.spec.resolve import resolve_spec
from rankscope.spec.schema import study_schema

ROOT = Path(__file__).parents[2]
WRITTEN = ROOT / "docs" / "study.schema.json"
BASE = {"model": {"id": "a/model"}, "data": {"id": "a/dataset"}}
SHIPPED = sorted((ROOT / "studies").glob("*.yaml"))
STUDIES = [*SHIPPED, ROOT / "src/rankscope/demo/study.yaml", *sorted((ROOT / "tests/fixtures").rglob("study.yaml"))]


@pytest.fixture(scope="module")
def validator() -> Draft202012Validator:
    schema = study_schema()
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def test_the_written_schema_is_current() -> None:
    assert json.loads(WRITTEN.read_text(encoding="utf-8")) == study_schema(), (
        "rankscope schema > docs/study.schema.json"
    )


def test_every_field_is_described() -> None:
    schema = study_schema()
    for group in [schema, *schema["$defs"].values()]:
        for field, described in group["properties"].items():
            assert described.get("description"), f"{group['title']}.{field}: write a docstring under it"


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: str(path.relative_to(ROOT)))
def test_shipped_and_resolved_studies_are_valid(validator: Draft202012Validator, path: Path) -> None:
    validator.validate(yaml.safe_load(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_studies_name_the_schema(path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert (path.parent / first.removeprefix("# yaml-language-server: $schema=")).resolve() == WRITTEN


ACCEPTED: list[dict[str, Any]] = [
    {},
    {"name": "a.study-1"},
    {"ranks": 8},
    {"ranks": [8, "full"]},
    {"learning_rates": 1e-4, "seeds": 0},
    {"adapter": {"alpha": 16}},
    {"adapter": {"alpha": "2r"}},
    {"adapter": {"alpha": "1.5r"}},
    {"adapter": {"target_modules": "all-linear"}},
    {"adapter": {"target_modules": "q_proj"}},
    {"adapter": {"target_modules": ["q_proj", "v_proj"]}},
    {"training": {"steps": 60, "epochs": None}},
    {"reference": {"full": True, "learning_rates": 1e-5}},
    {"reference": {"full": True, "learning_rates": [1e-5, 1e-6]}},
    {"verdict": {"max_gpu_memory": 24_000_000_000, "max_runtime": 90}},
    {"verdict": {"max_gpu_memory": "24GB", "max_runtime": "1.5h"}},
    {"verdict": {"max_gpu_memory": "16 GiB", "max_runtime": "45min"}},
    {"verdict": {"margin": "2%"}},
    {"verdict": {"margin": "0.5 %", "margin_of": "gain"}},
    {"verdict": {"margin": 0.02, "margin_of": "loss"}},
]

REFUSED: list[dict[str, Any]] = [
    {"rank": [8]},
    {"name": "../up"},
    {"model": {}},
    {"model": {"id": "a/model", "dtype": "float16"}},
    {"ranks": []},
    {"ranks": [8, -1]},
    {"ranks": [8, "ful"]},
    {"ranks": [8, True]},
    {"ranks": "full"},
    {"seeds": [-1]},
    {"learning_rates": [0.0]},
    {"learning_rates": []},
    {"adapter": {"alpha": "2x"}},
    {"adapter": {"alpha": 0}},
    {"adapter": {"target_modules": []}},
    {"adapter": {"lora_dropout": 1.0}},
    {"training": {"stepz": 60}},
    {"training": {"isolated": 3}},
    {"reference": {"full": True, "learning_rates": []}},
    {"verdict": {"max_gpu_memory": "24 apples"}},
    {"verdict": {"max_runtime": "90 GB"}},
    {"verdict": {"margin": 2}},
    {"verdict": {"margin": 0}},
    {"verdict": {"margin": "2 apples"}},
    {"verdict": {"margin_of": "accuracy"}},
]


@pytest.mark.parametrize("values", ACCEPTED, ids=str)
def test_it_accepts_what_rankscope_accepts(validator: Draft202012Validator, values: dict[str, Any]) -> None:
    resolve_spec(BASE | values)
    validator.validate(BASE | values)


@pytest.mark.parametrize("values", REFUSED, ids=str)
def test_it_refuses_what_rankscope_refuses(validator: Draft202012Validator, values: dict[str, Any]) -> None:
    with pytest.raises(StudyError):
        resolve_spec(BASE | values)
    assert not validator.is_valid(BASE | values)
