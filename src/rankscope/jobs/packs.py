"""The kind of job that trains packs: trials that share one frozen base model, on one device or several."""

import itertools
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rankscope.errors import KilledError, RankscopeError, WorkerError
from rankscope.jobs.child import load_base, open_study
from rankscope.jobs.job import Job, Run, failure_of, raise_fatal
from rankscope.lora.adapters import remove_adapters
from rankscope.measure.sampler import peak_rss, reset_peak_rss
from rankscope.model.device import give_back_freed
from rankscope.plan.packs import longest_first, work_of
from rankscope.spec.candidates import Trial
from rankscope.study.folder import FINISHED, Division
from rankscope.study.metrics import read_rows
from rankscope.study.missing import START_SECONDS, is_finished
from rankscope.study.records import PackRecord
from rankscope.text.formats import first_of
from rankscope.train.loop import PackRun, train_pack
from rankscope.train.probe import use_own_forward
from rankscope.train.stopping import StopRequest


def jobs(run: Run) -> list[Job]:
    """Return the jobs of the plan's packs, and publish the division with those that it lacks."""
    study, plan = run.study, run.plan
    division = study.division()
    if not plan.packs.keys() <= division.packs.keys():
        study.write_division(Division(division.packs | plan.packs, division.divided))
    for pack in plan.packs:
        folder = study.file("packs", pack)
        (folder / "pack.json").unlink(missing_ok=True)  # of a run that was stopped
        if any(study.is_stale(study.saved_record(one)) for one in plan.packs[pack] if not is_finished(study, one)):
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            run.say(run.text("notice.pack_again", pack=pack))
    return _jobs_of(run, plan.packs)


def _jobs_of(run: Run, packs: Mapping[str, Sequence[Trial]]) -> list[Job]:
    """Return the jobs that train `packs`. On one device of this machine the packs follow one another in one process,
    which loads the model once. On several devices, or where a job may be lost or not start, each pack has a process of
    its own, those that take longest first. So has each isolated trial."""
    plan = run.plan
    if not packs:
        return []
    if plan.on_one_device and not plan.spec.training.isolated and not plan.timed:
        return [_job(run, packs)]
    work = {pack: sum(work_of(trial, plan.prediction) for trial in trials) for pack, trials in packs.items()}
    return [_job(run, {pack: packs[pack]}) for pack in (longest_first(work) if plan.fleet.devices > 1 else packs)]


def _job(run: Run, packs: Mapping[str, Sequence[Trial]]) -> Job:
    plan, known = run.plan, run.study.with_known_model()
    trials, seconds = [*itertools.chain(*packs.values())], 0.0
    if plan.timed:  # of a process that trains what these trials lack one after the other: side by side they take less
        done = (read_rows(run.study.trial_folder(trial) / "metrics.jsonl") for trial in trials)
        left = (1 - max((row["step"] for row in rows), default=0) / plan.steps for rows in done)
        seconds = START_SECONDS + sum(plan.seconds(trial) * share for trial, share in zip(trials, left, strict=True))
    reads = [f"trials/{trial.name}" for trial in trials]
    if known is not None:  # its record says which model the study began with
        reads.append(f"trials/{known.name}/trial.json")
    names = {pack: [trial.name for trial in members] for pack, members in packs.items()}
    memory = max(plan.host_bytes(members) for members in packs.values())
    return Job(__name__, {"packs": names}, f"packs/{next(iter(names))}", reads, memory, seconds)


def work(study_path: Path, content: Mapping[str, Any]) -> None:
    """Train packs of trials, given by name, one after the other over one model that is loaded once.
    `packs/NAME/pack.json` is written when a pack starts, and again with what it measured when it ends; then its
    checkpoints are removed."""
    study, data = open_study(study_path)
    model, weights = load_base(study)
    attention = model.config._attn_implementation
    trials = {trial.name: trial for trial in study.spec.trials()}
    with StopRequest() as stop:
        for pack, names in content["packs"].items():
            pack_folder = study.path / "packs" / pack
            record = PackRecord(pack=pack, trials=list(names), results=None, left_over=getattr(model, "left_over", []))
            record.write(pack_folder / "pack.json")
            folders = {name: study.trial_folder(trials[name]) for name in names}
            members, checkpoints = [trials[name] for name in names], pack_folder / "checkpoints"
            train = partial(train_pack, model, study.spec, members, folders, checkpoints, data, pack, weights, stop)
            results = measure_pack(train, model.device)
            record.model_copy(update={"results": results}).write(pack_folder / "pack.json")
            shutil.rmtree(checkpoints, ignore_errors=True)
            use_own_forward(model, attention)
            remove_adapters(model)
            if stop.made:
                raise KilledError("stopped as asked, between two packs")


def ended(run: Run, job: Job, error: RankscopeError | None, waiting: Sequence[Job]) -> list[Job]:
    """Record the trials that the job did not finish, and return the jobs of the packs that it leaves to be trained."""
    raise_fatal(error)
    trials = {trial.name: trial for trial in run.study.trials}
    packs = {pack: [trials[name] for name in names] for pack, names in job.content["packs"].items()}
    left = _left_to_train(run, packs, error or WorkerError("the process ended before its packs did"))
    return [*_jobs_of(run, left), *waiting]


def _left_to_train(run: Run, packs: Mapping[str, list[Trial]], error: RankscopeError) -> dict[str, list[Trial]]:
    """Return the packs of a job that are to be trained in another. A pack in which the job ended by an error is divided
    in two, to be trained again: that takes less memory, and a trial that cannot be trained does not keep the others
    from it. Other trials of that pack are marked as ended."""
    study, status, waiting = run.study, failure_of(error).status, dict(packs)
    for pack, trials in packs.items():
        del waiting[pack]
        packable = [trial for trial in trials if trial.candidate.packable]  # DoRA's reason is known beforehand
        for reason in {study.trial_record(trial).engine_reason for trial in packable} - {None}:
            run.say(run.text("notice.not_packed", reason=reason))
        record = study.pack_record(pack)
        if record and record.left_over and pack == next(iter(packs)):
            run.say(run.text("notice.left_over", names=first_of(record.left_over, 3, run.text)))
        if record and record.results:
            continue
        unfinished = [trial for trial in trials if study.trial_record(trial).status not in FINISHED]
        if record and len(unfinished) > 1 and status != KilledError.status:
            parts = study.divide(pack, unfinished)
            first, second = parts
            run.say(run.text("notice.divided", pack=pack, first=first, second=second, error=error.what))
            return parts | waiting
        run.say(run.text("notice.failed", what=run.text("notice.pack", pack=pack), error=error))
        stopped = {pack: trials} if record else packs  # what ends before the first pack begins would end all of them
        for trial in itertools.chain(*stopped.values()):
            study.mark_ended(trial, status, error.what, pack)
        return waiting if record else {}
    return {}


def measure_pack(train: Callable[[], PackRun], device: torch.device) -> dict[str, Any]:
    """Run `train`, and return its numbers with useful FLOP/s and peaks of memory, without what was freed before."""
    give_back_freed(device)
    reset_peak_rss()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    run = train()
    gpu = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    peaks = {"rss_peak_bytes": peak_rss(), "gpu_allocated_peak_bytes": gpu}
    return {**run._asdict(), "useful_flops_per_second": run.useful_flops / run.step_seconds, **peaks}
