"""Cross-entropy at the label positions, in chunks, so that the logits never exist all at once."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from rankscope.lora.layout import Layout, NotPackable, Unpackable, use_layout
from rankscope.lora.packed import trunk_name

CHUNK_BYTES = {"cpu": 2**24, "cuda": 2**26, "mps": 2**26}
"""Bytes of one chunk's float32 logits; about two copies are alive at once. A CPU is faster when they fit its cache
(measured, docs/lab-notes.md); a GPU needs more rows to be busy (not measured)."""


class Head:
    """Logits (L, V) from hidden states (L, D), by the model's own forward.

    A model may do more than one product after its trunk (soft-capping in Gemma, scaling in Granite and Cohere), so all
    of it runs, with a trunk that returns given hidden states. Layers behind the trunk may carry adapters (BERT's
    transform); `layout` says whose the rows are. Raises NotPackable: the model has no such trunk.
    """

    layout: Layout | None = None

    def __init__(self, model: PreTrainedModel) -> None:
        name = trunk_name(model)
        if name is None:
            raise NotPackable(Unpackable.NO_TRUNK)
        self._model, self.trunk = model, getattr(model, name)

    @property
    def trained(self) -> list[nn.Parameter]:
        """Trained weights: none beside adapters, all of them in full fine-tuning."""
        behind = (part for part in self._model.children() if part is not self.trunk)  # may share the trunk's weights
        own = chain(self._model.parameters(recurse=False), *(part.parameters() for part in behind))
        return list({id(parameter): parameter for parameter in own if parameter.requires_grad}.values())

    def __call__(self, hidden: Tensor, start: int = 0) -> Tensor:
        """Logits of rows from `start` on."""
        called = {self.trunk, getattr(self.trunk, "decoder", self.trunk)}  # OPT calls `model.decoder`, not `model`
        for part in called:
            part.__dict__["forward"] = lambda *args, **kwargs: _TrunkOutput(last_hidden_state=hidden[None])
        try:
            with use_layout(self.layout.part(start, start + len(hidden))) if self.layout else nullcontext():
                logits: Tensor = self._model(inputs_embeds=hidden[None], use_cache=False).logits
        finally:
            for part in called:
                del part.__dict__["forward"]
        return logits[0]


@dataclass
class _TrunkOutput(BaseModelOutputWithPast):
    """Output of a trunk; further fields that models copy from it (cross attentions, router logits) are None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class LabelLosses(NamedTuple):
    """Losses of L label tokens, in nats."""

    total: Tensor  # (), weighted sum, with gradient
    losses: Tensor  # (L,) float32, without gradient
    correct: Tensor  # (L,) bool, whether the label has the highest logit; empty where gradients are on


def label_losses(
    head: Callable[[Tensor, int], Tensor],
    hidden: Tensor,
    targets: Tensor,
    weights: Tensor,
    trained: Sequence[nn.Parameter] = (),
) -> LabelLosses:
    """Compute the cross-entropy of each label, and the sum weighted by `weights`.

    Shapes: hidden (L, D), targets (L,) token ids, weights (L,). `head` gets rows and the number of the first. The
    gradients of `hidden` and of the head's `trained` parameters are computed chunk by chunk in the forward (as in Liger
    Kernel, arXiv:2410.10989), so that no logits are kept for the backward.
    """
    if not torch.is_grad_enabled():
        trained = ()  # parameters require gradients even under no_grad
    out = _ChunkedCrossEntropy.apply(hidden, targets, weights, head, *trained)  # type: ignore[no-untyped-call]
    return LabelLosses(*out)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        weights: Tensor,
        head: Callable[[Tensor, int], Tensor],
        *trained: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        correct = torch.empty(0 if grad is not None else len(targets), dtype=torch.bool, device=hidden.device)
        head_grads = [torch.zeros_like(parameter) for parameter in trained]
        with torch.no_grad():
            vocab_size = head(hidden[:1], 0).shape[-1]
        size = max(16, CHUNK_BYTES[hidden.device.type] // (4 * vocab_size))
        for start in range(0, len(targets), size):
            part = slice(start, start + size)
            with torch.set_grad_enabled(grad is not None):
                chunk = hidden[part].detach().requires_grad_(grad is not None)
                logits = head(chunk, start)
                logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            log_probs = F.log_softmax(logits.detach(), dim=-1)
            rows = torch.arange(len(log_probs), device=hidden.device)
            losses[part] = -log_probs[rows, targets[part]]
            if grad is None:
                correct[part] = logits.argmax(dim=-1) == targets[part]
            else:  # d loss / d logits = weight (p - 1{target}), in the buffer of log p
                grad_logits = log_probs.exp_()
                grad_logits[rows, targets[part]] -= 1
                grad_logits *= weights[part, None].to(grad_logits.dtype)
                grad[part], *parts = torch.autograd.grad(
                    logits, (chunk, *trained), grad_logits, materialize_grads=True
                )  # an adapter without rows in this chunk has none
                for total, one in zip(head_grads, parts, strict=True):
                    total += one
        if grad is not None:
            ctx.save_for_backward(grad, *head_grads)
        ctx.mark_non_differentiable(losses, correct)
        return losses @ weights.float(), losses, correct

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> Any:
        grad, *head_grads = ctx.saved_tensors
        return grad * grad_total, None, None, None, *(one * grad_total for one in head_grads)
