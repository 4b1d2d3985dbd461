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
from rankscope.jobs.job import Say
from rankscope.lora import svd
from rankscope.lora.saved import SavedAdapter, find_adapter, read_adapter, write_adapter
from rankscope.model.checks import pinned
from rankscope.model.load import load_model
from rankscope.resize import loss_budget as budget
from rankscope.resize.rules import Rule, option_name
from rankscope.spec.models import ModelSpec
from rankscope.spec.options import assemble
from rankscope.study.study import Study
from rankscope.text import catalogue
from rankscope.text.formats import loss, signed_percent
from rankscope.train.prepare import prepare_data

_ROUNDING = 1e-4  # relative: how far two losses of the same tensors may lie apart on a GPU
_BUDGET = "max_loss_increase"
_SUFFIXES = {"rank": "r", "budget_rank": "budget", _BUDGET: "loss"}


class Resized(NamedTuple):
    """A smaller adapter: shares, bytes, nats per label token."""

    adapter: str  # its folder
    rule: dict[str, float]
    parameters_before: int
    parameters_after: int
    file_bytes_before: int
    file_bytes_after: int
    kept_energy: float  # share of the energy of all layers
    layers: pd.DataFrame  # one row per layer: `layer module block old_rank new_rank kept_energy relative_error`
    loss: dict[str, Any] | None  # see `_smallest_within`


def resize(
    adapter: str,
    rule: Rule,
    out: Path | None = None,
    revision: str | None = None,
    uniform: bool = False,
    data: Mapping[str, Any] | None = None,
    sets: Sequence[str] = (),
    say: Say = lambda message: None,
    language: str = "en",
) -> Resized:
    """Write a smaller adapter to `out`, by default a folder beside the adapter.

    `uniform`, `data` (options of `rankscope.spec.options` that name model and data) and `sets` (assignments over them)
    belong to the rule `max_loss_increase`. Without data it takes model and held-out rows from the adapter's study.
    Raises StudyError: `out` is not empty, the rank exceeds the adapter's, or an option does not go with the rule;
    ModelError, DataError: the adapter, the model or the data cannot be used.
    """
    text, options = catalogue.load(language), {name: value for name, value in (data or {}).items() if value is not None}
    given = [*options, *["set"] * bool(sets), *["uniform"] * uniform]
    if given and rule.name != _BUDGET:
        raise StudyError(f"{option_name(given[0])} goes with {option_name(_BUDGET)} alone", "Leave one of them out.")
    source = find_adapter(adapter, revision)
    saved = read_adapter(source)
    svd.check_resizable(saved)
    if saved.foreign:
        say(text("resize.foreign", adapter=adapter, name=saved.foreign))
    folder = out or _beside(adapter, source, rule)
    check_empty(folder)
    layers = [svd.decompose(factors) for factors in saved.layers]
    measure = None
    if rule.name == _BUDGET:
        held_out = find_held_out(source, saved, options, sets)
        ranks, measure = _smallest_within(saved, layers, *held_out, rule.value, uniform, say, text)
    else:
        ranks = _ranks(saved, layers, rule)
    smaller = svd.resized(saved, layers, ranks)
    file_bytes = write_adapter(smaller, folder)
    return Resized(
        adapter=str(folder),
        rule={rule.name: rule.value},
        parameters_before=sum(factors.a.numel() + factors.b.numel() for factors in saved.layers),
        parameters_after=svd.parameters(layers, ranks),
        file_bytes_before=(source / SAFETENSORS_WEIGHTS_NAME).stat().st_size,
        file_bytes_after=file_bytes,
        kept_energy=svd.kept_energy(layers, ranks),
        layers=_by_layer(layers, smaller, ranks),
        loss=measure(folder) if measure else None,
    )


def _beside(adapter: str, source: Path, rule: Rule) -> Path:
    """Folder such as ADAPTER-r16, beside the adapter's; in the working directory for an adapter from the hub."""
    suffix = f"-{_SUFFIXES.get(rule.name, rule.name)}{rule.value:g}"
    if not Path(adapter).is_dir():
        return Path(adapter.rsplit("/", 1)[-1] + suffix)
    named = source if source.name not in ("", "..") else source.resolve()
    return named.with_name(named.name + suffix)


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


