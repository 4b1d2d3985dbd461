"""Engines that compute losses and gradients of trials: `packed` and `peft`, with the same methods.

`packed` runs all trials in one flattened batch; `peft` runs one trial at a time by PEFT's own forward on padded
batches. Both accumulate gradients in the adapters' parameters and give the same numbers, up to rounding.
"""

from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from peft.tuners.lora import ParamWrapper
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from rankscope.data.tokens import Tokens
from rankscope.lora.adapters import activate, adapted_modules, adapter_key, lora_layers
from rankscope.lora.layout import Examples, FlatBatch, Layout, Slice, flatten, use_layout
from rankscope.lora.packed import trunk_name
from rankscope.model.load import offset_positions
from rankscope.model.mixed import is_mixed
from rankscope.train.attention import NAME
from rankscope.train.loss import Head, label_losses

EVAL_TOKENS = 4096  # tokens of one evaluation forward at most, so that it needs less memory than training

BFLOAT16_MULTIPLE = 32
"""Multiple of tokens of a trial's part of a forward, for products in bfloat16 on a CPU: oneDNN compiles a kernel for
each new shape, which takes longer than a small product itself (docs/lab-notes.md)."""

OWN_ATTENTION_TOKENS = 2048  # tokens of one packed forward at most by a model's own attention: its mask has all pairs


class ExampleLosses(NamedTuple):
    """Held-out losses of one trial, each of shape (examples,)."""

    loss: np.ndarray  # mean over the example's label tokens, in nats
    label_tokens: np.ndarray
    correct_tokens: np.ndarray  # label tokens with the highest logit

    @property
    def mean(self) -> float:
        """Mean loss over all label tokens, in nats, rather than a mean of the examples' means."""
        return float(np.average(self.loss, weights=self.label_tokens))

    @property
    def accuracy(self) -> float:
        """Share of label tokens predicted correctly (teacher-forced)."""
        return float(self.correct_tokens.sum() / self.label_tokens.sum())


