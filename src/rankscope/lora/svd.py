"""Spectrum of a trained adapter, and its truncated SVD.

A layer's update is `scaling * B @ A`. With B = Q_B R_B and A^T = Q_A R_A (QR), its singular values are those of the
small matrix R_B R_A^T, so no matrix of the layer's own size is ever made.
"""

import copy
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from rankscope.errors import ModelError
from rankscope.lora.saved import Factors, SavedAdapter

ENERGIES = (0.90, 0.95, 0.99)  # shares of the energy, the squared Frobenius norm: rank_90, rank_95 and rank_99


class Decomposed(NamedTuple):
    """Thin SVD of a layer's update, `u * values @ v`, in float64, largest value first."""

    factors: Factors
    u: Tensor  # (O, K), K the smallest of O, R and D
    values: Tensor  # (K,)
    v: Tensor  # (K, D)

    @property
    def parameters_per_rank(self) -> int:
        return self.u.shape[0] + self.v.shape[1]

    def truncate(self, rank: int) -> Factors:
        """Best approximation of the update with `rank`, a scaling of 1, in float32."""
        a, b = self.v[:rank], self.u[:, :rank] * self.values[:rank]
        return self.factors._replace(a=a.float(), b=b.float(), scaling=1.0)


def decompose(factors: Factors) -> Decomposed:
    """SVD of `scaling * b @ a` by QR of both factors."""
    q_b, r_b = torch.linalg.qr(factors.b.double())
    q_a, r_a = torch.linalg.qr(factors.a.double().T)
    u, values, v = torch.linalg.svd(factors.scaling * (r_b @ r_a.T), full_matrices=False)
    return Decomposed(factors, q_b @ u, values, v @ q_a.T)


def singular_values(factors: Factors) -> Tensor:
    """Singular values of the layer's update, largest first, in float64: (min(O, R, D),)."""
    values: Tensor = torch.linalg.svdvals(factors.scaling * _core(factors.b.double(), factors.a.double()))
    return values


def _core(b: Tensor, a: Tensor) -> Tensor:
    """R_B R_A^T, (min(O, R), min(D, R)), which has the singular values of `b @ a`."""
    core: Tensor = torch.linalg.qr(b, mode="r").R @ torch.linalg.qr(a.T, mode="r").R.T
    return core


def effective_rank(values: Tensor) -> float:
    """Exponential of the entropy of the singular values, as shares of their sum (Roy and Vetterli 2007). It is between
    1 and the rank, which it reaches if all values are equal; 0 for an update of zero."""
    total = values.sum()
    if total == 0:
        return 0.0
    shares = values[values > 0] / total
    return float(torch.exp(-(shares * shares.log()).sum()))


def stable_rank(values: Tensor) -> float:
    """Squared Frobenius norm over squared spectral norm (Rudelson and Vershynin 2007); 0 for an update of zero."""
    return float((values**2).sum() / values[0] ** 2) if values[0] > 0 else 0.0


def energy_rank(values: Tensor, share: float) -> int:
    """Number of largest singular values with `share` of the energy, the sum of squares; 0 for an update of zero."""
    energy = (values**2).cumsum(0)
    if energy[-1] == 0:
        return 0
    return min(len(values), int(torch.searchsorted(energy, share * energy[-1])) + 1)


def spectrum(layers: Sequence[Factors]) -> pd.DataFrame:
    """Table with one row per layer: `layer module block rank scaling frobenius_norm spectral_norm effective_rank
    stable_rank rank_90 rank_95 rank_99 singular_values`. `block` is the first number in the layer's name, -1 without
    one; `module` is the name after it. `rank_90` and so on are `energy_rank`; `singular_values` is a list."""
    return pd.DataFrame([_row(factors) for factors in layers])


