"""The order in which a study grew is not seen in its verdict, not in one bit."""

import random
import shutil
from pathlib import Path

import pytest
import yaml

from rankscope.analysis.verdict import conclude
from rankscope.files import write_json
from rankscope.spec.resolve import resolve_spec, write_yaml
from rankscope.study.question import write_question
from rankscope.study.study import Study
from study.planting import plant_trial

ORDERS = range(3)


def grown(study: Study, path: Path, order: int) -> bytes:
    """verdict.json of a study to which the trials of `study` were added one by one, concluding after each."""
    rng = random.Random(order)
    question = yaml.safe_load(write_yaml(study.spec))
    for axis in ("ranks", "learning_rates", "seeds"):
        rng.shuffle(question[axis])
    path.mkdir()
    for name in ("machine.json", "data"):
        (shutil.copytree if (study.path / name).is_dir() else shutil.copy)(study.path / name, path / name)
    write_question(path / "study.yaml", write_yaml(resolve_spec(question)))
    trials = [trial.name for trial in study.trials]
    for name in rng.sample(trials, len(trials)):
        shutil.copytree(study.path / "trials" / name, path / "trials" / name)
        write_json(path / "verdict.json", conclude(Study.open(path).evidence()))
    return (path / "verdict.json").read_bytes()


@pytest.mark.parametrize("diverged", [False, True], ids=["all done", "one diverged"])
def test_trials_added_in_any_order_give_the_same_verdict(trained: Study, diverged: bool, tmp_path: Path) -> None:
    """Losses before training differ by rounding, as they do between packs."""
    shutil.copytree(trained.path, tmp_path / "whole")
    study = Study.open(tmp_path / "whole")
    for number, trial in enumerate(study.trials):
        plant_trial(study, trial, 6.0 + number * 1e-7, 2.0 + 0.01 * number / trial.candidate.rank)
    if diverged:
        record = study.trial_record(study.trials[-1]).model_copy(update={"status": "diverged", "results": None})
        record.write(study.trial_folder(study.trials[-1]) / "trial.json")
    verdicts = {grown(study, tmp_path / str(order), order) for order in ORDERS}
    assert len(verdicts) == 1
    questions = {(tmp_path / str(order) / "study.yaml").read_text() for order in ORDERS}
    assert len(questions) > 1, "the orders are seen in the study's own words"
