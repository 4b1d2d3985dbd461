"""The one job of a search: it draws candidates, trains them together, and stops the hopeless ones."""

import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna

from rankscope.data.tokens import load
from rankscope.errors import DataError, KilledError, ModelError, OutOfMemoryError, RankscopeError
from rankscope.files import JsonlWriter, write_atomic
from rankscope.jobs.job import Job, Say
from rankscope.model.load import fingerprint, load_model
from rankscope.search.driver import drive
from rankscope.search.folder import Search, Spent
from rankscope.search.sampling import DONE, modules_text, open_journal, summary
from rankscope.search.space import SearchSpec
from rankscope.search.trainer import PackTrainer, step_tokens
from rankscope.spec.models import StudySpec
from rankscope.spec.resolve import write_yaml
from rankscope.train.stopping import StopRequest

WRITE_EVERY_SECONDS = 1.0  # interval of writing result.json while nothing but steps has changed


def job_of(search: Search, slots: int) -> Job:
    """Return the job that searches with up to `slots` candidates in training at a time."""
    reads = ("optuna.log", "steps.jsonl", "result.json", "adapters")
    return Job(__name__, {"places": slots}, "job", reads, alone=True, shared=("search.yaml", "data"))


def work(study_path: Path, content: Mapping[str, Any]) -> None:
    """Search until the budget is spent, from where an earlier job has stopped. Raises KilledError: the search was asked
    to stop, and has stopped after a step; ModelError, DataError: the model or the data is not the one that the search
    began with."""
    search, slots = Search.open(study_path), int(content["places"])
    spec, data = search.spec, load(search.file("data"))
    model = load_model(spec.study.model)
    study = open_journal(search.file("optuna.log"), spec)
    _check_same(study, {"model_sha256": fingerprint(model), "tokens_sha256": data.sha256})
    trainer, tokens, spent = PackTrainer(model, spec, data, slots), step_tokens(spec, data), search.spent()
    study.set_user_attr("engine", trainer.engine.name)
    study.set_user_attr("engine_reason", trainer.engine_reason)
    written = 0.0
    with StopRequest() as stop, JsonlWriter(search.file("steps.jsonl")) as steps:
        for moment in drive(study, spec, trainer, tokens, slots, spent, lambda: stop.made):
            steps.write(moment.row())
            spent = Spent(spent.tokens + moment.spent.tokens, spent.seconds + moment.spent.seconds)
            for name in [name for name, how in moment.ended.items() if how == DONE]:
                found, own = summary(study, spec, spent, False), moment.held_out[name]
                losses = [float(c["eval_loss"]) for c in found["candidates"] if c["eval_loss"] is not None]
                if own <= min([own, *losses]) * (1 + float(found["margin"])):  # of the best so far
                    trainer.save(name, search.file("adapters", name))
            if moment.held_out or moment.ended or time.monotonic() - written > WRITE_EVERY_SECONDS:
                written = time.monotonic()
                search.write_result(summary(study, spec, spent, False) | {"training": moment.losses})
        if stop.made:
            search.write_result(summary(study, spec, spent, False) | {"training": {}})
            raise KilledError("stopped as asked")
    result = summary(study, spec, spent, True)
    for adapter in search.file("adapters").glob("*"):
        if adapter.name not in result["within_margin"]:
            shutil.rmtree(adapter)
    if result["best"]:
        write_atomic(search.file("confirm.yaml"), write_yaml(confirming(spec, result)))
    search.write_result(result | {"training": {}})


def ended(search: Search, say: Say, job: Job, error: RankscopeError | None, waiting: Sequence[Job]) -> list[Job]:
    """Search on with half as many candidates at a time where memory was short; raise any other error."""
    slots = int(job.content["places"])
    if isinstance(error, OutOfMemoryError) and slots > 1:
        say(f"Not enough memory; goes on with fewer at a time: {error.what}")
        return [job_of(search, (slots + 1) // 2), *waiting]
    if error is not None:
        raise error
    return list(waiting)


def _check_same(study: optuna.Study, facts: dict[str, str]) -> None:
    """Raise where the model or the tokens differ from those that the search began with; record them at its start."""
    for (name, value), error in zip(facts.items(), (ModelError, DataError), strict=True):
        if study.user_attrs.get(name, value) != value:
            raise error(f"{name.split('_')[0]}: not what the search began with", "Choose another --out.")
        if name not in study.user_attrs:
            study.set_user_attr(name, value)


def confirming(spec: SearchSpec, result: dict[str, Any]) -> StudySpec:
    """Return a study that trains the best candidate again, with three seeds that the search has not used. Beside it
    stands the candidate of the lowest rank within the margin with the same alpha and target modules; each of the two
    ranks is trained at the rates of both."""
    candidates = {candidate["trial"]: candidate for candidate in result["candidates"]}
    best, within = candidates[result["best"]], [candidates[name] for name in result["within_margin"]]
    alike = [one for one in within if all(one[name] == best[name] for name in ("alpha", "target_modules"))]
    chosen = (best, min(alike, key=lambda candidate: int(candidate["rank"])))
    (modules,) = [group for group in spec.space.target_modules if modules_text(group) == best["target_modules"]]
    changes = {
        "name": f"{spec.study.name[:92]}-confirm",
        "ranks": tuple(sorted({candidate["rank"] for candidate in chosen})),
        "learning_rates": tuple(sorted({candidate["learning_rate"] for candidate in chosen})),
        "seeds": tuple(spec.study.seeds[0] + number for number in (1, 2, 3)),
        "adapter": spec.study.adapter.model_copy(update={"alpha": best["alpha"], "target_modules": modules}),
    }
    return spec.study.model_copy(update=changes)