def find_held_out(
    folder: Path, saved: SavedAdapter, options: Mapping[str, Any], sets: Sequence[str]
) -> tuple[ModelSpec, Tokens]:
    """Model and held-out rows that the options name, or those of the study that `folder` lies in. Raises StudyError: no
    study is found, and the model or the data are not named; ModelError, DataError: they cannot be used."""
    trials, base = folder.resolve().parent.parent, saved.config.base_model_name_or_path
    if "dataset" in options:
        own = {"model": base, "revision": None if Path(base).is_dir() else saved.config.revision} if base else {}
        if "model" not in {**options, **own}:
            raise StudyError("--model is missing: the adapter names no base model", "Name the one it was trained on.")
        spec = pinned(assemble({}, {**({} if "model" in options else own), **options}, sets))
        return spec.model, prepare_data(spec).eval
    if trials.name != "trials" or not Study.is_at(trials.parent):
        raise StudyError("--dataset is missing: the adapter lies in no study", "Name data that it was not trained on.")
    for name in [*(name for name in options if name not in ("device", "dtype")), *["set"] * bool(sets)]:
        what = f"{option_name(name)} needs --dataset: without it, model and data are those of {trials.parent}"
        raise StudyError(what, "Add --dataset, or leave it out.")
    study = Study.open(trials.parent)
    model = ModelSpec.model_validate(study.spec.model.model_dump() | dict(options))
    return model, load(study.path / "data").eval


def _smallest_within(
    saved: SavedAdapter,
    layers: Sequence[svd.Decomposed],
    spec: ModelSpec,
    tokens: Tokens,
    limit: float,
    uniform: bool,
    say: Say,
    text: catalogue.Catalogue,
) -> tuple[budget.Ranks, Callable[[Path], dict[str, Any]]]:
    """Ranks of the smallest truncation whose held-out loss rises by at most the share `limit`, and a function that
    measures the adapter that was written and returns what there is to say of its loss."""
    model = load_model(spec)
    whole = budget.held_out_losses(model, saved, tokens)
    say(text("resize.whole", loss=loss(whole.mean), examples=text.count("examples", len(tokens))))
    measured = list[budget.MeasuredTruncation]()

    def evaluate(ranks: budget.Ranks) -> float:
        return budget.held_out_losses(model, svd.resized(saved, layers, ranks), tokens).mean

    for one in budget.measure_truncations(layers, uniform, evaluate, whole.mean, limit):
        measured.append(one)
        found = {"loss": loss(one.loss), "increase": signed_percent(one.increase)}
        say(text("resize.measured", n=f"{one.parameters:,}", **found))
    best = budget.smallest_within(measured, limit)
    if best is None:
        what = f"{option_name(_BUDGET)} {limit:g}: even at full rank the rounded update exceeds it"
        raise StudyError(what, "Allow a larger one.")

    chosen = best.loss

    def measure(folder: Path) -> dict[str, Any]:
        after = budget.held_out_losses(model, read_adapter(folder), tokens)
        if abs(after.mean / chosen - 1) > _ROUNDING:
            what = f"{folder}: its held-out loss is {after.mean:.6g}, and {chosen:.6g} before it was written"
            raise ModelError(what, "This is a bug in rankscope: report it.")
        lost, rule = budget.difference(after, whole), "uniform" if uniform else "most_energy"
        return {
            "before": whole.mean,
            "after": after.mean,
            "difference": lost.mean,
            "standard_error": lost.standard_error,
            "increase": after.mean / whole.mean - 1,
            "max_increase": limit,
            "examples": lost.examples,
            "tried": [one._asdict() | {"rule": rule, "within": one.increase <= limit} for one in measured],
        }

    return best.ranks, measure


def _by_layer(layers: Sequence[svd.Decomposed], smaller: SavedAdapter, ranks: budget.Ranks) -> pd.DataFrame:
    rows = []
    for layer, new in zip(layers, smaller.layers, strict=True):
        old = layer.factors
        block, module = svd.split_layer_name(old.layer)
        lost = svd.kept_energy([layer], ranks), svd.relative_error(old, new)
        rows.append([old.layer, module, block, old.rank, new.rank, *lost])
    names = ["layer", "module", "block", "old_rank", "new_rank", "kept_energy", "relative_error"]
    return pd.DataFrame(rows, columns=names)


def describe(result: Resized) -> dict[str, Any]:
    """Content of `--json`."""
    largest = float(result.layers["relative_error"].max())
    return result._asdict() | {"largest_relative_error": largest, "layers": result.layers.to_dict("records")}
