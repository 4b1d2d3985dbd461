"""The smallest cut of an adapter whose held-out loss stays within a budget."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedModel

from rankscope.data.tokens import Tokens
from rankscope.errors import ModelError
from rankscope.lora.layout import NotPackable
from rankscope.lora.saved import SavedAdapter, attached
from rankscope.lora.svd import Decomposed, most_energy_first, parameters, ranks_of, same_share_first, uniform_ranks
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
from rankscope.train.probe import dependent_rows_reason, make_packable, use_own_forward

Ranks = dict[str, int]


class Family(NamedTuple):
    """Cuts that grow by a rule: each has the ranks of the one before it, or more."""

    rule: str
    length: int
    ranks: Callable[[int], Ranks]


class Tried(NamedTuple):
    """A cut whose held-out loss was measured."""

    rule: str
    ranks: Ranks
    parameters: int
    losses: ExampleLosses
    increase: float
    """The share by which its loss is above that of the whole adapter; negative where it is below."""


def families(layers: Sequence[Decomposed], uniform: bool) -> list[Family]:
    """The rules by which ranks are divided among the layers, in the order in which they are tried.

    `most_energy`: over all layers, the direction with most energy for each of its parameters comes first;
    `same_share`: each layer keeps the same share of its own energy; `uniform`: one rank. With `uniform` that one alone.
    """
    highest = max(len(layer.values) for layer in layers)
    one_rank = Family("uniform", highest, lambda number: uniform_ranks(layers, number + 1))
    if uniform:
        return [one_rank]
    orders = {"most_energy": most_energy_first(layers), "same_share": same_share_first(layers)}
    by_layer = [
        Family(rule, len(order) + 1, lambda number, order=order: ranks_of(layers, order[:number]))  # type: ignore[misc]
        for rule, order in orders.items()
    ]
    return [*by_layer, one_rank]


def smallest_within(
    layers: Sequence[Decomposed],
    rules: Sequence[Family],
    evaluate: Callable[[Ranks], ExampleLosses],
    whole: float,
    most: float,
) -> Iterator[Tried]:
    """Measures cuts, and gives each one. The smallest of those whose increase over the loss `whole` is at most `most`
    is the answer; at the end it is the smallest of its family, as far as its loss falls with its size.

    The first family is climbed from its smallest cut, each time to one of twice the parameters, until one is within
    the budget; from there the border is bisected. So a border at a small size is found even where a larger cut is
    worse again. Of another family only cuts that are smaller than the best so far are looked at, the largest first: if
    that one is over the budget, so are those below it.
    """
    best: int | None = None
    for family in rules:
        sizes, climbing = _Sizes(layers, family), family is rules[0]
        if climbing:
            over, within, probe = -1, family.length, 0  # the border lies between the first two
        elif best is not None:
            over, within = 0, sizes.first_of(best)  # rank 1 everywhere is in each family: it is known to be over
            probe = within - 1
        else:
            return  # not even the whole is within
        while within - over > 1:
            ranks = family.ranks(probe)
            losses = evaluate(ranks)
            tried = Tried(family.rule, ranks, sizes[probe], losses, losses.mean / whole - 1)
            yield tried
            if tried.increase <= most:
                within, climbing, best = probe, False, tried.parameters
            else:
                over = probe
            probe = min(sizes.first_of(2 * sizes[probe]), within - 1) if climbing else (over + within) // 2


class _Sizes:
    """The parameters of each cut of a family."""

    def __init__(self, layers: Sequence[Decomposed], family: Family) -> None:
        self._layers, self._family = layers, family

    def __getitem__(self, number: int) -> int:
        return parameters(self._layers, self._family.ranks(number))

    def first_of(self, size: int) -> int:
        """The number of the first cut with at least `size` parameters; that after the last where there is none."""
        low, high = 0, self._family.length
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if self[middle] < size else (low, middle)
        return low


def best_of(tried: Sequence[Tried], most: float) -> Tried | None:
    """The one with fewest parameters among those within the budget; of equals the one with the lowest loss."""
    within = [one for one in tried if one.increase <= most]
    return min(within, key=lambda one: (one.parameters, one.increase), default=None)


_ROWS = 8
"""Of one forward of PEFT's own: rows of differing lengths are padded."""


def held_out_losses(
    model: PreTrainedModel, adapters: Mapping[str, SavedAdapter], tokens: Tokens
) -> dict[str, ExampleLosses]:
    """The loss of every example of `tokens` under each adapter. `model`, which has no adapter, is left as it was.

    The forward is the packed one where the model can be packed, which is probed with each adapter, and PEFT's own
    elsewhere.

    Raises:
        ModelError: an adapter does not fit the model, or a loss is no finite number.
    """
    losses = {}
    for name, adapter in adapters.items():
        attention = model.config._attn_implementation
        with attached(model, name, adapter):
            try:
                (losses[name],) = _engine(model, name, int(tokens.lengths.max())).evaluate(tokens, [name])
            finally:
                use_own_forward(model, attention)
        if not np.isfinite(losses[name].loss).all():
            raise ModelError(f"the held-out loss of {name} is no finite number", "Try another --dtype.")
    return losses


def _engine(model: PreTrainedModel, adapter: str, longest_row: int) -> Engine:
    dependent = dependent_rows_reason(model.config, longest_row)
    try:
        if dependent:
            raise NotPackable(dependent)
        make_packable(model, [adapter])
    except NotPackable:
        per_token = LOGIT_BYTES * model.config.get_text_config().vocab_size
        fitting = tokens_per_forward(free_bytes(model.device), per_token, model.device.type)
        return PeftEngine(model, 1 if dependent else _ROWS, tokens_per_forward=fitting)
    return PackedEngine(model, EVAL_TOKENS)


class Difference(NamedTuple):
    """Of two mean losses over the same examples, in nats a label token."""

    mean: float
    standard_error: float | None
    """Paired, over examples; None with fewer than two."""


def difference(losses: ExampleLosses, other: ExampleLosses) -> Difference:
    """`losses.mean - other.mean`. A mean with random weights is a ratio: its variance is that of its linear part,
    w (d - mean), with w an example's label tokens over their mean."""
    weights = losses.label_tokens / losses.label_tokens.mean()
    differences = losses.loss - other.loss
    mean = float((weights * differences).mean())
    if len(differences) < 2:
        return Difference(mean, None)
    return Difference(mean, float((weights * (differences - mean)).std(ddof=1)) / math.sqrt(len(differences)))
