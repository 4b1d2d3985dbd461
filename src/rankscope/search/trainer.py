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
    """A `rankscope.search.driver.Trainer` of at most `slots` candidates at a time. A candidate's losses equal those of
    the same trial of `rankscope run`, up to rounding: initial weights, batches and schedule are the same. At rungs only
    part of the held-out rows is evaluated: see `rung_rows`."""

    def __init__(self, model: PreTrainedModel, spec: SearchSpec, data: TokenizedData, slots: int) -> None:
        self.model, self.spec, self.data = model, spec, data
        self.training = spec.study.training
        self.steps = total_steps(self.training, len(data.train))
        self.rung_data = rung_rows(spec, data, self.steps)
        self.members: dict[str, TrainState] = {}
        # Whether the model can be packed, and how large its forwards may be, is asked with all slots taken by the
        # largest candidates.
        groups = len(spec.space.target_modules)
        largest = [spec.largest(number, number % groups) for number in range(max(slots, groups))]
        choice = choose_engine(model, [self._member(asked) for asked in largest], self.training)
        self.engine, self.engine_reason = choice.engine, choice.reason
        for asked in largest:
            remove_adapter(model, asked.name)

    def _member(self, asked: SearchTrial) -> TrainState:
        return make_train_state(self.model, asked, self.training, self.steps, self.spec.study.model.id)

    def add(self, asked: SearchTrial) -> None:
        self.members[asked.name] = self._member(asked)
        leave_out_unreached(self.model, self.members[asked.name], self.engine.unreached)
        if self.engine.name == "packed":
            pack_layers(self.model)  # those that carried no adapter before

    def remove(self, name: str) -> None:
        del self.members[name]
        remove_adapter(self.model, name)

    def step(self, steps: Mapping[str, int]) -> dict[str, float]:
        members = [self.members[name] for name in steps]
        metrics = train_step(self.engine, members, self.data.train, self.training, list(steps.values()))
        return {name: one.loss if one.finite else math.nan for name, one in zip(steps, metrics, strict=True)}

    def evaluate(self, steps: Mapping[str, int]) -> dict[str, float]:
        ended = [name for name, step in steps.items() if step == self.steps]
        losses: dict[str, float] = {}
        for names, tokens in ((ended, self.data.eval), ([n for n in steps if n not in ended], self.rung_data)):
            if names:
                means = [result.mean for result in self.engine.evaluate(tokens, names)]
                losses |= dict(zip(names, means, strict=True))
        diverged = [name for name in ended if not finite_weights(self.members[name])]
        return losses | dict.fromkeys(diverged, math.nan)

    def save(self, name: str, folder: Path) -> None:
        save_trained_adapter(self.members[name], folder)


def rung_rows(spec: SearchSpec, data: TokenizedData, steps: int) -> Tokens:
    """Return the held-out rows that are evaluated before the end of the schedule, the same at all rungs. There are as
    many as were trained on up to the first rung: evaluation has no backward, so it takes at most about a third of the
    time of training."""
    rungs = spec.rung_steps(steps)
    trained = rungs[0] * spec.study.training.effective_batch_size if rungs else len(data.eval)
    rows = min(trained, len(data.eval))
    return Tokens.from_examples([data.eval[row] for row in evenly_spaced(len(data.eval), rows)])


def step_tokens(spec: SearchSpec, data: TokenizedData) -> list[int]:
    """Return the training tokens of each step of the schedule, the same for all candidates: they have one seed."""
    training, rows, seed = spec.study.training, len(data.train), spec.study.seeds[0]
    steps = range(total_steps(training, rows))
    batches = [batch_indices(rows, training.effective_batch_size, seed, step) for step in steps]
    return [int(data.train.lengths[batch].sum()) for batch in batches]