def _row(factors: Factors) -> dict[str, Any]:
    values = singular_values(factors)
    block, module = split_layer_name(factors.layer)
    return {
        "layer": factors.layer,
        "module": module,
        "block": block,
        "rank": factors.rank,
        "scaling": factors.scaling,
        "frobenius_norm": float(values.norm()),
        "spectral_norm": float(values[0]),
        "effective_rank": effective_rank(values),
        "stable_rank": stable_rank(values),
        **{f"rank_{share * 100:.0f}": energy_rank(values, share) for share in ENERGIES},
        "singular_values": values.tolist(),
    }


def split_layer_name(layer: str) -> tuple[int, str]:
    """Block and module: `model.layers.3.self_attn.q_proj` -> (3, `self_attn.q_proj`); -1 and the last part without. All
    experts of a block are one module: `model.layers.3.mlp.experts.7.down_proj` -> (3, `mlp.experts.*.down_proj`)."""
    match = re.search(r"(?:^|\.)(\d+)\.(.+)$", layer)
    return (int(match[1]), re.sub(r"\.\d+(?=\.|$)", ".*", match[2])) if match else (-1, layer.rsplit(".", 1)[-1])


def by_module(frame: pd.DataFrame) -> pd.DataFrame:
    """Table with one row per module: `module layers rank effective_rank stable_rank rank_90 rank_95 rank_99
    rank_99_max`, as means over its layers, and the maximum."""
    grouped = frame.groupby("module", sort=False)
    columns = ["rank", "effective_rank", "stable_rank", *(f"rank_{share * 100:.0f}" for share in ENERGIES)]
    table = grouped[columns].mean()
    table.insert(0, "layers", grouped.size())
    table["rank_99_max"] = grouped["rank_99"].max()
    return table.reset_index()


# Values of init_lora_weights that change the base model, and would again when a truncated adapter is loaded.
_INITS_CHANGING_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_NOT_PLAIN = {
    "use_dora": "DoRA's magnitudes belong to the whole update",
    "lora_bias": "its factors have biases",
    "use_qalora": "its factors are of pooled inputs",
    "use_bdlora": "its factors are block-diagonal",
    "kasa_config": "the base model was changed for it",
    "monteclora_config": "its factors are random",
    "arrow_config": "it routes between adapters",
    "ensure_weight_tying": "two layers share its factors",
}


def check_resizable(adapter: SavedAdapter) -> None:
    """Raise ModelError if the adapter is not plain LoRA, so that truncation would not preserve it."""
    config, init = adapter.config, str(adapter.config.init_lora_weights).lower()
    reasons = {option: reason for option, reason in _NOT_PLAIN.items() if getattr(config, option, None)}
    if experts := next((layer for layer in adapter.layers if layer.of_experts), None):
        reasons["target_parameters"] = f"the factors of {experts.parameter} are of many experts"
    for option, reason in reasons.items():
        raise ModelError(f"the adapter is no plain LoRA ({option}): {reason}", "Only plain LoRA can be resized.")
    if init.startswith(_INITS_CHANGING_BASE):
        todo = "Save it with PEFT's path_initial_model_for_weight_conversion, which makes plain LoRA of it."
        raise ModelError(f"the adapter belongs to a base model that {init} changed", todo)
    if adapter.unknown:
        what = f"its configuration has {adapter.unknown[0]}, which the installed PEFT does not know"
        raise ModelError(what, "Update PEFT.")


def uniform_ranks(layers: Sequence[Decomposed], rank: int) -> dict[str, int]:
    """Rank of each layer: `rank`, or the layer's own if that is lower."""
    return {layer.factors.layer: min(rank, len(layer.values)) for layer in layers}


def ranks_by_energy(layers: Sequence[Decomposed], share: float) -> dict[str, int]:
    """Lowest rank of each layer that keeps `share` of its energy, the sum of squared singular values; at least 1.
    PEFT's conversion does the same with a fractional rank, as does kohya's `sv_fro` with sqrt(share), except that
    kohya's always drops at least the last singular value."""
    return {layer.factors.layer: max(1, energy_rank(layer.values, share)) for layer in layers}


def ranks_by_sum(layers: Sequence[Decomposed], share: float) -> dict[str, int]:
    """Lowest rank of each layer that keeps `share` of the sum of its singular values: kohya's `sv_cumulative`."""
    return {layer.factors.layer: max(1, energy_rank(layer.values.sqrt(), share)) for layer in layers}


