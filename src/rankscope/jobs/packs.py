"""A study's jobs: what is handed to a launcher, in which order, and what follows from how each ended.

Each function does what is missing of one kind of work: packs, profiles, full fine-tuning, answers.
"""

import itertools
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from rankscope.data.tokens import TokenizedData
from rankscope.errors import KilledError, RankscopeError, WorkerError
from rankscope.jobs.child import load_base
from rankscope.jobs.context import WRONG, Place, Progress
from rankscope.jobs.job import Job
from rankscope.jobs.queue import run_jobs
from rankscope.measure.sampler import peak_rss, reset_peak_rss
from rankscope.model.device import give_back_freed
from rankscope.plan.packs import longest_first, open_packs, work_of
from rankscope.spec.candidates import Trial
from rankscope.study.folder import FINISHED, StudyFolder
from rankscope.study.records import PackRecord
from rankscope.text.formats import size
from rankscope.train.loop import PackRun

if TYPE_CHECKING:
    from rankscope.data.tokens import TokenizedData


def train(study: StudyFolder, data: TokenizedData, place: Place, progress: Progress) -> None:
    """Trains the trials that have no result yet.

    Where there is one device its packs follow one another in one process, which loads the model once; a pack that ends
    this process is divided or recorded, and those after it go on in a new one. Over several devices each pack has a
    process of its own, those that take longest first. So has each isolated trial.
    """
    launcher, prediction, training = place.launcher, place.prediction, study.spec.training
    places = launcher.places()
    packs = open_packs(study, prediction, place.site.free_bytes, data.train, places)
    for pack in packs:
        (study.path / "packs" / pack / "pack.json").unlink(missing_ok=True)  # of a run that was stopped
    together = launcher.loads_once and places == 1 and not training.isolated
    step_tokens = float(data.train.lengths.mean()) * training.effective_batch_size
    members = {trial.name: trial for trial in study.trials}
    begun: list[str] = []  # packs in running jobs that have not ended
    known = study.with_known_model()  # by which a job elsewhere knows the model too
    known_record = [f"trials/{known.name}/trial.json"] if known else []

    def jobs(packs: Mapping[str, Sequence[Trial]]) -> list[Job]:
        if together:
            return [job(packs)] if packs else []
        work = {pack: sum(work_of(trial, prediction) for trial in trials) for pack, trials in packs.items()}
        return [job({pack: packs[pack]}) for pack in (longest_first(work) if places > 1 else packs)]

    def job(packs: Mapping[str, Sequence[Trial]]) -> Job:
        names = {pack: [trial.name for trial in trials] for pack, trials in packs.items()}
        folders = [f"trials/{name}" for name in itertools.chain(*names.values())]
        memory = max(place.host_bytes(trials, step_tokens) for trials in packs.values())
        return Job({"kind": "packs", "packs": names}, f"packs/{next(iter(names))}", folders + known_record, memory)

    def ended(job: Job, error: RankscopeError | None) -> list[Job]:
        here = {pack: [members[name] for name in names] for pack, names in job.content["packs"].items()}
        say_ended()
        begun[:] = [pack for pack in begun if pack not in here]
        if error is not None and error.exit_code in WRONG:
            raise error
        return jobs(_after(study, here, error, progress))

    def say_ended() -> None:
        for pack in list(begun):
            if (record := study.pack_record(pack)) and record.results:
                begun.remove(pack)
                progress.say(describe_pack(record))

    def poll() -> None:
        say_ended()
        progress.poll()

    run_jobs(launcher, study.path, jobs(packs), poll, ended, lambda job: begun.extend(job.content["packs"]))


