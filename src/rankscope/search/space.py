"""The question of a search: a study's question with a space of candidates instead of a list, and a budget."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, ValidationError

from rankscope.errors import StudyError, shortened
from rankscope.spec.candidates import AllLinear, Candidate, Count, Rank, Seed, Trial
from rankscope.spec.models import AdapterSpec, StudySpec
from rankscope.spec.options import assemble, doublings

DEFAULT_RANKS = "4..256"
DEFAULT_RATES = "3e-5..3e-3"
DEFAULT_TRIALS = 32

Alpha = float | str
Targets = AllLinear | tuple[str, ...]


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
    target_modules: tuple[Targets, ...] = Field(min_length=1)

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
    target_modules: Targets


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
    ranks = resolve_ranks(given["ranks"] or values.get("ranks") or DEFAULT_RANKS)
    rates = _rates(given["learning_rates"] or values.get("learning_rates") or DEFAULT_RATES)
    seed = given["seed"] or 0
    ends = (rates.low, rates.high) if isinstance(rates, RateRange) else rates
    question = {name: value for name, value in values.items() if name not in ("ranks", "learning_rates", "seeds")}
    fixed = {"ranks": list(ranks), "learning_rates": list(ends), "seeds": [seed]}
    study = assemble(question | fixed, rest, assignments, file)
    if study.variants or study.reference.full:
        raise StudyError("a search is among plain LoRA adapters", "Leave out variants and reference.full.")
    given["alpha"] = study.adapter.alpha if given["alpha"] is None else given["alpha"]
    alphas = _each("alpha", _parts(given["alpha"], ","), partial(_adapter, "alpha"))
    modules = given["target_modules"] or [study.adapter.target_modules]
    groups = _each("target-modules", _parts(modules, ";"), partial(_adapter, "target-modules"))
    space = SearchSpace(ranks=ranks, learning_rates=rates, alphas=alphas, target_modules=groups)
    budget = {name: given[name] for name in ("trials", "hours", "tokens")}
    if all(value is None for value in budget.values()):
        budget["trials"] = DEFAULT_TRIALS
    shared = study.adapter.model_copy(update={"alpha": alphas[0], "target_modules": groups[0]})
    chosen: dict[str, Any] = {name: given[name] for name in ("sampler", "pruner") if given[name] is not None}
    study = study.model_copy(update={"adapter": shared, "ranks": ranks, "learning_rates": ends})
    try:
        return SearchSpec(study=study, space=space, budget=Budget.model_validate(budget), seed=seed, **chosen)
    except ValidationError as error:
        detail = error.errors()[0]
        raise StudyError(f"--{detail['loc'][-1]} {detail['input']}: {detail['msg']}", _HELP) from None


_HELP = "See rankscope search --help."


def _parts(value: Any, separator: str) -> list[Any]:
    if isinstance(value, str):
        return [part.strip() for part in value.split(separator) if part.strip()]
    return list(value) if isinstance(value, list | tuple) else [value]


def _each(name: str, parts: Sequence[Any], read: Callable[[Any], Any]) -> tuple[Any, ...]:
    values = [read(part) for part in parts]
    if not values:
        raise StudyError(f"--{name}: expected at least one", _HELP)
    for number, value in enumerate(values):
        if value in values[:number]:
            raise StudyError(f"--{name}: listed twice: {value}", "Name each once.")
    return tuple(values)


def _ends(value: Any) -> tuple[str, str] | None:
    """Return the two ends of `4..256`; None for anything else."""
    low, dots, high = value.partition("..") if isinstance(value, str) else ("", "", "")
    return (low.strip(), high.strip()) if dots else None


def resolve_ranks(value: Any) -> tuple[int, ...]:
    """Return the ranks of a list, or of a range: `4..256` is 4, 8, 16 and so on up to 256."""
    ends = _ends(value)
    if ends is None:
        return tuple(sorted(_each("ranks", _parts(value, ","), _rank)))
    low, high = map(_rank, ends)
    if low > high:
        raise StudyError(f"--ranks {value}: the first is the larger", "Write the lower end first.")
    return tuple(doublings(low, high))


def _rank(value: Any) -> int:
    try:
        rank = int(str(value))
    except ValueError:
        rank = 0
    if not 0 < rank <= 1 << 20:
        what = f"--ranks: {shortened(str(value))} is no rank"
        raise StudyError(what, "Give whole numbers such as 8,32,128, or ends as in 4..256.")
    return rank


def _rates(value: Any) -> RateRange | tuple[float, ...]:
    ends = _ends(value)
    if ends is None:
        return tuple(sorted(_each("learning-rates", _parts(value, ","), _rate)))
    low, high = map(_rate, ends)
    if low >= high:
        raise StudyError(f"--learning-rates {value}: the first is not the smaller", "Write the lower end first.")
    return RateRange(low=low, high=high)


def _rate(value: Any) -> float:
    try:
        rate = float(value)
    except (TypeError, ValueError):
        rate = 0.0
    if not 0 < rate < math.inf:
        what = f"--learning-rates: {shortened(str(value))} is no learning rate"
        raise StudyError(what, "Give numbers above 0 such as 1e-4,3e-4, or ends as in 1e-5..1e-3.")
    return rate


def _adapter(option: str, value: Any) -> Any:
    """Value of a field of the adapter, checked."""
    field = option.replace("-", "_")
    several = option == "target-modules" and isinstance(value, str)
    values = [part.strip() for part in value.split(",")] if several else value
    try:
        return getattr(AdapterSpec.model_validate({field: values}), field)
    except ValidationError as error:
        message = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise StudyError(f"--{option} {shortened(str(value))}: {message}", _HELP) from None
