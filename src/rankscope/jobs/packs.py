"""A study's jobs: what is handed to a launcher, in which order, and what follows from how each ended.

Each function does what is missing of one kind of work: packs, profiles, full fine-tuning, answers.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from rankscope.data.tokens import TokenizedData
from rankscope.errors import KilledError, RankscopeError, WorkerError
from rankscope.jobs.job import Job, Launcher, Site
from rankscope.jobs.queue import run_jobs
from rankscope.plan.memory import BYTES_PER_PARAMETER, PROCESS_BYTES, Prediction
from rankscope.plan.packs import missing_profiles, missing_reference, open_packs, work_of
from rankscope.schedule import longest_first
from rankscope.spec.models import FullTrial, Trial
from rankscope.study.folder import ANSWERS, FINISHED, Study
from rankscope.text.formats import size

WRONG = (2, 3)
"""Exit codes of errors in the study, the model or the data: every job would meet them."""

GPU_HOST_BYTES = 4 << 30
"""Of the host, for a process that works on a GPU, beside the base model as it is loaded: taken, not measured."""


class Progress(Protocol):
    """What a run tells of itself. `rankscope.ui.progress` shows it; a caller may pass its own."""

    def say(self, message: str) -> None:
        """A sentence to be kept."""
        ...

    def training(self, study: Study, pack: str, trials: Sequence[Trial], steps: int) -> None:
        """A pack begins."""
        ...

    def reference(self, study: Study, trial: FullTrial, steps: int) -> None:
        """A trial of full fine-tuning begins."""
        ...

    def ended(self, name: str) -> None:
        """A pack, or a trial of full fine-tuning, has ended, well or not."""
        ...

    def measuring(self, done: int, total: int, name: str) -> None:
        """A profile begins, after `done` of `total`."""
        ...

    def poll(self) -> None:
        """Called twice a second while a job runs; the study's files say how far it is."""
        ...


class Place(NamedTuple):
    """What jobs need to know of where they run."""

    launcher: Launcher
    site: Site
    prediction: Prediction

    def host_bytes(self, trials: Sequence[Trial], step_tokens: float) -> int:
        """Memory of the host that a pack takes, as predicted."""
        if self.prediction.device == "cuda":
            return self.prediction.base_bytes + GPU_HOST_BYTES
        return self.prediction.peak_bytes(trials, self.site.free_bytes, step_tokens)


def train(study: Study, data: TokenizedData, place: Place, progress: Progress) -> None:
    """Trains the trials that have no result yet.

    Where there is one device its packs follow one another in one process, which loads the model once; a pack that ends
    this process is divided or recorded, and those after it go on in a new one. Over several devices each pack has a
    process of its own, those that take longest first. So has each isolated trial.
    """
    from rankscope.train.step import total_steps

    launcher, prediction, training = place.launcher, place.prediction, study.spec.training
    places = launcher.places()
    packs = open_packs(study, prediction, place.site.free_bytes, data.train, places)
    for pack in packs:
        (study.path / "packs" / pack / "pack.json").unlink(missing_ok=True)  # of a run that was stopped
    together = launcher.loads_once and places == 1 and not training.isolated
    step_tokens = float(data.train.lengths.mean()) * training.effective_batch_size
    teller = _Teller(study, total_steps(training, len(data.train)), progress)
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
        here = {pack: [teller.trials[name] for name in names] for pack, names in job.content["packs"].items()}
        teller.end(job)
        if error is not None and error.exit_code in WRONG:
            raise error
        return jobs(_after(study, here, error, progress))

    run_jobs(launcher, study.path, jobs(packs), teller.poll, ended, teller.begin)


class _Teller:
    """Tells of packs that begin and end, as their files show it. The first of a job counts as begun: it waits for the
    model."""

    def __init__(self, study: Study, steps: int, progress: Progress) -> None:
        self.study, self.steps, self.progress = study, steps, progress
        self.trials = {trial.name: trial for trial in study.trials}
        self._to_begin: dict[str, list[str]] = {}  # by the folder of a running job
        self._packs: dict[str, list[Trial]] = {}
        self._begun: list[str] = []

    def begin(self, job: Job) -> None:
        packs = job.content["packs"]
        self._packs |= {pack: [self.trials[name] for name in names] for pack, names in packs.items()}
        self._to_begin[job.folder] = list(packs)
        self._begin(self._to_begin[job.folder])

    def _begin(self, packs: list[str]) -> None:
        pack = packs.pop(0)
        self._begun.append(pack)
        self.progress.training(self.study, pack, self._packs[pack], self.steps)

    def poll(self) -> None:
        self._look()
        self.progress.poll()

    def _look(self) -> None:
        for pack in list(self._begun):
            if (record := self.study.pack_record(pack)) and record["results"]:
                self.progress.say(describe_pack(record))
                self._end(pack)
        for packs in self._to_begin.values():
            while packs and self.study.pack_record(packs[0]):
                self._begin(packs)

    def end(self, job: Job) -> None:
        self._look()
        del self._to_begin[job.folder]
        for pack in set(job.content["packs"]).intersection(self._begun):
            self._end(pack)

    def _end(self, pack: str) -> None:
        self._begun.remove(pack)
        self.progress.ended(pack)


