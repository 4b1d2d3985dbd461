"""Which modules of a model get an adapter: `all-linear`, `all-linear+experts`, or names.

`all-linear` is PEFT's, every linear module but the output layer, without three kinds. Routed experts hold most of a
model's parameters and each sees few tokens: they are asked for by `all-linear+experts`. Routers choose experts, and
change abruptly. What cannot carry LoRA would end the training. The coverage of a study names what was left out.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import torch
from peft import LoraConfig, LoraModel
from peft.tuners.lora import LoraLayer
from peft.utils import transformers_weight_conversion as conversion
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from rankscope.errors import StudyError, did_you_mean
from rankscope.model.quantized import is_quantized
from rankscope.spec.candidates import ALL_LINEAR, ALL_LINEAR_AND_EXPERTS

LeftOut = Literal["output", "experts", "routers", "refused", "own_forward", "renamed"]
"""Why a module gets no adapter: it is the output layer, of routed experts, or a router; PEFT refuses it in this
architecture; its forward is no linear layer's; or PEFT takes its name for that of experts, and has neither dropout nor
DoRA for it then."""


class Targets(NamedTuple):
    """Full names of what is adapted, and of what `all-linear` left out."""

    modules: tuple[str, ...]  # PEFT's target_modules
    parameters: tuple[str, ...]  # PEFT's target_parameters: experts that lie in one tensor, (E, O, D) or (E, D, O)
    left_out: dict[LeftOut, tuple[str, ...]]


class _Anatomy(NamedTuple):
    """Modules of a model without adapters' own, by what they are."""

    modules: dict[str, nn.Module]
    linear: tuple[str, ...]
    experts: tuple[str, ...]  # linear modules of routed experts
    parameters: tuple[str, ...]  # experts' weights that lie in one tensor
    flat: tuple[str, ...]  # those in one matrix (DBRX), whose rows are of several experts: no adapter is one expert's
    routers: frozenset[str]


def find_targets(model: nn.Module, asked: str | Sequence[str], plain: bool = True) -> Targets:
    """Resolve `adapter.target_modules` on a model, whether it carries adapters already or not. `plain` is false for
    LoRA with dropout and for DoRA, which PEFT does not have on parameters. Raises StudyError: a name matches nothing,
    or something that cannot carry LoRA; nothing is left to adapt."""
    anatomy = _look_at(model)
    if not isinstance(asked, str):
        return _named(model, anatomy, asked, plain)
    with_experts, taken = asked == ALL_LINEAR_AND_EXPERTS, _taken_for_experts(model)
    output: Any = getattr(model, "get_output_embeddings", lambda: None)()
    output = output.get_base_layer() if isinstance(output, LoraLayer) else output
    left: defaultdict[LeftOut, list[str]] = defaultdict(list)
    modules, parameters = list[str](), list[str]()
    for name in anatomy.linear:
        layer, renamed = anatomy.modules[name], _leaf(name) in taken
        reason: LeftOut | None = None
        if layer is output:
            reason = "output"
        elif name in anatomy.routers:
            reason = "routers"
        elif name in anatomy.experts and not with_experts:
            reason = "experts"
        elif _refused(model, name):  # this and the next are tried last: they take time
            reason = "refused"
        elif not _is_linear(layer):
            reason = "own_forward"
        elif renamed and not plain:
            reason = "renamed"
        if reason:
            left[reason].append(name)
        elif renamed:
            parameters.append(f"{name}.weight")
        else:
            modules.append(name)
    left["routers"] += [name for name in anatomy.modules if name in anatomy.routers - set(anatomy.linear)]
    left["experts"] += [*(() if with_experts else anatomy.parameters), *anatomy.flat]
    if with_experts and anatomy.parameters and not plain:
        raise _no_dropout(anatomy.parameters[0])
    if with_experts and not (anatomy.experts or anatomy.parameters):
        why = "experts in a layout that PEFT has no adapter for" if anatomy.flat else "no routed experts"
        what = f"adapter.target_modules: {ALL_LINEAR_AND_EXPERTS}: this model has {why}"
        raise StudyError(what, f"Use {ALL_LINEAR}.")
    parameters += anatomy.parameters if with_experts else ()
    if not modules and not parameters:
        raise _wrong(anatomy, f"{asked}: this model has no linear module that can carry LoRA")
    left_out = {reason: tuple(names) for reason, names in left.items() if names}
    return Targets(tuple(modules), tuple(parameters), left_out)


