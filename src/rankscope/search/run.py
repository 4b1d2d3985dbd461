"""The main path of a search: prepare the data, start the child process that searches, follow it to its end."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rankscope.data.tokens import load, save
from rankscope.errors import OutOfMemoryError, StudyError
from rankscope.files import write_json
from rankscope.jobs.local import LocalLauncher, run_locally
from rankscope.measure.machine import describe_machine
from rankscope.plan.checks import check_base_fits, check_ranks
from rankscope.plan.memory import predict
from rankscope.plan.packs import divide_into_packs
from rankscope.search import require_optuna
from rankscope.search.folder import Search
from rankscope.search.space import DEFAULT_RANKS, SearchSpec, resolve_ranks
from rankscope.search.trainer import step_tokens
from rankscope.train.prepare import describe_data, prepare_data

MOST_PLACES = 64


def run(
    spec: SearchSpec, out: Path, say: Callable[[str], None], poll: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Searches, or goes on with the search in `out`; returns its result, see `rankscope.search.sampling.summary`.

    `say` is given sentences to be kept, `poll` is called twice a second.

    Raises:
        MissingExtraError: Optuna is not installed.
        StudyError: the question is wrong, or `out` holds another one.
        DataError, ModelError: the data or the model cannot be used.
        WorkerError: the child process ended without finishing its work.
    """
    require_optuna()
    site = LocalLauncher(spec.study.model).site()
    predictions = [predict(_corner(spec, number)) for number in range(len(spec.space.target_modules))]
    full_rank = min(prediction.full_rank for prediction in predictions)
    if spec.space.ranks == resolve_ranks(DEFAULT_RANKS) and full_rank < max(spec.space.ranks):
        say(f"Ranks up to {full_rank:,}, the full rank of the model's layers")
        spec = spec.up_to(full_rank)
    for number, prediction in enumerate(predictions):
        check_ranks(_corner(spec, number), prediction)
        check_base_fits(spec.study.model, prediction, site.free_bytes)
    prepared = None if (out / "data" / "facts.json").exists() else prepare_data(spec.study)
    search = Search.create(out, spec)
    with search.lock():
        if prepared is not None:
            save(prepared, search.file("data"))
        if not search.file("machine.json").exists():
            write_json(search.file("machine.json"), describe_machine(spec.study, predictions[0].base_params, site))
        result = search.result()
        if result is not None and result["finished"] and result["budget"] == spec.budget.model_dump(mode="json"):
            return result
        data = load(search.file("data"))
        tokens = step_tokens(spec, data)
        if spec.budget.tokens is not None and spec.budget.tokens < sum(tokens):
            raise StudyError(
                f"--tokens {spec.budget.tokens:,}: one candidate alone takes {sum(tokens):,}",
                "Give more, or fewer --steps.",
            )
        say(describe_data(data.facts))
        free, places = site.free_bytes, MOST_PLACES
        for number, prediction in enumerate(predictions):
            largest = [spec.largest(place, number) for place in range(MOST_PLACES)]
            packs = divide_into_packs(largest, prediction, free, spec.study.training, data.train)
            places = min(places, len(packs[0]))
        while True:
            say(f"{places} candidates train at a time, {len(tokens):,} steps of {sum(tokens):,} tokens each at most")
            job = {"kind": "search", "places": places}
            error = run_locally(search.path, job, search.file("job"), poll)
            if isinstance(error, OutOfMemoryError) and places > 1:
                places = (places + 1) // 2
                say(f"Not enough memory; goes on with fewer at a time: {error.what}")
            elif error is not None:
                raise error
            else:
                break
        result = search.result()
        assert result is not None
        return result


def _corner(spec: SearchSpec, group: int) -> Any:
    """The study of the highest rank alone, with one of the groups of target modules."""
    adapter = spec.study.adapter.model_copy(update={"target_modules": spec.space.target_modules[group]})
    rate = spec.study.learning_rates[:1]
    return spec.study.model_copy(update={"ranks": (max(spec.space.ranks),), "learning_rates": rate, "adapter": adapter})
