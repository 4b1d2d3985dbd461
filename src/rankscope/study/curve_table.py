"""tables/curves.parquet: the curves of all trials that have ended, where files by trial would take too long to read.

It is derived from the trials' own metrics.jsonl, and never trusted over them: beside it lies curves.json, with the hash
of each metrics.jsonl that it was made from, and its own. Trials whose hash is another by now are read from their files,
and so is everything where the table is missing or damaged. It may be removed at any time.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from rankscope.errors import DamagedError
from rankscope.files import file_sha256, find_json, published, write_json
from rankscope.study.metrics import FIELDS, Steps
from rankscope.study.records import CurveTableRecord, checked

SCHEMA = 1

GROUP_STEPS = 1 << 17
"""Of a row group, at least. The memory of larger ones is given back to the system and taken anew for each column."""


class CurveTable(NamedTuple):
    """A table that is whole."""

    file: Path
    rows: dict[str, range]
    """By trial: where its steps are."""
    sha256: dict[str, str]
    """By trial: of the metrics.jsonl that its steps are of."""

    def read(self, name: str, out: npt.NDArray[Any], places: Mapping[str, int]) -> None:
        """Copies a column's values of some trials to `out`, each trial's from its place there on."""
        from pyarrow.parquet import ParquetFile  # type: ignore[import-untyped]

        runs = _runs((self.rows[trial], place) for trial, place in places.items())
        with ParquetFile(self.file) as parquet:
            first = 0
            for number in range(parquet.num_row_groups):
                last = first + parquet.metadata.row_group(number).num_rows
                here = [run for run in runs if run.start < last and first < run.stop]
                if here:
                    values = parquet.read_row_group(number, columns=[name])[name].to_numpy()
                for start, stop, place in here:
                    low, high = max(start, first), min(stop, last)
                    out[place + low - start : place + high - start] = values[low - first : high - first]
                first = last


class _Run(NamedTuple):
    """Rows of the table that are wanted in one piece."""

    start: int
    stop: int
    place: int


def _runs(wanted: Iterable[tuple[range, int]]) -> list[_Run]:
    """Rows and places of trials, those together that follow each other both in the table and where they are wanted."""
    runs: list[_Run] = []
    for start, stop, place in sorted((rows.start, rows.stop, place) for rows, place in wanted):
        before = runs[-1] if runs else None
        if before and before.stop == start and before.place + before.stop - before.start == place:
            runs[-1] = _Run(before.start, stop, before.place)
        else:
            runs.append(_Run(start, stop, place))
    return runs


def find_table(folder: Path) -> CurveTable | None:
    """The table in `folder`; None where there is none, or it is not what was written."""
    parquet, about = _files(folder)
    try:
        record = find_json(about)
        if record is None or checked(record, CurveTableRecord, about)["parquet_sha256"] != file_sha256(parquet):
            return None
    except DamagedError:
        return None
    ends = list(accumulate(record["steps"], initial=0))
    rows = {trial: range(ends[n], ends[n + 1]) for n, trial in enumerate(record["trials"])}
    return CurveTable(parquet, rows, dict(zip(record["trials"], record["metrics_sha256"], strict=True)))


def write_table(folder: Path, sha256: Mapping[str, str], parts: Iterable[tuple[Sequence[str], Steps]]) -> None:
    """Publishes the table of the trials of `parts`, whose metrics.jsonl have these hashes."""
    import pyarrow as pa  # type: ignore[import-untyped]
    from pyarrow.parquet import ParquetWriter

    parquet, about = _files(folder)
    schema = pa.schema([("step", pa.int64()), *((name, pa.float64()) for name in FIELDS)])
    trials: list[str] = []
    counts: list[int] = []
    waiting: list[Steps] = []

    def write_group() -> None:
        columns = [np.concatenate([steps.step for steps in waiting])]
        columns += [np.concatenate([steps.values[name] for steps in waiting]) for name in FIELDS]
        arrays = [pa.array(column, from_pandas=True) for column in columns]  # NaN takes no room as null
        writer.write_table(pa.table(arrays, schema=schema), row_group_size=len(columns[0]))
        waiting.clear()

    with published(parquet) as temporary:
        with ParquetWriter(temporary, schema, compression="lz4") as writer:
            for names, steps in parts:
                trials += names
                counts += steps.counts
                waiting.append(steps)
                if sum(len(one.step) for one in waiting) >= GROUP_STEPS:
                    write_group()
            if waiting:
                write_group()
        own = file_sha256(temporary)
    hashes = [sha256[trial] for trial in trials]
    record = {"schema": SCHEMA, "parquet_sha256": own, "trials": trials, "metrics_sha256": hashes, "steps": counts}
    write_json(about, record)


def _files(folder: Path) -> tuple[Path, Path]:
    return folder / "curves.parquet", folder / "curves.json"
