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
from rankscope.lora.saved import SavedAdapter, attached
from rankscope.lora.svd import Decomposed, order_by_energy, parameters, ranks_of, uniform_ranks
from rankscope.model.device import free_bytes
from rankscope.train.engine import LOGIT_BYTES, ExampleLosses, tokens_per_forward
from rankscope.train.probe import peft_engine

_ADAPTER = "adapter"  # name of the attached adapter

Ranks = dict[str, int]


class MeasuredTruncation(NamedTuple):
    ranks: Ranks
    parameters: int
    loss: float
    increase: float  # relative to the loss of the whole adapter; negative where the truncation is better


def truncations(layers: Sequence[Decomposed], uniform: bool) -> tuple[int, Callable[[int], Ranks]]:
    """Number of truncations, and the ranks of each by its index, which grow or stay. By default the direction with the
    most energy per parameter comes first, over all layers; with `uniform` every layer has the same rank."""
    if uniform:
        return max(len(layer.values) for layer in layers), lambda n: uniform_ranks(layers, n + 1)
    order = order_by_energy(layers)
    return len(order) + 1, lambda n: ranks_of(layers, order[:n])


def measure_truncations(
    layers: Sequence[Decomposed], uniform: bool, evaluate: Callable[[Ranks], float], whole: float, max_increase: float
) -> Iterator[MeasuredTruncation]:
    """Measure truncations until the smallest one within the budget is known, and yield each. Sizes double from the
    smallest one on until the increase over the loss `whole` is at most `max_increase`; from there the border is
    bisected. So a border at a small size is found even where a larger truncation is worse again."""
    count, ranks_at = truncations(layers, uniform)
    over, within, probe, climbing = -1, count, 0, True  # the border lies between `over` and `within`
    while within - over > 1:
        ranks = ranks_at(probe)
        size, loss = parameters(layers, ranks), evaluate(ranks)
        yield (measured := MeasuredTruncation(ranks, size, loss, loss / whole - 1))
        if measured.increase <= max_increase:
            within, climbing = probe, False
        else:
            over = probe
        doubled = bisect_left(range(count), 2 * size, key=lambda n: parameters(layers, ranks_at(n)))
        probe = min(doubled, within - 1) if climbing else (over + within) // 2


def smallest_within(measured: Sequence[MeasuredTruncation], max_increase: float) -> MeasuredTruncation | None:
    within = [truncation for truncation in measured if truncation.increase <= max_increase]
    return min(within, key=lambda truncation: truncation.parameters, default=None)


def held_out_losses(model: PreTrainedModel, adapter: SavedAdapter, tokens: Tokens) -> ExampleLosses:
    """Loss of every example of `tokens` under the adapter by PEFT's own forward; `model`, which has no adapter, is left
    as it was. Raises ModelError: the adapter does not fit the model, or a loss is not a finite number."""
    per_token = LOGIT_BYTES * model.config.get_text_config().vocab_size
    fitting = tokens_per_forward(free_bytes(model.device), per_token, model.device.type)
    with attached(model, _ADAPTER, adapter):
        (losses,) = peft_engine(model, tokens_per_forward=fitting).evaluate(tokens, [_ADAPTER])
    if not np.isfinite(losses.loss).all():
        raise ModelError("the adapter's held-out loss is not a finite number", "Try another --dtype.")
    return losses


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
    mean, count = float((weights * differences).mean()), len(differences)
    deviations = weights * (differences - mean)
    return Difference(mean, float(deviations.std(ddof=1)) / math.sqrt(count) if count > 1 else None, count)
