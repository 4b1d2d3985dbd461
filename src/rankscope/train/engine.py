"""Engines that compute losses and gradients of trials: `packed` and `peft`, with the same methods.

`packed` runs all trials in one flattened batch; `peft` runs one trial at a time by PEFT's own forward on padded
batches. Both accumulate gradients in the adapters' parameters and give the same numbers, up to rounding.
"""

from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from peft.tuners.lora import ParamWrapper
from torch import Tensor
from transformers import PreTrainedModel

from rankscope.data.tokens import Tokens
from rankscope.lora.adapters import adapted_modules, adapter_key, lora_layers
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


class BatchLoss(NamedTuple):
    """Loss of one trial's step, left on the device: to read it is to wait for a GPU."""

    losses: list[Tensor]  # of each label token, in nats, in parts; padding counts as 0
    tokens: int
    label_tokens: int

    @property
    def loss(self) -> float:
        """Mean over the step's label tokens, in nats."""
        return float(torch.cat(self.losses).cpu().double().sum()) / self.label_tokens


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
        self.model = model
        self.head, self._rotations = Head(model), dynamic_rotations(model)
        if model.device.type == "cpu" and is_mixed(model):
            self.multiple = BFLOAT16_MULTIPLE
        offset = offset_positions(model)
        self._first_position = int(offset.padding_idx or 0) + 1 if offset else 0
        self.tokens_per_forward = tokens_per_forward
        self.base_dropout = base_dropout

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
        kinds, most = of_one_kind(tokens, slices, row_kind(self.model.config)), most or self.tokens_per_forward
        if self.model.config._attn_implementation != NAME:
            positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
            most = min(most, OWN_ATTENTION_TOKENS, positions or most)  # some have buffers of so many
        return [group for kind in kinds for group in divide(tokens, kind, most)]

    def by_rank(self, slices: Sequence[Slice]) -> Sequence[Slice]:
        """Slices in the order of their ranks, on a GPU: see `rankscope.lora.grouped`."""
        configs = getattr(self.model, "peft_config", {})
        if self.model.device.type != "cuda" or not configs:
            return slices
        return sorted(slices, key=lambda slice_: int(configs[adapter_key(slice_.adapter)].r))

    def accumulate(self, tokens: Tokens, slices: Sequence[Slice]) -> Iterator[BatchLoss]:
        """Add the gradient of each slice's mean loss to its adapter's parameters. A slice's loss is handed out, in
        their order, once its gradient is complete: a caller may use and drop that before the next one takes memory."""
        self.model.train(self.base_dropout)
        results = {
            slice_.adapter: BatchLoss(
                [], int(tokens.lengths[slice_.examples].sum()), int(tokens.label_counts[slice_.examples].sum())
            )
            for slice_ in slices
        }
        groups, pending = self.groups(tokens, self.by_rank(slices)), list(results)
        ends = {part.adapter: number for number, group in enumerate(groups) for part in group}
        kind = np.float32 if self.model.device.type == "mps" else np.float64  # which Apple's GPUs lack
        for number, group in enumerate(groups):
            batch = flatten(tokens, group, self.model.device, self.tokens_per_forward, self.multiple)
            owners, counts = [results[part.adapter] for part in group], batch.label_layout.lengths
            shares = np.repeat(np.array([1 / owner.label_tokens for owner in owners], dtype=kind), counts)  # (L,)
            weights = torch.from_numpy(shares).to(self.model.device, non_blocking=True)
            with mixed_precision(self.model.device, self.mixed):
                out = label_losses(self.head, self.hidden(batch), batch.targets, weights, self.head.trained)
            out.total.backward()
            for owner, losses in zip(owners, out.losses.split(counts), strict=True):
                owner.losses.append(losses)
            while pending and ends[pending[0]] <= number:
                yield results[pending.pop(0)]

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
            places = np.array([first[part.adapter] + int(example) for part in group for example in part.examples])
            where = batch.label_sequence
            losses[places] = np.bincount(where, out.losses.cpu().double(), len(places))
            correct[places] = np.bincount(where, out.correct.cpu().double(), len(places))
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
        self.model, self._rotations = model, dynamic_rotations(model)
        for layer in adapted_modules(model):
            if isinstance(layer, ParamWrapper):  # PEFT adds an update to the weight itself, in the weight's type
                weight: Tensor = layer.get_param()  # type: ignore[no-untyped-call]
                weight.data = weight.data.float()
        self.batch_size = batch_size
        self.tokens_per_forward = tokens_per_forward
        self.base_dropout = base_dropout

    def _activate(self, adapter: str) -> None:
        for layer in adapted_modules(self.model):
            layer.set_adapter(adapter_key(adapter))

    def forward(self, tokens: Tokens, adapter: str) -> Tensor:
        self._activate(adapter)
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

    def accumulate(self, tokens: Tokens, slices: Sequence[Slice]) -> Iterator[BatchLoss]:
        self.model.train(self.base_dropout)
        for slice_ in slices:
            labels, found = int(tokens.label_counts[slice_.examples].sum()), list[Tensor]()
            for part in self.parts(tokens, slice_):
                loss = self.losses(tokens, part)
                (loss.sum() / labels).backward()
                found.append(loss.detach().flatten())
            yield BatchLoss(found, int(tokens.lengths[slice_.examples].sum()), labels)

    def parts(self, tokens: Tokens, slice_: Slice) -> list[Slice]:
        """Parts of a slice, one for each forward."""
        parts = []
        for ((adapter, examples, seeds),) in of_one_kind(tokens, [slice_], row_kind(self.model.config)):
            longest = int(tokens.lengths[list(examples)].max())
            rows = max(1, min(self.batch_size, self.tokens_per_forward // longest))
            parts += [
                Slice(adapter, examples[i : i + rows], seeds[i : i + rows]) for i in range(0, len(examples), rows)
            ]
        return parts

    def losses(self, tokens: Tokens, slice_: Slice) -> Tensor:
        """Losses of each label in one forward, zero elsewhere, with LoRA dropout if the slice has seeds."""
        self._activate(slice_.adapter)
        for _, layer in lora_layers(self.model):
            layer.lora_dropout.train(bool(slice_.dropout_seeds))
        with torch.random.fork_rng(enabled=bool(slice_.dropout_seeds)):
            if slice_.dropout_seeds:
                torch.manual_seed(slice_.dropout_seeds[0])
            return self._losses(tokens, slice_.examples)[0]

    @torch.no_grad()
    def evaluate(self, tokens: Tokens, adapters: Sequence[str]) -> list[ExampleLosses]:
        counts = tokens.label_counts
        self.model.eval()
        results = []
        for adapter in adapters:
            self._activate(adapter)
            losses, correct = np.zeros((2, len(tokens)))
            for _, part, _ in self.parts(tokens, Slice(adapter, range(len(tokens)))):
                loss, hits = self._losses(tokens, part)
                losses[part] = loss.cpu().double().sum(dim=1)
                correct[part] = hits.sum(dim=1).cpu()
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


def of_one_kind(tokens: Tokens, slices: Sequence[Slice], kind: Callable[[int], Hashable]) -> list[list[Slice]]:
    """Divide the rows of `slices`, in their order, into those of each kind."""
    kinds: dict[Hashable, list[Slice]] = {}
    for adapter, examples, seeds in slices:
        rows: dict[Hashable, list[int]] = {}
        for place, example in enumerate(examples):
            rows.setdefault(kind(int(tokens.lengths[int(example)])), []).append(place)
        for key, places in rows.items():
            own = Slice(
                adapter, [int(examples[place]) for place in places], [seeds[place] for place in places if seeds]
            )
            kinds.setdefault(key, []).append(own)
    return list(kinds.values()) if len(kinds) > 1 else [list(slices)]


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
    for slice_ in slices:
        adapter, examples, seeds = slice_
        start = 0
        for number, example in enumerate(examples):
            length = int(tokens.lengths[int(example)])
            if used and used + length > tokens_per_forward:
                if number > start:
                    groups[-1].append(Slice(adapter, examples[start:number], seeds[start:number]))
                groups.append([])
                start, used = number, 0
            used += length
        groups[-1].append(Slice(adapter, examples[start:], seeds[start:]))
    return groups


def pad(tokens: Tokens, examples: Examples, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Right-padded token ids, attention mask and label mask, each (examples, longest). Padding has token id 0."""
    parts = [tokens[int(example)] for example in examples]
    longest = max(len(ids) for ids, _ in parts)
    ids = np.zeros((len(parts), longest), dtype=np.int64)
    mask, is_label = np.zeros((2, len(parts), longest), dtype=bool)
    for row, (part, labels) in enumerate(parts):
        ids[row, : len(part)], mask[row, : len(part)], is_label[row, : len(part)] = part, True, labels
    return (
        torch.from_numpy(ids).to(device),
        torch.from_numpy(mask.astype(np.int64)).to(device),
        torch.from_numpy(is_label).to(device),
    )


LOGIT_BYTES = 16
"""Bytes per logit of PEFT's forward: logits and log-probabilities in float32, and the gradients of both."""

FORWARD_MEMORY_FRACTION = 0.6
"""Share of the memory free beside weights and adapters for what a forward saves; the rest is for temporaries."""

TOKENS_PER_FORWARD = {"cpu": 512, "cuda": 1 << 15, "mps": 1 << 13}
"""Maximum tokens of one training forward. Larger ones gain nothing on a CPU (docs/lab-notes.md); GPU not measured."""


def tokens_per_forward(free: int, bytes_per_token: int, device: str) -> int:
    """Tokens of one forward that fit into `free` bytes; at least 1."""
    fitting = int(free * FORWARD_MEMORY_FRACTION / max(1, bytes_per_token))
    return max(1, min(fitting, TOKENS_PER_FORWARD[device]))
