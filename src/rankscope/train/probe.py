"""Probe whether a model can be packed, on the loaded model itself.

There is no list of architectures: forwards of the model are compared, in float32 whatever its dtype. A flattened batch
leaks where an architecture ignores the registered attention, or has a convolution, a state or a norm over time; then a
sequence's logits change when its neighbours do.
"""

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from inspect import signature
from typing import Any

import numpy as np
import torch
from peft.tuners.lora import ParamWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from rankscope.data.tokens import Tokens
from rankscope.errors import ModelError
from rankscope.lora.adapters import outer_layers
from rankscope.lora.layout import NotPackable, Slice, Unpackable, flatten
from rankscope.lora.packed import own_forwards, pack_layers, trunk_name
from rankscope.model.mixed import products_in_float32
from rankscope.train.attention import NAME
from rankscope.train.engine import PackedEngine, PeftEngine, pad
from rankscope.train.fused import fuse_elementwise
from rankscope.train.mixers import divide_mixers
from rankscope.train.recompute import recompute_layers

_LENGTHS = (7, 12, 5, 9)
_OTHER_LENGTHS = ((7, 9, 5, 12), (4, 12, 8, 9))
"""Of as many tokens, none longer: the first keeps sequences 0 and 2, the second 1 and 3."""

PEFT_ROWS = 8  # of a forward by PEFT's own in which nothing is trained

ATTENTIONS = (NAME, None)
"""Attention of the packed forward, in the order in which they are tried: ours, or else the model's own over the whole
batch, which takes a mask of (T, T): sparse attention chooses keys by it (DeepSeek-V3.2)."""

_IN_BLOCKS = r"compress|^index_(block|topk_blocks)"
"""Names of sizes of blocks of tokens that attention reads as one: blocks are longer than the probe's sequences, so that
it would not see sequences share one (DeepSeek-V4, MiniMax-M3)."""

# Relative differences of logits in float32
LENGTH_ROUNDING = 1e-6  # by rounding, where products have other shapes
CAUSAL_ROUNDING = 1e-5  # by masked tokens in a model's own forward, where they are multiplied by almost 0
NEARNESS = 1e-3  # from the model's own forward: its attention rounds otherwise, in every layer

FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, KeyError)
"""Errors by which a forward fails that packed layers do not cover."""

log = logging.getLogger(__name__)


def check_causal(model: PreTrainedModel) -> None:
    """Check that the model's own forward works, and that no logits of it depend on later tokens. Logits that are not
    finite pass: the loss will show them. Raises ModelError: it fails, or they do, as in CPM-Ant, which reads its prompt
    in both directions."""
    ids = probe_tokens(model).ids[: max(_LENGTHS)]
    later = ids.copy()
    later[-4:] = ids[-8:-4]
    try:
        with in_float32(model):
            before, after = (_own_logits(model, part)[:-4] for part in (ids, later))
            finite = bool(before.isfinite().all() and after.isfinite().all())
            difference = _difference(before, after) if finite else 0.0
            sees_later = difference > CAUSAL_ROUNDING and difference > _rounding(model)
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        what = f"{type(model).__name__}: its own forward fails with these adapters: {type(error).__name__}: {error}"
        raise ModelError(what, "Choose other adapter.target_modules, or another model.") from error
    if sees_later:
        raise ModelError(
            f"{type(model).__name__} is not a causal language model: later tokens change its earlier logits, so that "
            "its loss would be that of a model which sees the answers",
            "Use a model that predicts each token from those before it, such as a LlamaForCausalLM.",
        )


def make_packable(model: PreTrainedModel, adapters: Sequence[str]) -> None:
    """Switch the model's attention and LoRA layers to the packed forward, and check that no sequence sees another.
    Raises NotPackable: a sequence's logits depend on its neighbours, or are not those of the model's own forward, or
    the packed forward fails; the model is then unchanged."""
    own_attention, reasons = model.config._attn_implementation, list[NotPackable]()
    with in_float32(model):
        tokens = probe_tokens(model)
        expected, rounding = [_own_logits(model, ids) for ids, _ in tokens], _rounding(model)
        for attention in ATTENTIONS:
            try:
                use_packed_forward(model, attention)
                return _check_packed(PackedEngine(model, 1 << 30), tokens, expected, adapters[0], rounding)
            except NotPackable as error:
                reasons.append(error)
            except FAILURES as error:
                reasons.append(NotPackable(Unpackable.FAILS, str(error)))
            use_own_forward(model, own_attention)
            log.info("not packed with attention %s: %s", attention or own_attention, reasons[-1])
    raise reasons[0]


@torch.no_grad()
def padding_matters(model: PreTrainedModel) -> bool:
    """Whether a row's logits, by the model's own forward, change where a longer row makes it be padded (ProphetNet)."""
    tokens = probe_tokens(model, (max(_LENGTHS), min(_LENGTHS)))
    ids, mask, _ = pad(tokens, range(2), model.device)
    with in_float32(model):
        alone = _own_logits(model, tokens[1].ids)
        padded = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[1, : len(alone)].float()
    return not _difference(alone, padded) <= NEARNESS


def peft_engine(
    model: PreTrainedModel,
    batch_size: int = PEFT_ROWS,
    base_dropout: bool = False,
    tokens_per_forward: int = 1 << 30,
) -> PeftEngine:
    """PEFT's engine of up to `batch_size` rows a forward; of one row where padding would change a row's logits."""
    rows = 1 if padding_matters(model) else batch_size
    return PeftEngine(model, rows, base_dropout, tokens_per_forward)