def _after(
    study: Study, packs: Mapping[str, list[Trial]], error: RankscopeError | None, progress: Progress
) -> dict[str, list[Trial]]:
    """Settles what a process has done or left undone, tells of it, and returns the packs that are still to be trained.

    A pack in which it ended by an error is divided in two, to be trained anew: less memory is needed then, and one
    trial that cannot be trained does not keep the others from it.
    """
    error = error or WorkerError("the process ended before its packs did")
    status = getattr(error, "status", WorkerError.status)
    for number, (pack, trials) in enumerate(packs.items()):
        packable = [trial for trial in trials if trial.candidate.packable]  # of DoRA's it is known before
        for reason in {study.trial_record(trial).get("engine_reason") for trial in packable} - {None}:
            progress.say(
                f"Trained by PEFT's own forward, one trial at a time, since this model cannot be packed: {reason}"
            )
        record = study.pack_record(pack)
        if record and record["results"]:
            continue
        rest = dict(list(packs.items())[number + 1 :])
        unfinished = [trial for trial in trials if study.trial_record(trial)["status"] not in FINISHED]
        if record and len(unfinished) > 1 and status != KilledError.status:
            parts = study.divide(pack, unfinished)
            progress.say(f"Pack {pack} is divided into {' and '.join(parts)}, and trained again: {error.what}")
            return parts | rest
        progress.say(f"Pack {pack} did not finish: {error}")
        stopped = {pack: trials} if record else packs  # what ends before the first pack begins would end all of them
        for trial in itertools.chain(*stopped.values()):
            study.settle(trial, status, error.what, pack)
        return {name: trials for name, trials in rest.items() if name not in stopped}
    return {}


def describe_pack(record: Mapping[str, Any]) -> str:
    """How near to the machine's limit a pack ran."""
    results = record["results"]
    peak = results["gpu_allocated_peak_bytes"] or results["rss_peak_bytes"]
    share = ""
    if results["product_share"] is not None:
        share = f", {results['product_share']:.0%} of what plain matrix products of its shapes reach here"
    return (
        f"Pack {record['pack']}: {results['step_seconds'] / results['steps']:.3g} s a step; "
        f"{results['useful_flops_per_second'] / 1e9:,.0f} useful GFLOP/s{share}; peak {size(peak)}"
    )


def measure(study: Study, place: Place, progress: Progress) -> None:
    """Measures the profiles that are missing, each repeat in a process of its own, one after the other, while nothing
    else of the study runs; one that fails ends no study."""
    jobs = missing_profiles(study)
    failed: set[str] = set()
    for number, (name, repeat) in enumerate(jobs):
        if name in failed:
            continue
        progress.measuring(number, len(jobs), name)
        content = {"kind": "profile", "profile": name, "repeat": repeat}
        trial = Trial(candidate=study.spec.profiled()[name], seed=study.spec.seeds[0])
        error = _run(study, place, content, f"profiles/jobs/{name}", [f"profiles/{name}.json"], [trial], progress)
        study.write_failure(name, None if error is None else _failure(error))
        if error is not None:
            failed.add(name)
            progress.say(f"profile of {name} did not finish: {error}")


def _run(
    study: Study,
    place: Place,
    content: Mapping[str, Any],
    folder: str,
    reads: Sequence[str],
    trials: Sequence[Trial],
    progress: Progress,
) -> RankscopeError | None:
    """Runs one job while nothing else runs, and returns what went wrong; raises what every job would meet."""
    errors: list[RankscopeError | None] = []

    def ended(job: Job, error: RankscopeError | None) -> list[Job]:
        if error is not None and error.exit_code in WRONG:
            raise error
        errors.append(error)
        return []

    job = Job(content, folder, reads, place.host_bytes(trials, math.inf), alone=True)
    run_jobs(place.launcher, study.path, [job], progress.poll, ended)
    return errors[0]


def _failure(error: RankscopeError) -> dict[str, str]:
    """What failures.json says of it."""
    return {"status": getattr(error, "status", WorkerError.status), "reason": error.what}


def train_reference(study: Study, data: TokenizedData, place: Place, progress: Progress) -> None:
    """Trains what is missing of full fine-tuning, each trial in a process of its own; one that fails ends no study."""
    from rankscope.train.step import total_steps

    steps, prediction = total_steps(study.spec.training, len(data.train)), place.prediction
    trials = {trial.name: trial for trial in missing_reference(study)}
    memory = prediction.base_bytes + GPU_HOST_BYTES
    if prediction.device == "cpu":
        memory = PROCESS_BYTES["cpu"] + BYTES_PER_PARAMETER * prediction.base_params

    def begun(job: Job) -> None:
        progress.reference(study, trials[job.content["trial"]], steps)

    def ended(job: Job, error: RankscopeError | None) -> list[Job]:
        name = job.content["trial"]
        progress.ended(name)
        if error is not None and error.exit_code in WRONG:
            raise error
        if error is not None:
            study.settle(trials[name], getattr(error, "status", WorkerError.status), error.what)
            progress.say(f"{name} did not finish: {error}")
        return []

    jobs = [Job({"kind": "reference", "trial": name}, f"reference/{name}", (), memory) for name in trials]
    run_jobs(place.launcher, study.path, jobs, progress.poll, ended, begun)


def answer(study: Study, place: Place, progress: Progress) -> None:
    """Lets the base model and each candidate answer the same held-out prompts, where that has not been done."""
    trials = study.answered() if study.spec.measure.answers else []
    if not trials or study.has_answers():
        return
    progress.say(f"Answers of {len(trials)} candidates to {study.spec.measure.answers} held-out prompts")
    reads = [f"trials/{trial.name}/trial.json" for trial in study.trials]
    reads += [f"trials/{trial.name}/adapter" for trial in trials]
    error = _run(study, place, {"kind": "answers"}, "answers", reads, trials[:1], progress)
    study.write_failure(ANSWERS, None if error is None else _failure(error))
    if error is not None:
        progress.say(f"The answers did not finish: {error}")
