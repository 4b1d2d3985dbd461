"""Growth of a study: what another question may add to it, and what makes it another study.

`RULES` has every field that grows or is free, with the reason; any other field is fixed. Only a value that somebody
wrote adds or changes anything: a default adds nothing.
"""

from collections.abc import Iterator, Sequence
from itertools import chain, count
from pathlib import Path
from shlex import quote
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel

from rankscope.errors import StudyError
from rankscope.spec.models import StudySpec
from rankscope.spec.options import set_field
from rankscope.spec.resolve import resolve_spec
from rankscope.study.records import FactsRecord


class Rule(NamedTuple):
    """Effect of another value of a field, and why."""

    kind: Literal["grows", "free", "fixed"]  # the study gets both values; the newest; or it is another study
    reason: str


_RULES = {
    Rule("grows", "each has trials of its own"): "ranks learning_rates seeds seeds_by_rank variants adapter.alpha",
    Rule("grows", "full fine-tuning has trials of its own"): "reference.full",
    Rule("grows", "full fine-tuning has trials at each of its learning rates"): "reference.learning_rates",
    Rule("free", "a label"): "name",
    Rule("free", "how evidence is judged is no reason to train again"): "verdict",
    Rule("free", "costs are measured beside the trials"): "measure.profiles",
    Rule("free", "answers are for the eye, and are made again"): "measure.answers measure.answer_tokens",
    Rule("free", "adapters are scored again"): "measure.task measure.task_items measure.task_tokens",
    Rule("free", "a resumed pack ends as one that was not stopped"): (
        "training.checkpoint_minutes training.checkpoint_steps"
    ),
    Rule("free", "trials do not depend on their pack; packs that exist stay"): "training.trials_per_pack",
    Rule("free", "the rows are the same"): "data.force",
    Rule("free", "where it trains is logged"): "model.device",
    Rule("fixed", "in a longer schedule every step has another learning rate"): "training.steps training.epochs",
    Rule("grows", "finished trials are evaluated on more of the set; held-out rows are fixed"): "data.eval_rows",
    Rule("fixed", "all trials are judged on the same rows"): "data.eval_dataset data.eval_split",
}
RULES = {field: rule for rule, fields in _RULES.items() for field in fields.split()}
"""Rules of fields, and of all fields of a group."""

OF_VARIANTS = {"adapter.loraplus_lr_ratio": "loraplus", "adapter.rank_pattern": "pattern"}
"""Fields that only a variant reads: they are fixed once the study has it."""

_FIXED = Rule("fixed", "")
_HELD_OUT = Rule("fixed", "held-out rows are not trained on, and trials were trained on all others")


class Growth(NamedTuple):
    spec: StudySpec
    added: dict[str, list[Any]]  # values of fields that grow


def grow(spec: StudySpec, asked: StudySpec, path: Path) -> Growth:
    """Add what `asked` has to the study `spec` in the directory `path`. Raises StudyError: `asked` is another study, or
    both together are contradictory; the message names the fields."""
    before, wanted = dict(_leaves(spec)), dict(_leaves(asked))
    given = {field for field, _ in _leaves(asked, given=True)}
    if wanted["verdict.margin_of"] != before["verdict.margin_of"] and "verdict.margin_of" in given:
        given.add("verdict.margin")  # a share of something else is another margin, if only by default
    values, added, conflicts = spec.model_dump(mode="json"), dict[str, list[Any]](), list[str]()
    for field, value in wanted.items():
        unasked = field not in given or (field in ("model.device", "model.dtype") and value == "auto")
        if unasked or value == before[field]:
            continue
        rule = rule_of(field, spec, path)
        if rule.kind == "fixed":
            why = f": {rule.reason}" if rule.reason else ""
            conflicts.append(f"{field}: {before[field]!r} there, {value!r} asked for{why}")
        elif rule.kind == "free":
            set_field(values, field, value)
        elif field == "seeds_by_rank":
            known = spec.seeds_by_rank
            more = {rank: [seed for seed in seeds if seed not in known.get(rank, ())] for rank, seeds in value.items()}
            if any(more.values()):
                added[field] = [more]
                both = {rank: [*known.get(rank, ()), *more.get(rank, ())] for rank in sorted({*known, *more})}
                set_field(values, field, both)
        elif field == "data.eval_rows":
            added[field] = [value]
            set_field(values, field, value)
        elif new := [one for one in _several(value) if one not in _known(spec, field)]:
            added[field] = new
            set_field(values, field, True if value is True else [*_known(spec, field), *new])
    if conflicts:
        raise StudyError(
            f"{path} holds another study:\n" + "\n".join(f"  - {line}" for line in conflicts),
            f"Give this one a directory of its own, --out {free_name(path)}, or leave these fields as they are: "
            f"`rankscope run {quote(str(path))}` takes them from there.",
        )
    return Growth(resolve_spec(values, f"what {path} would become"), added)


def with_seeds(spec: StudySpec, ranks: Sequence[int], count: int) -> StudySpec:
    """The question with at least `count` seeds of these ranks: seeds that others have come first, so that they pair."""
    known = sorted({*spec.seeds, *chain(*spec.seeds_by_rank.values())})
    order, by_rank = [*known, *range(known[-1] + 1, known[-1] + 1 + count)], dict(spec.seeds_by_rank)
    for rank in ranks:
        own = {*spec.seeds, *by_rank.get(rank, ())}
        more = [seed for seed in order if seed not in own][: max(0, count - len(own))]
        if more:
            by_rank[rank] = (*by_rank.get(rank, ()), *more)
    return spec.model_copy(update={"seeds_by_rank": by_rank})


def free_name(path: Path) -> str:
    """First of PATH-2, PATH-3, ... that does not exist, as a shell takes it."""
    return quote(str(next(other for n in count(2) if not (other := path.with_name(f"{path.name}-{n}")).exists())))


def rule_of(field: str, spec: StudySpec, path: Path) -> Rule:
    """Rule of a field such as `training.steps` in the study `spec` in the directory `path`."""
    if field == "data.eval_rows" and not (spec.data.eval_dataset or spec.data.eval_split):
        facts = FactsRecord.find(path / "data" / "facts.json")
        return RULES[field] if facts and facts.eval_id else _HELD_OUT
    if field in OF_VARIANTS and OF_VARIANTS[field] not in spec.variants:
        return Rule("free", "no trial depends on it")
    return RULES.get(field) or RULES.get(field.partition(".")[0], _FIXED)


def _leaves(model: BaseModel, prefix: str = "", given: bool = False) -> Iterator[tuple[str, Any]]:
    """Fields of a question with dotted names; with `given` those that somebody wrote."""
    for name in type(model).model_fields:
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            yield from _leaves(value, f"{prefix}{name}.", given)
        elif not given or name in model.model_fields_set:
            yield f"{prefix}{name}", value


def _several(value: Any) -> list[Any]:
    """Values of a field that grows; none for None and False."""
    return list(value) if isinstance(value, tuple) else [value] if value else []


def _known(spec: StudySpec, field: str) -> list[Any]:
    """Values that a study has of a field that grows: of full fine-tuning's learning rates also the default ones."""
    if field == "reference.learning_rates":
        return list(dict.fromkeys(trial.learning_rate for trial in spec.reference_trials()))
    group, _, name = field.rpartition(".")
    return _several(getattr(getattr(spec, group) if group else spec, name))
