"""The main path: prepare the data, train the packs, measure the profiles, conclude, report.

Every step looks at the study's directory first and does only what is missing.
"""

import itertools
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from rankscope import demo
from rankscope.analysis.verdict import conclude
from rankscope.data.cache import prepare_cached
from rankscope.data.general import with_general_text
from rankscope.data.tokens import TokenizedData, load, save
from rankscope.errors import (
    DataError,
    KilledError,
    ModelError,
    RankscopeError,
    StudyDirectoryError,
    StudyError,
    WorkerError,
)
from rankscope.files import write_json
from rankscope.forecast import forecast
from rankscope.launch.local import run_locally
from rankscope.lora.base import commit, free_bytes, load_config, load_tokenizer, resolve_device, resolve_dtype
from rankscope.measure.machine import hardware, versions
from rankscope.options import assemble
from rankscope.plan import (
    NOTHING,
    disk_bytes,
    disk_taken,
    divide_into_packs,
    missing_profiles,
    missing_reference,
    missing_trials,
    open_packs,
)
from rankscope.report import build
from rankscope.report.card import write_cards
from rankscope.report.catalogue import load as load_catalogue
from rankscope.report.formats import size
from rankscope.spec import EMBEDDED, AnyTrial, FullTrial, StudySpec, Trial
from rankscope.study import ANSWERS, CURVE, FINISHED, Study
from rankscope.track import choose_trackers
from rankscope.track.beside import reporting
from rankscope.train.memory import Prediction, predict


class Progress(Protocol):
    """What a run tells of itself. `rankscope.progress` shows it; a caller may pass its own."""

    def say(self, message: str) -> None:
        """A sentence to be kept."""
        ...

    def training(self, study: Study, pack: str, trials: Sequence[Trial], steps: int) -> None:
        """A pack begins."""
        ...

    def reference(self, study: Study, trial: FullTrial, steps: int) -> None:
        """A trial of full fine-tuning begins."""
        ...

    def measuring(self, done: int, total: int, name: str) -> None:
        """A profile begins, after `done` of `total`."""
        ...

    def poll(self) -> None:
        """Called twice a second while a job runs; the study's files say how far it is."""
        ...


def run(
    *,
    out: Path | str | None = None,
    progress: Progress | None = None,
    sets: Sequence[str] = (),
    study: Mapping[str, Any] | None = None,
    report_to: str | Sequence[str] = (),
    **options: Any,
) -> Study:
    """Runs a study from its question to its report, and returns it.

    `options` are those of the command line: `model`, `dataset`, `ranks`, `learning_rates`, `seeds`, `alpha`, `steps`,
    and the others of `rankscope.options.OPTION_FIELDS`; `study` is a mapping like a study's YAML, which they override.
    `out` is the study's directory (default: its name). On a directory that holds the same study only what is missing
    is done. `report_to` names trackers that follow the run: `wandb`, `tensorboard`, `mlflow`, `trackio`.

    Example: `rankscope.run(model="facebook/opt-350m", dataset="code.jsonl", ranks=[8, 64], steps=200)`

    Raises:
        StudyError: the question is wrong, a tracker is unknown, or `out` holds another study.
        MissingExtraError: a tracker is not installed.
        DataError, ModelError: the data or the model cannot be used.
        WorkerError: a child process ended without finishing its work.
    """
    spec = assemble(study or {}, options, sets)
    return run_study(spec, Path(out or spec.name), progress or _Silent(), report_to=report_to)


