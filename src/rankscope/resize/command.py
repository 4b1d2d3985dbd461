"""`rankscope resize`: choose each layer's rank, write the smaller adapter, and measure what was lost.

read -> decompose -> ranks (by a rule, or by measured loss) -> truncate -> write -> read again and measure
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from rankscope.data.tokens import Tokens, load
from rankscope.errors import ModelError, StudyError
from rankscope.files import check_empty
from rankscope.lora import svd
from rankscope.lora.saved import SavedAdapter, find_adapter, read_adapter, write_adapter
from rankscope.model.checks import pinned
from rankscope.model.load import load_model
from rankscope.resize import loss_budget as budget
from rankscope.resize.rules import Rule, option_name
from rankscope.spec.models import ModelSpec
from rankscope.spec.options import assemble
from rankscope.study.study import Study
from rankscope.train.engine import ExampleLosses
from rankscope.train.prepare import prepare_data

_ROUNDING = 1e-4  # relative: how far two losses of the same tensors may lie apart on a GPU
_BUDGET = "max_loss_increase"
_SUFFIXES = {"rank": "r", "budget_rank": "budget", _BUDGET: "loss"}


class HeldOut(NamedTuple):
    """Model and rows that a loss is measured on."""

    model: ModelSpec
    tokens: Tokens


class LossChange(NamedTuple):
    """Held-out loss of the whole adapter and of the smaller one, as it was written and read again."""

    before: ExampleLosses
    after: ExampleLosses
    difference: budget.Difference
    limit: float  # largest allowed increase, relative to the loss before
    tried: list[budget.MeasuredTruncation]  # in the order in which they were measured

    @property
    def increase(self) -> float:
        return self.after.mean / self.before.mean - 1


class Resized(NamedTuple):
    """A smaller adapter in its folder; pairs are (before, after)."""

    folder: Path
    rule: Rule
    layers: pd.DataFrame  # one row per layer: `layer module block old_rank new_rank kept_energy relative_error`
    parameters: tuple[int, int]
    file_bytes: tuple[int, int]
    kept_energy: float  # share of the energy of all layers
    loss: LossChange | None


def resize(
    adapter: str,
    rule: Rule,
    out: Path | None = None,
    revision: str | None = None,
    uniform: bool = False,
    data: Mapping[str, Any] | None = None,
    sets: Sequence[str] = (),
    say: Callable[[str], None] = lambda message: None,
) -> Resized:
    """Write a smaller adapter to `out`, by default a folder beside the adapter.

    `uniform`, `data` (options of `rankscope.spec.options` that name model and data) and `sets` (assignments over them)
    belong to the rule `max_loss_increase`. Without data it takes model and held-out rows from the adapter's study.
    Raises StudyError: `out` is not empty, the rank exceeds the adapter's, or an option does not go with the rule;
    ModelError, DataError: the adapter, the model or the data cannot be used.
    """
    options = {name: value for name, value in (data or {}).items() if value is not None}
    if rule.name != _BUDGET:
        for name in [*options, *(["set"] if sets else []), *(["uniform"] if uniform else [])]:
            raise StudyError(f"{option_name(name)} goes with {option_name(_BUDGET)} alone", "Leave one of them out.")
    source = find_adapter(adapter, revision)
    saved = read_adapter(source)
    svd.check_resizable(saved)
    if saved.foreign:
        say(f"PEFT loads nothing of {adapter}, as it knows no keys such as {saved.foreign}; the resized one it does")
    folder = out or _beside(adapter, source, rule)
    check_empty(folder)
    layers = [svd.decompose(factors) for factors in saved.layers]
    measure = None
    if rule.name == _BUDGET:
        held_out = find_held_out(source, saved, options, sets)
        ranks, measure = _search(saved, layers, held_out, rule.value, uniform, say)
    else:
        ranks = _ranks(saved, layers, rule)
    smaller = svd.resized(saved, layers, ranks)
    file_bytes = write_adapter(smaller, folder)
    return Resized(
        folder,
        rule,
        _by_layer(saved, smaller, layers, ranks),
        (sum(factors.a.numel() + factors.b.numel() for factors in saved.layers), svd.parameters(layers, ranks)),
        ((source / SAFETENSORS_WEIGHTS_NAME).stat().st_size, file_bytes),
        svd.kept_energy(layers, ranks),
        measure(folder) if measure else None,
    )


def _beside(adapter: str, source: Path, rule: Rule) -> Path:
    """Folder such as ADAPTER-r16, beside the adapter's; in the working directory for an adapter from the hub."""
    suffix = f"-{_SUFFIXES.get(rule.name, rule.name)}{rule.value:g}"
    if not Path(adapter).is_dir():
        return Path(adapter.rsplit("/", 1)[-1] + suffix)
    named = source if source.name not in ("", "..") else source.resolve()
    return named.parent / f"{named.name}{suffix}"


def _ranks(saved: SavedAdapter, layers: Sequence[svd.Decomposed], rule: Rule) -> budget.Ranks:
    if rule.name == "energy":
        return svd.ranks_by_energy(layers, rule.value)
    if rule.name == "cumulative":
        return svd.ranks_by_sum(layers, rule.value)
    rank, highest = int(rule.value), max(factors.rank for factors in saved.layers)
    if rank > highest:
        what = f"{option_name(rule.name)} {rank}: the adapter's largest rank is {highest}"
        raise StudyError(what, f"Give {highest} or less.")
    uniform = svd.uniform_ranks(layers, rank)
    return uniform if rule.name == "rank" else svd.ranks_within(layers, svd.parameters(layers, uniform))


