"""What adapters reach of a model: which modules, what share of its parameters and FLOPs, and what is left out."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate, chain
from typing import Any, NamedTuple

from peft.tuners.lora import ParamWrapper
from torch import nn
from transformers import PreTrainedModel

from rankscope.lora.adapters import lora_layers, wrapped_modules
from rankscope.lora.targets import base_modules, of_routed_experts
from rankscope.model.quantized import is_quantized


class Coverage(NamedTuple):
    """What the adapters of a study reach."""

    modules: dict[str, int]  # adapted modules, by their own names
    parameters: float  # share of the model's parameters that are in adapted modules
    flops: float  # share of a token's FLOPs, without attention's products over pairs of tokens
    left_out: dict[str, dict[str, int]]  # by reason: numbers of modules, by the part of the model that they are
    full_rank: dict[str, int]  # rank above which an adapter only adds parameters, by the module's own name
    tied: bool  # whether the output layer has the weights of the input embeddings
    whole: list[str]  # modules that are trained beside the adapters


def find_coverage(model: PreTrainedModel, left_out: Mapping[Any, Iterable[str]], unreached: Iterable[str]) -> Coverage:
    """Coverage of a model that carries adapters, and may lie on the meta device. `left_out` has names by reason:
    `rankscope.lora.targets.Targets`. Layers in `unreached` will lose their adapters, since they get no gradient."""
    out = {reason: list(names) for reason, names in [*left_out.items(), ("unreached", unreached)] if names}
    dead = out.get("unreached", [])
    adapted = {name: layer for name, layer in lora_layers(model) if name not in set(dead)}
    trees = {}
    for reason, names in out.items():
        others = chain(adapted, *(found for other, found in out.items() if other != reason))
        trees[reason] = _with_stars(subtrees(names, others))
    dead_trees = tuple(f"{tree}." for tree in subtrees(dead, adapted))
    reached = {_weight_of(name, layer) for name, layer in adapted.items()}
    ours, total = [0.0, 0.0], [0.0, 0.0]
    for weight, *sizes in _sizes(model, dead_trees):
        total = [known + size for known, size in zip(total, sizes, strict=True)]
        ours = [known + size * (weight in reached) for known, size in zip(ours, sizes, strict=True)]
    parameters, flops = (part / max(1, whole) for part, whole in zip(ours, total, strict=True))
    own = {name: _own_name(name, layer) for name, layer in adapted.items()}
    full_rank: dict[str, int] = {}
    for name, layer in adapted.items():
        smaller = min(layer.in_features or 1, layer.out_features or 1)
        full_rank[own[name]] = min(full_rank.get(own[name], smaller), smaller)
    return Coverage(
        modules=dict(Counter(own.values())),
        parameters=parameters,
        flops=flops,
        left_out=trees,
        full_rank=full_rank,
        tied=getattr(model.get_output_embeddings(), "weight", 0) is getattr(model.get_input_embeddings(), "weight", 1),
        whole=[name.rpartition(".")[2] for name, _ in wrapped_modules(model)],
    )


def subtrees(names: Iterable[str], others: Iterable[str]) -> dict[str, int]:
    """Largest parts of a model that hold some of `names` and none of `others`, with how many of `names` each holds."""
    prefixes = {prefix for other in others for prefix in _prefixes(other)}
    return dict(Counter(next((p for p in _prefixes(name) if p not in prefixes), name) for name in names))


def _prefixes(name: str) -> list[str]:
    """`a.b.c` -> `a`, `a.b`, `a.b.c`."""
    return list(accumulate(name.split("."), "{}.{}".format))


def _with_stars(trees: Mapping[str, int]) -> dict[str, int]:
    """Parts of a model that differ in numbers alone, added up."""
    found: Counter[str] = Counter()
    for tree, count in trees.items():
        found[re.sub(r"(?<=\.)\d+(?=\.|$)", "*", tree)] += count
    return dict(found)


def _weight_of(name: str, layer: Any) -> str:
    """Name of the weight that a LoRA layer adapts; PEFT nests the wrappers of several parameters of one module."""
    key = layer.parameter_name if isinstance(layer, ParamWrapper) else "weight"
    return f"{name.removesuffix('.base_layer')}.{key}"


def _own_name(name: str, layer: Any) -> str:
    """A module's name within its layer, or the parameter's."""
    parts = _weight_of(name, layer).rsplit(".", 2)
    return parts[-2] if parts[-1] == "weight" else parts[-1]


def _sizes(model: PreTrainedModel, unreached: tuple[str, ...]) -> Iterator[tuple[str, int, float]]:
    """Each weight's name, its parameters, and how many of them multiply a token."""
    active, seen = _active_experts(model.config.get_text_config()), set[int]()
    for name, module in base_modules(model):
        for key, weight in module.named_parameters(recurse=False):
            size = weight.numel()
            if key == "weight" and is_quantized(module):
                size = module.in_features * module.out_features  # type: ignore[operator, assignment]
            multiplies = weight.dim() > 1 and not isinstance(module, nn.Embedding)
            multiplies = multiplies and not f"{name}.".startswith(unreached)
            flops = size * (active if of_routed_experts(name) else 1.0) * multiplies
            yield f"{name}.{key}", 0 if id(weight) in seen else size, flops
            seen.add(id(weight))


def _active_experts(config: Any) -> float:
    """Share of the routed experts through which a token passes."""
    chosen, experts = (
        next((value for key in keys if isinstance(value := getattr(config, key, None), int) and value), None)
        for keys in (
            ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"),
            ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
        )
    )
    return min(1.0, chosen / experts) if chosen and experts else 1.0
