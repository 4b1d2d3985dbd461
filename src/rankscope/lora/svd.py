"""The spectrum of a trained adapter: which of its rank each layer really uses.

A layer's update is `scaling * B @ A`. With B = Q_B R_B and A^T = Q_A R_A (QR), its singular values are those of the
small matrix R_B R_A^T: no matrix of the layer's own size is ever made.
"""

import re
from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from rankscope.lora.saved import Factors

ENERGIES = (0.90, 0.95, 0.99)
"""Shares of the squared Frobenius norm."""


def singular_values(factors: Factors) -> Tensor:
    """Of the layer's update, largest first, in float64: (min(O, R, D),)."""
    r_b = torch.linalg.qr(factors.b.double(), mode="r").R  # (min(O, R), R)
    r_a = torch.linalg.qr(factors.a.double().T, mode="r").R  # (min(D, R), R)
    values: Tensor = torch.linalg.svdvals(r_b @ r_a.T)
    return values * abs(factors.scaling)


def effective_rank(values: Tensor) -> float:
    """exp of the entropy of the singular values' shares of their sum (Roy and Vetterli 2007, "The effective rank").

    Between 1 and the rank, which it reaches where all are equal; 0 for an update of zero.
    """
    total = values.sum()
    if total == 0:
        return 0.0
    shares = values[values > 0] / total
    return float(torch.exp(-(shares * shares.log()).sum()))


def stable_rank(values: Tensor) -> float:
    """Squared Frobenius norm over squared spectral norm (Rudelson and Vershynin 2007); 0 for an update of zero."""
    return float((values**2).sum() / values[0] ** 2) if values[0] > 0 else 0.0


def energy_rank(values: Tensor, share: float) -> int:
    """How many of the largest singular values hold `share` of the energy, the sum of squares; 0 for zero."""
    energy = (values**2).cumsum(0)
    if energy[-1] == 0:
        return 0
    return min(len(values), int(torch.searchsorted(energy, share * energy[-1])) + 1)


def spectrum(layers: Sequence[Factors]) -> pd.DataFrame:
    """One row a layer: `layer module block rank scaling frobenius_norm spectral_norm effective_rank stable_rank rank_90
    rank_95 rank_99 singular_values`.

    `block` is the layer's first number, -1 without one; `module` its name within the block. `rank_90` and so on are
    `energy_rank`; `singular_values` is a list.
    """
    return pd.DataFrame([_row(factors) for factors in layers])


def _row(factors: Factors) -> dict[str, Any]:
    values = singular_values(factors)
    block, module = place(factors.layer)
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


def place(layer: str) -> tuple[int, str]:
    """`model.layers.3.self_attn.q_proj` -> (3, `self_attn.q_proj`); without a number -1 and the last part."""
    found = re.search(r"(?:^|\.)(\d+)\.(.+)$", layer)
    return (int(found[1]), found[2]) if found else (-1, layer.rsplit(".", 1)[-1])


def by_module(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a module: `module layers rank effective_rank stable_rank rank_90 rank_95 rank_99 rank_99_max`; means over
    its layers, and the largest."""
    grouped = frame.groupby("module", sort=False)
    columns = ["rank", "effective_rank", "stable_rank", *(f"rank_{share * 100:.0f}" for share in ENERGIES)]
    table = grouped[columns].mean()
    table.insert(0, "layers", grouped.size())
    table["rank_99_max"] = grouped["rank_99"].max()
    return table.reset_index()
