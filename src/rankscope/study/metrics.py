"""metrics.jsonl as columns: what it says of each step.

A line holds numbers that were taken at one step; a step may have several lines, of its training and of an evaluation.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from rankscope.files import read_jsonl
from rankscope.study.records import MetricsRow, checked

FIELDS = (
    "epoch",
    "train_loss",
    "eval_loss",
    "grad_norm",
    "step_learning_rate",
    "tokens",
    "label_tokens",
    "step_seconds",
)
"""Numbers of a step, beside `step` itself."""


class Steps(NamedTuple):
    """The steps of several trials, N in all, laid end to end; of each trial in order, each once."""

    counts: list[int]
    """Of each trial."""
    step: npt.NDArray[np.int64]  # (N,)
    values: dict[str, npt.NDArray[np.float64]]
    """By field: (N,). NaN where a step has no such number."""

    @classmethod
    def empty(cls, counts: Iterable[int]) -> "Steps":
        """Room for so many steps, not yet filled."""
        counts = list(counts)
        total = sum(counts)
        return cls(counts, np.empty(total, np.int64), {name: np.empty(total) for name in FIELDS})


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl.

    Raises:
        DamagedError: it holds something else.
    """
    return [checked(row, MetricsRow, file) for row in read_jsonl(file)]


def read_steps(file: Path) -> Steps:
    """The steps of one trial, line by line: of any metrics.jsonl, also one that grows.

    Raises:
        DamagedError: it holds something else.
    """
    steps: dict[int, dict[str, Any]] = {}
    for row in read_rows(file):
        steps.setdefault(row["step"], {}).update(row)
    found = Steps.empty([len(steps)])
    found.step[:] = sorted(steps)
    for name, values in found.values.items():
        values[:] = [steps[step].get(name) for step in found.step.tolist()]  # None becomes NaN
    return found


def parse_steps(contents: Sequence[bytes]) -> Steps | None:
    """The steps of the trials whose metrics.jsonl have these contents, ten times as fast; None where these are not just
    as the training loop writes them, so that they must be read line by line.
    """
    import pyarrow as pa  # type: ignore[import-untyped]
    from pyarrow import json

    lines = [content.count(b"\n") for content in contents]
    if not all(map(_is_plain, contents, lines)):
        return None
    schema = pa.schema([("step", pa.int64()), *((name, pa.float64()) for name in FIELDS)])
    options = json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="error")
    try:
        table = json.read_json(pa.BufferReader(b"".join(contents)), parse_options=options)
    except pa.ArrowInvalid:
        return None
    if table.num_rows != sum(lines) or table["step"].null_count:
        return None
    step = table["step"].to_numpy()
    return _merge(lines, step, {name: table[name].to_numpy() for name in FIELDS})


def _is_plain(content: bytes, lines: int) -> bool:
    """Whether each line is an object, and no number is given as null, which would be taken for none given."""
    objects = content.startswith(b"{") and content.endswith(b"}\n") and content.count(b"}\n{") == lines - 1
    return objects and b"null" not in content


def _merge(lines: Sequence[int], step: npt.NDArray[np.int64], values: Mapping[str, npt.NDArray[np.float64]]) -> Steps:
    """One row a step of rows a line, M in all, of which each trial has `lines`; of numbers given twice the last."""
    trial = np.repeat(np.arange(len(lines)), lines)  # (M,)
    order = np.lexsort((step, trial))  # stable: lines of a step stay in their order
    if (order[1:] < order[:-1]).any():
        step, trial, values = step[order], trial[order], {name: column[order] for name, column in values.items()}
    first = np.ones(len(step), bool)
    first[1:] = (step[1:] != step[:-1]) | (trial[1:] != trial[:-1])
    place = np.cumsum(first) - 1  # (M,): each line's among the steps
    merged = {}
    for name, column in values.items():
        given = ~np.isnan(column)
        merged[name] = np.full(int(first.sum()), np.nan)
        merged[name][place[given]] = column[given]
    counts = np.bincount(trial[first], minlength=len(lines)).tolist()
    return Steps(counts, step[first], merged)
