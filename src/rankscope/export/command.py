"""`rankscope export`: what a study recommends, as a folder that is used without the study.

choose -> (train again) -> write, or merge and write -> load it as a server does, and measure -> card -> (push)
"""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from transformers.utils.logging import disable_progress_bar

from rankscope import hub
from rankscope.data.tokens import Tokens, load
from rankscope.errors import ModelError, StudyError, WorkerError
from rankscope.export.write import DTYPES, FORMS, Exported, measure, own_form, write_files
from rankscope.files import check_empty, published_folder, read_json
from rankscope.jobs.child import load_base
from rankscope.jobs.job import Say
from rankscope.model.checks import check_source, location
from rankscope.model.device import resolve_device
from rankscope.model.load import load_config
from rankscope.report.card import done_trials, model_card
from rankscope.resize.loss_budget import Difference, difference
from rankscope.spec.candidates import Trial
from rankscope.spec.models import ModelSpec
from rankscope.study.records import EvalRecord, TrialRecord
from rankscope.study.study import Study
from rankscope.text import catalogue
from rankscope.train.engine import ExampleLosses
from rankscope.train.loop import train_pack
from rankscope.train.stopping import StopRequest


class Result(NamedTuple):
    study: Study
    trial: Trial
    seeds: dict[int, float]  # held-out losses of the candidate's seeds that are done
    retrained: bool
    made: Exported
    before: ExampleLosses  # the study's own, or those of the training on all rows, which has seen them
    deployed: dict[str, tuple[ExampleLosses, Difference]]  # by form, with the difference from `before`, paired by row
    pushed: str | None  # address of the commit


def export(
    study: Study,
    out: Path | None = None,
    rank: int | None = None,
    trial: str | None = None,
    retrain: bool | None = False,
    merge: str | None = None,
    over: Sequence[str] = (),
    push: str | None = None,
    model: str | None = None,
    device: str | None = None,
    say: Say = lambda message: None,
    language: str = "en",
) -> Result:
    """Export the best seed of the candidate that the verdict names, or compares at `rank`, or the trial of that name,
    to the folder `out`. Options are those of the command: `over` names further forms to measure it in, `model` and
    `device` where the base is now.

    Raises StudyError: `out` is not empty, the verdict names no candidate, or an option does not go with the study;
    ModelError: the base is another, or cannot be merged; StudyDirectoryError: an adapter is corrupt, or `out` cannot be
    written.
    """
    text = catalogue.load(language)
    disable_progress_bar()  # one for each loading of a model
    chosen = study.best_trial(rank) if trial is None else next((t for t in study.trials if t.name == trial), None)
    if chosen is None or study.trial_record(chosen).status != "done" or (trial and rank):
        raise StudyError(f"--trial {trial}: no trial of that name is done", "Name one of trials/, without --rank.")
    moved = {"id": model, "commit": None, "revision": None} if model else {}
    base = ModelSpec.model_validate(study.spec.model.model_dump() | moved | ({"device": device} if device else {}))
    if not (model or Path(location(base)).exists() or base.commit or study.machine["model"].get("revision")):
        what = f"model {base.id}: the study began with a folder or file of that name, which is not here"
        raise ModelError(what, "Give the path that it has now: --model PATH.")
    study = Study.of(study, study.spec.model_copy(update={"model": base}))
    folder = out or Path(f"{study.spec.name}-{chosen.candidate.profile_name}" + (f"-{merge}" if merge else ""))
    _check(study, chosen, folder, merge, over, push)
    source = train_again(study, chosen, say, text) if retrain else study.trial_folder(chosen)
    record, before = TrialRecord.of(read_json(source / "trial.json"), source), _losses(source / "eval.json")
    rows, deployed = load(study.file("data")).eval, dict[str, tuple[ExampleLosses, Difference]]()
    part, row = next((part, row) for part, one, row in done_trials(study.evidence()) if one == chosen)
    if retrain:  # its own steps and training loss; of its quality nothing is known
        row |= {**dict(record.results or {}), "eval_loss": None, "adapter_fault": record.adapter_fault}
    sha256 = record.model_sha256
    if base.quantization and study.machine.get("device", "").split(":")[0] != resolve_device(base.device).type:
        sha256 = None
        say(text("export.not_checked", model=base.id))
    with published_folder(folder) as scratch:
        made = write_files(study, source / "adapter", merge, sha256, scratch)
        for form in filter(None, dict.fromkeys([merge or own_form(base), base.quantization, *over])):
            say(text("export.measuring", form=form, rows=text.count("rows", len(rows))))
            losses = measure(base, form, sha256, made, rows)
            deployed[form] = losses, difference(losses, before)
        name = "After training on the held-out rows too, their loss" if retrain else "Held-out loss"
        measured = {f"{name}, loaded as {form}": f"{one.mean:.4f}" for form, (one, _) in deployed.items()}
        card = model_card(part, study.find_verdict(), chosen, row, merge, measured)
        (scratch / "README.md").write_text(card, "utf-8")
    pushed = hub.push(push, folder, f"Export {chosen.name}") if push else None
    seeds = part.results[(part.results["candidate"] == chosen.candidate.name) & (part.results["status"] == "done")]
    known = dict(zip(seeds["seed"].tolist(), seeds["eval_loss"].tolist(), strict=True))
    return Result(study, chosen, known, bool(retrain), made._replace(folder=folder), before, deployed, pushed)


