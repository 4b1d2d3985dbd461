"""What a child process does: packs one after the other, a trial of full fine-tuning, one repeat of one profile, the
candidates' answers, or the losses of cut adapters.

    python -m rankscope.jobs.worker STUDY_DIRECTORY JOB_FILE

A failure is recorded in error.json beside the job's file, for the process that started this one.
"""

import errno
import faulthandler
import logging
import os
import shutil
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankscope.errors import KilledError, ModelError, OutOfMemoryError, RankscopeError, StudyDirectoryError, WorkerError
from rankscope.files import read_json, write_json
from rankscope.study.folder import Study

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rankscope.data.tokens import TokenizedData


DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)
"""Of the disk itself: another trial would meet the same."""

NO_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""In the texts of torch's RuntimeErrors, by which alone these are known."""


def run_job(study: Study, job: dict[str, Any]) -> None:
    """Runs one job of the study in this process."""
    from rankscope.data.tokens import load

    data = load(study.path / "data")
    if job["kind"] == "packs":
        _train_packs(study, job["packs"], data)
    elif job["kind"] == "reference":
        from rankscope.jobs.reference import train_full
        from rankscope.train.stopping import StopRequest

        (trial,) = [trial for trial in study.spec.reference_trials() if trial.name == job["trial"]]
        with StopRequest() as stop:
            train_full(study.spec, trial, study.trial_folder(trial), data, stop)
    elif job["kind"] == "answers":
        from rankscope.jobs.answers import answer

        model, _ = _load_base(study)
        adapters = {trial: study.adapter_file(trial) for trial in study.answered()}
        write_json(
            study.file("answers", "answers.json"), {"schema": 1} | answer(model, study.spec, adapters, data.eval)
        )
    elif job["kind"] == "curve":
        _cut_adapters(study, job["wanted"], data)
    else:
        from rankscope.measure.profile import profile_candidate

        name, candidate = job["profile"], study.spec.profiled()[job["profile"]]
        repeats = [*study.profile_repeats(name), profile_candidate(study.spec, candidate, data)]
        record = {"schema": 2, "profile": name, "candidate": candidate.model_dump(mode="json"), "repeats": repeats}
        write_json(study.profile_file(name), record)


def _train_packs(study: Study, packs: Mapping[str, Sequence[str]], data: "TokenizedData") -> None:
    """Trains packs of trials, given by name, one after the other over one model that is loaded once.

    `packs/NAME/pack.json` is written when a pack starts, and again with what it measured when it ends; then its
    checkpoints go.
    """
    from rankscope.lora.adapters import remove_adapters
    from rankscope.measure.pack import measure_pack
    from rankscope.train.loop import train_pack
    from rankscope.train.probe import use_own_forward
    from rankscope.train.stopping import StopRequest

    model, weights = _load_base(study)
    attention = model.config._attn_implementation
    trials = {trial.name: trial for trial in study.spec.trials()}
    with StopRequest() as stop:
        for pack, names in packs.items():
            record = {"schema": 1, "pack": pack, "trials": list(names), "results": None}
            write_json(study.path / "packs" / pack / "pack.json", record)
            folders = {name: study.trial_folder(trials[name]) for name in names}
            members = [trials[name] for name in names]
            checkpoints = study.path / "packs" / pack / "checkpoints"
            train = partial(train_pack, model, study.spec, members, folders, checkpoints, data, pack, weights, stop)
            results = measure_pack(train, model.device)
            write_json(study.path / "packs" / pack / "pack.json", record | {"results": results._asdict()})
            shutil.rmtree(checkpoints, ignore_errors=True)
            use_own_forward(model, attention)
            remove_adapters(model)
            if stop.made:
                raise KilledError("stopped as asked, between two packs")


def _cut_adapters(study: Study, wanted: Mapping[str, Sequence[Sequence[int]]], data: "TokenizedData") -> None:
    """Measures what is wanted of each trial, as pairs of rank and recovery steps; curve.json grows piece by piece."""
    from rankscope.measure.truncation import Wanted, take_cuts

    model, _ = _load_base(study)
    trials = {trial.name: trial for trial in study.spec.trials()}
    for name, pairs in wanted.items():
        trial, folder = trials[name], study.adapter_file(trials[name]).parent
        recorded = study.trial_record(trial)["results"]["eval_loss"]
        same = {"trial": name, "adapter_sha256": study.adapter_sha256(trial)}
        for cuts in take_cuts(model, study.spec, trial, folder, recorded, [Wanted(*pair) for pair in pairs], data):
            study.add_cuts([same | cut.describe() for cut in cuts])


def _load_base(study: Study) -> tuple["PreTrainedModel", str]:
    """The base model and its fingerprint.

    Raises:
        ModelError: it cannot be loaded, or is not the one that a trial was trained on.
    """
    from rankscope.model.load import fingerprint, load_model

    model = load_model(study.spec.model)
    weights = fingerprint(model)
    known = study.with_known_model()  # one tells for all: each of them was held against one before it
    if known is not None and study.trial_record(known)["model_sha256"] != weights:
        raise ModelError(
            f"{study.spec.model.id}: not the weights that {known.name} was trained on",
            "Give the model that the study began with (machine.json has its commit on the hub), or another --out.",
        )
    return model, weights


def _known(error: Exception) -> RankscopeError:
    """The error as one that says what to do."""
    import torch

    if isinstance(error, RankscopeError):
        return error
    what = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return StudyDirectoryError(
            f"{error.filename or 'a file'}: cannot be read or written: {error.strerror}",
            "Mend that and run the study again: it goes on where it was.",
        )
    no_memory = isinstance(error, OSError) and error.errno == errno.ENOMEM
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or no_memory or any(t in str(error) for t in NO_MEMORY):
        return OutOfMemoryError(what)
    return WorkerError(what)


def main(study_path: str, job_file: str) -> int:
    """Returns the exit code: 0, or the one that the error asks for."""
    faulthandler.enable()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    job = read_json(Path(job_file))
    try:
        if job["kind"] == "search":
            from rankscope.search.job import run_search

            run_search(Path(study_path), job["places"])
        else:
            run_job(Study.open(study_path), job)
    except Exception as error:
        with suppress(OSError):  # the log is on the same disk, which may be full
            traceback.print_exc()
        known = _known(error)
        report = {"kind": type(known).__name__, "what": known.what, "todo": known.todo}
        with suppress(StudyDirectoryError):  # on a full disk the exit code has to do
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
