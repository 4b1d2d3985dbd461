"""RMSNorm and SwiGLU as one autograd function each: fewer passes over a CPU's memory, and less kept for the backward.

    y = x w / sqrt(mean(x^2) + eps)        Zhang and Sennrich 2019, arXiv:1910.07467
    y = silu(gate) up                      Shazeer 2020, arXiv:2002.05202

Modules with the very code of Llama's forward take them (Mistral, Qwen and others); norms in float32, while frozen.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from rankscope.lora.packed import replace_forward


def fuse_elementwise(model: nn.Module) -> None:
    """Replace the forwards of norms and gated layers."""
    for module in model.modules():
        if _same_code(module, LlamaRMSNorm):
            replace_forward(module, _norm, module)
        elif _same_code(module, LlamaMLP) and type(module.act_fn).__name__ in ("SiLU", "SiLUActivation"):
            replace_forward(module, _gated, module)


def _same_code(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module's class computes what `kind` does, by the same code."""
    own, other = (getattr(one.forward, "__code__", None) for one in (type(module), kind))
    return all(getattr(own, part, None) == getattr(other, part) for part in ("co_code", "co_names", "co_consts"))


def _norm(module: Any, x: Tensor) -> Tensor:
    if {x.dtype, module.weight.dtype} != {torch.float32} or module.weight.requires_grad:
        out: Tensor = type(module).forward(module, x)
        return out
    normed: Tensor = _RMSNorm.apply(x, module.weight, module.variance_epsilon)  # type: ignore[no-untyped-call]
    return normed


def _gated(module: Any, x: Tensor) -> Tensor:
    out: Tensor = module.down_proj(_SwiGLU.apply(module.gate_proj(x), module.up_proj(x)))  # type: ignore[no-untyped-call]
    return out


class _RMSNorm(torch.autograd.Function):
    """x (..., D), weight (D,), frozen. With r = 1 / sqrt(mean(x^2) + eps) and g = w dy, dx = r g - x r^3 mean(g x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        r = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, r)
        return cast(Tensor, x * r).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, r = ctx.saved_tensors
        grad = grad * weight
        mean = torch.linalg.vecdot(grad, x).unsqueeze(-1).div_(x.shape[-1])
        return grad.mul_(r).addcmul_(x, mean.mul_(r**3), value=-1), None, None


class _SwiGLU(torch.autograd.Function):
    """silu(gate) is computed again in the backward rather than kept."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        gate, up = ctx.saved_tensors
        grad_up = F.silu(gate).mul_(grad)
        return torch.ops.aten.silu_backward(grad * up, gate), grad_up