def _check(study: Study, trial: Trial, folder: Path, merge: str | None, over: Sequence[str], push: str | None) -> None:
    """Raise for what is known to be wrong before anything is loaded."""
    spec = study.spec.model
    for option, forms, known in (("--merge", [merge] if merge else [], tuple(DTYPES)), ("--over", over, FORMS)):
        if wrong := [form for form in forms if form not in known]:
            raise StudyError(f"{option} {wrong[0]}: unknown", f"Give one of: {', '.join(known)}.")
    if push is not None and (not hub.HUB_ID.fullmatch(push) or "/" not in push):
        raise StudyError(f"--push {push}: not OWNER/NAME", "Give an id of the hub such as me/my-adapter.")
    if push is not None and merge is None and Path(location(spec)).exists():
        what = f"--push {push}: the base model, {spec.id}, is on this machine alone"
        raise StudyError(what, "Push a model of its own: --merge bf16.")
    check_source(spec)
    check_empty(folder)
    study.adapter_file(trial)  # raises where it is corrupt
    if merge is not None and not spec.dequantize and getattr(load_config(spec), "quantization_config", None):
        what = f"--merge {merge}: the weights of {spec.id} are quantized, which would round the update away"
        raise ModelError(what, "Serve the adapter: leave --merge out.")


def train_again(study: Study, trial: Trial, say: Say, text: catalogue.Catalogue) -> Path:
    """Train the trial on training rows and held-out ones, in retrained/ of the study, and return its folder. What is
    done is used again, and what was stopped goes on. Raises StudyError: no rows are held out; KilledError: it was
    stopped; WorkerError: it diverged."""
    if study.spec.data.eval_dataset or study.spec.data.eval_split:
        what = "--retrain: the study is evaluated on rows of its own, and trained on all others already"
        raise StudyError(what, "Leave it out.")
    data = load(study.file("data"))
    rows = Tokens.from_examples([*data.train, *data.eval])
    folder = study.file("retrained", f"{trial.name}-{len(rows)}-rows")
    record = TrialRecord.find(folder / "trial.json")
    if record is None or record.status != "done":
        say(text("export.training", trial=trial.name, rows=f"{len(rows):,}"))
        with study.lock(), StopRequest() as stop:
            model, weights = load_base(study)
            folders, checkpoints = {trial.name: folder}, folder / "checkpoints"
            whole = replace(data, train=rows, general=None)
            train_pack(model, study.spec, [trial], folders, checkpoints, whole, "retrained", weights, stop)
        shutil.rmtree(checkpoints, ignore_errors=True)
        record = TrialRecord.of(read_json(folder / "trial.json"), folder)
    if record.status != "done":
        raise WorkerError(f"{trial.name}, trained on all rows: {record.reason}", "Leave --retrain out.")
    return folder


def _losses(file: Path) -> ExampleLosses:
    examples = EvalRecord.of(read_json(file), file).examples
    return ExampleLosses(*map(np.array, (examples.loss, examples.label_tokens, examples.correct_tokens)))
