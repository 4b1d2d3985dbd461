"""The main path of a search: prepare, check, search in a job, return the result."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rankscope.data.tokens import TokenizedData, load, save
from rankscope.errors import StudyError
from rankscope.files import write_json
from rankscope.jobs.job import Launcher, Say
from rankscope.jobs.queue import run_jobs
from rankscope.measure.machine import Site, describe_machine
from rankscope.model.checks import pinned
from rankscope.plan.checks import check_base_fits, check_ranks
from rankscope.plan.costs import CostModel, predict
from rankscope.plan.memory import StudyMemory
from rankscope.plan.packs import divide_into_packs
from rankscope.plan.plan import with_site_dtype
from rankscope.search import job
from rankscope.search.folder import Search
from rankscope.search.space import DEFAULT_RANKS, SearchSpec
from rankscope.search.trainer import step_tokens
from rankscope.study.question import lock_folder
from rankscope.text.catalogue import load as load_catalogue
from rankscope.train.prepare import describe_data, prepare_data

MOST_SLOTS = 64  # most candidates that train at a time


def at_commits(spec: SearchSpec, out: Path) -> SearchSpec:
    """The question with the commits of its hub ids, which are those of the search in `out` if there is one."""
    known = Search.open(out).spec.study if (out / "search.yaml").exists() else None
    return spec.model_copy(update={"study": pinned(spec.study, known)})


def run(
    spec: SearchSpec,
    out: Path,
    launcher: Launcher,
    say: Say,
    poll: Callable[[], None] = lambda: None,
    language: str = "en",
) -> dict[str, Any]:
    """Search, or go on with the search in `out`; return its result, see `rankscope.search.sampling.summary`. `poll` is
    called twice a second. Raises StudyError: the question is wrong, or `out` holds another one; DataError, ModelError:
    the data or the model cannot be used; WorkerError: the child process ended without finishing its work."""
    spec, site, text = at_commits(spec, out), launcher.site(), load_catalogue(language)
    predictions = _predictions(spec, site)
    full_rank = min(prediction.full_rank for prediction in predictions)
    if spec.space.ranks == DEFAULT_RANKS and full_rank < max(DEFAULT_RANKS):
        say(text("search.full_rank", rank=f"{full_rank:,}"))
        spec = spec.up_to(full_rank)
        predictions = _predictions(spec, site)
    for point, prediction in zip(spec.largest(), predictions, strict=True):
        check_ranks(spec.alone(point), prediction)
        check_base_fits(spec.study.model, prediction, site.free_bytes)
    begun = (out / "data" / "facts.json").exists()
    prepared = None if begun else prepare_data(spec.study)
    search = Search.create(out, spec)
    with lock_folder(out):
        if prepared is not None:
            write_json(search.file("machine.json"), describe_machine(spec.study, predictions[0].base_params, site))
            save(prepared, search.file("data"))
        data, result = load(search.file("data")), search.result()
        if result is None or not result["finished"] or result["budget"] != spec.budget.model_dump(mode="json"):
            slots, tokens = _slots(spec, predictions, data, site.free_bytes), step_tokens(spec, data)
            if spec.budget.tokens is not None and spec.budget.tokens < sum(tokens):
                what = f"--tokens {spec.budget.tokens:,}: one candidate alone takes {sum(tokens):,}"
                raise StudyError(what, "Give more, or fewer --steps.")
            say(describe_data(data.facts, text))
            sizes = {"steps": text.count("training_steps", len(tokens)), "tokens": f"{sum(tokens):,}"}
            say(text("search.slots", candidates=text.count("candidates", slots), **sizes))
            run_jobs(launcher, out, [job.job_of(search, slots)], poll, partial(job.ended, search, say, text))
            result = search.result()
    assert result is not None
    return result


def _predictions(spec: SearchSpec, site: Site) -> list[CostModel]:
    studies = [with_site_dtype(spec.alone(point), site) for point in spec.largest()]
    return [predict(study, torch.device(site.kind)) for study in studies]


def _slots(spec: SearchSpec, predictions: list[CostModel], data: TokenizedData, free: int) -> int:
    """How many candidates of the highest rank can train together, on the most expensive group of target modules."""
    counts = []
    for point, prediction in zip(spec.largest(), predictions, strict=True):
        trials = [spec.trial(point, number) for number in range(MOST_SLOTS)]
        memory = StudyMemory(spec.alone(point), prediction, data.train, free)
        packs = divide_into_packs(trials, prediction, memory.fits, spec.study.training, data.train)
        counts.append(len(packs[0]))
    return min(counts)
