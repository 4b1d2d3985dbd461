"""The question of a search: a study's question with a space of candidates instead of a list, and a budget."""

import math
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveFloat, ValidationError

from rankscope.errors import StudyError, shortened
from rankscope.spec.candidates import Candidate, Count, Rank, Seed, Trial, doublings, unique
from rankscope.spec.models import Modules, StudySpec
from rankscope.spec.options import assemble

DEFAULT_RANKS = doublings(4, 256)
DEFAULT_RATES = "3e-5..3e-3"
DEFAULT_TRIALS = 32

Alpha = float | str


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class RateRange(_Part):
    """Learning rates between two ends, log-uniform; each is rounded to three digits."""

    low: PositiveFloat
    high: PositiveFloat


class SearchSpace(_Part):
    """The values that each part of a candidate may take."""

    ranks: tuple[Rank, ...] = Field(min_length=1)
    learning_rates: RateRange | tuple[PositiveFloat, ...]
    alphas: tuple[Alpha, ...] = Field(min_length=1)
    target_modules: Annotated[tuple[Modules, ...], Field(min_length=1), AfterValidator(unique)]

    @property
    def size(self) -> float:
        """Number of candidates; infinity where learning rates are a range."""
        if isinstance(self.learning_rates, RateRange):
            return math.inf
        return math.prod(map(len, (self.ranks, self.learning_rates, self.alphas, self.target_modules)))


class Budget(_Part):
    """Limits of a search; the first one reached ends it. None is no limit."""

    trials: Count | None = None  # candidates that are started
    hours: PositiveFloat | None = None  # of training and evaluation, over all runs of the search
    tokens: Count | None = None  # training tokens of all candidates together; never exceeded


class SearchSpec(_Part):
    """A search: everything that determines its result; only the budget may be raised later."""

    study: StudySpec  # `space` replaces its ranks, learning rates, alpha and target modules
    space: SearchSpace
    budget: Budget
    sampler: Literal["tpe", "random"] = "tpe"
    pruner: Literal["halving", "none"] = "halving"
    reduction: int = Field(default=3, ge=2)  # of successive halving: one of so many candidates passes each rung
    rungs: int = Field(default=2, ge=1)  # where a candidate may be stopped; the first at schedule / reduction**rungs
    seed: Seed = 0  # of the sampler; the study's own seed determines batches and initial weights

    def candidate(self, point: "Point") -> Candidate:
        adapter = self.study.adapter.model_copy(update={"alpha": point.alpha, "target_modules": point.target_modules})
        only = {"ranks": (point.rank,), "learning_rates": (point.learning_rate,), "adapter": adapter}
        return self.study.model_copy(update=only).candidates()[0]

    def up_to(self, rank: int) -> "SearchSpec":
        """Return the search without ranks above `rank`; with `rank` itself where none is left."""
        ranks = {"ranks": tuple(one for one in self.space.ranks if one <= rank) or (rank,)}
        parts = {"space": self.space.model_copy(update=ranks), "study": self.study.model_copy(update=ranks)}
        return self.model_copy(update=parts)

    def largest(self, number: int, group: int) -> "SearchTrial":
        """Return a candidate of the highest rank on one of the groups of target modules: the most expensive one."""
        rate, alpha = self.study.learning_rates[0], self.space.alphas[0]
        point = Point(max(self.space.ranks), rate, alpha, self.space.target_modules[group])
        return SearchTrial(candidate=self.candidate(point), seed=0, number=number)

    def points(self) -> list["Point"]:
        space, rates = self.space, self.space.learning_rates
        assert not isinstance(rates, RateRange)
        return [Point(*parts) for parts in product(space.ranks, rates, space.alphas, space.target_modules)]

    def rung_steps(self, steps: int) -> list[int]:
        """Return the steps after which a candidate may be stopped, for a schedule of `steps`."""
        if self.pruner == "none":
            return []
        first = max(1, steps // self.reduction**self.rungs)
        return [step for k in range(self.rungs) if (step := first * self.reduction**k) < steps]


class Point(NamedTuple):
    rank: int
    learning_rate: float
    alpha: Alpha
    target_modules: Modules


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
    own = ("ranks", "learning_rates", "alpha", "target_modules", "trials", "hours", "tokens", "sampler", "pruner")
    given = {name: options.get(name) for name in (*own, "seed")}
    rest = {name: value for name, value in options.items() if name not in given}
    ranks = given["ranks"] or values.get("ranks") or DEFAULT_RANKS
    rates = given["learning_rates"] or values.get("learning_rates") or DEFAULT_RATES
    ends = rates.split("..") if isinstance(rates, str) and ".." in rates else []
    fixed = {"ranks": ranks, "learning_rates": ",".join(ends) or rates}
    if given["alpha"] is not None:
        rest["alpha"] = given["alpha"]
    seed = given["seed"] or 0
    question = {name: value for name, value in values.items() if name not in (*fixed, "seeds")}
    study = assemble(question | fixed | {"seeds": [seed]}, rest, assignments, file)
    if study.variants or study.reference.full:
        raise StudyError("a search is among plain LoRA adapters", "Leave out variants and reference.full.")
    ordered = sorted(study.learning_rates)
    if ends and (len(ordered) != 2 or ordered != list(study.learning_rates)):
        raise StudyError(f"--learning-rates {rates}: no such range", "Give two ends, the lower first: 1e-5..1e-3.")
    groups: Any = [study.adapter.target_modules]
    if isinstance(modules := given["target_modules"], str):
        groups = modules.split(";")
    space = {
        "ranks": sorted(study.ranks),
        "learning_rates": dict(zip(("low", "high"), study.learning_rates, strict=True)) if ends else ordered,
        "alphas": study.adapter.alphas,
        "target_modules": groups,
    }
    budget = {name: given[name] for name in ("trials", "hours", "tokens")}
    if all(value is None for value in budget.values()):
        budget["trials"] = DEFAULT_TRIALS
    chosen = {name: given[name] for name in ("sampler", "pruner") if given[name] is not None}
    try:
        spec = SearchSpec.model_validate({"study": study, "space": space, "budget": budget, "seed": seed, **chosen})
    except ValidationError as error:
        detail = error.errors()[0]
        name = next(part for part in reversed(detail["loc"]) if isinstance(part, str)).replace("_", "-")
        what = f"--{name} {shortened(str(detail['input']))}: {detail['msg'].removeprefix('Value error, ')}"
        raise StudyError(what, "See rankscope search --help.") from None
    first = {"alpha": spec.space.alphas[0], "target_modules": spec.space.target_modules[0]}
    shared = {"adapter": study.adapter.model_copy(update=first), "ranks": spec.space.ranks}
    return spec.model_copy(update={"study": study.model_copy(update=shared)})
