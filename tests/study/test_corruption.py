"""Every file of a study, cut and with a bit turned: seen, or harmless; what can be made again is."""

import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import rankscope
from folders import write_data, write_model
from rankscope.errors import RankscopeError, StudyDirectoryError, StudyError
from rankscope.files import read_json
from rankscope.jobs.curve import take_curve
from rankscope.jobs.repair import remove_corrupt
from rankscope.study.study import Study
from recording import RecordingProgress

OPTIONS: dict[str, Any] = {
    "ranks": [2, 4],
    "seeds": [0],
    "steps": 3,
    "batch_size": 4,
    "learning_rates": [5e-3],
    "device": "cpu",
}
SETS = ("measure.repeats=1", "measure.steps=2", "measure.warmup_steps=1", "data.eval_rows=8", "training.evals=1")
NOT_READ = ("report", "log.txt", "job.json", ".lock", ".lock-holder")  # made anew each time, or for people


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("corruption")
    write_model(root / "model")
    write_data(root / "data.json", rows=40)
    return root


def run(root: Path, out: Path) -> Study:
    return rankscope.run(model=str(root / "model"), dataset=str(root / "data.json"), out=out, sets=SETS, **OPTIONS)


@pytest.fixture(scope="module")
def study(root: Path) -> Study:
    study = run(root, root / "study")
    take_curve(study, RecordingProgress(), ranks=[1])
    return study


@pytest.fixture(scope="module")
def known(study: Study) -> dict[str, Any]:
    return read(study.path)


def read(path: Path) -> dict[str, Any]:
    """All that the analysis and the report read."""
    study = Study.open(path)
    return {**study.evidence()._asdict(), "verdict": study.verdict, "division": study.division()}


def same(one: Any, other: Any) -> bool:
    if isinstance(one, pd.DataFrame):
        return isinstance(other, pd.DataFrame) and one.equals(other)
    return bool(one == other)


def files(path: Path) -> Iterator[Path]:
    for file in sorted(path.rglob("*")):
        if file.is_file() and not set(file.relative_to(path).parts) & set(NOT_READ):
            yield file


def harms(content: bytes, rng: random.Random) -> Iterator[bytes]:
    """Cut at the start, near the end and between; a bit turned at the first byte, the last, and between."""
    size = len(content)
    for end in {0, 1, size // 2, size - 2, *(rng.randrange(size) for _ in range(2))}:
        yield content[: max(0, end)]
    for place in {0, size - 1, *(rng.randrange(size) for _ in range(16))}:
        turned = bytearray(content)
        turned[place] ^= 1 << rng.randrange(8)
        yield bytes(turned)


def test_every_file_that_is_harmed_is_seen_or_means_the_same(
    study: Study, known: dict[str, Any], tmp_path: Path
) -> None:
    copy, rng, seen, tried = tmp_path / "study", random.Random(0), 0, 0
    shutil.copytree(study.path, copy)
    names = [file.relative_to(copy) for file in files(copy)]
    assert {name.name for name in names} >= {
        "study.yaml", "machine.json", "facts.json", "tokens.safetensors", "prediction.json", "division.json",
        "pack.json", "trial.json", "metrics.jsonl", "eval.json", "adapter_model.safetensors", "adapter_config.json",
        "r002.json", "control.json", "verdict.json", "curve.json",
    }  # fmt: skip
    for name in names:
        whole = (copy / name).read_bytes()
        for harmed in harms(whole, rng):
            (copy / name).write_bytes(harmed)
            tried += 1
            try:
                unchanged = not remove_corrupt(Study.open(copy))
                assert not unchanged or all(same(value, known[key]) for key, value in read(copy).items()), name
                assert not unchanged or name.suffix not in (".safetensors", ".jsonl"), name
                seen += not unchanged
            except (StudyError, StudyDirectoryError):
                assert name.name == "study.yaml", f"{name}: only the question cannot be made again"
                seen += 1
            shutil.rmtree(copy)
            shutil.copytree(study.path, copy)
    assert tried > 20 * len(names)
    assert seen > 0.9 * tried, "what is not seen is white space"


@pytest.mark.parametrize("name", ["trials/r004-lr5e-3-s0/eval.json", "trials/r004-lr5e-3-s0/metrics.jsonl"])
def test_a_reader_refuses_what_is_damaged_and_says_which(study: Study, tmp_path: Path, name: str) -> None:
    copy = tmp_path / "study"
    shutil.copytree(study.path, copy)
    content = (copy / name).read_text()
    (copy / name).write_text(content.replace("1", "2", 1))
    with pytest.raises(RankscopeError, match=rf"{name}: damaged") as caught:
        Study.open(copy).evidence()
    assert "made again" in caught.value.todo


def test_a_run_makes_what_is_damaged_again(root: Path, study: Study, tmp_path: Path) -> None:
    copy = tmp_path / "study"
    shutil.copytree(study.path, copy)
    trial = copy / "trials" / "r002-lr5e-3-s0"
    for file in (trial / "adapter" / "adapter_model.safetensors", copy / "data" / "tokens.safetensors"):
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    (copy / "profiles" / "r004.json").write_text("{")
    (copy / "machine.json").unlink()
    again = run(root, copy)
    assert list(again.results()["status"]) == ["done", "done"]
    assert len(again.profile_repeats("r004")) == 1
    expected = read_json(study.path / "trials" / "r002-lr5e-3-s0" / "eval.json")["examples"]["loss"]
    np.testing.assert_allclose(read_json(trial / "eval.json")["examples"]["loss"], expected, rtol=1e-4)


def test_other_rows_under_the_same_name_are_refused(root: Path, study: Study, tmp_path: Path) -> None:
    copy = tmp_path / "study"
    shutil.copytree(study.path, copy)
    shutil.rmtree(copy / "data")
    own = (root / "data.json").read_text()
    try:
        (root / "data.json").write_text(own.replace("sort", "turn"))
        with pytest.raises(RankscopeError, match="not the rows that r002-lr5e-3-s0 was trained on"):
            run(root, copy)
    finally:
        (root / "data.json").write_text(own)
