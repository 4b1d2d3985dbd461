"""A real study's verdict against benchmarks/recompute.py, which knows its files and nothing of rankscope."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import rankscope
from rankscope.files import read_json, write_json
from rankscope.pipeline import finish
from rankscope.study.study import Study

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "recompute.py"


@pytest.fixture(scope="module")
def study(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    sets = ("measure.repeats=1", "measure.steps=2", "measure.warmup_steps=1", "data.eval_rows=12", "training.evals=1")
    sets = (*sets, "measure.answers=0")
    options = {"ranks": [2, 4, 16], "seeds": [0, 1], "steps": 5, "batch_size": 4, "learning_rates": [1e-3, 5e-3]}
    return rankscope.run(
        model=str(root / "model"),
        dataset=str(root / "data.json"),
        out=tmp_path_factory.mktemp("recompute") / "study",
        sets=sets,
        **options,
    )


def recompute(study: Study) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), str(study.path)], capture_output=True, text=True)


def test_the_verdict_is_what_plain_pandas_and_scipy_find(study: Study) -> None:
    """Three ranks, two learning rates each, so that rates are chosen and judged on halves."""
    done = recompute(study)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 differ" in done.stdout
    assert "runtime_rises.effect" in done.stdout


def test_with_an_unfinished_trial_too(study: Study) -> None:
    trial = next(trial for trial in study.spec.trials() if trial.candidate.rank == 16 and trial.seed == 1)
    file = study.trial_folder(trial) / "trial.json"
    record = read_json(file)
    write_json(file, record | {"status": "failed", "reason": "for the test"})
    try:
        finish(study)
        done = recompute(study)
    finally:
        write_json(file, record)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_changed_loss_is_seen(study: Study) -> None:
    """The check can fail."""
    finish(study)
    chosen = study.verdict["comparison"][0]["candidate"]
    trial = next(trial for trial in study.spec.trials() if trial.candidate.name == chosen)
    file = study.trial_folder(trial) / "eval.json"
    original = file.read_text()
    record = json.loads(original)
    record["examples"]["loss"] = [loss + 1e-3 for loss in record["examples"]["loss"]]
    try:
        file.write_text(json.dumps(record))
        done = recompute(study)
    finally:
        file.write_text(original)
    assert done.returncode == 1
    assert "DIFFERS" in done.stdout
