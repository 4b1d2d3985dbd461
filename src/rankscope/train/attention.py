"""Causal attention inside each sequence of a flattened batch, registered with transformers' AttentionInterface.

Nothing is padded and no mask is built: the layout has the sequence boundaries.
OPT in transformers 5 builds its mask without looking at position ids, so plain sdpa would silently let the sequences of
a flattened batch attend to each other.
"""

from functools import cache
from inspect import signature
from itertools import chain, pairwise
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from rankscope.lora.layout import NotPackable, Unpackable, current_layout, offsets_on, on_gpu
from rankscope.model.mixed import is_mixed

NAME = "rankscope"
# Keyword arguments that models pass along and that have no effect here. Any other that is not None makes a model
# unpackable.
_HARMLESS = {
    "position_ids", "position_embeddings", "cache_position", "use_cache", "output_attentions", "return_dict",
    "output_hidden_states", "output_router_logits", "logits_to_keep", "past_key_values", "layer_idx", "is_causal",
    "num_items_in_batch",
}  # fmt: skip


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: "Tensor | LocalMask | None",
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend within each sequence: query (1, H, T, d), key and value (1, G, T, d) with G dividing H -> (1, T, H, d).

    A window of w lets a token see itself and the w - 1 before it, a chunk of c those of its own chunk, counted from the
    sequence's start (Llama 4); `softcap` bounds the scores by c tanh(s / c) (Gemma 2); `s_aux`, (H,), is one more logit
    of each head's softmax, an attention sink (gpt-oss). Raises NotPackable: the model uses something that is not
    covered, such as a mask of its own.
    """
    unknown = sorted(k for k, v in kwargs.items() if v is not None and v is not False and k not in _HARMLESS)
    local = attention_mask if isinstance(attention_mask, LocalMask) else LocalMask(None, None)
    if sliding_window not in (None, local.window):  # a mask rules, as in transformers; but none may be an omission
        raise NotPackable(Unpackable.OWN_MASK, f"a mask of {local}, and a window of {sliding_window}")
    if isinstance(attention_mask, Tensor) or unknown or not getattr(module, "is_causal", True):
        raise NotPackable(Unpackable.OWN_MASK, f"it asks for {', '.join(unknown) or 'a mask of its own'}")
    if query.shape[0] != 1 or query.shape[2] != current_layout().tokens:
        raise NotPackable(Unpackable.RESHAPES, f"attention over {tuple(query.shape)}")
    starts = current_layout().sequence_starts
    if local.chunk:  # a sequence's chunks see as little of each other as sequences do
        chunks = (range(start, stop, local.chunk) for start, stop in pairwise(starts))
        starts = (*chain.from_iterable(chunks), starts[-1])
    longest = max(stop - start for start, stop in pairwise(starts))
    window = local.window if local.window is not None and local.window < longest else None
    plain = not softcap and not dropout and s_aux is None
    if plain and on_gpu(query) and is_mixed(module):
        query, key, value = (part.to(torch.bfloat16) for part in (query, key, value))
    if plain and on_gpu(query) and _is_ampere() and _fits_kernel(query, value):
        return _varlen(query, key, value, starts, longest, scaling, window), None
    lengths = [stop - start for start, stop in pairwise(starts)]
    # split rather than slices: a slice's backward fills a zero tensor of all tokens for each sequence
    sequences = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    parts = [_attend(q, k, v, scaling, dropout, window, softcap, s_aux).transpose(1, 2) for q, k, v in sequences]
    return torch.cat(parts, dim=1), None


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    dropout: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of one sequence, (1, H, t, d) -> (1, H, t, d)."""
    length, plain = query.shape[2], not softcap and sinks is None
    windowed = window is not None and window < length
    allowed: Tensor | None = None
    if windowed or not plain:
        allowed = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
        allowed = allowed.triu(1 - window) if windowed and window else allowed
    if plain:
        options: dict[str, Any] = {"dropout_p": dropout, "scale": scaling, "enable_gqa": True}
        return F.scaled_dot_product_attention(query, key, value, allowed, is_causal=allowed is None, **options)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~cast(Tensor, allowed), float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], dim=-1)
    weights = scores.softmax(dim=-1, dtype=torch.float32)[..., :length].to(query.dtype)
    return F.dropout(weights, dropout, training=dropout > 0) @ value


def _fits_kernel(query: Tensor, value: Tensor) -> bool:
    """Whether FlashAttention takes tensors like these: what torch's flash_api.cpp checks before it launches."""
    dimension = query.shape[-1]
    halves = query.dtype in (torch.bfloat16, torch.float16)
    return halves and dimension % 8 == 0 and dimension <= 256 and value.shape[-1] == dimension


@cache
def _is_ampere() -> bool:
    return not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (8, 0)


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: tuple[int, ...],
    longest: int,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """Attention of all sequences in one kernel, on a GPU in half precision; not yet run on one (docs/lab-notes.md)."""
    from torch.nn.attention.varlen import varlen_attn

    groups, options = query.shape[1] // key.shape[1], dict[str, Any]()
    if groups > 1 and "enable_gqa" in signature(varlen_attn).parameters:
        options["enable_gqa"] = True
    elif groups > 1:  # torch 2.11
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    offsets = offsets_on(starts, query.device)
    q, k, v = (part[0].transpose(0, 1).contiguous() for part in (query, key, value))
    sides = (-1 if window is None else window - 1, 0)
    out = varlen_attn(q, k, v, offsets, offsets, longest, longest, scale=scaling, window_size=sides, **options)
    assert isinstance(out, Tensor)
    return out[None]


class LocalMask(NamedTuple):
    """Stand-in for a mask that limits attention to nearby tokens: to a window, or to a chunk."""

    window: int | None
    chunk: int | None


def packed_mask(*args: Any, config: Any = None, local_size: int | None = None, **kwargs: Any) -> LocalMask | None:
    """Mask function for `packed_attention`: builds no mask, and passes on the size of a local one. transformers gives a
    window and a chunk under one name; the configuration tells which it is."""
    chunk, window = (getattr(config, name, None) for name in ("attention_chunk_size", "sliding_window"))
    if local_size is None:
        return None
    if local_size == chunk == window:
        raise NotPackable(Unpackable.OWN_MASK, f"a window and chunks of {chunk}")
    return LocalMask(None, local_size) if local_size == chunk else LocalMask(local_size, None)


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, packed_mask)
