"""Evaluation of finished trials on evaluation rows that were added to the study: nothing is trained."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rankscope.errors import RankscopeError
from rankscope.jobs.child import load_base, open_study
from rankscope.jobs.job import Job, Run, raise_fatal
from rankscope.lora.adapters import remove_adapters
from rankscope.study.missing import unevaluated
from rankscope.train.engine import ExampleLosses
from rankscope.train.loop import choose_engine
from rankscope.train.probe import use_own_forward
from rankscope.train.results import evaluate_anew
from rankscope.train.step import make_train_state


def jobs(run: Run) -> list[Job]:
    """Return a job for each device, which loads the model once."""
    trials, devices, found = unevaluated(run.study), run.plan.fleet.devices, list[Job]()
    if trials:
        run.say(run.text("notice.rows_added", trials=run.text.count("trials", len(trials))))
    for number, group in enumerate(trials[first::devices] for first in range(min(devices, len(trials)))):
        names, memory = [trial.name for trial in group], max(run.plan.host_bytes([trial]) for trial in group)
        found.append(Job(__name__, {"trials": names}, f"rows/{number}", [f"trials/{name}" for name in names], memory))
    return found


def work(study_path: Path, content: Mapping[str, Any]) -> None:
    """Evaluate the trials one after the other, by the engine that trained them."""
    study, data = open_study(study_path)
    model, _ = load_base(study)
    attention, untrained = model.config._attn_implementation, list[ExampleLosses]()
    for trial in [trial for trial in unevaluated(study) if trial.name in content["trials"]]:
        state = make_train_state(model, trial, study.spec.training, 1)
        engine = choose_engine(model, [state], study.spec.training).engine
        untrained = untrained or engine.evaluate(data.eval, [trial.name])  # equal for all: no adapter adds anything yet
        study.adapter_file(trial)  # raises where it is corrupt
        evaluate_anew(engine, state, study.trial_folder(trial), data, untrained[0])
        use_own_forward(model, attention)
        remove_adapters(model)


def ended(run: Run, job: Job, error: RankscopeError | None, waiting: Sequence[Job]) -> list[Job]:
    """Tell of a failure; the trials that the job did not evaluate stay without results."""
    raise_fatal(error)
    if error is not None:
        run.say(run.text("notice.failed", what=run.text("notice.rows"), error=error))
    return list(waiting)