def for_peft(model: nn.Module, targets: Targets) -> tuple[list[str], list[str]]:
    """target_modules and target_parameters of PEFT's configuration: the shortest endings that no other name has."""
    modules = dict(base_modules(model))
    weights = [f"{name}.{key}" for name, module in modules.items() for key, _ in module.named_parameters(recurse=False)]
    return _endings(targets.modules, modules), _endings(targets.parameters, weights)


def _endings(names: Sequence[str], known: Iterable[str]) -> list[str]:
    others = {ending for other in set(known) - set(names) for ending in _all_endings(other)}
    short = (next((e for e in _all_endings(name) if e not in others), name) for name in names)
    return list(dict.fromkeys(short))


def _all_endings(name: str) -> Iterable[str]:
    """`a.b.c` -> `c`, `b.c`, `a.b.c`."""
    return accumulate(reversed(name.split(".")), "{1}.{0}".format)


def _named(model: nn.Module, anatomy: _Anatomy, asked: Sequence[str], plain: bool) -> Targets:
    """Resolve names, each of which matches modules or parameters whose names end in it."""
    modules, parameters, taken = list[str](), list[str](), _taken_for_experts(model)
    for name in asked:
        found, weights = [other for other in anatomy.modules if _ends_in(other, name)], list[str]()
        if not any(other in anatomy.linear for other in found):  # else it is a dense layer's down_proj
            weights = [w for w in anatomy.parameters if _ends_in(w, name) or _ends_in(w.rpartition(".")[0], name)]
        inside = [other for other in anatomy.experts if any(other.startswith(f"{stack}.") for stack in found)]
        if not found and not weights:
            guess = did_you_mean(name, linear_names(anatomy), most=2, cutoff=0.5)
            raise _wrong(anatomy, f"{name} matches no module of this model{guess}")
        modules += inside
        parameters += weights
        for other in [] if weights or inside else found:
            layer, kind = anatomy.modules[other], type(anatomy.modules[other]).__name__
            if other in anatomy.routers:
                raise _wrong(anatomy, f"{name} is a router ({kind}): it gets no adapter")
            if not isinstance(getattr(layer, "weight", None), torch.Tensor) and not is_quantized(layer):
                raise _wrong(anatomy, f"{name} is a {kind}, and no layer with a weight of its own")
            if isinstance(layer, nn.Linear) and not _is_linear(layer):
                raise _wrong(anatomy, f"{name} is a {kind}, which cannot carry LoRA")
            if _leaf(other) in taken and isinstance(layer, nn.Linear):
                parameters.append(f"{other}.weight")
            else:
                modules.append(other)
        if parameters and not plain:
            raise _no_dropout(parameters[0].removesuffix(".weight"))
    return Targets(tuple(dict.fromkeys(modules)), tuple(dict.fromkeys(parameters)), {})


def _no_dropout(name: str) -> StudyError:
    what = f"adapter.target_modules: {name} is a parameter to PEFT, which has neither dropout nor DoRA for those"
    return StudyError(what, "Set adapter.lora_dropout to 0, leave dora out of the variants, or name other modules.")


def _wrong(anatomy: _Anatomy, what: str) -> StudyError:
    names = ", ".join(linear_names(anatomy))
    return StudyError(f"adapter.target_modules: {what}", f"Linear modules of this model: {names}.")


def linear_names(anatomy: _Anatomy) -> list[str]:
    """Last parts of the names of what can be adapted, for messages."""
    names = [name for name in anatomy.linear if name not in anatomy.routers]
    return sorted({_leaf(name) for name in (*names, *anatomy.parameters)})


def _leaf(name: str) -> str:
    """`a.b.c` -> `c`."""
    return name.rpartition(".")[2]


def _ends_in(name: str, ending: str) -> bool:
    """Whether PEFT takes `ending` for this name."""
    return name == ending or name.endswith(f".{ending}")


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules of a model as (name, module), without what adapters have added."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(inside):
            continue
        if isinstance(module, LoraLayer):
            inside, module = (f"{name}.",), module.get_base_layer()
        elif isinstance(module, AuxiliaryTrainingWrapper):
            inside, module = (f"{name}.",), module.original_module
        yield name, module