def find_held_out(folder: Path, saved: SavedAdapter, options: Mapping[str, Any], sets: Sequence[str]) -> HeldOut:
    """Model and held-out rows that the options name, or those of the study that `folder` lies in. Raises StudyError: no
    study is found, and the model or the data are not named; ModelError, DataError: they cannot be used."""
    trials = folder.resolve().parent.parent
    if "dataset" not in options and trials.name == "trials" and Study.is_at(trials.parent):
        for name in [name for name in options if name not in ("device", "dtype")] + (["set"] if sets else []):
            what = f"{option_name(name)} needs --dataset: without it, model and data are those of {trials.parent}"
            raise StudyError(what, "Add --dataset, or leave it out.")
        study = Study.open(trials.parent)
        model = study.spec.model.model_copy(update=dict(options))
        return HeldOut(ModelSpec.model_validate(model.model_dump()), load(study.path / "data").eval)
    if "dataset" not in options:
        raise StudyError("--dataset is missing: the adapter lies in no study", "Name data that it was not trained on.")
    named, base = dict(options), saved.config.base_model_name_or_path
    if "model" not in named and base:
        named["model"] = base
        named["revision"] = None if Path(base).is_dir() else saved.config.revision
    if "model" not in named:
        raise StudyError("--model is missing: the adapter names no base model", "Name the model it was trained on.")
    spec = pinned(assemble({}, named, sets))
    return HeldOut(spec.model, prepare_data(spec).eval)


def _search(
    saved: SavedAdapter,
    layers: Sequence[svd.Decomposed],
    held_out: HeldOut,
    max_increase: float,
    uniform: bool,
    say: Callable[[str], None],
) -> tuple[budget.Ranks, Callable[[Path], LossChange]]:
    """Ranks of the smallest truncation within the budget, and a function that measures it as it is written."""
    model, tokens, measured = load_model(held_out.model), held_out.tokens, list[budget.MeasuredTruncation]()
    whole = budget.held_out_losses(model, saved, tokens)
    say(f"Held-out loss of the whole adapter: {whole.mean:.4f}, over {len(tokens):,} examples")

    def evaluate(ranks: budget.Ranks) -> ExampleLosses:
        return budget.held_out_losses(model, svd.resized(saved, layers, ranks), tokens)

    rule = budget.rank_rule(layers, uniform)
    for one in budget.measure_truncations(layers, rule, evaluate, whole.mean, max_increase):
        measured.append(one)
        say(f"{one.parameters:,} parameters: {one.losses.mean:.4f} ({one.increase:+.3%})")
    best = budget.smallest_within(measured, max_increase)
    if best is None:
        what = f"{option_name(_BUDGET)} {max_increase:g}: even at full rank the rounded update exceeds it"
        raise StudyError(what, "Allow a larger one.")
    chosen = best.losses.mean

    def change(folder: Path) -> LossChange:
        after = budget.held_out_losses(model, read_adapter(folder), tokens)
        if abs(after.mean / chosen - 1) > _ROUNDING:
            what = f"{folder}: its held-out loss is {after.mean:.6g}, and {chosen:.6g} before it was written"
            raise ModelError(what, "This is a bug in rankscope: report it.")
        return LossChange(whole, after, budget.difference(after, whole), max_increase, measured)

    return best.ranks, change


def _by_layer(
    saved: SavedAdapter, smaller: SavedAdapter, layers: Sequence[svd.Decomposed], ranks: budget.Ranks
) -> pd.DataFrame:
    rows = []
    for old, new, layer in zip(saved.layers, smaller.layers, layers, strict=True):
        block, module = svd.split_layer_name(old.layer)
        lost = svd.kept_energy([layer], ranks), svd.relative_error(old, new)
        rows.append([old.layer, module, block, old.rank, new.rank, *lost])
    names = ["layer", "module", "block", "old_rank", "new_rank", "kept_energy", "relative_error"]
    return pd.DataFrame(rows, columns=names)


def describe(result: Resized) -> dict[str, Any]:
    """Content of `--json`: shares, bytes, nats per label token."""
    found: dict[str, Any] = {
        "adapter": str(result.folder),
        "rule": {result.rule.name: result.rule.value},
        **dict(zip(("parameters_before", "parameters_after"), result.parameters, strict=True)),
        **dict(zip(("file_bytes_before", "file_bytes_after"), result.file_bytes, strict=True)),
        "kept_energy": result.kept_energy,
        "largest_relative_error": float(result.layers["relative_error"].max()),
        "layers": result.layers.to_dict("records"),
        "loss": None,
    }
    if result.loss is not None:
        change = result.loss
        found["loss"] = {
            "before": change.before.mean,
            "after": change.after.mean,
            "difference": change.difference.mean,
            "standard_error": change.difference.standard_error,
            "increase": change.increase,
            "max_increase": change.limit,
            "examples": len(change.before.loss),
            "tried": [
                {"rule": one.rule, "parameters": one.parameters, "loss": one.losses.mean, "increase": one.increase}
                | {"within": one.increase <= change.limit, "ranks": one.ranks}
                for one in change.tried
            ],
        }
    return found
