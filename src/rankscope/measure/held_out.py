"""Held-out losses of saved adapters on one model, and how far two of them differ."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedModel

from rankscope.data.tokens import Tokens
from rankscope.errors import ModelError
from rankscope.lora.layout import NotPackable
from rankscope.lora.saved import SavedAdapter, attached
from rankscope.model.load import free_bytes
from rankscope.plan.memory import LOGIT_BYTES, tokens_per_forward
from rankscope.train.engine import EVAL_TOKENS, Engine, ExampleLosses, PackedEngine, PeftEngine
from rankscope.train.probe import make_packable, use_own_forward

_ROWS = 8
"""Of one forward of PEFT's own: rows of differing lengths are padded."""


def held_out_losses(
    model: PreTrainedModel, adapters: Mapping[str, SavedAdapter], tokens: Tokens
) -> dict[str, ExampleLosses]:
    """The loss of every example of `tokens` under each adapter. `model`, which has no adapter, is left as it was.

    The forward is the packed one where the model can be packed, which is probed with each adapter, and PEFT's own
    elsewhere.

    Raises:
        ModelError: an adapter does not fit the model, or a loss is no finite number.
    """
    losses = {}
    for name, adapter in adapters.items():
        attention = model.config._attn_implementation
        with attached(model, name, adapter):
            try:
                (losses[name],) = _engine(model, name).evaluate(tokens, [name])
            finally:
                use_own_forward(model, attention)
        if not np.isfinite(losses[name].loss).all():
            raise ModelError(f"the held-out loss of {name} is no finite number", "Try another --dtype.")
    return losses


def _engine(model: PreTrainedModel, adapter: str) -> Engine:
    try:
        make_packable(model, [adapter])
    except NotPackable:
        per_token = LOGIT_BYTES * model.config.get_text_config().vocab_size
        fitting = tokens_per_forward(free_bytes(model.device), per_token, model.device.type)
        return PeftEngine(model, _ROWS, tokens_per_forward=fitting)
    return PackedEngine(model, EVAL_TOKENS)


class Difference(NamedTuple):
    """Of two mean losses over the same examples, in nats a label token."""

    mean: float
    standard_error: float | None
    """Paired, over examples; None with fewer than two."""


def difference(losses: ExampleLosses, other: ExampleLosses) -> Difference:
    """`losses.mean - other.mean`. A mean with random weights is a ratio: its variance is that of its linear part,
    w (d - mean), with w an example's label tokens over their mean."""
    weights = losses.label_tokens / losses.label_tokens.mean()
    differences = losses.loss - other.loss
    mean = float((weights * differences).mean())
    if len(differences) < 2:
        return Difference(mean, None)
    return Difference(mean, float((weights * (differences - mean)).std(ddof=1)) / math.sqrt(len(differences)))
