"""The JSON schema of a study's YAML, by which editors complete fields, explain them and mark what is wrong.

Types and bounds are those of the models in `rankscope.spec.models`, descriptions the docstrings under their fields.
What only a validator knows, such as `alpha: 2r`, stands here, under the validator's name: one that is not here is an
error.
"""

import ast
import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from rankscope.spec import candidates
from rankscope.spec import models as spec
from rankscope.text.formats import BYTES, SECONDS

_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def study_schema() -> dict[str, Any]:
    """The schema, as JSON's plain data."""
    schema = spec.StudySpec.model_json_schema(schema_generator=_StudySchema)
    return {"$schema": _DIALECT} | schema | {"title": "A rankscope study"}


class _StudySchema(GenerateJsonSchema):
    def field_title_should_be_set(self, schema: Any) -> bool:
        return False  # pydantic's titles are the fields' names once more

    def function_before_schema(self, schema: core_schema.BeforeValidatorFunctionSchema) -> JsonSchemaValue:
        validator = schema["function"]["function"]
        return _ACCEPTED[validator.__name__](super().function_before_schema(schema))

    def model_schema(self, schema: core_schema.ModelSchema) -> JsonSchemaValue:
        described = super().model_schema(schema)
        for field, docstring in _field_docstrings()[schema["cls"].__name__].items():
            if field in described["properties"]:
                described["properties"][field]["description"] = docstring
        return described


@cache
def _field_docstrings() -> dict[str, dict[str, str]]:
    """The docstring under each field of each class. Read when it is asked for: `use_attribute_docstrings` would read
    the source whenever a study is opened.
    """
    found = {}
    for node in ast.parse(inspect.getsource(spec)).body:
        if isinstance(node, ast.ClassDef):
            pairs = zip(node.body, node.body[1:], strict=False)
            found[node.name] = {field: text for pair in pairs for field, text in _documented(*pair)}
    return found


def _documented(field: ast.stmt, text: ast.stmt) -> list[tuple[str, str]]:
    match field, text:
        case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(docstring))):
            return [(name, inspect.cleandoc(docstring).replace("\n", " "))]
    return []


def _same(inner: JsonSchemaValue) -> JsonSchemaValue:
    return inner


def _one_or_several(inner: JsonSchemaValue) -> JsonSchemaValue:
    return {"anyOf": [inner["items"], inner | {"minItems": 1}]}


def _rank_or_full(inner: JsonSchemaValue) -> JsonSchemaValue:
    """`ranks` may hold `full` beside numbers."""
    one, several = inner["properties"]["ranks"]["anyOf"]
    several["items"] = {"anyOf": [one, {"const": candidates.FULL}]}
    return inner


def _alpha(inner: JsonSchemaValue) -> JsonSchemaValue:
    multiple = {"type": "string", "pattern": r"^\s*[0-9]+(\.[0-9]*)?r\s*$"}
    return {"anyOf": [{"type": "number", "exclusiveMinimum": 0}, multiple]}


def _names(inner: JsonSchemaValue) -> JsonSchemaValue:
    name = {"type": "string", "minLength": 1}
    return {"anyOf": [{"const": "all-linear"}, name, {"type": "array", "items": name, "minItems": 1}]}


def _with_unit(units: dict[str, int]) -> Callable[[JsonSchemaValue], JsonSchemaValue]:
    """A bare number, or one with a unit in letters of either case."""
    either_case = ["".join(f"[{letter}{letter.upper()}]" for letter in unit) for unit in units]
    pattern = rf"^\s*[0-9]+(\.[0-9]+)?\s*({'|'.join(either_case)})?\s*$"
    return lambda inner: {"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"type": "string", "pattern": pattern}]}


_ACCEPTED: dict[str, Callable[[JsonSchemaValue], JsonSchemaValue]] = {
    "_true_is_not_one": _same,  # JSON schema knows true from 1
    "_as_list": _one_or_several,
    "_full_is_the_reference": _rank_or_full,
    "_alpha_or_multiple": _alpha,
    "_all_linear_or_names": _names,
    "parse_bytes": _with_unit(BYTES),
    "parse_seconds": _with_unit(SECONDS),
}
"""What each validator accepts, given the schema of what it hands on."""
