"""Evidence of a study as plain data."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import pandas as pd

from rankscope.spec.candidates import PLAIN
from rankscope.spec.models import StudySpec
from rankscope.study.records import Failure


class Evidence(NamedTuple):
    """Tables and facts of a study, from which the analysis and the report start; any table may be empty. All fields but
    `variants` are evidence of plain LoRA, whose ranks the verdict is about."""

    spec: StudySpec
    results: pd.DataFrame
    curves: pd.DataFrame
    profiles: pd.DataFrame
    samples: pd.DataFrame
    examples: pd.DataFrame
    machine: dict[str, Any]
    data_facts: dict[str, Any]
    reference: pd.DataFrame  # `Study.reference_examples()`: empty where the study has no reference
    untrained: pd.DataFrame = pd.DataFrame()  # `Study.untrained_examples()`
    prediction: Mapping[str, Any] = MappingProxyType({})
    reference_results: pd.DataFrame = pd.DataFrame()
    divided: Sequence[str] = ()  # trials whose pack ended with an error and was divided
    survivors: Sequence[str] = ()  # trials that went on in their pack without one that diverged
    failures: Mapping[str, Failure] = MappingProxyType({})  # `Study.open_failures()`
    answers: pd.DataFrame = pd.DataFrame()
    variants: "Evidence | None" = None  # None in a study without variants
    cuts: pd.DataFrame = pd.DataFrame()  # `Study.cut_examples()`
    task_scores: pd.DataFrame | None = None  # `Study.task_scores()`; None in a study without a task
    task_untrained: pd.DataFrame | None = None  # `Study.untrained_scores()`

    @property
    def parts(self) -> "list[Evidence]":
        """This evidence, and that of the variants where the study has some."""
        return [self] if self.variants is None else [self, self.variants]


def without_variants(evidence: Evidence) -> Evidence:
    """Evidence of plain LoRA, with that of the variants in its field `variants`."""
    others = {candidate.name for candidate in evidence.spec.candidates() if candidate.variant != PLAIN}

    def part(is_variant: bool) -> dict[str, Any]:
        fields = ("results", "curves", "profiles", "samples", "examples", "answers", "task_scores")
        tables = {field: getattr(evidence, field) for field in fields}
        return {
            field: table[table["candidate"].isin(others) == is_variant].reset_index(drop=True)
            for field, table in tables.items()
            if table is not None and "candidate" in table
        }

    adapter = evidence.spec.adapter.model_copy(update={"rank_pattern": {}})
    plain = evidence.spec.model_copy(update={"variants": (), "adapter": adapter})
    return evidence._replace(**part(False), spec=plain, variants=evidence._replace(**part(True)))
