"""Mixed precision over a frozen base: matrix products of bfloat16 operands, everything else in float32.

    y = float32(bfloat16(x) W.T + b)

W and b of linear layers, embeddings and routed experts are held in bfloat16 alone; other weights, the residual stream,
norms and an adapter's update are float32 (Micikevicius et al. 2018, arXiv:1710.03740). Added to an output of bfloat16,
an update below half a step of it, 1/512 of the output, would vanish.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial
from inspect import getsource
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

_in_float32: ContextVar[bool] = ContextVar("in_float32", default=False)


@contextmanager
def products_in_float32() -> Iterator[None]:
    """Make forwards convert weights to float32, one layer at a time, while the body runs without gradient."""
    token = _in_float32.set(True)
    try:
        yield
    finally:
        _in_float32.reset(token)


def operand_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type of the operands of products with weights of this type."""
    return torch.float32 if dtype == torch.bfloat16 and _in_float32.get() else dtype


def is_mixed(module: nn.Module) -> bool:
    """Whether a model, or a part of one, computes products of bfloat16 operands now."""
    return "mixed" in module.__dict__ and not _in_float32.get()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Product x W.T + b of (T, D) and (O, D), of one type: in float32 of bfloat16 ones, which only CUDA need not round.
    There the sum is written as float32, elsewhere it is rounded to bfloat16 once: torch has no such product on CPUs."""
    if x.dtype != torch.bfloat16:
        return F.linear(x, weight, bias)
    if not x.is_cuda:
        return F.linear(x, weight, bias).float()
    out = torch.mm(x, weight.T, out_dtype=torch.float32)
    return out if bias is None else out.add_(bias)


def rounds_operands(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether a product of float32 x within `rounded_operands` has operands of `dtype`, without a conversion here."""
    return x.device.type == "cpu" and (x.dtype, dtype) == (torch.float32, torch.bfloat16)


@contextmanager
def rounded_operands(dtype: torch.dtype) -> Iterator[None]:
    """Let oneDNN round the operands of float32 products to bfloat16, if that is `dtype`, and sum in float32. It saves a
    CPU converting factors, gradients and updates one by one; one without bfloat16 computes in float32."""
    products = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = products.fp32_precision
    products.fp32_precision = "bf16" if dtype == torch.bfloat16 else before
    try:
        yield
    finally:
        products.fp32_precision = before


class FrozenForward:
    """Forward of one frozen linear layer in mixed precision, x (..., D) to (..., O)."""

    def __init__(self, layer: Any, products: torch.dtype = torch.bfloat16) -> None:
        self.layer, self._products = layer, products

    @property
    def dtype(self) -> torch.dtype:
        """Type of the product's operands."""
        return operand_dtype(self._products)

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The layer's weight, (O, D)."""
        weight: Tensor = self.layer.weight.T if isinstance(self.layer, Conv1D) else self.layer.weight
        return weight.to(dtype)

    def __call__(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        out: Tensor = _FrozenLinear.apply(flat, self, self.dtype)  # type: ignore[no-untyped-call]
        return out.view(*x.shape[:-1], out.shape[-1])


class _FrozenLinear(torch.autograd.Function):
    """Nothing is saved: the backward takes the weight again, and dequantizes it where it is quantized."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: FrozenForward, dtype: torch.dtype) -> Tensor:
        ctx.source, ctx.dtype, bias = source, dtype, source.layer.bias
        return linear(x.to(dtype), source.weight(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return linear(grad.to(ctx.dtype), ctx.source.weight(ctx.dtype).T), None, None


def frozen_forward(layer: nn.Module) -> FrozenForward | None:
    """The layer's forward in mixed precision, or over quantized weights; None of another layer."""
    forward = layer.__dict__.get("forward")
    return forward if isinstance(forward, FrozenForward) else None


def use_mixed_precision(model: PreTrainedModel) -> None:
    """Hold the weights that go into products, and embeddings, in bfloat16, the others in float32, and replace forwards.
    A linear layer stays float32 where its class computes something else, or another module reads its weight."""
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | Conv1D)]
    linears: list[Any] = [one for one in layers if frozen_forward(one) or is_product(cast(Any, type(one)))]
    experts = [module for module in model.modules() if hasattr(module, "has_gate") and hasattr(module, "down_proj")]
    half = {id(weight) for module in (*embeddings, *linears, *experts) for weight in module.parameters()}
    half -= set(_weights_read_elsewhere(model))
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(torch.bfloat16 if id(tensor) in half else torch.float32)
    for module in model.modules():
        module.__dict__["mixed"] = True
    for module in embeddings:
        module.register_forward_hook(lambda module, args, out: out.float())
    for layer in linears:
        if not frozen_forward(layer) and id(layer.weight) in half:
            layer.__dict__["forward"] = FrozenForward(layer)
    for module in experts:
        module.__dict__["forward"] = partial(_experts_forward, module)


def _experts_forward(experts: nn.Module, x: Tensor, *args: Any) -> Tensor:
    """Forward of a block's routed experts as a whole, (T, D) to (T, D), in the type of their products."""
    dtype = operand_dtype(cast(Tensor, experts.down_proj).dtype)
    held = [(weight, weight.data) for weight in experts.parameters(recurse=False) if weight.dtype != dtype]
    for weight, data in held:
        weight.data = data.to(dtype)
    try:
        out: Tensor = type(experts).forward(experts, x.to(dtype), *args)
        return out.float()
    finally:
        for weight, data in held:
            weight.data = data


def _weights_read_elsewhere(model: nn.Module) -> Iterator[int]:
    """Ids of weights and biases that a module reads without the forward of the layer that holds them, as Mamba does."""
    for module in model.modules():
        parts = (getattr(module, name, None) for name in _read_in_source(cast(Any, type(module))))
        yield from (id(weight) for part in parts if isinstance(part, nn.Module) for weight in part.parameters(False))


@cache
def _read_in_source(kind: Any) -> set[str]:
    """Names of parts whose weight, and not its type or device alone, is read in the source of a class."""
    if not kind.__module__.startswith("transformers.models.") or issubclass(kind, PreTrainedModel):
        return set()
    return set(re.findall(r"self\.(\w+)\.weight\b(?!\.(?:dtype|device))", getsource(kind)))


@cache
def is_product(kind: Any) -> bool:
    """Whether the forward of a class of linear layers is x W.T + b: tried where it has one of its own, as Falcon's."""
    if kind.forward in (nn.Linear.forward, Conv1D.forward):
        return True
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        try:
            layer, x = kind(3, 2), torch.randn(4, 3)
            return torch.allclose(layer(x), F.linear(x, layer.weight, layer.bias))
        except (TypeError, ValueError, RuntimeError, AttributeError):
            return False
