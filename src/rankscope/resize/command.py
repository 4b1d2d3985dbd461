"""What `rankscope resize` does: it chooses each layer's rank, writes the smaller adapter, and says what was lost.

read -> decompose -> ranks (by a rule, or by measured loss) -> cut -> write -> read again and measure
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from rankscope.data.tokens import Tokens, load
from rankscope.errors import ModelError, StudyError
from rankscope.lora.saved import SavedAdapter, find_adapter, read_adapter, write_adapter
from rankscope.lora.svd import (
    Decomposed,
    check_resizable,
    decompose,
    kept_energy,
    parameters,
    place,
    ranks_by_energy,
    ranks_by_sum,
    ranks_within,
    relative_error,
    resized,
    uniform_ranks,
)
from rankscope.model.load import load_model
from rankscope.resize.loss_budget import (
    Difference,
    Ranks,
    Tried,
    best_of,
    difference,
    families,
    held_out_losses,
    smallest_within,
)
from rankscope.spec.models import ModelSpec
from rankscope.spec.options import assemble
from rankscope.study.study import Study
from rankscope.train.engine import ExampleLosses
from rankscope.train.prepare import prepare_data

_ROUNDING = 1e-4
"""Relative: by how much a loss may differ between two evaluations of the same tensors, on a GPU."""


class Rule(NamedTuple):
    """How ranks are chosen: the name of the option, and its value."""

    name: str
    value: float

    @property
    def suffix(self) -> str:
        """Of the name of the folder that is written."""
        short = {"rank": "r", "budget_rank": "budget", "max_loss_increase": "loss"}.get(self.name, self.name)
        return f"-{short}{self.value:g}"


class HeldOut(NamedTuple):
    """What a loss is measured on."""

    model: ModelSpec
    tokens: Tokens


class LossChange(NamedTuple):
    """What the cut did to the held-out loss: of the adapter as it was, and as it was written and read again."""

    before: ExampleLosses
    after: ExampleLosses
    difference: Difference
    limit: float
    """The largest increase that was asked for, as a share of the loss before."""
    tried: list[Tried]
    """In the order in which they were measured."""

    @property
    def increase(self) -> float:
        return self.after.mean / self.before.mean - 1


class Resized(NamedTuple):
    """A smaller adapter that was written."""

    folder: Path
    rule: Rule
    layers: pd.DataFrame
    """One row a layer: `layer module block old_rank new_rank kept_energy relative_error`."""
    parameters: tuple[int, int]
    """Of the factors, before and after."""
    file_bytes: tuple[int, int]
    kept_energy: float
    """The share of all layers' energy."""
    loss: LossChange | None


def choose_rule(options: Mapping[str, Any]) -> Rule:
    """The one option that is given; those not given are None.

    Raises:
        StudyError: it is none or several, or the share is not between 0 and 1.
    """
    given = [(name, value) for name, value in options.items() if value is not None]
    names = [f"--{name.replace('_', '-')}" for name in options]
    if len(given) != 1:
        found = " and ".join(f"--{name.replace('_', '-')}" for name, _ in given) or "none"
        raise StudyError(f"one rule is needed, {found} given", f"Give exactly one of {', '.join(names)}.")
    name, value = given[0]
    return Rule(name, value if isinstance(value, int) else _share(f"--{name.replace('_', '-')}", value))


