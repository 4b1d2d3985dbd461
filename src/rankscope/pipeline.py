"""The main path: prepare the data, train the packs, measure the profiles, conclude, report.

Every step looks at the study's directory first and does only what is missing.
"""

import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from rankscope import demo
from rankscope.analysis.verdict import conclude
from rankscope.data.cache import prepare_cached
from rankscope.data.general import with_general_text
from rankscope.data.tokens import TokenizedData, load, save
from rankscope.errors import DataError, ModelError, StudyDirectoryError, StudyError
from rankscope.files import write_json
from rankscope.jobs.job import Site, make_launcher
from rankscope.jobs.packs import Place, Progress, answer, measure, train, train_reference
from rankscope.model.load import commit, load_config, load_tokenizer
from rankscope.plan.checks import check_base_fits
from rankscope.plan.memory import Prediction, predict
from rankscope.plan.packs import (
    NOTHING,
    disk_bytes,
    disk_taken,
    divide_into_packs,
    missing_reference,
    missing_trials,
)
from rankscope.plan.runtime import forecast
from rankscope.report import build
from rankscope.report.card import write_cards
from rankscope.spec.models import EMBEDDED, AnyTrial, FullTrial, StudySpec, Trial
from rankscope.spec.options import assemble
from rankscope.study.folder import CURVE, Study
from rankscope.text.catalogue import load as load_catalogue
from rankscope.text.formats import size
from rankscope.track import choose_trackers
from rankscope.track.tracker_process import reporting


def run(
    *,
    out: Path | str | None = None,
    progress: Progress | None = None,
    sets: Sequence[str] = (),
    study: Mapping[str, Any] | None = None,
    report_to: str | Sequence[str] = (),
    launcher: str = "local",
    ray_address: str | None = None,
    **options: Any,
) -> Study:
    """Runs a study from its question to its report, and returns it.

    `options` are those of the command line: `model`, `dataset`, `ranks`, `learning_rates`, `seeds`, `alpha`, `steps`,
    and the others of `rankscope.spec.options.OPTION_FIELDS`; `study` is a mapping like a study's YAML, which they
    override. `out` is the study's directory (default: its name). On a directory that holds the same study only what is
    missing is done. `report_to` names trackers that follow the run: `wandb`, `tensorboard`, `mlflow`, `trackio`.
    `launcher` is `local`, or `ray`, on the cluster at `ray_address`.

    Example: `rankscope.run(model="facebook/opt-350m", dataset="code.jsonl", ranks=[8, 64], steps=200)`

    Raises:
        StudyError: the question is wrong, a tracker or launcher is unknown, or `out` holds another study.
        MissingExtraError: a tracker, or Ray, is not installed.
        DataError, ModelError: the data or the model cannot be used.
        WorkerError: a child process ended without finishing its work.
    """
    spec = assemble(study or {}, options, sets)
    path, shown = Path(out or spec.name), progress or _Silent()
    return run_study(spec, path, shown, report_to=report_to, launcher=launcher, ray_address=ray_address)


def run_study(
    spec: StudySpec,
    out: Path,
    progress: Progress,
    language: str = "en",
    report_to: str | Sequence[str] = (),
    launcher: str = "local",
    ray_address: str | None = None,
) -> Study:
    """The main path, for a resolved study. What fails is recorded, not raised: see `unfinished` and `Study.unmet`."""
    load_catalogue(language)  # refused now, not when all is trained
    trackers = choose_trackers(report_to)
    with make_launcher(launcher, spec.model, ray_address, progress.say) as launching:
        site = launching.site()
        place = Place(launching, site, predict(_there(spec, site), torch.device(site.kind)))
        prepared = None
        if not Study.is_at(out):  # nothing is made before the data are known to be usable, and to have room
            prepared = prepare_data(spec)
            check_space(spec, out, place, spec.trials(), spec.reference_trials(), prepared)
        check_ranks(spec, place.prediction)
        study = Study.create(out, spec)
        try:
            _run(study, place, prepared, progress, language, trackers)
        except (ModelError, DataError):
            if prepared is not None and not any(f.stat().st_size for f in (out / "trials").glob("*/metrics.jsonl")):
                shutil.rmtree(out)  # what cannot begin leaves nothing behind
            raise
    return study


def _there(spec: StudySpec, site: Site) -> StudySpec:
    """The study with the dtype that `auto` is where it runs."""
    return spec.model_copy(update={"model": spec.model.model_copy(update={"dtype": site.dtype})})


def _run(
    study: Study,
    place: Place,
    prepared: TokenizedData | None,
    progress: Progress,
    language: str,
    trackers: Sequence[str],
) -> None:
    spec, site, prediction = study.spec, place.site, place.prediction
    with study.lock(), _marking_interrupted(study):
        study.remove_leftovers()
        for name in study.remove_damaged():
            again = "; `rankscope curve` makes it again" if name == CURVE else ", and made again"
            progress.say(f"{name} was damaged: it is removed{again}.")
        data = _study_data(study, prepared)
        check_space(spec, study.path, place, missing_trials(study), missing_reference(study), data, study)
        progress.say(describe_data(data.facts))
        if not (study.path / "machine.json").exists():
            write_json(study.path / "machine.json", describe_machine(spec, prediction.base_params, site))
        if not (study.path / "prediction.json").exists():
            found = forecast(spec, prediction, data, site.free_bytes, site.here)
            write_json(study.path / "prediction.json", found.describe(prediction))
        with reporting(study, trackers, progress) as shown:
            train(study, data, place, shown)
            measure(study, place, shown)
            train_reference(study, data, place, shown)
            answer(study, place, shown)
            study.keep_tables()
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
    place: Place,
    missing: Sequence[Trial],
    reference: Sequence[FullTrial],
    data: TokenizedData,
    study: Study | None = None,
) -> None:
    """Sees to it that the `missing` trials, and those of the `reference`, have room on the disk, beside what lies there
    of them in a `study` that has begun.

    Raises:
        StudyDirectoryError: they have not.
        ModelError: the base model alone is larger than its device.
    """
    if not missing and not reference:
        return
    check_base_fits(spec.model, place.prediction, place.site.free_bytes)
    prediction, devices = place.prediction, place.launcher.places()
    packs = divide_into_packs(missing, prediction, place.site.free_bytes, spec.training, data.train, devices)
    whole = disk_bytes(spec, prediction, packs, reference, data, devices)
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


def describe_machine(spec: StudySpec, parameters: int, site: Site) -> dict[str, Any]:
    """machine.json: what the study runs on, and the model it starts from."""
    model = {
        "id": spec.model.id,
        "revision": commit(spec.model) or spec.model.revision,
        "parameters": parameters,
        "dtype": site.dtype,
        "quantization": spec.model.quantization,
    }
    return {"hardware": site.hardware, "versions": site.versions, "model": model, "device": site.device}


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
    def ended(self, name: str) -> None: ...
    def measuring(self, done: int, total: int, name: str) -> None: ...
    def poll(self) -> None: ...
