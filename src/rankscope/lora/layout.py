"""Layout of sequences and trials in a flattened batch, and the context variable by which layers read it.

The sequences of all trials of a pack are laid end to end, trial by trial, without padding: `(1, T)` token ids.
Attention needs the sequence boundaries, LoRA layers the trial boundaries. Neither can be passed through every model's
forward, so the layout of the running forward is a context variable.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from enum import StrEnum
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from rankscope.data.tokens import Example, Tokens


class Unpackable(StrEnum):
    """Why trials are trained by PEFT's forward, as a user reads it after "this model cannot be packed"."""

    LEAKS = "a row's loss would depend on the rows beside it"
    OTHER_LOGITS = "rows laid end to end get other logits than alone"
    OWN_ATTENTION = "its attention is code of its own, which transformers cannot replace"
    OWN_MASK = "its attention takes a mask or an argument that the packed one does not cover"
    BLOCKS = "its attention reads blocks of tokens, which rows laid end to end would share"
    RESHAPES = "its layers change the order or number of a batch's tokens"
    NO_TRUNK = "its output layer cannot be told from the rest of the model"
    OUTPUT_DROPOUT = "its output layer, or one just before it, carries an adapter with dropout"
    NOT_LINEAR = "an adapter is not plain LoRA on a linear layer"
    WHOLE = "whole modules or tokens are trained beside the adapters"
    FAILS = "its forward fails on rows laid end to end"


class NotPackable(Exception):
    """The packed forward does not cover something in the model: for users a `reason`, for the log what it is."""

    def __init__(self, reason: Unpackable, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else str(reason))
        self.reason = reason


class Segment(NamedTuple):
    """Tokens of one trial, `[start, stop)`, and the lengths of its sequences. `dropout` has a random stream for each,
    which runs on from layer to layer; it is empty in evaluation. A stream depends only on the trial's seed, the step,
    and the example's position in the step, so neither the division of a step nor the other trials change it."""

    adapter: str
    start: int
    stop: int
    lengths: tuple[int, ...]
    dropout: tuple[torch.Generator, ...]


class Layout(NamedTuple):
    """Segments of the trials in a flattened batch of T tokens, in order and without gaps."""

    segments: tuple[Segment, ...]  # none in a padded batch, by PEFT's forward
    tokens: int
    recompute: bool = False  # decoder layers keep only their inputs: see `train.recompute`

    @property
    def streams(self) -> list[torch.Generator]:
        """Dropout streams of all sequences."""
        return [stream for segment in self.segments for stream in segment.dropout]

    @property
    def sequence_starts(self) -> tuple[int, ...]:
        """Offsets of the sequences, S + 1 of them, the last one T."""
        return tuple(accumulate((length for segment in self.segments for length in segment.lengths), initial=0))

    @property
    def lengths(self) -> list[int]:
        """Tokens of each segment."""
        return [segment.stop - segment.start for segment in self.segments]

    def part(self, start: int, stop: int) -> "Layout":
        """Layout of the tokens [start, stop) alone, without dropout, each segment's as one sequence."""
        clipped = [(s.adapter, max(0, s.start - start), min(stop, s.stop) - start) for s in self.segments]
        segments = tuple(Segment(name, a, b, (b - a,), ()) for name, a, b in clipped if a < b)
        return Layout(segments, stop - start)


class FlatBatch(NamedTuple):
    """Inputs of one forward of the packed model, with L label tokens and S sequences."""

    layout: Layout
    label_layout: Layout  # of the L label tokens alone, for layers behind the trunk
    input_ids: torch.Tensor  # (1, T)
    position_ids: torch.Tensor  # (1, T), restarting at 0 in each sequence
    label_positions: torch.Tensor  # (L,), positions before a label token
    targets: torch.Tensor  # (L,), the label tokens
    label_sequence: npt.NDArray[np.int64]  # (L,), the sequence (0..S-1) each label belongs to


