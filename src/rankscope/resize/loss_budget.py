"""Search for the smallest truncation of an adapter whose held-out loss stays within a budget."""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedModel

from rankscope.analysis.comparison import student
from rankscope.data.tokens import Tokens
from rankscope.errors import ModelError
from rankscope.lora.layout import NotPackable
from rankscope.lora.saved import SavedAdapter, attached
from rankscope.lora.svd import Decomposed, order_by_energy, parameters, ranks_of, uniform_ranks
from rankscope.model.device import free_bytes
from rankscope.train.engine import (
    EVAL_TOKENS,
    LOGIT_BYTES,
    Engine,
    ExampleLosses,
    PackedEngine,
    PeftEngine,
    tokens_per_forward,
)
from rankscope.train.probe import make_packable, use_own_forward

_PEFT_ROWS = 8  # rows in one of PEFT's own forwards: rows of differing lengths are padded there
_ADAPTER = "adapter"  # name of the attached adapter

Ranks = dict[str, int]


class RankRule(NamedTuple):
    """A sequence of truncations in which each layer's rank grows or stays: `ranks(0)` to `ranks(length - 1)`."""

    name: str
    length: int
    ranks: Callable[[int], Ranks]


class MeasuredTruncation(NamedTuple):
    rule: str
    ranks: Ranks
    parameters: int
    losses: ExampleLosses
    increase: float  # relative to the loss of the whole adapter; negative where the truncation is better


def rank_rule(layers: Sequence[Decomposed], uniform: bool) -> RankRule:
    """The rule that divides ranks among the layers. By default the direction with the most energy per parameter comes
    first, over all layers (`most_energy`); with `uniform` every layer has the same rank."""
    if uniform:
        highest = max(len(layer.values) for layer in layers)
        return RankRule("uniform", highest, lambda number: uniform_ranks(layers, number + 1))
    order = order_by_energy(layers)
    return RankRule("most_energy", len(order) + 1, lambda number: ranks_of(layers, order[:number]))


def measure_truncations(
    layers: Sequence[Decomposed],
    rule: RankRule,
    evaluate: Callable[[Ranks], ExampleLosses],
    whole: float,
    max_increase: float,
) -> Iterator[MeasuredTruncation]:
    """Measure truncations until the smallest one within the budget is known, and yield each. Sizes double from the
    smallest one on until the increase over the loss `whole` is at most `max_increase`; from there the border is
    bisected. So a border at a small size is found even where a larger truncation is worse again."""
    over, within, probe, climbing = -1, rule.length, 0, True  # the border lies between `over` and `within`
    while within - over > 1:
        ranks = rule.ranks(probe)
        size, losses = parameters(layers, ranks), evaluate(ranks)
        measured = MeasuredTruncation(rule.name, ranks, size, losses, losses.mean / whole - 1)
        yield measured
        if measured.increase <= max_increase:
            within, climbing = probe, False
        else:
            over = probe
        doubled = bisect_left(range(rule.length), 2 * size, key=lambda number: parameters(layers, rule.ranks(number)))
        probe = min(doubled, within - 1) if climbing else (over + within) // 2


def smallest_within(measured: Sequence[MeasuredTruncation], max_increase: float) -> MeasuredTruncation | None:
    """The truncation with the fewest parameters within the budget, or None."""
    within = [truncation for truncation in measured if truncation.increase <= max_increase]
    return min(within, key=lambda truncation: truncation.parameters, default=None)


def held_out_losses(model: PreTrainedModel, adapter: SavedAdapter, tokens: Tokens) -> ExampleLosses:
    """Loss of every example of `tokens` under the adapter; `model`, which has no adapter, is left as it was. The
    forward is the packed one where a probe shows that model and adapter can be packed, and PEFT's own elsewhere. Raises
    ModelError: the adapter does not fit the model, or a loss is not a finite number."""
    attention = model.config._attn_implementation
    with attached(model, _ADAPTER, adapter):
        try:
            (losses,) = _engine(model).evaluate(tokens, [_ADAPTER])
        finally:
            use_own_forward(model, attention)
    if not np.isfinite(losses.loss).all():
        raise ModelError("the adapter's held-out loss is not a finite number", "Try another --dtype.")
    return losses


def _engine(model: PreTrainedModel) -> Engine:
    try:
        make_packable(model, [_ADAPTER])
    except NotPackable:
        per_token = LOGIT_BYTES * model.config.get_text_config().vocab_size
        fitting = tokens_per_forward(free_bytes(model.device), per_token, model.device.type)
        return PeftEngine(model, _PEFT_ROWS, tokens_per_forward=fitting)
    return PackedEngine(model, EVAL_TOKENS)


class Difference(NamedTuple):
    """Difference of two mean losses over the same examples, in nats per label token."""

    mean: float
    standard_error: float | None  # paired, over examples; None with fewer than two
    examples: int

    def interval(self, confidence: float) -> tuple[float | None, float | None]:
        """Student's two-sided interval; without ends where there are fewer than two examples."""
        if self.standard_error is None:
            return None, None
        half = float(student(self.examples - 1, (1 + confidence) / 2)) * self.standard_error
        return self.mean - half, self.mean + half


def difference(losses: ExampleLosses, other: ExampleLosses) -> Difference:
    """`losses.mean - other.mean` with its paired standard error. A mean with random weights is a ratio: its variance is
    that of its linear part, w (d - mean), with w an example's label tokens over their mean."""
    weights = losses.label_tokens / losses.label_tokens.mean()
    differences = losses.loss - other.loss
    mean = float((weights * differences).mean())
    if len(differences) < 2:
        return Difference(mean, None, len(differences))
    error = float((weights * (differences - mean)).std(ddof=1)) / math.sqrt(len(differences))
    return Difference(mean, error, len(differences))