def _after(
    study: StudyFolder, packs: Mapping[str, list[Trial]], error: RankscopeError | None, progress: Progress
) -> dict[str, list[Trial]]:
    """Settles what a process has done or left undone, tells of it, and returns the packs that are still to be trained.

    A pack in which it ended by an error is divided in two, to be trained anew: less memory is needed then, and one
    trial that cannot be trained does not keep the others from it.
    """
    error = error or WorkerError("the process ended before its packs did")
    status = getattr(error, "status", WorkerError.status)
    for number, (pack, trials) in enumerate(packs.items()):
        packable = [trial for trial in trials if trial.candidate.packable]  # of DoRA's it is known before
        for reason in {study.trial_record(trial).engine_reason for trial in packable} - {None}:
            progress.say(
                f"Trained by PEFT's own forward, one trial at a time, since this model cannot be packed: {reason}"
            )
        record = study.pack_record(pack)
        if record and record.results:
            continue
        rest = dict(list(packs.items())[number + 1 :])
        unfinished = [trial for trial in trials if study.trial_record(trial).status not in FINISHED]
        if record and len(unfinished) > 1 and status != KilledError.status:
            parts = study.divide(pack, unfinished)
            progress.say(f"Pack {pack} is divided into {' and '.join(parts)}, and trained again: {error.what}")
            return parts | rest
        progress.say(f"Pack {pack} did not finish: {error}")
        stopped = {pack: trials} if record else packs  # what ends before the first pack begins would end all of them
        for trial in itertools.chain(*stopped.values()):
            study.mark_ended(trial, status, error.what, pack)
        return {name: trials for name, trials in rest.items() if name not in stopped}
    return {}


def describe_pack(record: PackRecord) -> str:
    """How near to the machine's limit a pack ran."""
    results: Mapping[str, Any] = record.results or {}
    peak = results["gpu_allocated_peak_bytes"] or results["rss_peak_bytes"]
    share = ""
    if results["product_share"] is not None:
        share = f", {results['product_share']:.0%} of what plain matrix products of its shapes reach here"
    return (
        f"Pack {record.pack}: {results['step_seconds'] / results['steps']:.3g} s a step; "
        f"{results['useful_flops_per_second'] / 1e9:,.0f} useful GFLOP/s{share}; peak {size(peak)}"
    )


def train_packs(study: StudyFolder, packs: Mapping[str, Sequence[str]], data: "TokenizedData") -> None:
    """Trains packs of trials, given by name, one after the other over one model that is loaded once.

    `packs/NAME/pack.json` is written when a pack starts, and again with what it measured when it ends; then its
    checkpoints go.
    """
    from rankscope.lora.adapters import remove_adapters

    pass
    from rankscope.train.loop import train_pack
    from rankscope.train.probe import use_own_forward
    from rankscope.train.stopping import StopRequest

    model, weights = load_base(study)
    attention = model.config._attn_implementation
    trials = {trial.name: trial for trial in study.spec.trials()}
    with StopRequest() as stop:
        for pack, names in packs.items():
            record = PackRecord(pack=pack, trials=list(names), results=None)
            record.write(study.path / "packs" / pack / "pack.json")
            folders = {name: study.trial_folder(trials[name]) for name in names}
            members = [trials[name] for name in names]
            checkpoints = study.path / "packs" / pack / "checkpoints"
            train = partial(train_pack, model, study.spec, members, folders, checkpoints, data, pack, weights, stop)
            results = measure_pack(train, model.device)
            record.model_copy(update={"results": results._asdict()}).write(study.path / "packs" / pack / "pack.json")
            shutil.rmtree(checkpoints, ignore_errors=True)
            use_own_forward(model, attention)
            remove_adapters(model)
            if stop.made:
                raise KilledError("stopped as asked, between two packs")


class PackResults(NamedTuple):
    """What a pack measured of itself."""

    steps: int
    step_seconds: float  # of all steps
    useful_flops: float  # of all steps: see `rankscope.train.flops.Cost`
    useful_flops_per_second: float
    product_flops_per_second: float | None
    """Of plain matrix products of one step's shapes: the mean of two timings; None where there are none."""
    product_share: float | None
    """Useful over plain: 1 would be a step that is nothing but products of real tokens."""
    rss_peak_bytes: int
    gpu_allocated_peak_bytes: int | None


def measure_pack(train: Callable[[], PackRun], device: torch.device) -> PackResults:
    """Runs `train` and measures it; the peaks are those of the run alone, without what was freed before it."""
    give_back_freed(device)
    reset_peak_rss()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    run = train()
    gpu = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    peak, useful = peak_rss(), run.useful_flops / run.step_seconds
    rate = statistics.fmean(run.product_rates) if run.product_rates else None
    share = useful / rate if rate else None
    return PackResults(run.steps, run.step_seconds, run.useful_flops, useful, rate, share, peak, gpu)