def mixed_precision(device: torch.device, enabled: bool) -> torch.autocast:
    """Matrix products in bfloat16 over float32 weights, with no cast cached: one made without gradient has none."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled, cache_enabled=False)


class PackedEngine:
    """Engine for all trials in one flattened batch, divided into forwards of at most `tokens_per_forward` tokens."""

    name = "packed"
    unreached: Collection[str] = ()  # adapted layers that get no gradient, and keep no adapter
    mixed = False  # matrix products in bfloat16 over float32 weights: full fine-tuning of a bfloat16 base
    multiple = 1  # of tokens to which each trial's part of a forward is filled up

    def __init__(self, model: PreTrainedModel, tokens_per_forward: int, base_dropout: bool = False) -> None:
        self.model, self.tokens_per_forward, self.base_dropout = model, tokens_per_forward, base_dropout
        self.head, self._rotations = Head(model), dynamic_rotations(model)
        if model.device.type == "cpu" and is_mixed(model):
            self.multiple = BFLOAT16_MULTIPLE
        offset = offset_positions(model)
        self._first_position = int(offset.padding_idx or 0) + 1 if offset else 0

    def forward(self, tokens: Tokens, adapter: str) -> Tensor:
        """Trunk's hidden states of all of `tokens` under one adapter, for counting its cost."""
        batch = flatten(tokens, [Slice(adapter, range(len(tokens)))], self.model.device)
        # With a mask, transformers does not derive sequences from the positions, which fails on the meta device.
        return self.hidden(batch, torch.ones_like(batch.input_ids))

    def hidden(self, batch: FlatBatch, attention_mask: Tensor | None = None) -> Tensor:
        """Trunk's last hidden states at the label positions, (L, D)."""
        positions = batch.position_ids + self._first_position
        inputs = {"input_ids": batch.input_ids, "position_ids": positions, "attention_mask": attention_mask}
        forget_lengths(self._rotations)
        with use_layout(batch.layout):
            states: Tensor = self.head.trunk(**inputs, use_cache=False).last_hidden_state
        self.head.layout = batch.label_layout
        return states[0].index_select(0, batch.label_positions)

    def groups(self, tokens: Tokens, slices: Sequence[Slice], most: int | None = None) -> list[list[Slice]]:
        """Slices of each forward, of at most `most` tokens (default: those of a training forward)."""
        most = most or self.tokens_per_forward
        if self.model.config._attn_implementation != NAME:
            positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
            most = min(most, OWN_ATTENTION_TOKENS, positions or most)  # some have buffers of so many
        kinds = by_kind(tokens, slices, row_kind(self.model.config))
        return [group for alike in kinds for group in divide(tokens, alike, most)]

    def by_rank(self, slices: Sequence[Slice]) -> Sequence[Slice]:
        """Slices in the order of their ranks, on a GPU: see `rankscope.lora.grouped`."""
        configs = getattr(self.model, "peft_config", {})
        if self.model.device.type != "cuda" or not configs:
            return slices
        return sorted(slices, key=lambda slice_: int(configs[adapter_key(slice_.adapter)].r))

    def accumulate(self, tokens: Tokens, slices: Sequence[Slice]) -> Iterator[Tensor]:
        """Add the gradient of each slice's mean loss to its adapter's parameters. The losses of its labels, (L,), are
        handed out in the slices' order once its gradient is complete: a caller may use and drop that before the next
        one takes memory. They are left on the device: to read them is to wait for a GPU."""
        self.model.train(self.base_dropout)
        labels = {part.adapter: int(tokens.label_counts[part.examples].sum()) for part in slices}
        found: dict[str, list[Tensor]] = {adapter: [] for adapter in labels}
        groups, pending = self.groups(tokens, self.by_rank(slices)), list(labels)
        ends = {part.adapter: number for number, group in enumerate(groups) for part in group}
        kind = np.float32 if self.model.device.type == "mps" else np.float64  # which Apple's GPUs lack
        for number, group in enumerate(groups):
            batch = flatten(tokens, group, self.model.device, self.tokens_per_forward, self.multiple)
            counts = batch.label_layout.lengths
            shares = np.repeat(np.array([1 / labels[part.adapter] for part in group], dtype=kind), counts)  # (L,)
            weights = torch.from_numpy(shares).to(self.model.device, non_blocking=True)
            with mixed_precision(self.model.device, self.mixed):
                out = label_losses(self.head, self.hidden(batch), batch.targets, weights, self.head.trained)
            out.total.backward()
            for part, losses in zip(group, out.losses.split(counts), strict=True):
                found[part.adapter].append(losses)
            while pending and ends[pending[0]] <= number:
                yield torch.cat(found.pop(pending.pop(0)))

    @torch.no_grad()
    def evaluate(self, tokens: Tokens, adapters: Sequence[str]) -> list[ExampleLosses]:
        """Evaluate the loss of every example under each adapter, without gradient or dropout."""
        if not adapters:
            return []
        self.model.eval()
        counts, rows = tokens.label_counts, len(tokens)
        losses, correct = np.zeros((2, len(adapters) * rows))
        first = {adapter: number * rows for number, adapter in enumerate(adapters)}
        slices = [Slice(adapter, range(rows)) for adapter in adapters]
        for group in self.groups(tokens, slices, min(EVAL_TOKENS, self.tokens_per_forward)):
            batch = flatten(tokens, group, self.model.device, multiple=self.multiple)
            with mixed_precision(self.model.device, self.mixed):
                hidden = self.hidden(batch)
                out = label_losses(self.head, hidden, batch.targets, torch.ones_like(hidden[:, 0]).float())
            places = [first[part.adapter] + example for part in group for example in part.examples]
            losses[places] = np.bincount(batch.label_sequence, out.losses.cpu().double(), len(places))
            correct[places] = np.bincount(batch.label_sequence, out.correct.cpu().double(), len(places))
        parts = zip(losses.reshape(-1, rows), correct.reshape(-1, rows), strict=True)
        return [ExampleLosses(loss / counts, counts, hits) for loss, hits in parts]


