"""A real study's verdict against benchmarks/recompute.py, which knows its files and nothing of rankscope."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import yaml

import rankscope
from rankscope.analysis.verdict import conclude
from rankscope.files import write_json
from rankscope.report.finish import finish
from rankscope.spec.candidates import Trial
from rankscope.spec.resolve import resolve_spec, write_yaml
from rankscope.study.question import write_question
from rankscope.study.study import Study
from scripts import BENCHMARKS, load_benchmark
from study.planting import plant_trial

pytestmark = pytest.mark.slow  # whole studies

SCRIPT = BENCHMARKS / "recompute.py"


@pytest.fixture(scope="module")
def module() -> ModuleType:
    return load_benchmark("recompute")


@pytest.fixture(scope="module")
def study(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Three ranks, full fine-tuning, two learning rates and three seeds each."""
    sets = (
        "measure.repeats=1",
        "measure.steps=2",
        "measure.rounds=2",
        "measure.warmup_steps=1",
        "data.eval_rows=12",
        "training.evals=1",
    )
    options = {"ranks": [2, 4, 16, "full"], "seeds": [0, 1, 2], "steps": 5, "batch_size": 4}
    return rankscope.run(
        model=str(root / "model"),
        dataset=str(root / "data.json"),
        out=tmp_path_factory.mktemp("recompute") / "study",
        sets=(*sets, "measure.answers=0"),
        learning_rates=[1e-3, 5e-3],
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


def plant_at_random(study: Study, draw: int) -> None:
    """Losses and statuses of any kind: gains of any size, full fine-tuning better or worse, missing seeds, seeds that
    diverged, one learning rate or two, a margin of the gain or of the loss."""
    rng = np.random.default_rng(draw)
    gain, spread = 10.0 ** rng.uniform(-2, 0.5), 10.0 ** rng.uniform(-3, -1)
    effects = {rank: spread * rng.normal() for rank in (*study.spec.ranks, 0)}
    for trial in study.all_trials():
        rank = trial.candidate.rank if isinstance(trial, Trial) else 0
        loss = 3.0 - gain + effects[rank] + spread * rng.normal(0, 0.3)
        plant_trial(study, trial, 3.0, loss, noise=spread)
        if rng.random() < 0.08:
            status = str(rng.choice(["diverged", "failed"]))
            record = study.trial_record(trial).model_copy(update={"status": status, "results": None})
            record.write(study.trial_folder(trial) / "trial.json")
    question = yaml.safe_load(write_yaml(study.spec))
    question["verdict"] = {
        "margin_of": "gain" if rng.random() < 0.8 else "loss",
        "margin": float(rng.choice([0.01, 0.05, 0.2])),
    }
    if rng.random() < 0.3:
        question["learning_rates"] = [1e-3]
    write_question(study.path / "study.yaml", write_yaml(spec := resolve_spec(question)))
    kept = {trial.name for trial in (*spec.trials(), *spec.reference_trials())}
    for trial in study.all_trials():
        if trial.name not in kept:
            shutil.rmtree(study.trial_folder(trial))


@pytest.mark.parametrize("draw", [pytest.param(draw, marks=pytest.mark.slow if draw > 7 else ()) for draw in range(60)])
def test_with_any_losses_and_statuses(study: Study, module: ModuleType, draw: int, tmp_path: Path) -> None:
    shutil.copytree(study.path, tmp_path / "study", ignore=shutil.ignore_patterns("adapter", "report", "packs"))
    plant_at_random(planted := Study.open(tmp_path / "study"), draw)
    planted = Study.open(planted.path)
    verdict = conclude(planted.evidence())
    write_json(planted.path / "verdict.json", verdict)
    if len(verdict["comparison"]) < 2 or min(row["seeds"] for row in verdict["comparison"]) < 2:
        with pytest.raises(SystemExit, match="2"):
            list(module.differences(planted.path))
    else:
        assert [line for line, same in module.differences(planted.path) if not same] == []


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
