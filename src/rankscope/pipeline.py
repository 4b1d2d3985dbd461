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

from rankscope.analysis.verdict import conclude
from rankscope.data.tokens import TokenizedData, load, save
from rankscope.errors import DataError, ModelError
from rankscope.files import write_json
from rankscope.jobs.answers import answer_missing
from rankscope.jobs.context import Place, Progress
from rankscope.jobs.launchers import make_launcher
from rankscope.jobs.packs import train
from rankscope.jobs.profiles import measure
from rankscope.jobs.reference import train_reference
from rankscope.jobs.repair import remove_corrupt, remove_leftovers
from rankscope.measure.machine import Site, describe_machine
from rankscope.plan.checks import check_ranks, check_space
from rankscope.plan.memory import predict
from rankscope.plan.runtime import forecast
from rankscope.report.card import write_cards
from rankscope.report.write import build
from rankscope.spec.models import StudySpec
from rankscope.spec.options import assemble
from rankscope.study.folder import CURVE
from rankscope.study.missing import missing_reference, missing_trials
from rankscope.study.study import Study
from rankscope.text.catalogue import load as load_catalogue
from rankscope.track import choose_trackers
from rankscope.track.tracker_process import reporting
from rankscope.train.prepare import describe_data, prepare_data


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
    and the others of `rankscope.spec.option_table.OPTIONS`; `study` is a mapping like a study's YAML, which they
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
    """The main path, for a resolved study. What fails is recorded, not raised: see `unfinished` and
    `StudyFolder.open_failures`."""
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
        remove_leftovers(study)
        for name in remove_corrupt(study):
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
            train_reference(study, place, shown)
            answer_missing(study, place, shown)
            finish(study, language)


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
        seen = study.trial_record(trial).tokens_sha256 or data.sha256
        if seen != data.sha256:
            raise DataError(
                f"{study.spec.data.id}: not the rows that {trial.name} was trained on",
                "Give the rows that the study began with, or choose another --out.",
            )
    return data


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


@contextmanager
def _marking_interrupted(study: Study) -> Iterator[None]:
    """Marks the running trials as interrupted where the user ends the body. The lock must be held: they are its own."""
    try:
        yield
    except KeyboardInterrupt:
        for trial in study.all_trials():
            if study.trial_record(trial).status == "running":
                study.mark_ended(trial, "interrupted", "interrupted by the user")
        raise


class _Silent:
    """Progress that shows nothing."""

    def say(self, message: str) -> None: ...
    def poll(self) -> None: ...
