"""Corruption of every file of a study, by truncation and flipped bits: detected or harmless, and repaired by a run."""

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
from rankscope.jobs.local import LocalLauncher
from rankscope.jobs.repair import remove_corrupt
from rankscope.pipeline import measure_curve
from rankscope.spec.resolve import write_yaml
from rankscope.study.question import write_question
from rankscope.study.study import Study
from recording import RecordingProgress
from small_study import run_small

OPTIONS: dict[str, Any] = {
    "ranks": [2, 4],
    "seeds": [0],
    "steps": 3,
    "batch_size": 4,
    "learning_rates": [5e-3],
    "device": "cpu",
}
SETS = (
    "measure.repeats=1",
    "measure.steps=2",
    "measure.rounds=2",
    "measure.warmup_steps=1",
    "data.eval_rows=8",
    "training.evals=1",
)
NOT_READ = ("report", "log.txt", "job.json", ".lock", ".lock-holder")  # made anew by each run, or for people


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A study with every kind of file."""
    root = tmp_path_factory.mktemp("corruption")
    write_model(root / "model")
    data = write_data(root / "data.json", rows=40)
    study = rankscope.run(model=str(root / "model"), dataset=str(data), out=root / "study", sets=SETS, **OPTIONS)
    measure_curve(study, LocalLauncher(study.spec.model), RecordingProgress(), ranks=[1])
    return study


@pytest.fixture(scope="module")
def known(study: Study) -> dict[str, Any]:
    return read(study.path)


def read(path: Path) -> dict[str, Any]:
    """Everything that the analysis and the report read."""
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


def corruptions(content: bytes, rng: random.Random) -> Iterator[bytes]:
    """The content truncated to 0 and 1 bytes, to half, by 2 bytes, and at random; with one bit flipped in 18 places."""
    size = len(content)
    for end in {0, 1, size // 2, size - 2, *(rng.randrange(size) for _ in range(2))}:
        yield content[: max(0, end)]
    for position in {0, size - 1, *(rng.randrange(size) for _ in range(16))}:
        flipped = bytearray(content)
        flipped[position] ^= 1 << rng.randrange(8)
        yield bytes(flipped)


def copied(study: Study, tmp_path: Path) -> Path:
    """A copy of the study without its report."""
    return Path(shutil.copytree(study.path, tmp_path / "study", ignore=shutil.ignore_patterns("report")))


@pytest.mark.slow
def test_every_corruption_is_detected_or_harmless(study: Study, known: dict[str, Any], tmp_path: Path) -> None:
    copy, rng, detected, tried = copied(study, tmp_path), random.Random(0), 0, 0
    names = [file.relative_to(copy) for file in files(copy)]
    assert {name.name for name in names} >= {
        "study.yaml", "machine.json", "facts.json", "tokens.safetensors", "prediction.json", "division.json",
        "pack.json", "trial.json", "metrics.jsonl", "eval.json", "adapter_model.safetensors", "adapter_config.json",
        "r002.json", "control.json", "verdict.json", "curve.json",
    }  # fmt: skip
    for name in names:
        for corrupt in corruptions((copy / name).read_bytes(), rng):
            (copy / name).write_bytes(corrupt)
            tried += 1
            try:
                unchanged = not remove_corrupt(Study.open(copy))
                assert not unchanged or all(same(value, known[key]) for key, value in read(copy).items()), name
                assert not unchanged or name.suffix not in (".safetensors", ".jsonl"), name
                detected += not unchanged
            except (StudyError, StudyDirectoryError):
                assert name.name == "study.yaml", f"{name}: every other file can be made again"
                detected += 1
            restore(copy, study.path)
    assert tried > 20 * len(names)
    assert detected > 0.9 * tried, "only changed white space goes undetected"


def restore(copy: Path, study: Path) -> None:
    """Makes the copy what it was, without a report; copies only files that differ in size or time."""
    originals = {copy / file.relative_to(study): file for file in study.rglob("*") if file.is_file()}
    originals = {file: original for file, original in originals.items() if "report" not in original.parts}
    for file in {file for file in copy.rglob("*") if file.is_file()} - originals.keys():
        file.unlink()
    for file, original in originals.items():
        if not file.exists() or stamp(file) != stamp(original):
            file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(original, file)


def stamp(file: Path) -> tuple[int, int]:
    return file.stat().st_size, file.stat().st_mtime_ns


@pytest.mark.parametrize("name", ["trials/r008-lr3e-2-s0/eval.json", "trials/r008-lr3e-2-s0/metrics.jsonl"])
def test_reading_a_corrupt_file_is_an_error_that_names_it(trained: Study, tmp_path: Path, name: str) -> None:
    copy = copied(trained, tmp_path)
    content = (copy / name).read_text()
    (copy / name).write_text(content.replace("1", "2", 1))
    with pytest.raises(RankscopeError, match=rf"{name}: damaged") as caught:
        Study.open(copy).evidence()
    assert "made again" in caught.value.todo


@pytest.mark.usefixtures("no_report")
def test_a_run_makes_corrupt_files_again(root: Path, trained: Study, tmp_path: Path) -> None:
    copy = copied(trained, tmp_path)
    trial = copy / "trials" / "r002-lr3e-2-s0"
    for file in (trial / "adapter" / "adapter_model.safetensors", copy / "data" / "tokens.safetensors"):
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    (copy / "prediction.json").write_text("{")
    (copy / "machine.json").unlink()
    again = run_small(root, copy)
    assert list(again.results()["status"]) == ["done"] * 4
    assert again.prediction["candidates"].keys() == trained.prediction["candidates"].keys()
    expected = read_json(trained.path / "trials" / "r002-lr3e-2-s0" / "eval.json")["examples"]["loss"]
    np.testing.assert_allclose(read_json(trial / "eval.json")["examples"]["loss"], expected, rtol=1e-4)


def test_other_rows_under_the_same_name_are_refused(root: Path, trained: Study, tmp_path: Path) -> None:
    copy, data = copied(trained, tmp_path), tmp_path / "data.json"
    shutil.rmtree(copy / "data")
    data.write_text((root / "data.json").read_text().replace("sort", "turn"))
    spec = trained.spec.model_copy(update={"data": trained.spec.data.model_copy(update={"id": str(data)})})
    write_question(copy / "study.yaml", write_yaml(spec))
    with pytest.raises(RankscopeError, match="not the rows that r002-lr3e-2-s0 was trained on"):
        rankscope.run(model=spec.model.id, dataset=str(data), out=copy)