class PeftEngine:
    """Engine for one trial at a time, by PEFT's forward and the model's own attention, on right-padded batches. A
    forward takes at most `batch_size` rows, or fewer to stay within `tokens_per_forward` tokens. A single row with more
    tokens is recomputed if `recompute_layers` has prepared the model: see `rankscope.train.recompute`."""

    name = "peft"
    mixed = False
    unreached: Collection[str] = ()

    def __init__(
        self, model: PreTrainedModel, batch_size: int, base_dropout: bool = False, tokens_per_forward: int = 1 << 30
    ) -> None:
        self.model, self.tokens_per_forward, self.base_dropout = model, tokens_per_forward, base_dropout
        self.batch_size, self._rotations = batch_size, dynamic_rotations(model)
        for layer in adapted_modules(model):
            if isinstance(layer, ParamWrapper):  # PEFT adds an update to the weight itself, in the weight's type
                weight: Tensor = layer.get_param()  # type: ignore[no-untyped-call]
                weight.data = weight.data.float()

    def forward(self, tokens: Tokens, adapter: str) -> Tensor:
        """As `PackedEngine.forward`, row by row."""
        activate(self.model, adapter)
        trunk = getattr(self.model, trunk_name(self.model) or "", self.model)
        rows = [torch.from_numpy(ids.astype(np.int64))[None].to(self.model.device) for ids, _ in tokens]
        return torch.cat([trunk(row, use_cache=False)[0] for row in rows], dim=1)

    def _losses(self, tokens: Tokens, examples: Examples) -> tuple[Tensor, Tensor]:
        """Losses and hits of each label, of shape (examples, longest - 1) and zero elsewhere."""
        ids, mask, is_label = pad(tokens, examples, self.model.device)
        mixed = self.mixed or is_mixed(self.model)  # what PEFT's own forward multiplies beside the base
        layout = Layout((), ids.numel(), recompute=ids.numel() > self.tokens_per_forward)
        forget_lengths(self._rotations)
        with mixed_precision(self.model.device, mixed), use_layout(layout):
            logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        logits, targets, wanted = logits[:, :-1].float(), ids[:, 1:], is_label[:, 1:]
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        return loss * wanted, (logits.argmax(dim=-1) == targets) & wanted

    def accumulate(self, tokens: Tokens, slices: Sequence[Slice]) -> Iterator[Tensor]:
        """As `PackedEngine.accumulate`; padding has losses of 0."""
        self.model.train(self.base_dropout)
        for slice_ in slices:
            labels, found = int(tokens.label_counts[slice_.examples].sum()), list[Tensor]()
            for part in self.parts(tokens, slice_):
                loss = self.losses(tokens, part)
                (loss.sum() / labels).backward()
                found.append(loss.detach().flatten())
            yield torch.cat(found)

    def parts(self, tokens: Tokens, slice_: Slice) -> list[Slice]:
        """Parts of a slice, one for each forward."""
        parts = []
        for (alike,) in by_kind(tokens, [slice_], row_kind(self.model.config)):
            longest = int(tokens.lengths[alike.examples].max())
            rows, places = max(1, min(self.batch_size, self.tokens_per_forward // longest)), range(len(alike.examples))
            parts += [alike.take(places[first : first + rows]) for first in places[::rows]]
        return parts

    def losses(self, tokens: Tokens, slice_: Slice) -> Tensor:
        """Losses of each label in one forward, zero elsewhere, with LoRA dropout if the slice has seeds."""
        activate(self.model, slice_.adapter)
        for _, layer in lora_layers(self.model):
            layer.lora_dropout.train(bool(slice_.dropout_seeds))
        with torch.random.fork_rng(enabled=bool(slice_.dropout_seeds)):
            if slice_.dropout_seeds:
                torch.manual_seed(slice_.dropout_seeds[0])
            return self._losses(tokens, slice_.examples)[0]

    @torch.no_grad()
    def evaluate(self, tokens: Tokens, adapters: Sequence[str]) -> list[ExampleLosses]:
        """As `PackedEngine.evaluate`."""
        self.model.eval()
        counts, results = tokens.label_counts, []
        for adapter in adapters:
            activate(self.model, adapter)
            losses, correct = np.zeros((2, len(tokens)))
            for _, part, _ in self.parts(tokens, Slice(adapter, range(len(tokens)))):
                loss, hits = self._losses(tokens, part)
                losses[part], correct[part] = loss.cpu().double().sum(dim=1), hits.sum(dim=1).cpu()
            results.append(ExampleLosses(losses / counts, counts, correct))
        return results


Engine = PackedEngine | PeftEngine


def row_kind(config: Any) -> Callable[[int], Hashable]:
    """Kind of a row by its length: rows of different kinds may not share a forward.

    transformers computes one set of rotations for all positions of a forward. With longrope (Ding et al. 2024,
    arXiv:2402.13753) it depends on whether any position is beyond the original length, with dynamic RoPE on the longest
    row, once that is beyond the model's length.
    """
    text = config.get_text_config()
    parameters = getattr(text, "rope_parameters", None) or {}
    by_layer = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    long = {kind["original_max_position_embeddings"] for kind in by_layer if kind.get("rope_type") == "longrope"}
    dynamic = any("dynamic" in str(kind.get("rope_type")) for kind in by_layer)

    def kind(length: int) -> Hashable:
        scaled = length if dynamic and length > text.max_position_embeddings else 0
        return scaled, *(length > original for original in sorted(long))

    return kind


def by_kind(tokens: Tokens, slices: Sequence[Slice], kind: Callable[[int], Hashable]) -> list[list[Slice]]:
    """Divide the rows of `slices`, in their order, into those of each kind."""
    kinds: dict[Hashable, list[Slice]] = {}
    for part in slices:
        places: dict[Hashable, list[int]] = {}
        for place, length in enumerate(tokens.lengths[part.examples].tolist()):
            places.setdefault(kind(length), []).append(place)
        for key, own in places.items():
            kinds.setdefault(key, []).append(part.take(own))
    return list(kinds.values())


def dynamic_rotations(model: PreTrainedModel) -> list[Any]:
    """Modules whose rotations depend on the rows that they have seen: see `forget_lengths`."""
    return [module for module in model.modules() if "dynamic" in str(getattr(module, "rope_type", ""))]


def forget_lengths(rotations: Sequence[Any]) -> None:
    """Make dynamic RoPE take the next forward's rotations from that forward alone, not from a longer one before."""
    for module in rotations:
        by_layer = isinstance(module.rope_type, dict)
        for prefix in [f"{layer_type}_" for layer_type in module.rope_type] if by_layer else [""]:
            now, original = (getattr(module, f"{prefix}{name}") for name in ("inv_freq", "original_inv_freq"))
            module.register_buffer(f"{prefix}inv_freq", original.to(now.device), persistent=False)
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


def divide(tokens: Tokens, slices: Sequence[Slice], tokens_per_forward: int) -> list[list[Slice]]:
    """Divide the sequences of `slices`, in order, into groups of at most `tokens_per_forward` tokens. A longer sequence
    is not divided but makes a group by itself."""
    groups: list[list[Slice]] = [[]]
    used = 0
    for part in slices:
        cuts = []
        for place, length in enumerate(tokens.lengths[part.examples].tolist()):
            if used and used + length > tokens_per_forward:
                cuts.append(place)
                used = 0
            used += length
        first, *others = [part.take(range(start, stop)) for start, stop in pairwise([0, *cuts, len(part.examples)])]
        groups[-1] += [first] if first.examples else []
        groups += [[other] for other in others]
    return groups


def pad(tokens: Tokens, examples: Examples, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Right-padded token ids, attention mask and label mask, each (examples, longest). Padding has token id 0."""
    rows = [tokens[int(example)] for example in examples]
    columns = (
        [torch.from_numpy(row.ids.astype(np.int64)) for row in rows],
        [torch.ones(len(row.ids), dtype=torch.int64) for row in rows],
        [torch.from_numpy(row.is_label.copy()) for row in rows],
    )
    ids, mask, is_label = (pad_sequence(column, batch_first=True).to(device) for column in columns)
    return ids, mask, is_label


LOGIT_BYTES = 16  # per logit of PEFT's forward: logits and log-probabilities in float32, and the gradients of both
FORWARD_MEMORY_FRACTION = 0.6  # of the memory free beside weights and adapters, for what a forward saves
TOKENS_PER_FORWARD = {"cpu": 512, "cuda": 1 << 15, "mps": 1 << 13}
"""Maximum tokens of one training forward. Larger ones gain nothing on a CPU (docs/lab-notes.md); GPU not measured."""


def tokens_per_forward(free: int, bytes_per_token: int, device: str) -> int:
    """Tokens of one forward that fit into `free` bytes; at least 1."""
    fitting = int(free * FORWARD_MEMORY_FRACTION / max(1, bytes_per_token))
    return max(1, min(fitting, TOKENS_PER_FORWARD[device]))
