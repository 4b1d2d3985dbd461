"""Sizes of the forwards into which the steps of a schedule are divided."""

from collections.abc import Hashable, Sequence
from functools import cache
from typing import NamedTuple

from rankscope.data.batches import total_steps
from rankscope.data.tokens import Tokens
from rankscope.lora.layout import Slice
from rankscope.model.load import load_config
from rankscope.spec.candidates import Candidate, Trial
from rankscope.spec.models import StudySpec
from rankscope.train.engine import PackedEngine, PeftEngine, row_kind
from rankscope.train.step import batch_at, evenly_spaced, step_slice

MAX_STEPS_SEARCHED = 2000  # of a schedule, for its largest forward: later ones are like these


class Forwards(NamedTuple):
    """Largest forwards of a schedule. Token counts include padding."""

    kept: int  # tokens of the largest forward within the budget; 0 without one
    recomputed: int  # tokens of the longest sequence beyond the budget, whose layers run again; 0 without one
    several: bool  # whether a step has more than one forward, so that later ones meet all gradients
    where: dict[bool, tuple[int, int]]  # step, and number among its forwards, by whether it is recomputed


class ForwardSizes:
    """Sequence lengths of one trial's steps, with the study's first seed."""

    def __init__(self, spec: StudySpec, tokens: Tokens) -> None:
        self.tokens, self._spec, self._kind = tokens, spec, row_kind(load_config(spec.model))
        steps = total_steps(spec.training, len(tokens))
        profiled = evenly_spaced(steps, spec.measure.warmup_steps + spec.measure.steps)
        trial = Trial(candidate=spec.candidates()[0], seed=spec.seeds[0])
        self._lengths: dict[int, list[int]] = {
            step: tokens.lengths[batch_at(trial, tokens, spec.training, step)].tolist()
            for step in sorted({*profiled, *range(min(steps, MAX_STEPS_SEARCHED))})
        }
        self.step_tokens = max(map(sum, self._lengths.values()))  # tokens of the largest step
        self.forwards = cache(self._forwards)

    def tokens_of(self, part: Slice, packed: bool) -> int:
        """Tokens of the sequences of a forward, with PEFT's padding."""
        lengths = self.tokens.lengths[list(part.examples)]
        return int(lengths.sum() if packed else len(lengths) * lengths.max())

    def _forwards(self, packed: bool, budget: int) -> Forwards:
        """Forwards of one trial, by either engine, with at most `budget` tokens each."""
        largest, several = {False: 0, True: 0}, False
        where: dict[bool, tuple[int, int]] = {}
        for step, lengths in self._lengths.items():
            kinds: dict[Hashable, list[int]] = {}
            for length in lengths:
                kinds.setdefault(self._kind(length), []).append(length)
            measure = _packed_sizes if packed else self._padded_sizes
            sizes = [size for alike in kinds.values() for size in measure(alike, budget)]
            several |= len(sizes) > 1
            for number, size in enumerate(sizes):
                if size >= largest[size > budget]:
                    largest[size > budget], where[size > budget] = size, (step, number)
        return Forwards(largest[False], largest[True], several, where)

    def _padded_sizes(self, lengths: Sequence[int], budget: int) -> list[int]:
        rows = max(1, min(self._spec.training.batch_size, budget // max(lengths)))
        parts = [lengths[start : start + rows] for start in range(0, len(lengths), rows)]
        return [len(part) * max(part) for part in parts]

    def slices(
        self, engine: PackedEngine | PeftEngine, candidate: Candidate, recomputed: bool, budget: int
    ) -> list[Slice]:
        """The sequences of the largest forward of a kind, for the candidate's adapter."""
        step, number = self.forwards(isinstance(engine, PackedEngine), budget).where[recomputed]
        trial = Trial(candidate=candidate, seed=self._spec.seeds[0])
        slice_ = step_slice(trial, candidate.lora_dropout, self.tokens, self._spec.training, step)
        slice_ = slice_._replace(adapter=candidate.name)
        if isinstance(engine, PackedEngine):
            return engine.groups(self.tokens, [slice_])[number]
        return [engine.parts(self.tokens, slice_)[number]]


def _packed_sizes(lengths: Sequence[int], budget: int) -> list[int]:
    """Tokens of each group that `rankscope.train.engine.divide` makes."""
    sizes = [0]
    for length in lengths:
        if sizes[-1] and sizes[-1] + length > budget:
            sizes.append(0)
        sizes[-1] += length
    return sizes
