"""metrics.jsonl in columns, one row per step.

A line has numbers of one step, and a step may have several lines: one for training, one for an evaluation.
"""

from pathlib import Path
from typing import Any, NamedTuple, Required

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic cannot use typing's before Python 3.12

from rankscope.files import damaged_error, exists, read_whole


class _Row(TypedDict, total=False):
    """A line as the training loop writes it; a number that is not finite is None."""

    __pydantic_config__ = ConfigDict(extra="allow", strict=True)  # type: ignore[misc]

    step: Required[int]
    epoch: float | None
    train_loss: float | None
    eval_loss: float | None
    grad_norm: float | None
    step_learning_rate: float | None
    tokens: int | float | None  # whole numbers stay whole
    label_tokens: int | float | None
    step_seconds: float | None


FIELDS = tuple(name for name in _Row.__annotations__ if name != "step")  # numbers of a step
_ROWS = TypeAdapter(list[_Row])


class Steps(NamedTuple):
    """Numbers of the N steps of one trial, in order."""

    step: npt.NDArray[np.int64]  # (N,)
    values: dict[str, npt.NDArray[np.float64]]  # by field: (N,); NaN where a step has no such number


def read_rows(file: Path, sha256: str | None = None) -> list[Any]:
    """Lines of a metrics.jsonl, checked against the hash `sha256` where one is given. Without a hash the file may still
    grow: it may be missing, or end in a torn line. Raises DamagedError: the file is corrupt."""
    content = b"" if sha256 is None and not exists(file) else read_whole(file, sha256)
    lines = content.split(b"\n")[:-1]
    try:
        rows = _ROWS.validate_json(b"[" + b",\n".join(lines) + b"]")  # much faster than line by line
    except ValidationError as error:
        first = error.errors(include_url=False)[0]  # its message has the line where it is no JSON
        where = "".join(f"{part}: " for part in first["loc"][1:])
        line = f"line {int(first['loc'][0]) + 1}: " if first["loc"] else ""
        raise damaged_error(file, f"{line}{where}{first['msg']}") from None
    if len(rows) != len(lines):
        raise damaged_error(file, f"{len(lines)} lines hold {len(rows)} objects")
    return rows


def read_steps(file: Path, sha256: str | None = None) -> Steps:
    """Steps of a trial, from `read_rows`. A later line of a step wins."""
    steps: dict[int, dict[str, Any]] = {}
    for row in read_rows(file, sha256):
        steps.setdefault(row["step"], row).update(row)
    rows = [steps[step] for step in sorted(steps)]
    values = {name: np.array([row.get(name) for row in rows], np.float64) for name in FIELDS}  # None: NaN
    return Steps(np.array(sorted(steps), np.int64), values)
