"""`--quick`: a preset of a study's own fields."""

from typing import Any

import pytest

from rankscope.spec.options import assemble, quick_look

BASE = {"model": {"id": "a/model"}, "data": {"id": "a/dataset"}}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, {"training.epochs": 1, "training.steps": None, "data.max_rows": 1600, "data.eval_rows": None}),
        ({"training": {"epochs": 3, "batch_size": 16}}, {"training.epochs": 1, "data.max_rows": 2000}),
        ({"training": {"epochs": 0.5}}, {"training.epochs": 0.5}),
        ({"training": {"gradient_accumulation_steps": 4, "batch_size": 1}}, {"data.max_rows": 800}),
        ({"training": {"steps": 5000}}, {"training.steps": 200, "training.epochs": None, "data.max_rows": 2000}),
        ({"training": {"steps": 60}, "seeds": [7]}, {"training.steps": 60, "seeds": (7,)}),
        ({"data": {"id": "x", "max_rows": 100, "eval_rows": 50}}, {"data.max_rows": 100, "data.eval_rows": 25}),
        ({"data": {"id": "x", "max_rows": 3, "eval_rows": 1}}, {"data.max_rows": 3, "data.eval_rows": 1}),
        ({"ranks": "4..256"}, {"ranks": (4, 32, 256)}),
        ({"ranks": [64, 8], "seeds": "3..9", "seeds_by_rank": {8: [0]}}, {"ranks": (8, 64), "seeds": (3, 4)}),
    ],
)
def test_it_is_a_preset_of_fields(values: dict[str, Any], expected: dict[str, Any]) -> None:
    spec = assemble(BASE | values, {})
    quick = quick_look(spec)
    for field, value in expected.items():
        group, _, name = field.rpartition(".")
        assert getattr(getattr(quick, group) if group else quick, name) == value, field
    assert len(quick.ranks) <= 3
    assert len(quick.seeds) <= 2
    assert quick.seeds_by_rank == {}
    assert (quick.model, quick.adapter, quick.measure, quick.verdict) == (
        spec.model, spec.adapter, spec.measure, spec.verdict,
    )  # fmt: skip
    assert quick_look(quick) == quick
