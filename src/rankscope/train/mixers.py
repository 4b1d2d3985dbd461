"""Hybrids: modules that mix over time by other means than replaceable attention are called by sequence.

A short convolution, a state-space model or linear attention runs on from one sequence of a flattened batch into the
next. Most of transformers' own heed sequence boundaries only in their kernels on a GPU. So while a mixer runs, its
tensors and the layout are those of sequences of one length, as rows of a batch. The rest of the model stays flattened.
"""

import inspect
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from rankscope.lora.layout import Layout, NotPackable, Segment, Unpackable, layout_if_any, use_layout
from rankscope.lora.packed import replace_forward

_STATE = {"cache", "cache_params", "layer_past", "past_key_value", "past_key_values", "state", "use_cache"}
"""Parameters of a forward by which a module is handed what it keeps of earlier tokens: only a mixer needs one."""


def divide_mixers(model: PreTrainedModel) -> None:
    """Call every mixer by sequence."""
    for _, module in mixers(model):
        replace_forward(module, _by_sequence, module.forward)


def mixers(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """Names and modules of the mixers that the registered attention does not reach. These are the innermost modules of
    decoder layers that are handed a state, unless they attend through transformers' AttentionInterface. What this
    misses leaks from sequence to sequence, which the probe finds."""
    stateful = [
        (name, module)
        for name, module in model.named_modules()
        if not isinstance(module, PreTrainedModel | GradientCheckpointingLayer)
        and _STATE & set(inspect.signature(type(module).forward).parameters)
    ]
    outer = {name[:at] for name, _ in stateful for at, letter in enumerate(name) if letter == "."}
    return [(name, module) for name, module in stateful if name not in outer and not _attends(type(module))]


def _attends(kind: type[nn.Module]) -> bool:
    """Whether a class refers to transformers' registered attention functions."""
    members = (member for base in kind.__mro__ for member in vars(base).values())
    codes = (getattr(inspect.unwrap(member), "__code__", None) for member in members if inspect.isfunction(member))
    return any(code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names for code in codes)


def _by_sequence(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a mixer's forward on the sequences of the flattened batch, those of equal length as one batch."""
    layout = layout_if_any()
    if layout is None or len(layout.sequence_starts) <= 2:
        return forward(*args, **kwargs)
    sequences = [
        segment._replace(lengths=(length,), dropout=segment.dropout[number : number + 1])
        for segment in layout.segments
        for number, length in enumerate(segment.lengths)
    ]
    lengths = [sequence.lengths[0] for sequence in sequences]
    leaves, spec = tree_flatten((args, kwargs))
    parts = [_split(leaf, lengths) for leaf in leaves]
    order = sorted(range(len(lengths)), key=lengths.__getitem__)  # stable: an adapter's sequences stay together
    groups = [list(group) for _, group in groupby(order, lengths.__getitem__)]
    if not all(part is None or part[0].shape[0] == 1 for part in parts):
        groups = [[number] for number in order]
    outs = []
    for group in groups:
        pairs = zip(leaves, parts, strict=True)
        own = [leaf if part is None else torch.cat([part[n] for n in group]) for leaf, part in pairs]
        own_args, own_kwargs = tree_unflatten(own, spec)
        with use_layout(_end_to_end([sequences[n] for n in group])):
            outs.append(forward(*own_args, **own_kwargs))
    if (merged := _merge(outs, groups, lengths)) is None:
        raise NotPackable(Unpackable.RESHAPES, "a module that mixes over time returns something else")
    return merged


def _split(leaf: Any, lengths: list[int]) -> list[Tensor] | None:
    """Parts of a tensor, one for each sequence; None for what has no tokens. Tokens are in the second dimension, or in
    the first that has as many; a mask (1, H, T, T) has them in the last, too."""
    tokens = sum(lengths)
    if not isinstance(leaf, Tensor) or tokens not in leaf.shape:
        return None
    parts = leaf.split(lengths, 1 if leaf.ndim > 1 and leaf.shape[1] == tokens else leaf.shape.index(tokens))
    if leaf.ndim == 4 and leaf.shape[2:] == (tokens, tokens):
        return [part.split(lengths, 3)[number] for number, part in enumerate(parts)]
    return list(parts)


def _end_to_end(sequences: Sequence[Segment]) -> Layout:
    """Layout of sequences one after another, those of one adapter in one segment."""
    segments, start = [], 0
    for adapter, members in groupby(sequences, lambda segment: segment.adapter):
        own = list(members)
        lengths = tuple(segment.lengths[0] for segment in own)
        streams = tuple(stream for segment in own for stream in segment.dropout)
        segments.append(Segment(adapter, start, start + sum(lengths), lengths, streams))
        start += sum(lengths)
    return Layout(tuple(segments), start)


def _merge(outs: Sequence[Any], groups: Sequence[Sequence[int]], lengths: Sequence[int]) -> Any:
    """Outputs (n, t, …) of all groups as one (1, T, …), in a tuple each for itself; None for what has no tokens."""
    if isinstance(outs[0], tuple | list):
        return type(outs[0])(_merge(parts, groups, lengths) for parts in zip(*outs, strict=True))
    pieces: dict[int, Tensor] = {}
    for out, group in zip(outs, groups, strict=True):
        if not isinstance(out, Tensor) or out.shape[:2] != (len(group), lengths[group[0]]):
            return None
        pieces |= zip(group, out.unbind(), strict=True)
    return torch.cat([pieces[number] for number in range(len(lengths))])[None]
