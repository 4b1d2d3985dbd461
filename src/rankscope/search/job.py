"""The one job of a search: it draws candidates, trains them together, and stops the hopeless ones."""

import math
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rankscope.data.tokens import load
from rankscope.errors import DataError, KilledError, ModelError, OutOfMemoryError, RankscopeError
from rankscope.files import write_atomic
from rankscope.jobs.job import Job, Say
from rankscope.model.load import fingerprint, load_model
from rankscope.search.driver import drive
from rankscope.search.folder import Search
from rankscope.search.sampling import DONE, open_journal, summary
from rankscope.search.space import Point, SearchSpec
from rankscope.search.trainer import PackTrainer, step_tokens
from rankscope.spec.models import StudySpec
from rankscope.spec.resolve import write_yaml
from rankscope.text.catalogue import Catalogue
from rankscope.train.stopping import StopRequest

WRITE_EVERY_SECONDS = 1.0  # interval of writing result.json while nothing but steps has changed


def job_of(search: Search, slots: int) -> Job:
    """Return the job that searches with up to `slots` candidates in training at a time."""
    reads = ("optuna.log", "result.json", "adapters")
    return Job(__name__, {"places": slots}, "job", reads, alone=True, shared=("search.yaml", "data"))


def work(study_path: Path, content: Mapping[str, Any]) -> None:
    """Search until the budget is spent, from where an earlier job has stopped. Raises KilledError: the search was asked
    to stop, and has stopped after a step; ModelError, DataError: the model or the data is not the one that the search
    began with."""
    search, slots = Search.open(study_path), int(content["places"])
    spec, data = search.spec, load(search.file("data"))
    model, study = load_model(spec.study.model), open_journal(search.file("optuna.log"), spec)
    facts = {"model": (fingerprint(model), ModelError), "tokens": (data.sha256, DataError)}
    for name, (sha256, error) in facts.items():
        if study.user_attrs.get(f"{name}_sha256", sha256) != sha256:
            raise error(f"{name}: not what the search began with", "Choose another --out.")
        study.set_user_attr(f"{name}_sha256", sha256)
    trainer, spent, written = PackTrainer(model, spec, data, slots), search.spent(), 0.0
    with StopRequest() as stop:
        for step in drive(study, spec, trainer, step_tokens(spec, data), slots, spent, lambda: stop.made):
            spent = step.spent
            if not (step.held_out or step.ended or time.monotonic() - written > WRITE_EVERY_SECONDS):
                continue
            written = time.monotonic()
            found = summary(study, spec, spent, False)
            best = min((one["eval_loss"] for one in found["candidates"] if one["state"] == DONE), default=math.inf)
            for name, how in step.ended.items():
                if how == DONE and step.held_out[name] <= best * (1 + found["margin"]):
                    trainer.save(name, search.file("adapters", name))
            search.write_result(found | {"training": step.losses})
    result = summary(study, spec, spent, not stop.made) | {"training": {}}
    if not stop.made:
        for adapter in search.file("adapters").glob("*"):
            if adapter.name not in result["within_margin"]:
                shutil.rmtree(adapter)
        if result["best"]:
            write_atomic(search.file("confirm.yaml"), write_yaml(confirming(spec, result)))
    search.write_result(result)
    if stop.made:
        raise KilledError("stopped as asked")


def ended(
    search: Search, say: Say, text: Catalogue, job: Job, error: RankscopeError | None, waiting: Sequence[Job]
) -> list[Job]:
    """Search on with half as many candidates at a time where memory was short; raise any other error."""
    slots = int(job.content["places"])
    if isinstance(error, OutOfMemoryError) and slots > 1:
        say(text("search.less_memory", error=error.what))
        return [job_of(search, (slots + 1) // 2), *waiting]
    if error is not None:
        raise error
    return list(waiting)


def confirming(spec: SearchSpec, result: dict[str, Any]) -> StudySpec:
    """Return a study that trains the best candidate again, with three seeds that the search has not used. Beside it
    stands the candidate of the lowest rank within the margin with the same alpha and target modules; each of the two
    ranks is trained at the rates of both."""
    candidates = {candidate["trial"]: candidate for candidate in result["candidates"]}
    best, *others = [candidates[name] for name in result["within_margin"]]
    alike = [one for one in others if all(one[name] == best[name] for name in ("alpha", "target_modules"))]
    chosen = (best, min([best, *alike], key=lambda candidate: int(candidate["rank"])))
    changes = {
        "name": f"{spec.study.name[:92]}-confirm",
        "ranks": tuple(sorted({candidate["rank"] for candidate in chosen})),
        "learning_rates": tuple(sorted({candidate["learning_rate"] for candidate in chosen})),
        "seeds": tuple(spec.study.seeds[0] + number for number in (1, 2, 3)),
    }
    return spec.alone(Point(*(best[field] for field in Point._fields))).model_copy(update=changes)
