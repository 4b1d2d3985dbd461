"""JSON schema of a study's YAML, with which editors complete fields, explain them and mark errors.

Types, bounds and descriptions are those of the models in `rankscope.spec.models`.
"""

from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from rankscope.spec.models import StudySpec
from rankscope.spec.resolve import LOG

_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def study_schema() -> dict[str, Any]:
    """The schema, as JSON's plain data."""
    schema = StudySpec.model_json_schema(schema_generator=_Untitled)
    schema["properties"][LOG] = {
        "description": "What was added to the study, and when. Written by `run`.",
        "type": "array",
        "items": {"type": "object"},
    }
    return {"$schema": _DIALECT} | schema | {"title": "A rankscope study"}


class _Untitled(GenerateJsonSchema):
    """Generator without titles: pydantic's repeat the fields' names."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False
