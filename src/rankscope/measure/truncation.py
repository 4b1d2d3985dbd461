"""Held-out losses of a trained adapter truncated to lower ranks, and after a short recovery training.

Each layer's update is truncated to its largest singular values (`rankscope.lora.svd`). A truncated adapter is the
study's own candidate of that rank, with its alpha and scaling, so that it trains as that candidate does. The scaling s
goes into the factors, each with the root of the singular values: A = sqrt(S / s) V, B = U sqrt(S / s).
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from rankscope.data.batches import total_steps
from rankscope.data.tokens import TokenizedData
from rankscope.errors import ModelError
from rankscope.lora.adapters import remove_adapters
from rankscope.lora.saved import read_adapter
from rankscope.lora.svd import Decomposed, check_resizable, decompose, kept_energy, uniform_ranks
from rankscope.model.mixed import is_mixed
from rankscope.spec.candidates import Trial
from rankscope.spec.models import StudySpec
from rankscope.study.records import Cut
from rankscope.train.engine import Engine, ExampleLosses
from rankscope.train.loop import choose_engine
from rankscope.train.probe import use_own_forward
from rankscope.train.step import TrainState, finite_weights, make_train_state, train_step

log = logging.getLogger(__name__)

RECOVERY_RATE_FRACTION = 0.1
"""Learning rate of recovery over the candidate's. Its schedule ended near 0, where the weights settled: at the full
rate they would leave that optimum and, within a few steps and without a decay, not settle again."""

LOSS_TOLERANCE = {"float32": 1e-4, "mixed": 5e-3}
"""Largest relative difference in held-out loss between two forwards of one adapter in differing batches."""


def evaluate_truncations(
    model: PreTrainedModel,
    spec: StudySpec,
    trial: Trial,
    folder: Path,
    eval_loss: float,
    requests: Sequence[tuple[int, int]],
    data: TokenizedData,
    adapter_sha256: str | None = None,
) -> Iterator[list[Cut]]:
    """Truncate the adapter of `trial` in `folder`, and yield what is requested, pairs of a rank and a number of
    steps of recovery training, a group of ranks at a time.

    The trial's own rank stands for the whole adapter. It is always evaluated first, and must have the recorded
    `eval_loss`. The ranks of a group add up to at most the trial's own, so that none needs more memory than its
    training did; where the base model's dropout is kept, each rank is a group. Raises ModelError: the adapter is not
    plain LoRA, or its loss is not the recorded one.
    """
    adapter = read_adapter(folder)
    check_resizable(adapter)
    # Factors in float32, for half the memory; the singular values stay float64.
    layers = [layer._replace(u=layer.u.float(), v=layer.v.float()) for layer in map(decompose, adapter.layers)]
    whole, attention = trial.candidate.rank, model.config._attn_implementation

    def cuts(losses: Mapping[int, ExampleLosses | None], steps: int) -> list[Cut]:
        return [
            Cut(
                trial=trial.name,
                adapter_sha256=adapter_sha256,
                rank=rank,
                recover_steps=steps,
                kept_energy=kept_energy(layers, uniform_ranks(layers, rank)),
                eval_loss=found.mean if found else None,
                losses=found.loss.tolist() if found else None,
                label_tokens=found.label_tokens.tolist() if found else None,
            )
            for rank, found in losses.items()
            if (rank, steps) in requests
        ]

    lower = sorted({rank for rank, _ in requests} - {whole})
    for ranks in [[whole], *group_ranks(lower, whole, alone=spec.training.base_dropout == "keep")]:
        trials = {rank: _trial(spec, trial, rank) for rank in ranks}
        members = {rank: make_train_state(model, one, spec.training, 1) for rank, one in trials.items()}
        # Chosen while the adapters still add nothing: the probe compares one of them with the model's own forward.
        engine = choose_engine(model, list(members.values()), spec.training).engine
        for rank, member in members.items():
            _fill(member, layers, None if rank == whole else rank)
        now = [rank for rank in ranks if rank == whole or (rank, 0) in requests]
        losses = dict(zip(now, engine.evaluate(data.eval, [trials[rank].name for rank in now]), strict=True))
        most = LOSS_TOLERANCE["mixed" if is_mixed(model) else "float32"] * eval_loss
        if whole in losses and not abs(losses[whole].mean - eval_loss) <= most:
            found = losses[whole].mean
            raise ModelError(
                f"{trial.name}: its adapter's held-out loss is {found:.6g} here, and {eval_loss:.6g} was recorded",
                "Use the versions and the machine that the study was run with: machine.json has them.",
            )
        yield cuts(losses, 0)
        for steps in sorted({steps for _, steps in requests} - {0}):
            trained = {rank: members[rank] for rank in ranks if (rank, steps) in requests}
            if trained:
                log.info("%s truncated to %s: %d steps", trial.name, ", ".join(map(str, trained)), steps)
                yield cuts(_recover(engine, trained, spec, data, steps), steps)
        use_own_forward(model, attention)
        remove_adapters(model)


def group_ranks(ranks: Sequence[int], max_sum: int, alone: bool = False) -> list[list[int]]:
    """Groups of consecutive ranks with a sum of at most `max_sum`; with `alone`, one rank per group."""
    groups: list[list[int]] = []
    for rank in ranks:
        if groups and not alone and sum(groups[-1]) + rank <= max_sum:
            groups[-1].append(rank)
        else:
            groups.append([rank])
    return groups


def _trial(spec: StudySpec, trial: Trial, rank: int) -> Trial:
    """The study's trial of this rank with the seed of `trial`, at the learning rate of recovery."""
    candidate = next(
        one
        for one in spec.model_copy(update={"ranks": (rank,)}).candidates()
        if one.learning_rate == trial.candidate.learning_rate and one.variant == trial.candidate.variant
    )
    slower = candidate.model_copy(update={"learning_rate": RECOVERY_RATE_FRACTION * candidate.learning_rate})
    return Trial(candidate=slower, seed=trial.seed)


