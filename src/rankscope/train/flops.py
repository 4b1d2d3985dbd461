"""FLOPs and saved bytes of a training step, per token, counted in one forward and backward of four short sequences: on
the loaded model or on one without weights, so that memory can be predicted before anything is loaded."""

import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from rankscope.data.tokens import Tokens
from rankscope.lora.adapters import adapter_parameters, unreached_layers
from rankscope.lora.packed import trunk_name
from rankscope.lora.variants import iter_initial_factors

_aten = torch.ops.aten
_PRODUCTS = {_aten.mm: 0, _aten.addmm: 1, _aten.addmm_: 1, _aten._grouped_mm: 0}
"""Index of the left operand among the arguments of each product."""


class Cost(NamedTuple):
    """Cost of training one adapter over its base model. FLOPs leave out attention's products over pairs of tokens:
    below 1,024 tokens they are a few per cent, and the count is too low rather than too high."""

    bytes_per_token: int  # saved for the backward, each storage once, without weights
    flops_per_token: int  # matrix products of the trunk, forward and backward, LoRA's included
    flops_per_label: int  # output layer: forward, and backward to its input

    def flops(self, tokens: int, label_tokens: int) -> float:
        """Useful FLOPs of training on so many tokens and label tokens, without padding and recomputation."""
        return self.flops_per_token * tokens + self.flops_per_label * label_tokens


class Counted(NamedTuple):
    """Cost of an adapter, and the adapted layers that get no gradient: see `unreached_layers`."""

    cost: Cost
    unreached: list[str]


class Products(TorchDispatchMode):
    """Counter of the matrix products that run inside it, by shape (m, k, n) of (m, k) @ (k, n)."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shapes: Counter[tuple[int, int, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first = _PRODUCTS.get(func.overloadpacket)
        if first is not None:
            left, right = args[first : first + 2]
            self.shapes[left.shape[0], left.shape[1], right.shape[-1]] += 1  # experts' (E, k, n) take each row once
            if func.overloadpacket is _aten._grouped_mm and isinstance(left, FakeTensor):  # torch's: bfloat16 alone
                stack = [] if right.dim() == 3 else [args[2].shape[0]]  # the gradient of experts' weights
                return left.new_empty(*stack, left.shape[0], right.shape[-1])
        return func(*args, **(kwargs or {}))

    @property
    def flops(self) -> int:
        return sum(2 * m * k * n * count for (m, k, n), count in self.shapes.items())


def count_cost(
    model: PreTrainedModel, adapter: str, forward: Callable[[Tokens, str], Tensor], tokens: Tokens
) -> Counted:
    """Count the cost of `adapter` on `tokens`; `forward` is an engine's."""
    kept = itertools.chain(model.parameters(), iter_initial_factors(model))
    weights = {tensor.untyped_storage()._cdata for tensor in kept}
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            saved[storage._cdata] = storage.nbytes()
        return tensor

    with Products() as products:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            hidden = forward(tokens, adapter)
        if hidden.requires_grad:
            hidden.backward(torch.ones_like(hidden))
    unreached = unreached_layers(model, adapter, trunk_name(model))
    for parameter in adapter_parameters(model, adapter):
        parameter.grad = None
    total = int(tokens.offsets[-1])
    head = model.get_output_embeddings()
    cost = Cost(sum(saved.values()) // total, products.flops // total, 4 * head.weight.numel())
    return Counted(cost, unreached)