def ranks_within(layers: Sequence[Decomposed], parameters: int) -> dict[str, int]:
    """Ranks that keep the most energy within so many parameters, but at least 1 for each layer. Directions are taken in
    the order of `order_by_energy`, skipping those that no longer fit. If all layers have the same size the result is
    optimal; otherwise it loses less than the energy of the first direction skipped."""
    left, taken = parameters - sum(layer.parameters_per_rank for layer in layers), []
    for number in order_by_energy(layers):
        if layers[number].parameters_per_rank <= left:
            left -= layers[number].parameters_per_rank
            taken.append(number)
    return ranks_of(layers, taken)


def order_by_energy(layers: Sequence[Decomposed]) -> list[int]:
    """Layer indices of all nonzero directions but each layer's first, by falling energy per parameter."""
    gains = [
        (-float(value**2) / layer.parameters_per_rank, number)
        for number, layer in enumerate(layers)
        for value in layer.values[1:]
        if value > 0
    ]
    return [number for _, number in sorted(gains)]


def ranks_of(layers: Sequence[Decomposed], directions: Iterable[int]) -> dict[str, int]:
    """Rank of each layer: 1, plus the number of times that its index is among the directions."""
    more = Counter(directions)
    return {layer.factors.layer: 1 + more[number] for number, layer in enumerate(layers)}


def kept_energy(layers: Sequence[Decomposed], ranks: Mapping[str, int]) -> float:
    """Share of all layers' energy that these ranks keep; 1 for an adapter of zeros."""
    total = sum(float((layer.values**2).sum()) for layer in layers)
    kept = sum(float((layer.values[: ranks[layer.factors.layer]] ** 2).sum()) for layer in layers)
    return kept / total if total else 1.0


def relative_error(whole: Factors, truncated: Factors) -> float:
    """Frobenius norm of the difference of two updates, relative to `whole`; 0 if that is 0. It includes the rounding to
    the file's own type."""
    own_b, own_a = whole.scaling * whole.b.double(), whole.a.double()
    b, a = truncated.b.to(truncated.dtype).double(), truncated.a.to(truncated.dtype).double()
    norm = float(_core(own_b, own_a).norm())
    difference = _core(torch.cat([own_b, -truncated.scaling * b], dim=1), torch.cat([own_a, a]))
    return float(difference.norm()) / norm if norm else 0.0


def parameters(layers: Sequence[Decomposed], ranks: Mapping[str, int]) -> int:
    """Number of parameters of an adapter with these ranks."""
    return sum(layer.parameters_per_rank * ranks[layer.factors.layer] for layer in layers)


def resized(adapter: SavedAdapter, layers: Sequence[Decomposed], ranks: Mapping[str, int]) -> SavedAdapter:
    """Adapter with each layer truncated to its rank. `r` is the largest rank, by which servers size their buffers;
    `rank_pattern` names the layers with a lower one."""
    config = copy.deepcopy(adapter.config)
    config.r = config.lora_alpha = max(ranks.values())  # a scaling of 1
    targets = {layer.factors.layer: layer.factors.target for layer in layers}
    lower = {targets[name]: rank for name, rank in ranks.items() if rank < config.r}
    config.rank_pattern = {_pattern(name, targets.values()): rank for name, rank in lower.items()}
    config.alpha_pattern = dict(config.rank_pattern)
    config.use_rslora, config.init_lora_weights, config.eva_config = False, True, None
    return SavedAdapter(config, [layer.truncate(ranks[layer.factors.layer]) for layer in layers], adapter.others)


def _pattern(layer: str, layers: Iterable[str]) -> str:
    """Key of rank_pattern that PEFT matches with this layer only: its name, anchored if another name ends in it."""
    like = re.compile(rf"(.*\.)?({layer})$")  # as PEFT reads it
    alone = all(other == layer or not like.match(other) for other in layers)
    return layer if alone else f"^{re.escape(layer)}"