def run_study(
    spec: StudySpec, out: Path, progress: Progress, language: str = "en", report_to: str | Sequence[str] = ()
) -> Study:
    """The main path, for a resolved study. What fails is recorded, not raised: see `unfinished` and `Study.unmet`."""
    load_catalogue(language)  # refused now, not when all is trained
    trackers = choose_trackers(report_to)
    resolve_device(spec.model.device)
    prediction = predict(spec)
    prepared = None
    if not Study.is_at(out):  # nothing is made before the data are known to be usable, and to have room
        prepared = prepare_data(spec)
        check_space(spec, out, prediction, spec.trials(), spec.reference_trials(), prepared)
    check_ranks(spec, prediction)
    study = Study.create(out, spec)
    try:
        _run(study, prediction, prepared, progress, language, trackers)
    except (ModelError, DataError):
        if prepared is not None and not any(file.stat().st_size for file in (out / "trials").glob("*/metrics.jsonl")):
            shutil.rmtree(out)  # what cannot begin leaves nothing behind
        raise
    return study


def _run(
    study: Study,
    prediction: Prediction,
    prepared: TokenizedData | None,
    progress: Progress,
    language: str,
    trackers: Sequence[str],
) -> None:
    spec = study.spec
    with study.lock(), _marking_interrupted(study):
        study.remove_leftovers()
        for name in study.remove_damaged():
            again = "; `rankscope curve` makes it again" if name == CURVE else ", and made again"
            progress.say(f"{name} was damaged: it is removed{again}.")
        data = _study_data(study, prepared)
        check_space(spec, study.path, prediction, missing_trials(study), missing_reference(study), data, study)
        progress.say(describe_data(data.facts))
        if not (study.path / "machine.json").exists():
            write_json(study.path / "machine.json", describe_machine(spec, prediction.base_params))
        if not (study.path / "prediction.json").exists():
            found = forecast(spec, prediction, data, free_bytes(resolve_device(spec.model.device)))
            write_json(study.path / "prediction.json", found.describe(prediction))
        with reporting(study, trackers, progress) as shown:
            train(study, data, prediction, shown)
            measure(study, shown)
            train_reference(study, data, shown)
            answer(study, shown)
            finish(study, language)


def check_ranks(spec: StudySpec, prediction: Prediction) -> None:
    """Raises StudyError where a rank is larger than any update of an adapted layer can have."""
    too_large = [rank for rank in spec.ranks if rank > prediction.full_rank]
    if too_large:
        raise StudyError(
            f"ranks: {too_large[0]:,} is larger than {prediction.full_rank:,}, the full rank of the model's layers",
            "Leave it out: it adds parameters and nothing else.",
        )


def _study_data(study: Study, prepared: TokenizedData | None) -> TokenizedData:
    """The study's tokens, which are saved where they are not yet.

    Raises:
        DataError: trials have seen other tokens.
    """
    folder = study.path / "data"
    if not (folder / "facts.json").exists():
        save(prepared or prepare_data(study.spec), folder)
    data = load(folder)
    for trial in study.all_trials():
        seen = study.trial_record(trial).get("tokens_sha256", data.sha256)
        if seen != data.sha256:
            raise DataError(
                f"{study.spec.data.id}: not the rows that {trial.name} was trained on",
                "Give the rows that the study began with, or choose another --out.",
            )
    return data


def prepare_data(spec: StudySpec) -> TokenizedData:
    """Reads and tokenises the data, once for all trials. Rows are cut at the last of the model's positions at most."""
    config = load_config(spec.model).get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or spec.data.max_length
    changes: dict[str, Any] = {"max_length": min(spec.data.max_length, positions)}
    if spec.data.id == EMBEDDED:
        changes["id"] = str(demo.data_path())
    tokenizer, measured = load_tokenizer(spec.model), spec.measure
    data = prepare_cached(spec.data.model_copy(update=changes), tokenizer, config.vocab_size)
    data = TokenizedData(data.train, data.eval, data.facts | {"id": spec.data.id})
    if measured.forgetting is None:
        return data
    return with_general_text(data, measured.forgetting, measured.forgetting_rows, tokenizer, config.vocab_size)


