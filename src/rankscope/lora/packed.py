"""The packed forward: each segment of a flattened batch goes through its own adapter, over one frozen base.

    y = x W.T + b                          for all T tokens at once
    y[seg] += s (drop(x[seg]) A.T) B.T     for each segment, in place

PEFT's layers stay what they are; only their `forward` is replaced. A quantized W is dequantized for each product.
Experts whose weights lie in one tensor take the same products, each over the tokens that are routed to it.
"""

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, cast

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import ParamWrapper
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PreTrainedModel

from rankscope.lora.adapters import adapter_key, outer_layers, wrapped_modules
from rankscope.lora.grouped import Span, add_updates, grouped
from rankscope.lora.layout import Layout, NotPackable, Segment, Unpackable, current_layout
from rankscope.lora.variants import initial_factors
from rankscope.model import mixed
from rankscope.model.mixed import FrozenForward, linear
from rankscope.model.quantized import is_quantized


def pack_layers(model: PreTrainedModel) -> None:
    """Replace the forward of every LoRA layer by the packed one. Raises NotPackable: a layer is not plain LoRA over a
    linear module, or one behind the trunk has LoRA dropout, whose numbers PEFT draws for all positions and not for the
    labels alone."""
    if others := wrapped_modules(model):
        raise NotPackable(Unpackable.WHOLE, others[0][0])
    trunk = trunk_name(model)
    if trunk is None:
        raise NotPackable(Unpackable.NO_TRUNK)
    for name, layer in outer_layers(model):
        base: Any = layer.get_base_layer()
        if isinstance(layer, ParamWrapper) and not isinstance(base, nn.Linear):
            _check_experts(name, base)
            replace_forward(layer, _packed_experts, layer)
            continue
        quantized, kinds = is_quantized(base), f"a {type(layer).__name__} on a {type(base).__name__}"
        known = quantized or (type(layer) in (LoraLinear, ParamWrapper) and mixed.is_product(cast(Any, type(base))))
        if not known or layer.lora_variant or any(layer.lora_bias.values()):
            raise NotPackable(Unpackable.NOT_LINEAR, f"{name} is {kinds}, or carries a variant of LoRA")
        has_dropout = any(isinstance(dropout, nn.Dropout) for dropout in layer.lora_dropout.values())
        if has_dropout and not name.startswith(f"{trunk}."):
            raise NotPackable(Unpackable.OUTPUT_DROPOUT, name)
        replace_forward(layer, _packed_forward, layer)


def trunk_name(model: PreTrainedModel) -> str | None:
    """Name of the direct part of a model that makes the hidden states: that which holds the input embeddings.
    `base_model_prefix` would be wrong for the text models of Llama 4 and Mllama."""
    embeddings = model.get_input_embeddings()
    parts = [(name, part) for name, part in model.named_children() if part is not embeddings]
    return next((name for name, part in parts if any(module is embeddings for module in part.modules())), None)


class Replaced(partial[Any]):
    """Forward that stands in for a module's own in the packed forward, or to recompute it."""


def replace_forward(module: Any, forward: Callable[..., Any], *arguments: Any) -> None:
    """Have `forward`, with these first arguments, stand in for the module's own. `own_forwards` undoes it."""
    module.__dict__["forward"] = Replaced(forward, *arguments)


def own_forwards(model: nn.Module) -> None:
    """Give every module whose forward was replaced its own back."""
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), Replaced):
            del module.__dict__["forward"]


def _packed_forward(layer: Any, x: Tensor) -> Tensor:
    """Packed forward of one layer, from (1, T, D) or (T, D) to (1, T, O) or (T, O)."""
    layout, base = current_layout(), layer.get_base_layer()
    flat = x.reshape(-1, x.shape[-1])  # (T, D): a frozen weight's product is slower with 3-D operands
    weight = mixed.frozen_forward(base) or (base.weight if isinstance(base, nn.Linear) else base.weight.T)  # Conv1D
    operand = _operand(x, weight.dtype).view_as(flat)
    if flat.shape[0] != layout.tokens:
        raise NotPackable(Unpackable.RESHAPES, f"a layer was given {flat.shape[0]} of {layout.tokens} tokens")
    spans = []
    for segment in layout.segments:
        key, place = adapter_key(segment.adapter), (segment.start, segment.stop)
        if key in layer.lora_A:
            scaling, keep = layer.scaling[key], _dropout_keep(layer.lora_dropout[key], segment, flat)
            spans.append(Span(*place, scaling, keep, layer.lora_A[key].weight, layer.lora_B[key].weight))
            if initial := initial_factors(layer, key):
                spans.append(Span(*place, -scaling, None, *initial))
    groups = grouped(spans, operand)
    taken = {id(span) for group in groups for span in group}
    out = _packed_linear(flat, operand, weight, base.bias, [span for span in spans if id(span) not in taken])
    if groups:
        out = add_updates(out, flat, operand, groups)
    return out.view(*x.shape[:-1], out.shape[-1])


_last_operand: list[Any] = [lambda: None, 0, torch.empty(0)]