@contextmanager
def in_float32(model: PreTrainedModel) -> Iterator[None]:
    """Make the model's forwards run in float32; experts to which PEFT adds an update are converted before it does."""
    kept: dict[nn.Module, list[tuple[nn.Parameter, Tensor]]] = {}

    def widen(layer: nn.Module, args: Any) -> None:
        kept[layer] = [(weight, weight.data) for weight in layer.parameters() if weight.dtype == torch.bfloat16]
        for weight, data in kept[layer]:
            weight.data = data.float()

    def restore(layer: nn.Module, *_: Any) -> None:
        for weight, data in kept.pop(layer):
            weight.data = data

    with products_in_float32(), ExitStack() as hooks:
        for _, layer in outer_layers(model):
            if isinstance(layer, ParamWrapper):
                hooks.callback(layer.register_forward_pre_hook(widen).remove)
                hooks.callback(layer.register_forward_hook(restore, always_call=True).remove)
        yield


def use_packed_forward(model: PreTrainedModel, attention: str | None = NAME) -> None:
    """Switch attention, LoRA layers and decoder layers to the packed forward, without comparing logits. Raises
    NotPackable if a layer cannot be replaced, or the model's attention, or its own cannot do instead."""
    if any(re.search(_IN_BLOCKS, name) for name, value in vars(model.config.get_text_config()).items() if value):
        raise NotPackable(Unpackable.BLOCKS)
    pack_layers(model)
    fuse_elementwise(model)
    recompute_layers(model)
    if attention is None:  # transformers makes a mask of sequences from the positions, where a model takes some
        if "position_ids" not in signature(getattr(model, str(trunk_name(model))).forward).parameters:
            raise NotPackable(Unpackable.OWN_ATTENTION)
        return
    divide_mixers(model)
    model.set_attn_implementation(attention)
    if model.config._attn_implementation != attention:  # GPT-Neo and Falcon ignore it without an error
        raise NotPackable(Unpackable.OWN_ATTENTION)


def use_own_forward(model: PreTrainedModel, attention: str) -> None:
    """Restore the attention of that name and the own forward of all layers."""
    own_forwards(model)
    model.set_attn_implementation(attention)


def probe_tokens(model: PreTrainedModel, lengths: Sequence[int] = _LENGTHS, seed: int = 0) -> Tokens:
    """Short sequences of random ids, without the pad id, which some models treat specially."""
    config = model.config.get_text_config()
    ids = np.random.default_rng(seed).integers(0, config.vocab_size, sum(lengths), dtype=np.int32)
    pad = getattr(config, "pad_token_id", None)
    ids[ids == pad] = 0 if pad != 0 else 1
    return Tokens(ids=ids, is_label=np.ones(len(ids), dtype=bool), offsets=np.cumsum([0, *lengths], dtype=np.int64))


@torch.no_grad()
def _own_logits(model: PreTrainedModel, *rows: np.ndarray) -> Tensor:
    """Logits (t - 1, V) of the first of some rows of equal length, by the model's own forward and attention."""
    batch = torch.from_numpy(np.stack(rows).astype(np.int64)).to(model.device)
    logits: Tensor = model(input_ids=batch, use_cache=False).logits
    return logits[0, :-1].float()


@torch.no_grad()
def _packed_logits(engine: PackedEngine, tokens: Tokens, adapter: str) -> list[Tensor]:
    """Logits (t - 1, V) of each sequence in one flattened batch."""
    batch = flatten(tokens, [Slice(adapter, range(len(tokens)))], engine.model.device)
    logits = engine.head(engine.hidden(batch)).float()
    return list(logits.split((tokens.lengths - 1).tolist()))


def _check_packed(
    engine: PackedEngine, tokens: Tokens, expected: Sequence[Tensor], adapter: str, rounding: float
) -> None:
    """Raise NotPackable if a sequence's logits change with its neighbours, or are not those of `expected`. No change at
    all shows a leak of any size, where nearness would hide a small one. The batch always has as many tokens, so that
    nothing is rounded otherwise; only routed experts get other numbers of them."""
    found = _packed_logits(engine, tokens, adapter)
    for kept in (0, 1):  # every other sequence keeps its tokens; its neighbours have other ones, then other lengths
        for lengths, limit in ((_LENGTHS, rounding), (_OTHER_LENGTHS[kept], max(rounding, LENGTH_ROUNDING))):
            others = probe_tokens(engine.model, lengths, seed=1)
            rows = [(tokens if number % 2 == kept else others)[number] for number in range(len(tokens))]
            after = _packed_logits(engine, Tokens.from_examples(rows), adapter)
            if any(not _difference(found[number], after[number]) <= limit for number in range(kept, len(tokens), 2)):
                raise NotPackable(Unpackable.LEAKS, f"beside lengths {lengths}")
    if any(not _difference(one, other) <= NEARNESS for one, other in zip(expected, found, strict=True)):
        raise NotPackable(Unpackable.OTHER_LOGITS)


def _rounding(model: PreTrainedModel) -> float:
    """Most that a token's logits may change with another's id: nothing, except where experts group the tokens. There a
    row alone and beside another in a batch of the model's own, which cannot leak, show what grouping changes: 3e-6 in a
    deep model."""
    if not any("expert" in name.lower() for name, _ in model.named_modules()):
        return 0.0
    row, other = probe_tokens(model, (max(_LENGTHS),) * 2).ids.reshape(2, -1)
    return max(LENGTH_ROUNDING, 4 * _difference(_own_logits(model, row), _own_logits(model, row, other)))


def _difference(one: Tensor, other: Tensor) -> float:
    """Norm of the difference of logits relative to their spread, which may be 0 where there is none; NaN with NaN."""
    difference = float((one - other).norm())
    return difference and difference / max(float((one - one.mean()).norm()), 1e-30)
