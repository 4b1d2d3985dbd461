"""benchmarks/gpu.py without a GPU: its rehearsal, and what it does where a stage goes wrong."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rankscope.files import read_json
from scripts import BENCHMARKS, load_benchmark

SCRIPT = BENCHMARKS / "gpu.py"


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    return load_benchmark("gpu")


def rehearse(out: Path, *options: str) -> tuple[int, str, dict[str, Any]]:
    """Exit code, output and stages of a rehearsal."""
    command = [sys.executable, str(SCRIPT), "--rehearse", "--out", str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return done.returncode, done.stdout + done.stderr, read_json(out)["stages"]


def test_a_stage_notes_what_it_finds_at_once(gpu: ModuleType, tmp_path: Path) -> None:
    """The share of the peak, without the profile: it fails after what it has measured."""
    here = gpu.Here("share", tmp_path, rehearse=True)
    here.sizes = here.sizes._replace(ranks=(2,), seeds=1, warmup=0, steps=1)
    own, gpu.profile_step = gpu.profile_step, None
    try:
        with pytest.raises(TypeError, match="'NoneType' object is not callable"):
            gpu.share(here)
    finally:
        gpu.profile_step = own
    rows = read_json(tmp_path / "share.json")["rows"]
    assert [row["what"] for row in rows] == ["plain bfloat16 products", "share of the peak, rows of 32"]
    assert 0 < rows[1]["value"] < 1
    assert (rows[1]["bar"], rows[1]["met"]) == ("40%", None), "a rehearsal judges no speed"


def test_an_architecture_that_fails_is_a_missed_bar(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def differences(here: Any, name: str, tokens: Any) -> dict[tuple[str, str], float]:
        if name == "first":
            raise RuntimeError("no kernel\nfor this")
        return dict.fromkeys([(d, e) for d in ("float32", "bfloat16") for e in ("packed", "peft")], 3e-3)

    monkeypatch.setattr(gpu, "differences", differences)
    here = gpu.Here("parity", tmp_path, rehearse=True)
    gpu.parity(here, ("first", "second"))
    found = {row["what"]: (row["found"], row["met"]) for row in here.rows}
    assert found["first"] == ("RuntimeError: no kernel", False)
    assert (found["second, float32"][1], found["second, bfloat16"][1]) == (False, True)
    table = gpu.table({"parity": {"status": "missed", "error": None, "rows": here.rows}})
    assert "| parity | first | RuntimeError: no kernel | runs | **no** |" in table


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_a_rehearsal_runs_every_stage(gpu: ModuleType, tmp_path: Path) -> None:
    code, output, stages = rehearse(tmp_path / "gpu.json", "--seconds", "960")
    left_out = {"trl"} if find_spec("trl") is None else set()
    assert {name: stage["status"] for name, stage in stages.items()} == {
        name: "skipped" if name in left_out else "ok" for name in gpu.STAGES
    }, output
    assert code == (1 if left_out else 0)
    assert "pip install trl" in output or not left_out
    rows = {(name, row["what"]): row for name, stage in stages.items() for row in stage["rows"]}
    assert rows["resume", "resumed, and never stopped"]["found"] == "bitwise equal"
    assert rows["oom", "trials"]["found"] == "done, oom"


@pytest.mark.slow
def test_a_stage_that_hangs_leaves_the_others_their_turn(tmp_path: Path) -> None:
    code, output, stages = rehearse(tmp_path / "gpu.json", "--stages", "scaling,share", "--seconds", "2.5")
    assert code == 1
    assert [stage["status"] for stage in stages.values()] == ["cut off", "skipped"], output
    assert "no time is left" in output
