"""The question of a search: a study's question with a space of candidates instead of a list, and a budget."""

import math
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, Field, PositiveFloat, ValidationError

from rankscope.errors import StudyError, shortened
from rankscope.spec.candidates import Count, Frozen, Rank, Seed, Trial, all_linear_or_names, unique
from rankscope.spec.models import Modules, StudySpec
from rankscope.spec.options import assemble

DEFAULT_RANKS = (4, 8, 16, 32, 64, 128, 256)
DEFAULT_RATES = "3e-5..3e-3"
DEFAULT_TRIALS = 32

Alpha = float | str


class Point(NamedTuple):
    rank: int
    learning_rate: float
    alpha: Alpha
    target_modules: str  # see `modules_text`


def modules_text(modules: str | Sequence[str]) -> str:
    """A group of target modules as Optuna stores it."""
    return modules if isinstance(modules, str) else ",".join(modules)


class RateRange(Frozen):
    """Learning rates between two ends, log-uniform; each is rounded to three digits."""

    low: PositiveFloat
    high: PositiveFloat


class SearchSpace(Frozen):
    """The values that each part of a candidate may take."""

    ranks: tuple[Rank, ...] = Field(min_length=1)
    learning_rates: RateRange | tuple[PositiveFloat, ...]
    alphas: tuple[Alpha, ...] = Field(min_length=1)
    target_modules: Annotated[tuple[Modules, ...], Field(min_length=1), AfterValidator(unique)]

    def choices(self) -> dict[str, tuple[Any, ...]]:
        """Values of each part of a `Point` that is chosen from a list: all but learning rates in a range."""
        rates = {} if isinstance(self.learning_rates, RateRange) else {"learning_rate": self.learning_rates}
        modules = tuple(map(modules_text, self.target_modules))
        return {"rank": self.ranks, **rates, "alpha": self.alphas, "target_modules": modules}

    def points(self) -> list[Point]:
        """All candidates; none where learning rates are a range."""
        choices = self.choices()
        several = product(*choices.values()) if "learning_rate" in choices else ()
        return [Point(*parts) for parts in several]

    @property
    def size(self) -> float:
        """Number of candidates; infinity where learning rates are a range."""
        return len(self.points()) or math.inf


class Budget(Frozen):
    """Limits of a search; the first one reached ends it. None is no limit."""

    trials: Count | None = None  # candidates that are started
    hours: PositiveFloat | None = None  # of training and evaluation, over all runs of the search
    tokens: Count | None = None  # training tokens of all candidates together; never exceeded


