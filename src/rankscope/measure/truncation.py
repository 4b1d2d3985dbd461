"""What a trained adapter loses when it is cut to lower ranks, and what a short training gives back.

Each layer's update is cut to its largest singular values (`rankscope.lora.svd`). A cut is the study's own candidate
of that rank, with its alpha and scaling, so that it trains as that candidate does; the scaling s goes into the
factors, which each get the root of the singular values: A = sqrt(S / s) V, B = U sqrt(S / s).
"""

import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from rankscope.data.tokens import TokenizedData
from rankscope.errors import ModelError
from rankscope.lora.adapters import remove_adapters
from rankscope.lora.saved import read_adapter
from rankscope.lora.svd import Decomposed, check_resizable, decompose, kept_energy, uniform_ranks
from rankscope.spec.candidates import Trial
from rankscope.spec.models import StudySpec
from rankscope.train.engine import Engine, ExampleLosses
from rankscope.train.loop import choose_engine
from rankscope.train.probe import use_own_forward
from rankscope.train.step import Member, finite_weights, make_member, total_steps, train_step

log = logging.getLogger(__name__)

RECOVERY_RATE = 0.1
"""Of the candidate's learning rate. The schedule had ended near 0, where the trained weights settled: at the full rate
they would leave that place and, in a few steps without a schedule's end, not settle again."""

ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 5e-3}
"""Relative: by how much two forwards of one adapter, divided into other batches, may differ in held-out loss."""


class Wanted(NamedTuple):
    """One loss that is to be measured: of a cut to `rank`, after so many steps of recovery training, or none."""

    rank: int
    recover_steps: int


class Cut(NamedTuple):
    """The held-out loss of a cut."""

    rank: int
    recover_steps: int
    kept_energy: float
    """The share of the update's energy, the sum of its squared singular values, that the cut keeps."""
    losses: ExampleLosses | None
    """None where the recovery training diverged."""

    def describe(self) -> dict[str, Any]:
        """As curve.json has it."""
        found = self.losses
        return {
            "rank": self.rank,
            "recover_steps": self.recover_steps,
            "kept_energy": self.kept_energy,
            "eval_loss": found.mean if found else None,
            "losses": found.loss.tolist() if found else None,
            "label_tokens": found.label_tokens.tolist() if found else None,
        }


def take_cuts(
    model: PreTrainedModel,
    spec: StudySpec,
    trial: Trial,
    folder: Path,
    eval_loss: float,
    wanted: Sequence[Wanted],
    data: TokenizedData,
) -> Iterator[list[Cut]]:
    """Cuts the adapter of `trial` in `folder`, and gives what is `wanted` of it piece by piece.

    Its own rank stands for the adapter as it is. That one is evaluated first in any case: its loss must be the
    `eval_loss` that was recorded. A piece's ranks add up to no more than the trial's own (but for one that the base's
    dropout keeps alone), so that nothing needs more memory than its training did.

    Raises:
        ModelError: the adapter is no plain LoRA, or its loss is another than the recorded one.
    """
    adapter = read_adapter(folder)
    check_resizable(adapter)
    layers = [_single(decompose(factors)) for factors in adapter.layers]
    most = trial.candidate.rank
    lower = sorted({rank for rank, _ in wanted} - {most})
    for ranks in [[most], *pieces(lower, most, alone=spec.training.base_dropout == "keep")]:
        yield from _take_piece(model, spec, trial, layers, eval_loss, ranks, wanted, data)


def pieces(ranks: Sequence[int], most: int, alone: bool = False) -> list[list[int]]:
    """Consecutive ranks whose sum is at most `most`; with `alone` single ones."""
    found: list[list[int]] = []
    for rank in ranks:
        if found and not alone and sum(found[-1]) + rank <= most:
            found[-1].append(rank)
        else:
            found.append([rank])
    return found


