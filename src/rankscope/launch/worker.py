"""What a child process does: packs one after the other, a trial of full fine-tuning, or one repeat of one profile.

    python -m rankscope.launch.worker STUDY_DIRECTORY JOB_FILE

A failure is recorded twice: in trial.json of every trial that did not finish, and in error.json beside the job's
file for the process that started this one.
"""

import faulthandler
import logging
import os
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankscope.errors import RankscopeError, WorkerError
from rankscope.files import read_json, write_json
from rankscope.study import Study

if TYPE_CHECKING:
    from rankscope.data.tokens import TokenizedData


def run_job(study: Study, job: dict[str, Any]) -> None:
    """Runs one job of the study in this process."""
    from rankscope.data.tokens import load

    data = load(study.path / "data")
    if job["kind"] == "packs":
        _train_packs(study, job["packs"], data)
    elif job["kind"] == "reference":
        from rankscope.train.full import train_full

        (trial,) = [trial for trial in study.spec.reference_trials() if trial.name == job["trial"]]
        train_full(study.spec, trial, study.trial_folder(trial), data)
    else:
        from rankscope.measure.profile import profile_candidate

        name, candidate = job["profile"], study.spec.profiled()[job["profile"]]
        repeats = [*study.profile_repeats(name), profile_candidate(study.spec, candidate, data)]
        record = {"schema": 2, "profile": name, "candidate": candidate.model_dump(mode="json"), "repeats": repeats}
        write_json(study.profile_file(name), record)


def _train_packs(study: Study, packs: Mapping[str, Sequence[str]], data: "TokenizedData") -> None:
    """Trains packs of trials, given by name, one after the other over one model that is loaded once.

    `packs/NAME/pack.json` is written when a pack starts, and again with what it measured when it ends.
    """
    from rankscope.lora.adapters import remove_adapters
    from rankscope.lora.base import fingerprint, load_model
    from rankscope.measure.pack import measure_pack
    from rankscope.train.loop import train_pack
    from rankscope.train.probe import use_own_forward

    model = load_model(study.spec.model)
    weights, attention = fingerprint(model), model.config._attn_implementation
    trials = {trial.name: trial for trial in study.spec.trials()}
    for pack, names in packs.items():
        record = {"schema": 1, "pack": pack, "trials": list(names), "results": None}
        write_json(study.path / "packs" / pack / "pack.json", record)
        folders = {name: study.trial_folder(trials[name]) for name in names}
        members = [trials[name] for name in names]
        train = partial(train_pack, model, study.spec, members, folders, data, pack, weights)
        results = measure_pack(train, model.device)
        write_json(study.path / "packs" / pack / "pack.json", record | {"results": results._asdict()})
        use_own_forward(model, attention)
        remove_adapters(model)


def _out_of_memory(error: BaseException) -> bool:
    import torch

    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _record_failure(study: Study, job: dict[str, Any], error: BaseException) -> None:
    status = "oom" if _out_of_memory(error) else "failed"
    reason = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
    for pack, names in job.get("packs", {}).items():
        if (study.path / "packs" / pack / "pack.json").exists():  # this one, or one before it, whose trials are settled
            for trial in study.spec.trials():
                if trial.name in names:
                    study.settle(trial, status, reason, pack)
    for full in study.spec.reference_trials():
        if full.name == job.get("trial"):
            study.settle(full, status, reason)


def main(study_path: str, job_file: str) -> int:
    """Returns the exit code: 0, or the one that the error asks for."""
    faulthandler.enable()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    study = Study.open(study_path)
    job = read_json(Path(job_file))
    try:
        run_job(study, job)
    except Exception as error:
        traceback.print_exc()
        _record_failure(study, job, error)
        known = error if isinstance(error, RankscopeError) else WorkerError(f"{type(error).__name__}: {error}")
        report = {"kind": type(known).__name__, "what": known.what, "todo": known.todo}
        write_json(Path(job_file).with_name("error.json"), report)
        return known.exit_code
    return 0


def _end_with_parent() -> None:
    """Ends this process when its standard input closes, which is when the process that started it ends."""

    def wait() -> None:
        while os.read(0, 1):  # not sys.stdin, whose lock a waiting thread would hold at this process's own end
            pass
        os._exit(1)

    threading.Thread(target=wait, name="rankscope-parent", daemon=True).start()


if __name__ == "__main__":
    _end_with_parent()
    sys.exit(main(*sys.argv[1:]))