class SearchSpec(Frozen):
    """A search: everything that determines its result; only the budget may be raised later."""

    study: StudySpec  # `space` replaces its ranks, learning rates, alpha and target modules
    space: SearchSpace
    budget: Budget
    sampler: Literal["tpe", "random"] = "tpe"
    pruner: Literal["halving", "none"] = "halving"
    reduction: int = Field(default=3, ge=2)  # of successive halving: one of so many candidates passes each rung
    rungs: int = Field(default=2, ge=1)  # where a candidate may be stopped; the first at schedule / reduction**rungs
    seed: Seed = 0  # of the sampler; the study's own seed determines batches and initial weights

    def up_to(self, rank: int) -> "SearchSpec":
        """The search without ranks above `rank`; with `rank` itself where none is left."""
        ranks = {"ranks": tuple(one for one in self.space.ranks if one <= rank) or (rank,)}
        parts = {"space": self.space.model_copy(update=ranks), "study": self.study.model_copy(update=ranks)}
        return self.model_copy(update=parts)

    def alone(self, point: Point) -> StudySpec:
        """The study of one candidate."""
        adapter = {"alpha": point.alpha, "target_modules": all_linear_or_names(point.target_modules)}
        only: dict[str, Any] = {"ranks": (point.rank,), "learning_rates": (point.learning_rate,)}
        return self.study.model_copy(update=only | {"adapter": self.study.adapter.model_copy(update=adapter)})

    def trial(self, point: Point, number: int) -> "SearchTrial":
        return SearchTrial(candidate=self.alone(point).candidates()[0], seed=self.study.seeds[0], number=number)

    def largest(self) -> list[Point]:
        """The most expensive candidate on each of the groups of target modules."""
        rank, rate, alpha = max(self.space.ranks), self.study.learning_rates[0], self.space.alphas[0]
        return [Point(rank, rate, alpha, modules_text(modules)) for modules in self.space.target_modules]

    def rung_steps(self, steps: int) -> list[int]:
        """Return the steps after which a candidate may be stopped, for a schedule of `steps`."""
        if self.pruner == "none":
            return []
        first = max(1, steps // self.reduction**self.rungs)
        return [step for k in range(self.rungs) if (step := first * self.reduction**k) < steps]


class SearchTrial(Trial):
    """A trial of a search. It has a number, since its candidate's name omits alpha and target modules."""

    number: int

    @property
    def name(self) -> str:
        return f"t{self.number:04d}-{self.candidate.name}"


def resolve_search(
    values: Mapping[str, Any], options: Mapping[str, Any], assignments: Sequence[str] = (), file: Path | None = None
) -> SearchSpec:
    """Resolve a search from a study's values and options.

    Options of the search itself, as text or numbers, None for a default: `ranks learning_rates alpha target_modules
    trials hours tokens sampler pruner seed`. Ranks and learning rates default to those of the values, else `4..256` and
    `3e-5..3e-3`; alpha and target modules are the study's. Raises StudyError: a part of the space or the budget is
    wrong, or the study is.
    """
    own = ("ranks", "learning_rates", "target_modules", *Budget.model_fields, "sampler", "pruner", "seed")
    given = {name: options.get(name) for name in own}
    ranks = given["ranks"] or values.get("ranks") or DEFAULT_RANKS
    rates = given["learning_rates"] or values.get("learning_rates") or DEFAULT_RATES
    ends = rates.split("..") if isinstance(rates, str) and ".." in rates else []
    seed = given["seed"] or 0
    fixed = {"ranks": ranks, "learning_rates": ",".join(ends) or rates, "seeds": [seed]}
    rest = {name: value for name, value in options.items() if name not in own}
    study = assemble({**values, **fixed}, rest, assignments, file)
    if study.variants or study.reference.full:
        raise StudyError("a search is among plain LoRA adapters", "Leave out variants and reference.full.")
    ordered = sorted(study.learning_rates)
    if ends and (len(ordered) != 2 or ordered != list(study.learning_rates)):
        raise StudyError(f"--learning-rates {rates}: no such range", "Give two ends, the lower first: 1e-5..1e-3.")
    modules: Any = given["target_modules"]
    space = {
        "ranks": sorted(study.ranks),
        "learning_rates": dict(zip(("low", "high"), ordered, strict=True)) if ends else ordered,
        "alphas": study.adapter.alphas,
        "target_modules": modules.split(";") if isinstance(modules, str) else [study.adapter.target_modules],
    }
    budget = {name: given[name] for name in Budget.model_fields if given[name] is not None}
    chosen = {name: given[name] for name in ("sampler", "pruner") if given[name] is not None} | {"seed": seed}
    try:
        question = {"study": study, "space": space, "budget": budget or {"trials": DEFAULT_TRIALS}, **chosen}
        spec = SearchSpec.model_validate(question)
    except ValidationError as error:
        detail = error.errors()[0]
        name = next(part for part in reversed(detail["loc"]) if isinstance(part, str)).replace("_", "-")
        what = f"--{name} {shortened(str(detail['input']))}: {detail['msg'].removeprefix('Value error, ')}"
        raise StudyError(what, "See rankscope search --help.") from None
    first = {"alpha": spec.space.alphas[0], "target_modules": spec.space.target_modules[0]}
    shared = {"adapter": study.adapter.model_copy(update=first), "ranks": spec.space.ranks}
    return spec.model_copy(update={"study": study.model_copy(update=shared)})
