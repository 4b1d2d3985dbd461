"""The kernel over all sequences, which only a GPU has: what it is handed, by a stand-in of each torch's signature."""

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import varlen

from marks import mostly_slow
from models import CONFIGS, tiny_model
from rankscope.lora.layout import Slice
from rankscope.spec.models import TrainingSpec
from rankscope.train import attention
from rankscope.train.attention import _attend, _fits_kernel, _varlen
from rankscope.train.engine import PackedEngine
from rankscope.train.probe import use_packed_forward
from rankscope.train.step import make_train_state
from reference import make_trial, random_tokens

STARTS = (0, 3, 8, 9)


def kernel(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int, scale: float, window: tuple[int, int]
) -> Tensor:
    """(T, H, d) -> (T, H, d), with as many heads of keys as of queries: what FlashAttention checks, and computes."""
    for part in (query, key, value):
        assert part.dtype == query.dtype
        assert part.dtype in (torch.bfloat16, torch.float16), "FlashAttention only support fp16 and bf16 data type"
        assert part.dim() == 3
        assert part.shape[2] % 8 == 0, "head_size should be a multiple of 8"
        assert part.shape[2] <= 256, "only supports head dimension at most 256"
        assert part.stride(2) == 1, "Input tensor must have contiguous last dimension"
        assert all(stride % 8 == 0 for stride in part.stride()[:2]), "rows are read 16 bytes at a time"
    assert key.shape == value.shape
    if query.shape[1:] != key.shape[1:]:
        raise ValueError("Expect query and key/value to have the same number of heads")
    assert starts.dtype == torch.int32
    assert starts.device == query.device
    assert starts.dim() == 1
    assert starts.is_contiguous()
    lengths = starts.diff().tolist()
    assert (int(starts[0]), int(starts[-1])) == (0, len(query)) and min(lengths) > 0  # noqa: PT018
    assert type(longest) is int
    assert longest == max(lengths)
    assert [type(side) for side in window] == [int, int]
    assert window[1] == 0, "a token sees no later one"
    parts = []
    for start, stop in pairwise(starts.tolist()):
        q, k, v = (x[start:stop].transpose(0, 1) for x in (query, key, value))
        distance = torch.arange(stop - start)[:, None] - torch.arange(stop - start)
        allowed = (distance >= 0) & ((distance <= window[0]) | (window[0] < 0))
        parts.append(F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=scale).transpose(0, 1))
    out = torch.cat(parts)
    if out.requires_grad:
        out.register_hook(_check_gradient)
    return out


def _check_gradient(gradient: Tensor) -> None:
    assert gradient.stride(2) == 1, "dout tensor must have contiguous last dimension"


def of_torch_2_11(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
    scale: float, window_size: tuple[int, int],
) -> Tensor:  # fmt: skip
    assert (cu_seq_q is cu_seq_k, max_q) == (True, max_k)
    return kernel(query, key, value, cu_seq_q, max_q, scale, window_size)


def with_enable_gqa(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
    scale: float, window_size: tuple[int, int], enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
    assert (cu_seq_q is cu_seq_k, max_q) == (True, max_k)
    return kernel(query, key, value, cu_seq_q, max_q, scale, window_size)


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize("stand_in", [of_torch_2_11, with_enable_gqa])
def test_heads_of_keys_are_shared_by_every_torch(
    stand_in: Any, heads: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    torch.manual_seed(0)
    query = torch.randn(1, 4, STARTS[-1], 8, dtype=torch.float16)
    key, value = torch.randn(2, 1, heads, STARTS[-1], 8, dtype=torch.float16)
    got = _varlen(query, key, value, STARTS, 5, 0.3, window)
    expected = [
        _attend(query[:, :, a:b], key[:, :, a:b], value[:, :, a:b], 0.3, 0.0, window, None).transpose(1, 2)
        for a, b in pairwise(STARTS)
    ]
    torch.testing.assert_close(got, torch.cat(expected, dim=1), rtol=2e-3, atol=1e-3)  # steps of float16


@pytest.mark.parametrize(
    ("dtype", "dimension", "of_values", "fits"),
    [
        (torch.bfloat16, 64, 64, True),
        (torch.float16, 256, 256, True),
        (torch.float32, 64, 64, False),
        (torch.bfloat16, 264, 264, False),
        (torch.bfloat16, 20, 20, False),
        (torch.bfloat16, 192, 128, False),  # DeepSeek's
    ],
)
def test_what_the_kernel_refuses_goes_another_way(
    dtype: torch.dtype, dimension: int, of_values: int, fits: bool
) -> None:
    query, value = torch.empty(1, 1, 3, dimension, dtype=dtype), torch.empty(1, 1, 3, of_values, dtype=dtype)
    assert _fits_kernel(query, value) == fits


@pytest.mark.parametrize("name", mostly_slow(CONFIGS, "mistral-window", "gemma2"))
def test_models_attend_alike_by_the_kernel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses and gradients in bfloat16, of sequences of a pack, by the kernel's stand-in and by one product a row."""
    modules = ("q_proj", "v_proj") if name == "mixtral" else "all-linear"
    tokens, trials = random_tokens(6), [make_trial(4, 1e-3, seed, modules=modules) for seed in (0, 1)]
    calls, found = [], []

    def stand_in(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return with_enable_gqa(*args, **kwargs)

    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    for on_gpu in (False, True):
        monkeypatch.setattr(attention, "on_gpu", lambda _, on_gpu=on_gpu: on_gpu)
        model = tiny_model(name, torch.bfloat16)
        members = [make_train_state(model, trial, TrainingSpec(steps=1), 1) for trial in trials]
        for weight in (w for member in members for n, w in member.weights.items() if "lora_B" in n):
            weight.data.fill_(0.01)  # so that A gets a gradient too
        use_packed_forward(model)
        losses = list(
            PackedEngine(model, 1 << 30).accumulate(tokens, [Slice(trial.name, range(6)) for trial in trials])
        )
        gradients = torch.cat([p.grad.flatten() for member in members for p in member.parameters])
        found.append((torch.stack([loss.mean() for loss in losses]), gradients))
    assert bool(calls) == (name != "gemma2"), "soft-capped scores go another way, all others by the kernel"
    torch.testing.assert_close(found[1][0], found[0][0], rtol=2e-3, atol=0)
    assert torch.cosine_similarity(found[1][1], found[0][1], dim=0) > 0.999