def _fill(member: TrainState, layers: Sequence[Decomposed], rank: int | None) -> None:
    """Fill a member's weights with the trained adapter truncated to `rank`, or with the whole one (None). A layer with
    fewer directions has zeros for the rest."""
    assert isinstance(member.trial, Trial)
    for layer in layers:
        if not layer.factors.b.any():
            continue  # of a layer that gets no gradient, as earlier versions saved them
        a, b = (member.weights[key].data for key in layer.factors.keys)
        if rank is None:
            a.copy_(layer.factors.a)
            b.copy_(layer.factors.b)
            continue
        root = (layer.values[:rank] / member.trial.candidate.scaling).sqrt()
        a.zero_()[: len(root)] = root[:, None] * layer.v[:rank]
        b.zero_()[:, : len(root)] = layer.u[:, :rank] * root


def _recover(
    engine: Engine, members: Mapping[int, TrainState], spec: StudySpec, data: TokenizedData, steps: int
) -> dict[int, ExampleLosses | None]:
    """Train the members together on the batches that would have come next, and return their losses by rank.

    AdamW starts afresh, since its old state belongs to other factors. Its first estimates rest on single gradients, so
    the rate warms up over a tenth of the steps, two at least, and then stays.
    """
    warmup = max(2, -(-steps // 10))
    active = {
        rank: member._replace(scheduler=LambdaLR(member.optimizer, lambda step: min(1.0, (step + 1) / warmup)))
        for rank, member in members.items()
    }
    first = total_steps(spec.training, len(data.train))
    for step in range(first, first + steps):
        metrics = train_step(engine, list(active.values()), data.train, spec.training, step)
        active = {rank: member for (rank, member), found in zip(active.items(), metrics, strict=True) if found.finite}
        if not active:
            break
    active = {rank: member for rank, member in active.items() if finite_weights(member)}
    losses = engine.evaluate(data.eval, [member.trial.name for member in active.values()])
    found = dict(zip(active, losses, strict=True))
    return {rank: found[rank] if rank in found and math.isfinite(found[rank].mean) else None for rank in members}
