"""Candidates that share one base model, each at a step of its own schedule."""

import math
from collections.abc import Mapping
from pathlib import Path

from transformers import PreTrainedModel

from rankscope.data.batches import batch_indices, total_steps
from rankscope.data.tokens import TokenizedData, Tokens
from rankscope.lora.adapters import remove_adapter
from rankscope.lora.packed import pack_layers
from rankscope.search.space import SearchSpec, SearchTrial
from rankscope.train.loop import choose_engine
from rankscope.train.step import (
    TrainState,
    evenly_spaced,
    finite_weights,
    leave_out_unreached,
    make_train_state,
    save_trained_adapter,
    train_step,
)


class PackTrainer:
    """Trainer of candidates; `steps` are their completed steps, by name. A candidate's losses equal those of the same
    trial of `rankscope run`, up to rounding. At rungs only part of the held-out rows is evaluated: see `rung_rows`."""

    def __init__(self, model: PreTrainedModel, spec: SearchSpec, data: TokenizedData, slots: int) -> None:
        self.model, self.spec, self.data = model, spec, data
        self.training = spec.study.training
        self.steps = total_steps(self.training, len(data.train))
        self.rung_data, self.members = rung_rows(spec, data, self.steps), dict[str, TrainState]()
        # Whether the model can be packed, and how large its forwards may be, is asked with all slots taken by the
        # largest candidates.
        points = spec.largest()
        largest = [spec.trial(points[n % len(points)], n) for n in range(max(slots, len(points)))]
        self.engine = choose_engine(model, [self._member(asked) for asked in largest], self.training).engine
        for asked in largest:
            remove_adapter(model, asked.name)

    def _member(self, asked: SearchTrial) -> TrainState:
        return make_train_state(self.model, asked, self.training, self.steps, self.spec.study.model)

    def add(self, asked: SearchTrial) -> None:
        self.members[asked.name] = self._member(asked)
        leave_out_unreached(self.model, self.members[asked.name], self.engine.unreached)
        if self.engine.name == "packed":
            pack_layers(self.model)  # those that carried no adapter before

    def remove(self, name: str) -> None:
        del self.members[name]
        remove_adapter(self.model, name)

    def step(self, steps: Mapping[str, int]) -> dict[str, float]:
        """Train each candidate by one step, and return its loss; NaN where it diverged."""
        members = [self.members[name] for name in steps]
        metrics = train_step(self.engine, members, self.data.train, self.training, list(steps.values()))
        return {name: one.loss if one.finite else math.nan for name, one in zip(steps, metrics, strict=True)}

    def evaluate(self, steps: Mapping[str, int]) -> dict[str, float]:
        losses: dict[str, float] = {}
        for tokens, at_end in ((self.data.eval, True), (self.rung_data, False)):
            if names := [name for name, step in steps.items() if (step == self.steps) is at_end]:
                found = zip(names, self.engine.evaluate(tokens, names), strict=True)
                losses |= {name: one.mean if finite_weights(self.members[name]) else math.nan for name, one in found}
        return losses

    def save(self, name: str, folder: Path) -> None:
        save_trained_adapter(self.members[name], folder)


def rung_rows(spec: SearchSpec, data: TokenizedData, steps: int) -> Tokens:
    """The held-out rows that are evaluated before the end of the schedule: as many as were trained on up to the first
    rung. Evaluation has no backward, so it takes at most about a third of the time of training."""
    rungs = spec.rung_steps(steps)
    trained = rungs[0] * spec.study.training.effective_batch_size if rungs else len(data.eval)
    rows = min(trained, len(data.eval))
    return Tokens.from_examples([data.eval[row] for row in evenly_spaced(len(data.eval), rows)])


def step_tokens(spec: SearchSpec, data: TokenizedData) -> list[int]:
    """Training tokens of each step of the schedule, the same for all candidates: they have one seed."""
    training, rows, seed = spec.study.training, len(data.train), spec.study.seeds[0]
    steps = range(total_steps(training, rows))
    batches = [batch_indices(rows, training.effective_batch_size, seed, step) for step in steps]
    return [int(data.train.lengths[batch].sum()) for batch in batches]