def on_gpu(tensor: torch.Tensor) -> bool:
    """Whether the kernels of CUDA GPUs take the tensor: a function of its own, so that tests without one can say so."""
    return tensor.is_cuda


@lru_cache(maxsize=64)
def offsets_on(offsets: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Offsets of rows as kernels take them, int32 on the device, made once for all layers of a forward."""
    return torch.tensor(offsets, dtype=torch.int32).to(device, non_blocking=True)


Examples = Sequence[int] | npt.NDArray[np.int64]
"""Indices of examples, in order."""


class Slice(NamedTuple):
    """Examples for one adapter, with a seed of LoRA dropout for each, or none for evaluation."""

    adapter: str
    examples: Examples
    dropout_seeds: Sequence[int] = ()

    def take(self, places: Sequence[int]) -> "Slice":
        """Examples at these places of the slice, with their seeds."""
        seeds = [self.dropout_seeds[place] for place in places if self.dropout_seeds]
        return Slice(self.adapter, [int(self.examples[place]) for place in places], seeds)


def flatten(
    tokens: Tokens, slices: Sequence[Slice], device: torch.device, most_kept: int | None = None, multiple: int = 1
) -> FlatBatch:
    """Lay the examples of each slice end to end. With more than `most_kept` tokens the layout asks to recompute. A
    slice is filled up to a `multiple` of tokens by a last sequence without labels, so that products meet few shapes."""
    segments, rows, is_example, start = list[Segment](), list[Example](), list[bool](), 0
    for adapter, examples, dropout_seeds in slices:
        own, seeds = [tokens[int(example)] for example in examples], list(dropout_seeds)
        is_example += [True] * len(own)
        if filling := -sum(len(row.ids) for row in own) % multiple:
            own.append(Example(np.repeat(own[-1].ids[:1], filling), np.zeros(filling, bool)))
            is_example.append(False)
            seeds += [0] if seeds else []
        row_lengths = tuple(len(row.ids) for row in own)
        streams = tuple(torch.Generator(device).manual_seed(seed) for seed in seeds)
        segments.append(Segment(adapter, start, start + sum(row_lengths), row_lengths, streams))
        start += sum(row_lengths)
        rows += own
    ids, is_label = (np.concatenate(part) for part in zip(*rows, strict=True))
    lengths = np.array([len(row.ids) for row in rows])
    starts = np.cumsum(lengths) - lengths
    is_label[starts] = False  # no token is before a sequence's first one, to predict it
    labels = np.flatnonzero(is_label)
    borders = pairwise([0, *np.searchsorted(labels, [segment.stop for segment in segments]).tolist()])
    of_labels = [Segment(s.adapter, a, b, (b - a,), ()) for s, (a, b) in zip(segments, borders, strict=True)]

    def tensor(values: npt.NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(values.astype(np.int64)).to(device, non_blocking=True)

    return FlatBatch(
        layout=Layout(tuple(segments), start, most_kept is not None and int(lengths[is_example].sum()) > most_kept),
        label_layout=Layout(tuple(of_labels), len(labels)),
        input_ids=tensor(ids)[None],
        position_ids=tensor(np.arange(start) - np.repeat(starts, lengths))[None],
        label_positions=tensor(labels - 1),
        targets=tensor(ids[labels]),
        label_sequence=np.repeat(np.cumsum(is_example) - 1, lengths)[labels],
    )


_current: ContextVar[Layout | None] = ContextVar("rankscope_layout", default=None)


@contextmanager
def use_layout(layout: Layout) -> Iterator[None]:
    """Make `layout` the one that attention and LoRA layers read while the body runs."""
    token = _current.set(layout)
    try:
        yield
    finally:
        _current.reset(token)


def layout_if_any() -> Layout | None:
    """Layout of the running forward, or None outside of `use_layout`."""
    return _current.get()


def current_layout() -> Layout:
    """Layout of the running forward. Raises RuntimeError outside of `use_layout`."""
    if (layout := _current.get()) is None:
        raise RuntimeError("a packed model was called outside of use_layout")
    return layout