def _operand(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A layer's input as its product takes it. q, k and v are handed one tensor, which is converted and kept once."""
    if x.dtype == dtype:
        return x.detach()
    if _last_operand[0]() is not x or _last_operand[1] != x._version or _last_operand[2].dtype != dtype:
        _last_operand[:] = weakref.ref(x), x._version, x.detach().to(dtype)
    return cast(Tensor, _last_operand[2])


def _check_experts(name: str, experts: nn.Module) -> None:
    """Raise NotPackable where experts are not laid out as transformers' own functions for them expect."""
    known = all(hasattr(experts, part) for part in ("has_gate", "has_bias", "is_transposed", "down_proj"))
    if not known or getattr(experts, "has_post_expert_norm", False):
        raise NotPackable(Unpackable.NOT_LINEAR, f"{name} is a {type(experts).__name__}")


def _packed_experts(layer: ParamWrapper, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Packed forward of all experts of a block, (T, D) to (T, D); each token goes to K experts, with (T, K) weights.
    transformers' `grouped_mm_experts_forward` with the update of each adapter: the rows of an expert are in the order
    of the tokens, so that each adapter's lie together."""
    layout, experts = current_layout(), cast(Any, layer.get_base_layer())
    if x.shape[0] != layout.tokens:
        raise NotPackable(Unpackable.RESHAPES, f"experts: {x.shape[0]} of {layout.tokens} tokens")
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    spans = {parameter: _expert_spans(layer, parameter, layout) for parameter in (first, "down_proj")}
    index = top_k_index.reshape(-1)
    order = index.sort(stable=True).indices  # (T K,), rows by expert and then by token
    token = order // top_k_index.shape[1]
    parts = []
    for expert, ends in enumerate(_ends(index[order], token, layout, getattr(experts, first).shape[0])):
        rows = token[ends[0] : ends[-1]]
        if rows.shape[0]:
            places = [(start - ends[0], stop - ends[0]) for start, stop in pairwise(ends)]
            hidden = _expert_product(experts, first, expert, x[rows], places, spans[first])
            hidden = experts._apply_gate(hidden) if experts.has_gate else experts.act_fn(hidden)
            parts.append(_expert_product(experts, "down_proj", expert, hidden, places, spans["down_proj"]))
    out = torch.cat(parts) * top_k_weights.reshape(-1)[order, None]
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    return out[inverse].view(*top_k_index.shape, -1).sum(dim=1).to(x.dtype)


def _ends(expert: Tensor, token: Tensor, layout: Layout, experts: int) -> list[list[int]]:
    """Where the rows of each expert begin, and where those of each segment end among them: (E, segments + 1). On fake
    tensors, which have no values, each expert gets as many tokens of each segment."""
    ends = [0, *(segment.stop for segment in layout.segments)]
    if isinstance(expert, FakeTensor) or expert.is_meta:
        rows, tokens = len(expert), layout.tokens
        return [[(number * tokens + end) * rows // (experts * tokens) for end in ends] for number in range(experts)]
    first = layout.tokens * torch.arange(experts, device=expert.device)[:, None]
    wanted = first + torch.tensor(ends, device=expert.device)
    found: list[list[int]] = torch.searchsorted(expert * layout.tokens + token, wanted).tolist()
    return found


def _expert_spans(layer: Any, parameter: str, layout: Layout) -> list[list[Span]]:
    """Adapter of each segment on one parameter, as a span without a place for each expert; empty where it has none.
    PEFT's nested wrappers hold them."""
    while isinstance(layer, ParamWrapper) and layer.parameter_name != parameter:
        layer = layer.base_layer
    found: list[list[Span]] = []
    for key in (adapter_key(segment.adapter) for segment in layout.segments):
        if not isinstance(layer, ParamWrapper) or key not in layer.lora_A:
            found.append([])
            continue
        a, b = cast(Tensor, layer.lora_A[key].weight), cast(Tensor, layer.lora_B[key].weight)
        a = a.view(layer.num_experts, -1, a.shape[1])  # (E, R, D)
        b = b.view(b.shape[0], -1, layer.num_experts).permute(2, 0, 1).contiguous()  # (E, O, R): products copy it else
        pairs = zip(a.unbind(), b.unbind(), strict=True)
        found.append([Span(0, 0, layer.scaling[key], None, *pair) for pair in pairs])
    return found


def _expert_product(
    experts: Any, name: str, expert: int, x: Tensor, places: Sequence[tuple[int, int]], spans: Sequence[Sequence[Span]]
) -> Tensor:
    """Product of one expert with its rows, and each adapter's update of its own."""
    weight = getattr(experts, name)[expert]
    bias = getattr(experts, f"{name}_bias")[expert] if experts.has_bias else None
    pairs = zip(places, spans, strict=True)
    own = [one[expert]._replace(start=start, stop=stop) for (start, stop), one in pairs if one and stop > start]
    operand = x.detach().to(mixed.operand_dtype(weight.dtype))
    return _packed_linear(x, operand, weight.T if experts.is_transposed else weight, bias, own)


def _packed_linear(
    x: Tensor, operand: Tensor, weight: Tensor | FrozenForward, bias: Tensor | None, spans: Sequence[Span]
) -> Tensor:
    """Outputs (T, O) of a frozen layer with the updates of `spans`: see `_PackedLinear`."""
    factors = [factor for span in spans for factor in (span.a, span.b)]
    return _PackedLinear.apply(  # type: ignore[no-any-return, no-untyped-call]
        x, operand, weight, bias, [span[:4] for span in spans], *factors
    )


class _PackedLinear(torch.autograd.Function):
    """Frozen product plus the update of every span of tokens, with the input gradients added up in one buffer.

    Shapes: x and `operand`, which is x in the type of the products, (T, D), weight (O, D), bias (O,) or None, A (R, D),
    B (O, R). `spans` have first and last token, scaling, and dropout mask. A span with untrained A and B subtracts an
    initial update: see `rankscope.lora.variants`. In mixed precision sums are float32: see `rankscope.model.mixed`.
    The backward needs x or the operand (which q, k and v share), s A x of shape (t, R), and the dropout masks.

    The order of products is (x A) B rather than x (W + B A): a merged weight would have to be recomputed in the
    backward or kept for every trial, and costs more unless a span has more than 2 D O / (D + O) tokens.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        operand: Tensor,
        weight: Tensor | FrozenForward,
        bias: Tensor | None,
        spans: list[tuple[int, int, float, Any]],
        *weights: Tensor,
    ) -> Tensor:
        kind = operand.dtype
        out = linear(operand, _matrix(weight, kind), None if bias is None else bias.to(kind))
        inputs = x if mixed.rounds_operands(x, kind) else operand
        hidden = []
        with mixed.rounded_operands(kind):
            for (start, stop, scaling, keep), a, b in zip(spans, weights[::2], weights[1::2], strict=True):
                h = linear(_drop(inputs[start:stop], keep), a.to(inputs.dtype)).mul_(scaling).to(inputs.dtype)  # (t, R)
                _add_product(out[start:stop], h, b.to(inputs.dtype).T)
                hidden.append(h if a.requires_grad else h[:0])
        ctx.weight, ctx.spans, ctx.kind = weight, spans, kind
        ctx.save_for_backward(inputs, *weights, *hidden)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        inputs, *saved = ctx.saved_tensors
        count, kind, weights = len(ctx.spans), inputs.dtype, saved[: 2 * len(ctx.spans)]
        operand, grad = grad.to(ctx.kind), grad.to(kind)
        grad_x = linear(operand, _matrix(ctx.weight, ctx.kind).T) if ctx.needs_input_grad[0] else None
        grad_weights: list[Tensor | None] = []
        with mixed.rounded_operands(ctx.kind):
            for i, (start, stop, scaling, keep) in enumerate(ctx.spans):
                a, b, g = weights[2 * i].to(kind), weights[2 * i + 1].to(kind), grad[start:stop]
                grad_h = linear(g, b.T).mul_(scaling).to(kind)  # (t, R)
                if ctx.needs_input_grad[5 + 2 * i]:
                    grad_weights.append(_grad(weights[2 * i], grad_h.T, _drop(inputs[start:stop], keep)))
                    grad_weights.append(_grad(weights[2 * i + 1], g.T, saved[2 * count + i]))
                else:
                    grad_weights += [None, None]
                if grad_x is not None and keep is None:
                    _add_product(grad_x[start:stop], grad_h, a)
                elif grad_x is not None:
                    grad_x[start:stop] += _drop(linear(grad_h, a.T), keep)
        return grad_x, None, None, None, None, *grad_weights


def _matrix(weight: Tensor | FrozenForward, dtype: torch.dtype) -> Tensor:
    """Frozen weight of shape (O, D), dequantized where it is quantized."""
    return weight.weight(dtype) if isinstance(weight, FrozenForward) else weight.to(dtype)


def _add_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    """Add `left @ right` in place, in the type of `out`."""
    if out.dtype == left.dtype:
        out.addmm_(left, right)
    else:
        out += linear(left, right.T)


def _grad(weight: Tensor, left: Tensor, right: Tensor) -> Tensor | None:
    """Return the gradient `left @ right`, or add it to the one that the step has accumulated and return None."""
    if not weight.is_leaf or weight.grad is None:
        return linear(left, right.T)
    _add_product(weight.grad, left, right)
    return None


def _dropout_keep(dropout: nn.Module, segment: Segment, x: Tensor) -> tuple[Tensor, float] | None:
    """Dropout mask of a segment, a bool (t, D), and the factor 1 / (1 - p); None without dropout. On the CPU a
    sequence's random stream draws the same numbers as `torch.nn.Dropout` does for that sequence alone."""
    if not segment.dropout or not isinstance(dropout, nn.Dropout) or dropout.p == 0.0:
        return None
    mask = torch.empty(segment.stop - segment.start, x.shape[1], dtype=torch.bool, device=x.device)
    for part, stream in zip(mask.split(segment.lengths), segment.dropout, strict=True):
        part.bernoulli_(1 - dropout.p, generator=stream)
    return mask, 1 / (1 - dropout.p)


def _drop(x: Tensor, keep: tuple[Tensor, float] | None) -> Tensor:
    return x if keep is None else (x * keep[0]).mul_(keep[1])
