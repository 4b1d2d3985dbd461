"""Tables of benchmarks/compare_trl.py: the reference, ratios within a repeat, and what is measured once."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from scripts import load_benchmark


@pytest.fixture(scope="module")
def compare_trl() -> ModuleType:
    return load_benchmark("compare_trl")


def timed(arm: str, repeat: int, seconds: float, gigabytes: float, **more: Any) -> dict[str, Any]:
    peak = {"peak_bytes": gigabytes * 1e9, "private_bytes": gigabytes * 5e8, "step_seconds": [100.0, seconds, seconds]}
    return {"kind": "time", "model": "m", "length": 8, "arm": arm, "repeat": repeat} | peak | more | STAMP


def gained(arm: str, gain: float) -> dict[str, Any]:
    case = {"steps": 5}
    return {
        "kind": "gain",
        "model": "m",
        "length": 8,
        "arm": arm,
        "before": 3.0,
        "after": {"8": 3 - gain},
        "case": case,
    } | STAMP


STAMP: dict[str, Any] = {
    "versions": dict.fromkeys(("torch", "transformers", "peft", "rankscope"), "1"),
    "date": "2026-01-01",
}
LINES = [
    {"kind": "rate", "model": "m", "length": 8, "repeat": 0, "rates": {"float32": 1e9, "bfloat16": 4e9}} | STAMP,
    *(timed("rankscope bfloat16", repeat, 2.0 + repeat, 3.0, flops=4e9) for repeat in (0, 1)),
    *(timed("TRL float32", repeat, 20.0 + 10 * repeat, 9.0, padded=1.5) for repeat in (0, 1)),
    *(timed("TRL autocast, grouped", repeat, 8.0 + 4 * repeat, 6.0, padded=1.0) for repeat in (0, 1)),
    *(timed("TRL bfloat16", repeat, 4.0, 3.0) for repeat in (0, 1)),
    *map(gained, ("TRL float32", "TRL autocast", "TRL bfloat16"), (0.1, 0.0992, 0.0985)),
]


def rows(lines: list[str], first: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines if line.startswith(f"| {first}")]


def test_the_reference_is_the_fastest_that_gains_as_much(compare_trl: ModuleType) -> None:
    """TRL's bfloat16 is twice as fast as its autocast, and loses 1.5% of the gain."""
    lines = list(compare_trl.tables(LINES))
    settings = {row[2]: row[3:] for row in rows(lines, "m | 8 ")}
    assert settings["**TRL autocast, grouped**"] == ["0.0992", "10.00", "6.00", "3.00", "1.00"]
    assert settings["TRL bfloat16"][:2] == ["0.0985", "4.00"]
    (bars,) = [row[3:] for row in rows(lines, "m | 8 | rankscope") if len(row) > 8]
    # within a repeat: 8/2 and 12/3, 20/2 and 30/3; 4e9 FLOPs at 4e9 a second
    assert bars == ["TRL autocast, grouped", "4.00", "2.00", "2.00", "10.00", "4", "1.00", "40%", "10.0"]


def test_without_gains_float32_alone_counts(compare_trl: ModuleType) -> None:
    lines = list(compare_trl.tables([line for line in LINES if line["kind"] != "gain"]))
    assert any("**TRL float32**" in line for line in lines)
    assert any("not measured; float32 alone counts" in line for line in lines)


def test_a_measurement_is_made_once(compare_trl: ModuleType, tmp_path: Path) -> None:
    case = compare_trl.Case("models/m", "rows.json", 8, [2], 3, 4, 1e-3, 8)
    for seconds, minutes in ((1.0, 1.0), (2.0, 1.0), (3.0, -1.0)):
        log = compare_trl.Log(tmp_path / "log.jsonl", minutes)
        log.add(case, lambda folder, seconds=seconds: {"seconds": seconds}, kind="time", arm="TRL float32", repeat=0)
    (line,) = compare_trl.Log(tmp_path / "log.jsonl", 1).lines
    assert (line["seconds"], line["model"], line["case"]["dataset"]) == (1.0, "m", "rows.json")
    log = compare_trl.Log(tmp_path / "log.jsonl", -1.0)
    log.add(case, lambda folder: {}, kind="time", arm="TRL float32", repeat=1)
    assert len(log.lines) == 1  # the time is over
    with pytest.raises(SystemExit, match="use another --out"):
        log.add(case._replace(steps=4), lambda folder: {}, kind="time", arm="TRL float32", repeat=0)
