"""The kernel over all sequences, which only a GPU has: what it is handed, by a stand-in of each torch's signature."""

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import varlen

from rankscope.train.attention import _attend, _varlen

STARTS = (0, 3, 8, 9)


def kernel(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, scale: float, window: tuple[int, int]) -> Tensor:
    """(T, H, d) -> (T, H, d), with as many heads of keys as of queries."""
    if query.shape[1] != key.shape[1]:
        raise ValueError("Expect query and key/value to have the same number of heads")
    parts = []
    for start, stop in pairwise(starts.tolist()):
        q, k, v = (x[start:stop].transpose(0, 1) for x in (query, key, value))
        distance = torch.arange(stop - start)[:, None] - torch.arange(stop - start)
        allowed = (distance >= 0) & ((distance <= window[0]) | (window[0] < 0))
        parts.append(F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=scale).transpose(0, 1))
    return torch.cat(parts)


def of_torch_2_11(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
    scale: float, window_size: tuple[int, int],
) -> Tensor:  # fmt: skip
    return kernel(query, key, value, cu_seq_q, scale, window_size)


def with_enable_gqa(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
    scale: float, window_size: tuple[int, int], enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
    return kernel(query, key, value, cu_seq_q, scale, window_size)


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize("stand_in", [of_torch_2_11, with_enable_gqa])
def test_heads_of_keys_are_shared_by_every_torch(
    stand_in: Any, heads: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    torch.manual_seed(0)
    query = torch.randn(1, 4, STARTS[-1], 8)
    key, value = torch.randn(2, 1, heads, STARTS[-1], 8)
    got = _varlen(query, key, value, STARTS, 5, 0.3, window)
    expected = [
        _attend(query[:, :, a:b], key[:, :, a:b], value[:, :, a:b], 0.3, 0.0, window, None).transpose(1, 2)
        for a, b in pairwise(STARTS)
    ]
    torch.testing.assert_close(got, torch.cat(expected, dim=1))