def check_space(
    spec: StudySpec,
    out: Path,
    prediction: Prediction,
    missing: Sequence[Trial],
    reference: Sequence[FullTrial],
    data: TokenizedData,
    study: Study | None = None,
) -> None:
    """Sees to it that the `missing` trials, and those of the `reference`, have room on the disk, beside what lies there
    of them in a `study` that has begun.

    Raises:
        StudyDirectoryError: they have not.
    """
    if not missing and not reference:
        return
    free_memory = free_bytes(resolve_device(spec.model.device))
    packs = divide_into_packs(missing, prediction, free_memory, spec.training, data.train)
    whole = disk_bytes(spec, prediction, packs, reference, data)
    needed = whole.beside(disk_taken(study) if study else NOTHING)
    folder = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StudyDirectoryError(
            f"{out}: about {size(needed)} are needed on the disk, and {size(free)} are free",
            "Make room, choose another --out, or try fewer or lower ranks.",
        )


def describe_data(facts: Mapping[str, Any]) -> str:
    """What was read and what was left out, in one line."""
    return (
        f"Data {facts['id']}: {facts['rows_train']:,} rows to train on, {facts['rows_eval']:,} held out, "
        f"{facts['mean_length']:.0f} tokens a row; {facts['truncated']:,} cut to {facts['max_length']:,} tokens, "
        f"{facts['duplicates_dropped']:,} duplicates, {facts['rows_without_label_dropped']:,} without a label left out"
    )


def describe_machine(spec: StudySpec, parameters: int) -> dict[str, Any]:
    """machine.json: what the study runs on, and the model it starts from."""
    device = resolve_device(spec.model.device)
    model = {
        "id": spec.model.id,
        "revision": commit(spec.model) or spec.model.revision,
        "parameters": parameters,
        "dtype": str(resolve_dtype(spec.model.dtype, device)).removeprefix("torch."),
    }
    return {"hardware": hardware(), "versions": versions(), "model": model, "device": str(device)}


def train(study: Study, data: TokenizedData, prediction: Prediction, progress: Progress) -> None:
    """Trains the trials that have no result yet: packs one after the other in one process, which loads the model once.

    A pack that ends its process is divided or recorded, and those after it go on in a new one. Isolated trials have one
    process each.
    """
    from rankscope.train.pack import total_steps

    training = study.spec.training
    free = free_bytes(resolve_device(study.spec.model.device))
    packs = open_packs(study, prediction, free, data.train)
    steps = total_steps(training, len(data.train))
    for pack in packs:
        (study.path / "packs" / pack / "pack.json").unlink(missing_ok=True)  # of a run that was stopped
    while packs:
        here = dict(list(packs.items())[:1]) if training.isolated else packs
        teller = _Teller(study, here, steps, progress)
        job = {"kind": "packs", "packs": {pack: [trial.name for trial in here[pack]] for pack in here}}
        error = run_locally(study.path, job, study.path / "packs" / next(iter(here)), teller.poll)
        teller.poll()
        if error is not None and error.exit_code in (2, 3):  # the study, the model or the data: all packs would fail
            raise error
        left = _after(study, here, error, progress)
        packs = left | {pack: trials for pack, trials in packs.items() if pack not in here}


class _Teller:
    """Tells of packs that begin and end, as their files show it. The first counts as begun: it waits for the model."""

    def __init__(self, study: Study, packs: Mapping[str, Sequence[Trial]], steps: int, progress: Progress) -> None:
        self.study, self.packs, self.steps, self.progress = study, packs, steps, progress
        self.to_begin, self.to_end = list(packs), list(packs)
        self._begin()

    def _begin(self) -> None:
        pack = self.to_begin.pop(0)
        self.progress.training(self.study, pack, self.packs[pack], self.steps)

    def poll(self) -> None:
        while self.to_end and (record := self.study.pack_record(self.to_end[0])) and record["results"]:
            self.to_end.pop(0)
            self.progress.say(describe_pack(record))
        while self.to_begin and self.study.pack_record(self.to_begin[0]):
            self._begin()
        self.progress.poll()


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


