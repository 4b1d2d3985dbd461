"""A trained study with other held-out losses, in files whose hashes are right."""

from collections.abc import Mapping

import numpy as np

from rankscope.files import file_hashes
from rankscope.spec.candidates import AnyTrial
from rankscope.study.folder import TRIAL_FILES, StudyFolder
from rankscope.study.records import EvalRecord


def plant(study: StudyFolder, untrained: float, losses: Mapping[str, float]) -> None:
    """Write losses before training, and after it by name of trial: means over label tokens of alike rows."""
    for trial in study.trials:
        plant_trial(study, trial, untrained, losses[trial.name])


def plant_trial(study: StudyFolder, trial: AnyTrial, untrained: float, loss: float, noise: float = 0.0) -> None:
    """Write the losses of a trial that is done; `noise` is how much rows differ by trial, as a standard deviation."""
    folder, record = study.trial_folder(trial), study.trial_record(trial)
    rng = np.random.default_rng(list(trial.name.encode()))
    for name, mean in {"untrained.json": untrained, "eval.json": loss}.items():
        examples = study.held_out(trial, name)
        rows = np.sin(examples.example)
        examples.loss = (rows + mean - np.average(rows, weights=examples.label_tokens)).tolist()
        if name == "eval.json":
            examples.loss = (examples.loss + rng.normal(0, noise, len(rows))).tolist()
        EvalRecord(step=0, examples=examples).write(folder / name)
    assert record.results is not None
    record.results.eval_loss = loss
    record.files = file_hashes(folder, TRIAL_FILES)
    record.write(folder / "trial.json")
