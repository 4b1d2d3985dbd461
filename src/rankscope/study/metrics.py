"""metrics.jsonl in columns, one row per step.

A line has numbers of one step, and a step may have several lines: one for training, one for an evaluation.
"""

from pathlib import Path
from typing import Any, NamedTuple, Required

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic cannot use typing's before Python 3.12

from rankscope.files import exists, read_jsonl, read_whole
from rankscope.study.records import MetricsRow


class _Row(TypedDict, total=False):
    """A line as the training loop writes it."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)  # type: ignore[misc]

    step: Required[int]
    epoch: float
    train_loss: float
    eval_loss: float
    grad_norm: float
    step_learning_rate: float
    tokens: float
    label_tokens: float
    step_seconds: float


FIELDS = tuple(name for name in _Row.__annotations__ if name != "step")  # numbers of a step
_ROWS = TypeAdapter(list[_Row])


class Steps(NamedTuple):
    """Numbers of the N steps of one trial, in order."""

    step: npt.NDArray[np.int64]  # (N,)
    values: dict[str, npt.NDArray[np.float64]]  # by field: (N,); NaN where a step has no such number


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Lines of a metrics.jsonl. Raises DamagedError: a line has another shape."""
    return [MetricsRow.of(row, file).model_dump() for row in read_jsonl(file)]


def read_steps(file: Path, sha256: str | None = None) -> Steps:
    """Steps of a trial from its metrics.jsonl, checked against the hash `sha256` where one is given. Without a hash the
    file may still grow: it may be missing, or end in a torn line. A later line of a step wins. Raises DamagedError: the
    file is corrupt."""
    content = b"" if sha256 is None and not exists(file) else read_whole(file, sha256)
    steps: dict[int, dict[str, Any]] = {}
    for row in _parse(content) or read_rows(file):
        steps.setdefault(row["step"], row).update(row)
    rows = [steps[step] for step in sorted(steps)]
    values = {name: np.array([row.get(name) for row in rows], np.float64) for name in FIELDS}  # None: NaN
    return Steps(np.array(sorted(steps), np.int64), values)


def _parse(content: bytes) -> list[Any] | None:
    """Parse all lines at once, much faster than `read_rows`; None if one is not as the training loop writes it."""
    lines = content.count(b"\n")
    try:
        rows = _ROWS.validate_json(b"[" + content.removesuffix(b"\n").replace(b"\n", b",") + b"]")
    except ValidationError:
        return None
    return rows if len(rows) == lines else None
