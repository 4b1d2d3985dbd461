"""Decoder layers that repeat, so that a few of them stand for all.

Bytes and FLOPs are affine in the number of equal layers: counted on a model with two periods of its layers and on one
with three, they follow for any number. Layers count as equal where nothing that their modules hold differs: classes,
scalar attributes, shapes of tensors (adapters included), and the entries that the configuration has for each layer.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

_SCALARS = (bool, int, float, str, type(None), torch.dtype)


class Repeats(NamedTuple):
    """The repeating layers of a model: all layers from `start` on, up to a rest that is shorter than a period."""

    stack: str  # name of the list of layers
    start: int  # layers before the first period
    period: int  # layers of a period: 1 where all are alike, 2 where window and full attention alternate
    periods: int

    def in_kept(self, name: str, periods: int) -> str:
        """Name of the module that stands for one of the whole model where only `periods` are kept."""
        if not name.startswith(f"{self.stack}."):
            return name
        number, dot, rest = name.removeprefix(f"{self.stack}.").partition(".")
        layer, end = int(number), self.start + self.periods * self.period
        if layer >= end:
            layer -= (self.periods - periods) * self.period
        elif layer >= self.start:
            layer = self.start + (layer - self.start) % self.period
        return f"{self.stack}.{layer}{dot}{rest}"

    def keep(self, model: nn.Module, periods: int) -> "Repeats":
        """Take all but `periods` of the periods out of the model; what is left."""
        layers: Any = model.get_submodule(self.stack)
        del layers[self.start + periods * self.period : self.start + self.periods * self.period]
        return self._replace(periods=periods)

    @contextmanager
    def only(self, model: nn.Module, periods: int) -> Iterator[None]:
        """The model without all but `periods` of the periods, for a while."""
        layers: Any = model.get_submodule(self.stack)
        all_layers = list(layers)
        self.keep(model, periods)
        try:
            yield
        finally:
            del layers[:]
            layers.extend(all_layers)


def find_repeats(model: PreTrainedModel) -> Repeats | None:
    """The repeating layers of a model; None where counting on two smaller models would take no fewer layers, as where
    all layers differ, or where the model has no list of decoder layers or several."""
    stacks = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    stacks = [(n, s) for n, s in stacks if len(s) and all(isinstance(x, GradientCheckpointingLayer) for x in s)]
    if len(stacks) != 1:
        return None
    ((name, layers),) = stacks
    facts, least, found = _facts(model, layers), len(layers), None
    for period in range(1, len(layers) // 3 + 1):
        pairs = zip(facts, facts[period:], strict=False)
        start = max((number + 1 for number, (one, other) in enumerate(pairs) if one != other), default=0)
        count = (len(layers) - start) // period
        counted = 2 * (len(layers) - count * period) + 5 * period  # of both models together
        if count > 3 and counted < least:
            least, found = counted, Repeats(name, start, period, count)
    return found


def _facts(model: PreTrainedModel, layers: nn.ModuleList) -> list[dict[tuple[str, str], Any]]:
    """Everything by which layers can differ, for each layer. Its own number among them is left out."""
    facts: list[dict[tuple[str, str], Any]] = []
    lists = {key: value for key, value in vars(model.config.get_text_config()).items() if isinstance(value, list)}
    for number, layer in enumerate(layers):
        own: dict[tuple[str, str], Any] = {
            ("config", key): value[number] for key, value in lists.items() if len(value) == len(layers)
        }
        for name, module in layer.named_modules():
            own[name, "class"] = type(module)
            own |= {(name, key): value for key, value in vars(module).items() if isinstance(value, _SCALARS)}
            tensors = (module._parameters | module._buffers).items()
            own |= {(name, key): (value.shape, value.dtype) for key, value in tensors if value is not None}
        facts.append(own)
    numbers = [key for key in facts[0] if all(own.get(key) == number for number, own in enumerate(facts))]
    return [{key: value for key, value in own.items() if key not in numbers} for own in facts]
