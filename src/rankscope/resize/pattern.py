"""Where rank matters: ranks by layer for the parameters of a uniform rank, proposed from what trained adapters use.

A study's largest rank shows how much each layer's update has to say; the layers whose next direction has most energy
for its parameters get it. Whether that is any better than the same rank everywhere is a question of its own: the
proposal is a study, which trains both in the same packs and judges them (`rankscope.analysis.variants`).
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
from rankscope.lora.svd import Decomposed, decompose, parameters, place, ranks_within, uniform_ranks
from rankscope.spec.candidates import Trial
from rankscope.spec.models import StudySpec
from rankscope.spec.resolve import write_yaml
from rankscope.study.study import Study


class Proposal(NamedTuple):
    """Ranks by layer, and the study that tries them."""

    rank: int
    """The uniform rank that it is held against."""
    ranks: dict[str, int]
    parameters: int
    uniform_parameters: int
    trained: Sequence[Trial]
    """Whose adapters it is made of."""
    spec: StudySpec


def propose(study: Study, rank: int | None = None) -> Proposal:
    """Ranks by layer for the parameters of `rank`; by default that of the verdict, or the study's lowest.

    Singular values are averaged over seeds, as energies.

    Raises:
        StudyError: no trial of the study's largest rank is done, or `rank` is not below it.
        StudyDirectoryError: an adapter is damaged.
        ModelError: an adapter cannot be read.
    """
    trained = trained_trials(study)
    largest, own = trained[0].candidate.rank, sorted(study.spec.ranks)
    if rank is None:
        rank = study.verdict["rank"] if study.file("verdict.json").exists() else None
        rank = rank if rank is not None and rank < largest else own[0]
    if not 0 < rank < largest:
        raise StudyError(
            f"--rank {rank}: expected 1 to {largest - 1}",
            f"What layers want is read off rank {largest}, the study's largest; a pattern has to be below it.",
        )
    layers = mean_layers([study.adapter_file(trial).parent for trial in trained])
    uniform = parameters(layers, uniform_ranks(layers, rank))
    ranks = ranks_within(layers, uniform)
    adapter = study.spec.adapter.model_copy(
        update={"rank_pattern": {layer: found for layer, found in ranks.items() if found != rank}}
    )
    if not adapter.rank_pattern:
        raise StudyError(
            f"every layer wants rank {rank}, so there is no pattern to try", "Rank matters alike everywhere here."
        )
    changes = {
        "name": f"{study.spec.name[:90]}-pattern",
        "ranks": (rank,),
        "learning_rates": (trained[0].candidate.learning_rate,),
        "variants": ("pattern",),
        "adapter": adapter,
        "reference": study.spec.reference.model_copy(update={"full": False, "learning_rates": None}),
    }
    return Proposal(rank, ranks, parameters(layers, ranks), uniform, trained, study.spec.model_copy(update=changes))


def mean_layers(folders: Sequence[Path]) -> list[Decomposed]:
    """The layers of several adapters of one shape, with the roots of their singular values' mean squares."""
    adapters = [[decompose(factors) for factors in read_adapter(folder).layers] for folder in folders]
    return [
        layers[0]._replace(values=torch.stack([layer.values for layer in layers]).square().mean(dim=0).sqrt())
        for layers in zip(*adapters, strict=True)
    ]


def write_proposal(proposal: Proposal, file: Path) -> None:
    """Writes the study's file.

    Raises:
        StudyError: there is one.
        StudyDirectoryError: it cannot be written.
    """
    if file.exists():
        raise StudyError(f"{file} exists", "Choose another --out, or remove it.")
    write_atomic(file, write_yaml(proposal.spec))


def by_module(proposal: Proposal) -> pd.DataFrame:
    """One row a module: `module layers mean lowest highest` of the proposed ranks."""
    rows = [{"module": place(layer)[1], "rank": rank} for layer, rank in proposal.ranks.items()]
    grouped = pd.DataFrame(rows).groupby("module", sort=False)["rank"]
    table = grouped.agg(layers="size", mean="mean", lowest="min", highest="max")
    return table.reset_index()
