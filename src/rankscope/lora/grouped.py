"""Updates of neighbouring trials of one rank by one grouped product each, on a GPU in bfloat16: fewer launches.

    y[seg] += s (x[seg] A.T) B.T     for all segments of a group at once

`torch._grouped_mm` multiplies rows by the matrix of their group, or sums over the rows of each. It takes and gives
bfloat16, and rows of a multiple of 16 bytes. So an update, and a gradient of A or B, is rounded once, as by autocast.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rankscope.lora.layout import offsets_on, on_gpu

MULTIPLE = 8  # values of bfloat16 in 16 bytes


class Span(NamedTuple):
    """One trial's tokens, `[start, stop)`, with its scaling, dropout mask and factors."""

    start: int
    stop: int
    scaling: float
    keep: Any
    a: Tensor  # (R, D)
    b: Tensor  # (O, R)


def grouped(spans: Sequence[Span], operand: Tensor) -> list[list[Span]]:
    """Groups of two or more neighbouring spans for grouped products; none where their rules do not hold."""
    if not on_gpu(operand) or operand.dtype != torch.bfloat16:
        return []
    runs = [list(run) for _, run in groupby(spans, lambda span: (len(span.a), span.scaling, _is_plain(span)))]
    return [run for run in runs if len(run) > 1 and _is_plain(run[0])]


def _is_plain(span: Span) -> bool:
    sizes = (*span.a.shape, len(span.b))
    return span.keep is None and span.a.requires_grad and not any(size % MULTIPLE for size in sizes)


def add_updates(out: Tensor, x: Tensor, operand: Tensor, groups: Sequence[Sequence[Span]]) -> Tensor:
    """Add the updates of `groups` in place to float32 outputs (T, O), of inputs x (T, D), `operand` in bfloat16."""
    weights = [factor for group in groups for span in group for factor in (span.a, span.b)]
    return _Updates.apply(out, x, operand, groups, *weights)  # type: ignore[no-any-return, no-untyped-call]


class _Updates(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, x: Tensor, operand: Tensor, groups: Any, *weights: Tensor) -> Tensor:
        ctx.groups, kept, kind = [], [], operand.dtype
        for group in groups:
            rows, scaling = slice(group[0].start, group[-1].stop), group[0].scaling
            ends = offsets_on(tuple(span.stop - rows.start for span in group), out.device)
            a = torch.stack([span.a for span in group]).to(kind)  # (G, R, D)
            b = torch.stack([span.b for span in group]).to(kind)  # (G, O, R)
            hidden = F.grouped_mm(operand[rows], a.mT, offs=ends).mul_(scaling)  # (t, R)
            out[rows] += F.grouped_mm(hidden, b.mT, offs=ends)
            ctx.groups.append((rows, scaling))
            kept += [ends, a, b, hidden]
        ctx.mark_dirty(out)
        ctx.save_for_backward(operand, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        operand, *kept = ctx.saved_tensors
        half, gradients = grad.to(operand.dtype), list[Tensor]()
        grad_x = torch.zeros_like(operand, dtype=grad.dtype) if ctx.needs_input_grad[1] else None
        for number, (rows, scaling) in enumerate(ctx.groups):
            ends, a, b, hidden = kept[4 * number : 4 * number + 4]
            grad_hidden = F.grouped_mm(half[rows], b, offs=ends).mul_(scaling)  # (t, R)
            of_a = F.grouped_mm(grad_hidden.mT, operand[rows], offs=ends).float()  # (G, R, D)
            of_b = F.grouped_mm(half[rows].mT, hidden, offs=ends).float()  # (G, O, R)
            gradients += [one for pair in zip(of_a, of_b, strict=True) for one in pair]
            if grad_x is not None:
                grad_x[rows] = F.grouped_mm(grad_hidden, a, offs=ends)
        return grad, grad_x, None, None, *gradients
