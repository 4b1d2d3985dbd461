"""Activation checkpointing for forwards that are too long to keep (Chen et al. 2016, arXiv:1604.06174): one sequence
that is longer than a forward should be. Of either engine only the decoder layers' inputs are kept, and each layer is
run again in its backward."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from rankscope.lora.layout import Layout, layout_if_any, use_layout
from rankscope.lora.packed import replace_forward


def recompute_layers(model: nn.Module) -> None:
    """Make every decoder layer follow the layout's `recompute`."""
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            replace_forward(layer, _recomputed, layer.forward)


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a decoder layer with checkpointing; transformers' own needs training mode, which turns on dropout."""
    layout = layout_if_any()
    if layout is None or not layout.recompute or not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    states = [stream.get_state() for stream in layout.streams]
    return checkpoint(
        forward, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), _again(layout, states)), **kwargs
    )


@contextmanager
def _again(layout: Layout, states: list[torch.Tensor]) -> Iterator[None]:
    """Context of a layer's second run, in the backward: the layout and dropout states of the first."""
    for stream, state in zip(layout.streams, states, strict=True):
        stream.set_state(state)
    with use_layout(layout):
        yield
