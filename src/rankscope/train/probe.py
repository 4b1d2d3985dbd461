"""Can this model be packed, and how much memory does a token of it take? Asked of the real model, before training.

No list of architectures: two forwards of the loaded model are compared. An architecture that ignores the
registered attention (some still carry their own) lets sequences of a flattened batch see each other, which shows.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rankscope.data.tokens import Tokens
from rankscope.lora.adapters import adapter_parameters
from rankscope.lora.layout import NotPackable, Slice, flatten, use_layout
from rankscope.lora.packed import pack_layers, unpack_layers
from rankscope.train.attention import NAME
from rankscope.train.engine import PackedEngine
from rankscope.train.loss import label_losses

_LENGTHS = (7, 12, 5, 9)


def make_packable(model: PreTrainedModel, adapters: Sequence[str]) -> int:
    """Turns the model's attention and LoRA layers to the packed forward, and checks it against the model's own.

    Returns the bytes that a training forward keeps for the backward, for each token (saved tensors of the trunk,
    weights not counted).

    Raises:
        NotPackable: with the reason; the model is then as before.
    """
    own_attention = model.config._attn_implementation
    try:
        tokens = _random_tokens(model)
        expected = [_plain_logits(model, tokens[i][0]) for i in range(len(tokens))]
        pack_layers(model)
        model.set_attn_implementation(NAME)
        if model.config._attn_implementation != NAME:  # refused without an error: GPT-J, GPT-Neo, Falcon
            raise NotPackable("its attention cannot be replaced")
        got = _packed_logits(model, tokens, adapters)
        _compare(expected, got, model.dtype)
        return _bytes_per_token(model, tokens, adapters)
    except NotPackable:
        _restore(model, own_attention)
        raise
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError) as error:
        _restore(model, own_attention)
        raise NotPackable(f"its packed forward fails: {str(error).strip().splitlines()[0]}") from error


def _restore(model: PreTrainedModel, attention: str) -> None:
    unpack_layers(model)
    model.set_attn_implementation(attention)


def _random_tokens(model: PreTrainedModel) -> Tokens:
    """Four short sequences of random ids; never the pad id, which some models treat apart."""
    rng = np.random.default_rng(0)
    config = model.config.get_text_config()
    ids = rng.integers(0, config.vocab_size, sum(_LENGTHS), dtype=np.int32)
    pad = getattr(config, "pad_token_id", None)
    ids[ids == pad] = 0 if pad != 0 else 1
    is_label = np.ones(len(ids), dtype=bool)
    return Tokens(ids=ids, is_label=is_label, offsets=np.cumsum([0, *_LENGTHS], dtype=np.int64))


@torch.no_grad()
def _plain_logits(model: PreTrainedModel, ids: np.ndarray) -> Tensor:
    """The logits (t - 1, V) of one sequence alone, by the model's own forward and attention."""
    batch = torch.from_numpy(ids.astype(np.int64))[None].to(model.device)
    logits: Tensor = model(input_ids=batch, use_cache=False).logits
    return logits[0, :-1].float()


@torch.no_grad()
def _packed_logits(model: PreTrainedModel, tokens: Tokens, adapters: Sequence[str]) -> list[Tensor]:
    engine = PackedEngine(model, tokens_per_forward=1 << 30)
    batch = flatten(tokens, [Slice(adapters[0], range(len(tokens)))], model.device)
    logits = engine.head(engine.hidden(batch)).float()
    return list(logits.split([length - 1 for length in _LENGTHS]))


def _compare(expected: Sequence[Tensor], got: Sequence[Tensor], dtype: torch.dtype) -> None:
    """Rounding may differ; a sequence that saw its neighbour, or another position, differs by far more."""
    tolerance = 1e-3 if dtype == torch.float32 else 5e-2
    for one, other in zip(expected, got, strict=True):
        difference, scale = float((one - other).norm()), float((one - one.mean()).norm())
        if not difference <= tolerance * scale:
            raise NotPackable(
                f"flattened sequences give other logits than single ones ({difference / scale:.1e} relative)"
            )


def _bytes_per_token(model: PreTrainedModel, tokens: Tokens, adapters: Sequence[str]) -> int:
    """Runs one forward and backward of all adapters and counts the tensors it saves, each storage once."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    engine = PackedEngine(model, tokens_per_forward=1 << 30)
    batch = flatten(tokens, [Slice(adapter, range(len(tokens))) for adapter in adapters], model.device)
    with use_layout(batch.layout), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        hidden = engine.hidden(batch)
    weight = torch.ones(len(batch.targets), device=model.device)
    label_losses(engine.head, hidden, batch.targets, weight).total.backward()
    for adapter in adapters:
        for parameter in adapter_parameters(model, adapter):
            parameter.grad = None
    return sum(saved.values()) // batch.layout.tokens
