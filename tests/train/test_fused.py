"""Norms and gated layers as one function each against the modules' own forwards."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, Qwen3Config
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm

from rankscope.lora.packed import own_forwards
from rankscope.train.fused import _RMSNorm, _SwiGLU, fuse_elementwise

SIZES = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "num_key_value_heads": 2}


def modules() -> nn.ModuleList:
    norm = Qwen3RMSNorm(8, eps=1e-2)
    nn.init.normal_(norm.weight)
    return nn.ModuleList([norm, LlamaMLP(LlamaConfig(**SIZES)), Qwen3MLP(Qwen3Config(**SIZES))]).requires_grad_(False)


def test_fused_modules_compute_what_their_own_forward_does() -> None:
    torch.manual_seed(0)
    own = modules()
    inputs = [torch.randn(1, 7, 8, requires_grad=True) for _ in own]
    grad = torch.randn(1, 7, 8)

    def results() -> list[torch.Tensor]:
        outs = [module(x) for module, x in zip(own, inputs, strict=True)]
        return outs + [torch.autograd.grad(out, x, grad)[0] for out, x in zip(outs, inputs, strict=True)]

    expected = results()
    fuse_elementwise(own)
    assert all("forward" in vars(module) for module in own)
    torch.testing.assert_close(results(), expected, rtol=1e-5, atol=1e-6)
    assert type(own[0](inputs[0]).grad_fn).__name__ == "_RMSNormBackward"
    own_forwards(own)
    assert not any("forward" in vars(module) for module in own)


@pytest.mark.parametrize("function", [lambda x: _RMSNorm.apply(x, torch.arange(1.0, 5).double(), 1e-3),
                                      lambda x: _SwiGLU.apply(x[:, :2], x[:, 2:])])  # fmt: skip
def test_gradients_against_finite_differences(function: object) -> None:
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(function, (x,))


def test_other_norms_and_activations_keep_their_forward() -> None:
    kept = nn.ModuleList([Gemma2RMSNorm(8), LlamaMLP(LlamaConfig(**SIZES, hidden_act="gelu")), nn.LayerNorm(8)])
    fuse_elementwise(kept)
    assert not any("forward" in vars(module) for module in kept)
    trained = modules()[:1].requires_grad_(True)
    fuse_elementwise(trained)
    assert "RMSNorm" not in type(trained[0](torch.randn(2, 8)).grad_fn).__name__  # its weight needs a gradient