def _share(option: str, text: str) -> float:
    """`0.5%` or `0.005`."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise StudyError(f"{option} {text}: not a share between 0 and 1", f"For example {option} 0.95, or 95%.")
    return value


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
    """Writes a smaller adapter to `out`, by default a folder beside the adapter's own.

    `data` are options of `rankscope.spec.options` that name model and data, and `sets` assignments over them: for the
    rule `max_loss_increase` alone, which takes both from the study that the adapter lies in where no data are named.

    Raises:
        StudyError: `out` has something in it, the rank is larger than the adapter's, or an option does not go with the
            rule.
        ModelError, DataError: the adapter, the model or the data cannot be used.
    """
    asked = {name: value for name, value in (data or {}).items() if value is not None}
    if rule.name != "max_loss_increase":
        extra = [*asked, *(["set"] if sets else []), *(["uniform"] if uniform else [])]
        if extra:
            raise StudyError(
                f"--{extra[0].replace('_', '-')} goes with --max-loss-increase alone", "Leave one of them out."
            )
    source = find_adapter(adapter, revision)
    saved = read_adapter(source)
    check_resizable(saved)
    folder = out or _beside(adapter, source, rule)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise StudyError(f"{folder} exists and is not empty", "Choose another --out, or remove it.")
    layers = [decompose(factors) for factors in saved.layers]
    tried: list[Tried] = []
    losses = None
    if rule.name == "max_loss_increase":
        losses = _Losses(saved, layers, find_held_out(source, saved, asked, sets))
        ranks = _within_budget(losses, rule.value, uniform, tried, say)
    else:
        ranks = _ranks(saved, layers, rule)
    smaller = resized(saved, layers, ranks)
    file_bytes = write_adapter(smaller, folder)
    return Resized(
        folder,
        rule,
        _by_layer(saved, smaller, layers, ranks),
        (sum(factors.a.numel() + factors.b.numel() for factors in saved.layers), parameters(layers, ranks)),
        ((source / SAFETENSORS_WEIGHTS_NAME).stat().st_size, file_bytes),
        kept_energy(layers, ranks),
        losses.change(folder, rule.value, tried) if losses else None,
    )


def _beside(adapter: str, source: Path, rule: Rule) -> Path:
    """Beside the adapter's folder; in the working directory where it came from the hub."""
    if not Path(adapter).is_dir():
        return Path(adapter.rsplit("/", 1)[-1] + rule.suffix)
    named = source if source.name not in ("", "..") else source.resolve()
    return named.parent / f"{named.name}{rule.suffix}"


def _ranks(saved: SavedAdapter, layers: Sequence[Decomposed], rule: Rule) -> Ranks:
    if rule.name == "energy":
        return ranks_by_energy(layers, rule.value)
    if rule.name == "cumulative":
        return ranks_by_sum(layers, rule.value)
    rank, highest = int(rule.value), max(factors.rank for factors in saved.layers)
    if rank > highest:
        raise StudyError(
            f"--{rule.name.replace('_', '-')} {rank}: the adapter's largest rank is {highest}",
            f"A cut lowers ranks: give {highest} or less.",
        )
    uniform = uniform_ranks(layers, rank)
    return uniform if rule.name == "rank" else ranks_within(layers, parameters(layers, uniform))


def find_held_out(folder: Path, saved: SavedAdapter, asked: Mapping[str, Any], sets: Sequence[str]) -> HeldOut:
    """The model and the held-out rows: those asked for, or of the study that `folder` lies in.

    Raises:
        StudyError: there is no study, and the model or the data are not named.
        ModelError, DataError: they cannot be used.
    """
    trials = folder.resolve().parent.parent
    if "dataset" not in asked and trials.name == "trials" and Study.is_at(trials.parent):
        other = [name for name in asked if name not in ("device", "dtype")] + (["set"] if sets else [])
        if other:
            raise StudyError(
                f"--{other[0].replace('_', '-')} needs --dataset: without it model and data are those of the study "
                f"{trials.parent}",
                "Add --dataset, or leave it out.",
            )
        study = Study.open(trials.parent)
        model = study.spec.model.model_copy(update={name: asked[name] for name in ("device", "dtype") if name in asked})
        return HeldOut(ModelSpec.model_validate(model.model_dump()), load(study.path / "data").eval)
    options = dict(asked)
    if "dataset" not in options:
        raise StudyError("--dataset is missing: the adapter lies in no study", "Name data that it was not trained on.")
    base = saved.config.base_model_name_or_path
    if "model" not in options and base:
        options["model"] = base
        options["revision"] = None if Path(base).is_dir() else saved.config.revision
    if "model" not in options:
        raise StudyError("--model is missing: the adapter names no base model", "Name the model it was trained on.")
    spec = assemble({}, options, sets)
    return HeldOut(spec.model, prepare_data(spec).eval)


