"""Ranks by layer with the parameters of a uniform rank, proposed from the singular values of trained adapters.

The adapters of a study's largest rank show the energy of each layer's directions; ranks go to the directions with the
most energy per parameter. The proposal is a study that trains it and the uniform rank in the same packs and compares
them (`rankscope.analysis.variants`).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch

from rankscope.errors import StudyError
from rankscope.files import write_atomic
from rankscope.jobs.curve import trained_trials
from rankscope.lora.saved import read_adapter
from rankscope.lora.svd import Decomposed, decompose, parameters, ranks_within, split_layer_name, uniform_ranks
from rankscope.spec.candidates import alpha_of
from rankscope.spec.models import StudySpec
from rankscope.spec.resolve import write_yaml
from rankscope.study.study import Study


class Proposal(NamedTuple):
    rank: int  # the uniform rank that they are compared with
    ranks: dict[str, int]
    parameters: int
    uniform_parameters: int
    spec: StudySpec


def propose(study: Study, rank: int | None = None) -> Proposal:
    """Propose ranks by layer with the parameters of `rank`, by default the verdict's rank, or the study's lowest.

    The energies of singular values are averaged over seeds. Raises StudyError: no trial of the study's largest rank is
    done, or `rank` is not below it; StudyDirectoryError: an adapter is corrupt; ModelError: an adapter cannot be read.
    """
    trained = trained_trials(study)
    largest = trained[0].candidate
    if rank is None:
        found = study.find_verdict().get("rank")
        rank = found if found is not None and found < largest.rank else min(study.spec.ranks)
    if not 0 < rank < largest.rank:
        todo = f"Ranks by layer are derived from rank {largest.rank}, the study's largest, and must be below it."
        raise StudyError(f"--rank {rank}: expected 1 to {largest.rank - 1}", todo)
    layers = mean_layers([study.adapter_file(trial).parent for trial in trained])
    if experts := next((layer.factors for layer in layers if layer.factors.of_experts), None):
        what = f"the study's adapters are of experts ({experts.target}), which share one rank in PEFT's format"
        raise StudyError(what, "Ranks by layer are proposed for studies on all-linear.")
    uniform = parameters(layers, uniform_ranks(layers, rank))
    ranks = ranks_within(layers, uniform)
    pattern = {layer: found for layer, found in ranks.items() if found != rank}
    if not pattern:
        raise StudyError(f"every layer gets rank {rank}, so there is no pattern to try", "Keep the uniform rank.")
    alpha = next(one for one in study.spec.adapter.alphas if alpha_of(one, largest.rank) == largest.lora_alpha)
    changes = {
        "name": f"{study.spec.name[:90]}-pattern",
        "ranks": (rank,),
        "learning_rates": (largest.learning_rate,),
        "variants": ("pattern",),
        "adapter": study.spec.adapter.model_copy(update={"alpha": alpha, "rank_pattern": pattern}),
        "reference": study.spec.reference.model_copy(update={"full": False, "learning_rates": None}),
    }
    return Proposal(rank, ranks, parameters(layers, ranks), uniform, study.spec.model_copy(update=changes))


def mean_layers(folders: Sequence[Path]) -> list[Decomposed]:
    """Layers of several adapters of one shape, with the root mean squares of their singular values."""
    adapters = [[decompose(factors) for factors in read_adapter(folder).layers] for folder in folders]
    return [
        layers[0]._replace(values=torch.stack([layer.values for layer in layers]).square().mean(dim=0).sqrt())
        for layers in zip(*adapters, strict=True)
    ]


def write_proposal(proposal: Proposal, file: Path) -> None:
    """Write the study's file. Raises StudyError: the file exists; StudyDirectoryError: it cannot be written."""
    if file.exists():
        raise StudyError(f"{file} exists", "Choose another --out, or remove it.")
    write_atomic(file, write_yaml(proposal.spec))


def by_module(proposal: Proposal) -> pd.DataFrame:
    """`module layers mean lowest highest` of the proposed ranks, one row per module."""
    rows = [{"module": split_layer_name(layer)[1], "rank": rank} for layer, rank in proposal.ranks.items()]
    grouped = pd.DataFrame(rows).groupby("module", sort=False)["rank"]
    return grouped.agg(layers="size", mean="mean", lowest="min", highest="max").reset_index()