def _take_piece(
    model: PreTrainedModel,
    spec: StudySpec,
    trial: Trial,
    layers: Sequence[Decomposed],
    eval_loss: float,
    ranks: Sequence[int],
    wanted: Sequence[Wanted],
    data: TokenizedData,
) -> Iterator[list[Cut]]:
    attention = model.config._attn_implementation
    members = {rank: make_member(model, _trial(spec, trial, rank), spec.training, 1, spec.model.id) for rank in ranks}
    kept = {rank: kept_energy(layers, uniform_ranks(layers, rank)) for rank in ranks}
    # Chosen while the adapters still add nothing: the probe holds one of them against the model's own forward.
    engine = choose_engine(model, list(members.values()), spec.training, data.longest_row).engine
    for rank, member in members.items():
        _fill(member, layers, None if rank == trial.candidate.rank else rank)
    uncut = trial.candidate.rank
    now = [rank for rank in ranks if rank == uncut or Wanted(rank, 0) in wanted]
    losses = dict(zip(now, engine.evaluate(data.eval, [members[rank].trial.name for rank in now]), strict=True))
    if uncut in losses:
        _check_control(trial, losses[uncut].mean, eval_loss, ROUNDING[model.dtype])
    yield [Cut(rank, 0, kept[rank], losses[rank]) for rank in now if Wanted(rank, 0) in wanted]
    for steps in sorted({steps for _, steps in wanted} - {0}):
        trained = {rank: members[rank] for rank in ranks if Wanted(rank, steps) in wanted}
        if trained:
            log.info("%s cut to %s: %d steps", trial.name, ", ".join(map(str, trained)), steps)
            after = _recover(engine, trained, spec, data, steps)
            yield [Cut(rank, steps, kept[rank], after[rank]) for rank in trained]
    use_own_forward(model, attention)
    remove_adapters(model)


def _trial(spec: StudySpec, trial: Trial, rank: int) -> Trial:
    """The study's trial of this rank beside `trial`, at recovery's learning rate."""
    candidate = next(
        one
        for one in spec.model_copy(update={"ranks": (rank,)}).candidates()
        if one.learning_rate == trial.candidate.learning_rate and one.variant == trial.candidate.variant
    )
    slower = candidate.model_copy(update={"learning_rate": RECOVERY_RATE * candidate.learning_rate})
    return Trial(candidate=slower, seed=trial.seed)


def _fill(member: Member, layers: Sequence[Decomposed], rank: int | None) -> None:
    """Gives a member the trained adapter cut to `rank`, or as it is. A layer that has no so many directions has zeros
    for the rest.
    """
    assert isinstance(member.trial, Trial)
    for layer in layers:
        a, b = (member.weights[key].data for key in layer.factors.keys)
        if rank is None:
            a.copy_(layer.factors.a)
            b.copy_(layer.factors.b)
            continue
        root = (layer.values[:rank] / member.trial.candidate.scaling).sqrt()
        a.zero_()[: len(root)] = root[:, None] * layer.v[:rank]
        b.zero_()[:, : len(root)] = layer.u[:, :rank] * root


def _single(layer: Decomposed) -> Decomposed:
    """In float32, which takes half the memory; the values stay float64."""
    return layer._replace(u=layer.u.float(), v=layer.v.float())


def _check_control(trial: Trial, found: float, recorded: float, tolerance: float) -> None:
    if not abs(found - recorded) <= tolerance * recorded:
        raise ModelError(
            f"{trial.name}: its adapter's held-out loss is {found:.6g} here, and {recorded:.6g} was recorded",
            "Use the versions and the machine that the study was run with: machine.json has them.",
        )


def _recover(
    engine: Engine, cuts: dict[int, Member], spec: StudySpec, data: TokenizedData, steps: int
) -> dict[int, ExampleLosses | None]:
    """Trains the cuts together for `steps` more, on the batches that would have come next; their losses after it.

    AdamW starts afresh, since what it had is of other factors. The rate rises over the first tenth, two steps at least,
    for its first estimates are of single gradients, and stays.
    """
    warmup = max(2, -(-steps // 10))
    active = {
        rank: cut._replace(scheduler=LambdaLR(cut.optimizer, lambda step: min(1.0, (step + 1) / warmup)))
        for rank, cut in cuts.items()
    }
    first = total_steps(spec.training, len(data.train))
    for step in range(first, first + steps):
        metrics = train_step(engine, list(active.values()), data.train, spec.training, step)
        active = {rank: cut for (rank, cut), found in zip(active.items(), metrics, strict=True) if found.finite}
        if not active:
            break
    active = {rank: cut for rank, cut in active.items() if finite_weights(cut)}
    losses = engine.evaluate(data.eval, [cut.trial.name for cut in active.values()])
    found = dict(zip(active, losses, strict=True))
    return {rank: found[rank] if rank in found and math.isfinite(found[rank].mean) else None for rank in cuts}