class _Losses:
    """Held-out losses of an adapter and its cuts. A cut that was measured is not measured again."""

    def __init__(self, saved: SavedAdapter, layers: Sequence[Decomposed], held_out: HeldOut) -> None:
        self.saved, self.layers, self.tokens = saved, layers, held_out.tokens
        self._model = load_model(held_out.model)
        self._known: dict[tuple[int, ...], ExampleLosses] = {}
        self.whole = self._measure(saved)

    def of_cut(self, ranks: Ranks) -> ExampleLosses:
        key = tuple(ranks.values())
        if key not in self._known:
            self._known[key] = self._measure(resized(self.saved, self.layers, ranks))
        return self._known[key]

    def _measure(self, adapter: SavedAdapter) -> ExampleLosses:
        return held_out_losses(self._model, {"adapter": adapter}, self.tokens)["adapter"]

    def change(self, folder: Path, limit: float, tried: list[Tried]) -> LossChange:
        """Of the adapter as it lies in `folder`."""
        after = self._measure(read_adapter(folder))
        best = best_of(tried, limit)
        if best is None or abs(after.mean / best.losses.mean - 1) > _ROUNDING:
            raise ModelError(
                f"{folder}: its held-out loss is not that of the cut it was made from",
                "A fault of rankscope: report it.",
            )
        return LossChange(self.whole, after, difference(after, self.whole), limit, tried)


def _within_budget(
    losses: _Losses, most: float, uniform: bool, tried: list[Tried], say: Callable[[str], None]
) -> Ranks:
    say(f"Held-out loss of the whole adapter: {losses.whole.mean:.4f}, over {len(losses.tokens):,} examples")
    rules = families(losses.layers, uniform)
    for one in smallest_within(losses.layers, rules, losses.of_cut, losses.whole.mean, most):
        tried.append(one)
        say(f"{one.parameters:,} parameters: {one.losses.mean:.4f} ({one.increase:+.3%})")
    best = best_of(tried, most)
    if best is None:
        raise StudyError(
            f"--max-loss-increase {most:g}: not even the whole update, decomposed and rounded, stays within it",
            "Allow a larger one.",
        )
    return best.ranks


def _by_layer(saved: SavedAdapter, smaller: SavedAdapter, layers: Sequence[Decomposed], ranks: Ranks) -> pd.DataFrame:
    rows = []
    for old, new, layer in zip(saved.layers, smaller.layers, layers, strict=True):
        block, module = place(old.layer)
        rows.append(
            {
                "layer": old.layer,
                "module": module,
                "block": block,
                "old_rank": old.rank,
                "new_rank": new.rank,
                "kept_energy": kept_energy([layer], ranks),
                "relative_error": relative_error(old, new),
            }
        )
    return pd.DataFrame(rows)


def describe(result: Resized) -> dict[str, Any]:
    """The same as data, for `--json`: shares, bytes, nats a label token."""
    found: dict[str, Any] = {
        "adapter": str(result.folder),
        "rule": {result.rule.name: result.rule.value},
        "parameters_before": result.parameters[0],
        "parameters_after": result.parameters[1],
        "file_bytes_before": result.file_bytes[0],
        "file_bytes_after": result.file_bytes[1],
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
                {
                    "rule": one.rule,
                    "parameters": one.parameters,
                    "loss": one.losses.mean,
                    "increase": one.increase,
                    "within": one.increase <= change.limit,
                    "ranks": one.ranks,
                }
                for one in change.tried
            ],
        }
    return found