def _look_at(model: nn.Module) -> _Anatomy:
    modules = dict(base_modules(model))
    linear = tuple(name for name, module in modules.items() if isinstance(module, nn.Linear | Conv1D))
    experts = tuple(name for name in linear if of_routed_experts(name))
    counts: dict[str, int] = {}  # experts of each block that has some
    parameters, flat = list[str](), list[str]()
    for stack, module in modules.items():
        own = dict(module.named_parameters(recurse=False)) if _is_stack(stack, module) else {}
        if stacked := {name: len(value) for name, value in own.items() if value.dim() == 3}:
            parameters += [f"{stack}.{name}" for name in stacked]
            counts[stack.rpartition(".")[0]] = next(iter(stacked.values()))
        flat += [f"{stack}.{name}" for name, value in own.items() if value.dim() == 2 and "bias" not in name]
    flat = [name for name in flat if not any(other.startswith(f"{name.rpartition('.')[0]}.") for other in parameters)]
    for name in experts:
        if match := re.match(r"(.*?)\.?[^.]*expert[^.]*\.(\d+)\.", name):
            counts[match[1]] = max(counts.get(match[1], 0), int(match[2]) + 1)
    routers = frozenset(name for name, module in modules.items() if _is_router(name, module, modules, counts))
    return _Anatomy(modules, linear, experts, tuple(parameters), tuple(flat), routers)


def of_routed_experts(name: str) -> bool:
    """Whether a module of that name is one of routed experts, or within them; shared experts are not."""
    return any("expert" in part and "shared" not in part for part in name.lower().split("."))


def _is_stack(name: str, module: nn.Module) -> bool:
    """Whether the module holds the weights of all experts itself."""
    if isinstance(module, nn.Linear | Conv1D | nn.modules.conv._ConvNd | nn.Embedding):
        return False
    kind = type(module).__name__.lower()
    return of_routed_experts(name) or ("expert" in kind and "shared" not in kind)


def _is_router(name: str, module: nn.Module, modules: dict[str, nn.Module], counts: dict[str, int]) -> bool:
    """Whether the module chooses experts: by its class or its parent's, or a gate of as many outputs as experts."""
    block, _, leaf = name.rpartition(".")
    if not isinstance(module, nn.Linear) and not any(True for _ in module.parameters(recurse=False)):
        return False
    kinds = [type(module).__name__.lower(), type(modules.get(block)).__name__.lower()]
    if any("router" in kind or "topkgat" in kind for kind in kinds):
        return True
    outer, _, parent = block.rpartition(".")
    gate = any(word in part for part in (leaf, parent) for word in ("gate", "router", "wg"))
    return gate and isinstance(module, nn.Linear) and module.out_features in (counts.get(block), counts.get(outer))


def _refused(model: nn.Module, name: str) -> bool:
    """Whether PEFT refuses the module in this architecture, as it does Mamba's out_proj."""
    try:
        LoraModel._check_target_module_compatiblity(None, LoraConfig(), model, _leaf(name))  # type: ignore
    except ValueError:
        return True
    return False


def _is_linear(layer: Any) -> bool:
    """Whether the layer's forward is that of a linear layer, (..., D) to (..., O), tried where a class has its own."""
    if type(layer).forward in (nn.Linear.forward, Conv1D.forward) or is_quantized(layer):
        return True
    weights = {name: value.to("meta") for name, value in layer.named_parameters()}
    x = torch.empty(2, 3, layer.in_features, device="meta", dtype=layer.weight.dtype)
    try:
        out = torch.func.functional_call(layer, weights, (x,))
    except Exception:  # whatever a layer that wants other inputs makes of it
        return False
    return isinstance(out, torch.Tensor) and out.shape == (2, 3, layer.out_features)


def _taken_for_experts(model: nn.Module) -> Iterable[str]:
    """Names of modules that PEFT takes for those which experts had before transformers 5, such as gate_proj. It adapts
    the experts in their place, so modules of that name (dense layers, shared experts) are given to it as parameters:
    their adapter is the same, in memory and in the file."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    family = getattr(conversion, "_MODEL_TO_CONVERSION_PATTERN", {}).get(kind)
    names: dict[str, str] = getattr(conversion, "_MOE_TARGET_MODULE_MAPPING", {}).get(family, {})
    return names.keys()
