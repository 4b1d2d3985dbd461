"""Probe whether a model can be packed, on the loaded model itself.

There is no list of architectures: two forwards of the model are compared. An architecture that ignores the registered
attention (some still have their own) lets the sequences of a flattened batch attend to each other, and the probe shows
it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rankscope.data.tokens import Tokens
from rankscope.lora.layout import NotPackable, Slice, flatten
from rankscope.lora.packed import pack_layers, unpack_layers
from rankscope.train.attention import NAME
from rankscope.train.engine import PackedEngine
from rankscope.train.recompute import keep_layers, recompute_layers

_LENGTHS = (7, 12, 5, 9)
PROBE_TOKENS = sum(_LENGTHS)  # total length of the probe sequences


def make_packable(model: PreTrainedModel, adapters: Sequence[str]) -> None:
    """Switch the model's attention and LoRA layers to the packed forward, and check it against the model's own.

    Raises:
        NotPackable: the packed forward fails or gives other logits; the model is then unchanged.
    """
    own_attention = model.config._attn_implementation
    try:
        tokens = probe_tokens(model)
        expected = [_plain_logits(model, ids) for ids, _ in tokens]
        use_packed_forward(model)
        _compare(expected, _packed_logits(model, tokens, adapters), model.dtype)
    except NotPackable:
        use_own_forward(model, own_attention)
        raise
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError) as error:
        use_own_forward(model, own_attention)
        raise NotPackable(f"its packed forward fails: {str(error).strip().splitlines()[0]}") from error


def dependent_rows_reason(config: Any, longest_row: int) -> str | None:
    """Reason why rows of up to `longest_row` tokens depend on their neighbours in a forward; None if they do not.

    With longrope (Ding et al. 2024, arXiv:2402.13753) transformers takes other rotations for all positions of a
    forward in which any position is beyond the original length: a long row would change every row beside it.
    """
    parameters = getattr(config.get_text_config(), "rope_parameters", None) or {}
    kinds = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]  # may be by layer type
    lengths = [kind["original_max_position_embeddings"] for kind in kinds if kind.get("rope_type") == "longrope"]
    if not lengths or longest_row <= min(lengths):
        return None
    return (
        f"rows of up to {longest_row:,} tokens are longer than its original_max_position_embeddings of "
        f"{min(lengths):,}, beyond which longrope changes all rows of a forward"
    )


def use_packed_forward(model: PreTrainedModel) -> None:
    """Switch attention, LoRA layers and decoder layers to the packed forward, without comparing logits.

    Raises NotPackable if a layer, or the model's attention, cannot be replaced.
    """
    pack_layers(model)
    recompute_layers(model)
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:  # GPT-Neo and Falcon ignore it without an error
        raise NotPackable("its attention cannot be replaced")


def use_own_forward(model: PreTrainedModel, attention: str) -> None:
    """Restore the attention of that name and the own forward of all layers."""
    unpack_layers(model)
    keep_layers(model)
    model.set_attn_implementation(attention)


def probe_tokens(model: PreTrainedModel) -> Tokens:
    """Four short sequences of random ids, without the pad id, which some models treat specially."""
    rng = np.random.default_rng(0)
    config = model.config.get_text_config()
    ids = rng.integers(0, config.vocab_size, PROBE_TOKENS, dtype=np.int32)
    pad = getattr(config, "pad_token_id", None)
    ids[ids == pad] = 0 if pad != 0 else 1
    is_label = np.ones(len(ids), dtype=bool)
    return Tokens(ids=ids, is_label=is_label, offsets=np.cumsum([0, *_LENGTHS], dtype=np.int64))


@torch.no_grad()
def _plain_logits(model: PreTrainedModel, ids: np.ndarray) -> Tensor:
    """Logits (t - 1, V) of one sequence alone, by the model's own forward and attention."""
    batch = torch.from_numpy(ids.astype(np.int64))[None].to(model.device)
    logits: Tensor = model(input_ids=batch, use_cache=False).logits
    return logits[0, :-1].float()


@torch.no_grad()
def _packed_logits(model: PreTrainedModel, tokens: Tokens, adapters: Sequence[str]) -> list[Tensor]:
    engine = PackedEngine(model, 1 << 30)
    batch = flatten(tokens, [Slice(adapters[0], range(len(tokens)))], model.device)
    logits = engine.head(engine.hidden(batch)).float()
    return list(logits.split([length - 1 for length in _LENGTHS]))


def _compare(expected: Sequence[Tensor], got: Sequence[Tensor], dtype: torch.dtype) -> None:
    """Raise NotPackable if logits differ by more than rounding, as they do after a leak or with wrong positions."""
    tolerance = 1e-3 if dtype == torch.float32 else 5e-2
    for one, other in zip(expected, got, strict=True):
        difference, scale = float((one - other).norm()), float((one - one.mean()).norm())
        if not difference <= tolerance * scale:
            relative = difference / scale
            raise NotPackable(f"flattened sequences give other logits than single ones ({relative:.1e} relative)")
