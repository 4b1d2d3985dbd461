"""A smaller adapter from a trained one: each layer's update cut to its largest singular values.

The cut is the best of its rank in the Frobenius norm (Eckart and Young 1936). It is written as PEFT's own conversion
to LoRA writes it: A = V^T, B = U S, and a scaling of 1.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import NamedTuple

import torch
from peft import LoraConfig
from torch import Tensor

from rankscope.errors import ModelError
from rankscope.lora.saved import Factors, SavedAdapter
from rankscope.lora.spectrum import energy_rank


class Decomposed(NamedTuple):
    """The thin SVD of a layer's update, in float64: `u * values @ v`, the largest value first."""

    factors: Factors
    u: Tensor  # (O, K), K the smallest of O, R and D
    values: Tensor  # (K,)
    v: Tensor  # (K, D)

    @property
    def parameters_per_rank(self) -> int:
        return self.u.shape[0] + self.v.shape[1]

    def cut(self, rank: int) -> Factors:
        """The update's best approximation of `rank`, with a scaling of 1, in float32."""
        a, b = self.v[:rank], self.u[:, :rank] * self.values[:rank]
        return self.factors._replace(a=a.float(), b=b.float(), scaling=1.0)


def decompose(factors: Factors) -> Decomposed:
    """The SVD of `scaling * b @ a` by way of QR: no matrix of the layer's own size is made."""
    q_b, r_b = torch.linalg.qr(factors.b.double())
    q_a, r_a = torch.linalg.qr(factors.a.double().T)
    u, values, v = torch.linalg.svd(factors.scaling * (r_b @ r_a.T), full_matrices=False)
    return Decomposed(factors, q_b @ u, values, v @ q_a.T)


def check_resizable(adapter: SavedAdapter) -> None:
    """Raises ModelError where the adapter is more than its factors, so that cutting them would change the rest."""
    config = adapter.config
    start = config.init_lora_weights
    if config.use_dora:
        raise ModelError("the adapter is of DoRA, whose magnitudes belong to its factors", "Only plain LoRA is cut.")
    if config.lora_bias:
        raise ModelError("the adapter has biases in its factors (lora_bias)", "Only plain LoRA is cut.")
    if isinstance(start, str) and start.startswith(("pissa", "olora", "corda", "loftq", "lora_ga", "mica")):
        raise ModelError(
            f"the adapter belongs to a base model that {start} changed",
            "Save it with PEFT's path_initial_model_for_weight_conversion, which makes plain LoRA of it.",
        )


def uniform_ranks(layers: Sequence[Decomposed], rank: int) -> dict[str, int]:
    """`rank` for each layer, or what a layer has where that is less."""
    return {layer.factors.layer: min(rank, len(layer.values)) for layer in layers}


def ranks_by_energy(layers: Sequence[Decomposed], share: float) -> dict[str, int]:
    """The lowest rank of each layer that keeps `share` of its energy, the sum of squared singular values; at least 1.

    It is what PEFT's conversion does with a rank given as a fraction, and kohya's `sv_fro` with sqrt(share), but that
    kohya's always leaves out at least the last singular value.
    """
    return {layer.factors.layer: max(1, energy_rank(layer.values, share)) for layer in layers}


def ranks_by_sum(layers: Sequence[Decomposed], share: float) -> dict[str, int]:
    """The lowest rank of each layer that keeps `share` of the sum of its singular values: kohya's `sv_cumulative`."""
    return {layer.factors.layer: max(1, energy_rank(layer.values.sqrt(), share)) for layer in layers}


def ranks_within(layers: Sequence[Decomposed], parameters: int) -> dict[str, int]:
    """Ranks that keep most energy with at most so many parameters, at least 1 for each layer.

    Direction by direction, the one with most energy for each of its parameters first: since a layer's singular values
    fall, that is the best there is, up to the last direction that no longer has room.
    """
    ranks = {layer.factors.layer: 1 for layer in layers}
    left = parameters - sum(layer.parameters_per_rank for layer in layers)
    heap = [_next(layer, number, 1) for number, layer in enumerate(layers) if len(layer.values) > 1]
    heapq.heapify(heap)
    while heap:
        _, number, rank = heapq.heappop(heap)
        layer = layers[number]
        if layer.parameters_per_rank > left:
            continue  # a smaller layer's may still fit
        left -= layer.parameters_per_rank
        ranks[layer.factors.layer] = rank + 1
        if rank + 1 < len(layer.values):
            heapq.heappush(heap, _next(layer, number, rank + 1))
    return ranks


def _next(layer: Decomposed, number: int, rank: int) -> tuple[float, int, int]:
    """The direction after `rank`, as a heap takes it."""
    return -float(layer.values[rank] ** 2) / layer.parameters_per_rank, number, rank


def kept_energy(layers: Sequence[Decomposed], ranks: Mapping[str, int]) -> float:
    """The share of all layers' energy that the cut keeps; 1 for an adapter of zeros."""
    total = sum(float((layer.values**2).sum()) for layer in layers)
    kept = sum(float((layer.values[: ranks[layer.factors.layer]] ** 2).sum()) for layer in layers)
    return kept / total if total else 1.0


def parameters(layers: Sequence[Decomposed], ranks: Mapping[str, int]) -> int:
    """Of an adapter with these ranks."""
    return sum(layer.parameters_per_rank * ranks[layer.factors.layer] for layer in layers)


def resized(adapter: SavedAdapter, layers: Sequence[Decomposed], ranks: Mapping[str, int]) -> SavedAdapter:
    """The adapter with each layer cut to its rank. `rank_pattern` names the layers that differ from the commonest."""
    given = list(ranks.values())
    common = max(set(given), key=lambda rank: (given.count(rank), rank))
    pattern = {name: rank for name, rank in ranks.items() if rank != common}
    old = {field.name: getattr(adapter.config, field.name) for field in fields(LoraConfig) if field.init}
    changed = {
        "r": common,
        "lora_alpha": common,  # a scaling of 1
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "use_rslora": False,
        "init_lora_weights": True,
    }
    cut = [layer.cut(ranks[layer.factors.layer]) for layer in layers]
    return SavedAdapter(LoraConfig(**{**old, **changed}), cut, adapter.others)