def measure(study: Study, progress: Progress) -> None:
    """Measures the profiles that are missing, each repeat in a process of its own; one that fails ends no study."""
    jobs = missing_profiles(study)
    failed: set[str] = set()
    for number, (name, repeat) in enumerate(jobs):
        if name in failed:
            continue
        progress.measuring(number, len(jobs), name)
        job = {"kind": "profile", "profile": name, "repeat": repeat}
        error = run_locally(study.path, job, study.path / "profiles" / "jobs" / name, progress.poll)
        if error is not None and error.exit_code in (2, 3):
            raise error
        study.write_failure(name, None if error is None else _failure(error))
        if error is not None:
            failed.add(name)
            progress.say(f"profile of {name} did not finish: {error}")


def _failure(error: RankscopeError) -> dict[str, str]:
    """What failures.json says of it."""
    return {"status": getattr(error, "status", WorkerError.status), "reason": error.what}


def train_reference(study: Study, data: TokenizedData, progress: Progress) -> None:
    """Trains what is missing of full fine-tuning, each trial in a process of its own; one that fails ends no study."""
    from rankscope.train.pack import total_steps

    steps = total_steps(study.spec.training, len(data.train))
    for trial in missing_reference(study):
        progress.reference(study, trial, steps)
        job = {"kind": "reference", "trial": trial.name}
        error = run_locally(study.path, job, study.trial_folder(trial), progress.poll)
        if error is not None and error.exit_code in (2, 3):
            raise error
        if error is not None:
            study.settle(trial, getattr(error, "status", WorkerError.status), error.what)
            progress.say(f"{trial.name} did not finish: {error}")


def answer(study: Study, progress: Progress) -> None:
    """Lets the base model and each candidate answer the same held-out prompts, where that has not been done."""
    trials = study.answered() if study.spec.measure.answers else []
    if not trials or study.has_answers():
        return
    progress.say(f"Answers of {len(trials)} candidates to {study.spec.measure.answers} held-out prompts")
    error = run_locally(study.path, {"kind": "answers"}, study.path / "answers", progress.poll)
    if error is not None and error.exit_code in (2, 3):
        raise error
    study.write_failure(ANSWERS, None if error is None else _failure(error))
    if error is not None:
        progress.say(f"The answers did not finish: {error}")


def finish(study: Study, language: str = "en") -> Path:
    """Draws the conclusion, writes the adapters' model cards and builds the report; returns the path of its page."""
    load_catalogue(language)
    evidence = study.evidence()
    verdict = conclude(evidence)
    write_json(study.path / "verdict.json", verdict)
    write_cards(evidence, verdict, study.path / "trials")
    return build(evidence, verdict, study.path / "report", language, reproduce=reproduce_command(study.spec))


def reproduce_command(spec: StudySpec) -> str:
    """The command that runs this study again from its study.yaml."""
    return f"rankscope run study.yaml --out {shlex.quote(spec.name)}"


def unfinished(study: Study) -> list[AnyTrial]:
    """Trials, also of the reference, that did not end as `done`."""
    return [trial for trial in study.all_trials() if study.trial_record(trial)["status"] != "done"]


@contextmanager
def _marking_interrupted(study: Study) -> Iterator[None]:
    """Marks the running trials as interrupted where the user ends the body. The lock must be held: they are its own."""
    try:
        yield
    except KeyboardInterrupt:
        for trial in study.all_trials():
            if study.trial_record(trial)["status"] == "running":
                study.settle(trial, "interrupted", "interrupted by the user")
        raise


class _Silent:
    """Progress that shows nothing."""

    def say(self, message: str) -> None: ...
    def training(self, study: Study, pack: str, trials: Sequence[Trial], steps: int) -> None: ...
    def reference(self, study: Study, trial: FullTrial, steps: int) -> None: ...
    def measuring(self, done: int, total: int, name: str) -> None: ...
    def poll(self) -> None: ...
