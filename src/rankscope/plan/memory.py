"""Memory that training takes, predicted before anything is loaded.

Bytes are affine in a candidate's rank and in the number of equal layers, and nearly proportional to a forward's
tokens. So the lowest and the highest rank are rehearsed on a few layers (`rankscope.plan.fake_steps`), once for a
study, and the peak of any pack follows by arithmetic.
"""

import itertools
import logging
import math
import time
from collections.abc import Hashable, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from rankscope.data.tokens import Tokens
from rankscope.errors import first_line
from rankscope.lora.variants import WEIGHT_INIT_VARIANTS
from rankscope.measure.allocator import allocator
from rankscope.plan.costs import CostModel, Family, family_key, small_engines, stand_in
from rankscope.plan.fake_steps import Instant, Recording, forward_seconds, record
from rankscope.plan.forwards import Forwards, ForwardSizes
from rankscope.spec.candidates import Candidate, Trial
from rankscope.spec.models import StudySpec
from rankscope.train.engine import BFLOAT16_MULTIPLE, tokens_per_forward
from rankscope.train.loss import CHUNK_BYTES
from rankscope.train.optimizer import step_bytes

log = logging.getLogger(__name__)

MOST_TIMED_FLOPS = 4e12
"""Of the whole model's products in a forward whose time is taken, or it is taken of one row alone."""

TIMED_PERIODS, TIMED_BYTES = 8, 1 << 30
"""Most of a model's equal layers that are timed, and most bytes of them, beside a model of two: the time of all follows
from the difference, and with it a clock's noise, which a wide one keeps small."""

TURNS, TIMING_SECONDS = 4, 10.0
"""Most turns of the lowest and the highest rank, of which the fastest counts; after so many seconds none begins."""

BYTES_PER_PARAMETER = 16  # in training: weight, gradient and AdamW's two moments, in float32

MAX_PACK_MEMORY_FRACTION = 0.9
"""Largest share of free memory that a pack may be predicted to take: the prediction is not exact."""

UNTRACKED_ACTIVATION_FRACTION = {"cpu": 0.65, "cpu with jemalloc": 0.36, "cuda": 0.0, "mps": 0.0}
"""Memory that fake tensors do not show, as a fraction of activations and logits: what operators allocate within
themselves, and freed memory that the allocator keeps. Fitted on one machine with glibc, and on another with jemalloc:
docs/results/memory-prediction.md. On a GPU not measured."""

RECOMPUTED_TAKES_LESS = 4
"""Tokens of a recomputed forward, in full forwards: up to there it takes less memory than a full one, since it keeps
its layers' inputs and one layer."""


class MemoryBreakdown(NamedTuple):
    """Memory at its peak, in bytes, by use."""

    process: int  # Python with its libraries; 0 on a GPU, where torch's allocator does not count CUDA's own
    base: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int  # saved for the backward, and short-lived tensors
    logits: int
    retained: int  # see `UNTRACKED_ACTIVATION_FRACTION`

    @property
    def total(self) -> int:
        return sum(self)


class PeakMemory(NamedTuple):
    """Predicted peak of one pack."""

    parts: MemoryBreakdown
    forward_tokens: int  # tokens of the largest forward
    recomputed_tokens: int  # tokens of the longest forward with gradient checkpointing; 0 where none has it


Ends = tuple[list[float], list[float]]  # numbers at a family's lowest and highest rank


class StudyMemory:
    """Predicted peaks of a study's packs, on a device with `free` bytes: the one estimate by which trials are divided,
    and that `plan` shows.

    A family of candidates is rehearsed when it is first needed, which takes a second or two; after that a peak takes
    some microseconds a trial.
    """

    def __init__(self, spec: StudySpec, costs: CostModel, tokens: Tokens, free: int) -> None:
        self.costs, self.free = costs, free
        self.reason: str | None = None  # for a peak that cannot be predicted
        self._spec, self._schedule = spec, ForwardSizes(spec, tokens)
        self._rehearsals: dict[tuple[Hashable, bool], tuple[int, Ends]] = {}  # tokens, and instants one after the other
        self._seconds: dict[Hashable, Ends | None] = {}

    def fits(self, trials: Sequence[Trial]) -> bool:
        """Whether a pack fits on the device, with room for what the prediction does not know."""
        return self.peak_bytes(trials) <= self.free * MAX_PACK_MEMORY_FRACTION

    def peak_bytes(self, trials: Sequence[Trial]) -> int:
        """Peak of a pack, in bytes: from `peak`, or roughly, by saved tensors, where that cannot be predicted."""
        if peak := self.peak(trials):
            return peak.parts.total
        tokens = min(len(trials) * self._schedule.step_tokens, self._budget(trials))
        return self._held(trials).total + tokens * self.costs.bytes_per_token(trials)

    def peak_at(self, candidate: Candidate, rank: int) -> int:
        """Peak of a trial alone, in bytes, with the candidate's family at any rank."""
        other = candidate.model_copy(update={"rank": rank})
        self.costs = self.costs.including(other)
        return self.peak_bytes([Trial(candidate=other, seed=0)])

    def peak(self, trials: Sequence[Trial]) -> PeakMemory | None:
        """Peak of a pack, by part; None where it cannot be predicted, for `reason`."""
        if self.reason is not None:
            return None
        packed, budget, held = self._is_packed(trials[0].candidate), self._budget(trials), self._held(trials)
        forwards = self._forwards(len(trials), packed, budget)
        longest = forwards.recomputed
        again = 0 if forwards.kept and longest <= RECOMPUTED_TAKES_LESS * budget else longest
        gradients = self._gradients(trials, packed, budget)
        stepping = max(self._step_bytes(trial.candidate) for trial in trials)
        fullest, total, tracked, optimizer = Instant(0, 0, gradients), float(gradients + stepping), 0.0, stepping
        try:
            for recomputed, size in ((False, forwards.kept), (True, again)):
                alone = [self._instants(trial.candidate, recomputed, size, budget) for trial in trials if size]
                for instants in zip(*alone, strict=True):
                    instant = Instant(
                        max(one.activations for one in instants),
                        max(one.logits for one in instants),
                        gradients if forwards.several else sum(one.gradients for one in instants),
                    )
                    tracked = max(tracked, instant.tracked)
                    if instant.total > total:
                        fullest, total, optimizer = instant, instant.total, 0
        except Exception as error:  # whatever a model does that fake tensors cannot
            self.reason = first_line(error)
            return None
        site = "cpu with jemalloc" if self.costs.device == "cpu" and "jemalloc" in allocator() else self.costs.device
        parts = held._replace(
            gradients=int(fullest.gradients),
            optimizer=held.optimizer + optimizer,
            activations=int(fullest.activations),
            logits=int(fullest.logits),
            retained=int(UNTRACKED_ACTIVATION_FRACTION[site] * tracked),
        )
        return PeakMemory(parts, max(forwards.kept, again), longest)

    def seconds_per_token(self, candidate: Candidate) -> float | None:
        """Seconds of a token of the schedule's largest forward and its backward, from a few layers with random weights
        that are timed here; None where that fails. Seconds too are affine in rank and in the number of layers."""
        key, family = family_key(candidate), self.costs.families[family_key(candidate)]
        if key not in self._seconds:
            try:
                self._seconds[key] = self._time(family)
            except Exception as error:  # whatever a model does with random weights
                log.info("not timed", exc_info=error)
                self._seconds[key] = None
        ends = self._seconds[key]
        return family.at(candidate.rank, *ends)[0] if ends else None

    def _time(self, family: Family) -> Ends:
        """Seconds of a token, each (1,). The ranks and the depths take turns: a disturbance of the clock meets all."""
        costs, schedule, packed, repeats = self.costs, self._schedule, self._is_packed(family.low), family.repeats
        budget, device = self._budget([Trial(candidate=family.low, seed=0)]), torch.device(costs.device)
        depths: tuple[int, ...] = (0,)
        if repeats:
            allowed = TIMED_BYTES * repeats.periods // costs.base_bytes
            repeats = repeats._replace(periods=max(3, min(TIMED_PERIODS, repeats.periods, allowed)))
            depths = repeats.periods, 2
        engine = next(small_engines(self._spec, costs.dtype, family, device, budget, packed, None, depths[0]))
        recomputed = not schedule.forwards(packed, budget).kept
        slices = [schedule.slices(engine, end, recomputed, budget) for end in family.ends]
        if schedule.tokens_of(slices[0][0], packed) * 4 * costs.base_params > MOST_TIMED_FLOPS:
            slices = [[part._replace(examples=part.examples[:1])] for part, *_ in slices]
        fastest = [[[math.inf] for _ in depths] for _ in family.ends]
        start = time.perf_counter()
        for turn in range(TURNS):
            if turn and time.perf_counter() - start > TIMING_SECONDS:
                break
            for depth, periods in enumerate(depths):
                with repeats.only(engine.model, periods) if repeats else nullcontext():
                    for own, end in zip(slices, fastest, strict=True):
                        end[depth][0] = min(end[depth][0], forward_seconds(engine, schedule.tokens, own))
        tokens = schedule.tokens_of(slices[0][0], packed)
        # What noise is left may not make the whole model faster than a part of it.
        low, high = (max(*family.whole(end, depths[0]), *end[0]) / tokens for end in fastest)
        return [low], [high]

    def _is_packed(self, candidate: Candidate) -> bool:
        return self.costs.engine == "packed" and candidate.packable

    def _held(self, trials: Sequence[Trial]) -> MemoryBreakdown:
        """What is there in every forward of a pack: process, base, adapters, gradients of all, optimizer states, and
        the loss's two buffers."""
        costs = self.costs
        weights = [4 * costs.params[trial.candidate.name] for trial in trials]
        initial = [trial.candidate.variant in WEIGHT_INIT_VARIANTS for trial in trials]
        return MemoryBreakdown(
            process=costs.process_bytes,
            base=costs.base_bytes,
            adapter=sum(size * (1 + also) for size, also in zip(weights, initial, strict=True)),
            gradients=sum(weights),
            optimizer=sum(costs.optimizer_bytes[trial.candidate.name] for trial in trials),
            activations=0,
            logits=2 * CHUNK_BYTES[costs.device],
            retained=0,
        )

    def _budget(self, trials: Sequence[Trial]) -> int:
        """Most tokens of one forward of a pack, as `rankscope.train.loop.choose_engine` has it."""
        costs = self.costs
        return tokens_per_forward(self.free - self._held(trials).total, costs.bytes_per_token(trials), costs.device)

    def _gradients(self, trials: Sequence[Trial], packed: bool, budget: int) -> int:
        """Most bytes of gradients at once. On a CPU a trial's go with its optimizer step, so those of the trials that
        one forward meets exist together: see `rankscope.train.step.train_step`."""
        sizes = [4 * self.costs.params[trial.candidate.name] for trial in trials]
        met = self._met(packed, budget) if self.costs.device == "cpu" else len(sizes)
        return max(sum(sizes[first : first + met]) for first in range(max(1, len(sizes) - met + 1)))

    def _met(self, packed: bool, budget: int) -> int:
        """Most trials that one forward of a large pack meets: of the first and the last it has a part of a step."""
        return 2 + budget // self._schedule.step_tokens if packed else 1

    def _forwards(self, trials: int, packed: bool, budget: int) -> Forwards:
        """The largest forwards of a pack: those of one trial are searched for, those of several are full, and each
        trial's part of them is filled up: see `rankscope.train.engine.BFLOAT16_MULTIPLE`."""
        one = self._schedule.forwards(packed, budget)
        if trials == 1:
            return one
        together, kept = trials * self._schedule.step_tokens, one.kept
        if packed and kept:
            kept = min(together, budget)
            if (self.costs.device, self.costs.dtype) == ("cpu", torch.bfloat16):
                kept += (min(trials, self._met(packed, budget)) - 1) * BFLOAT16_MULTIPLE
        return one._replace(kept=kept, several=one.several or not packed or together > budget)

    def _step_bytes(self, candidate: Candidate) -> int:
        """Short-lived memory of an optimizer step."""
        family = self.costs.families[family_key(candidate)]
        return max(step_bytes(family.optim, size, self.costs.device) for size in family.sizes_at(candidate.rank))

    def _instants(self, candidate: Candidate, recomputed: bool, tokens: int, budget: int) -> list[Instant]:
        """The fullest instants of one trial's forward of so many tokens, and of its backward. The packed engine makes
        logits in chunks of limited size."""
        key, device = family_key(candidate), torch.device(self.costs.device)
        family, packed = self.costs.families[key], self._is_packed(candidate)
        if (key, recomputed) not in self._rehearsals:
            forwards = self._schedule.forwards(packed, budget)
            ends = self._rehearse(family, packed, recomputed, budget)
            self._rehearsals[key, recomputed] = forwards.recomputed if recomputed else forwards.kept, ends
        rehearsed, ends = self._rehearsals[key, recomputed]
        numbers, scale = [max(0.0, number) for number in family.at(candidate.rank, *ends)], tokens / rehearsed
        counted, chunk = CHUNK_BYTES[stand_in(device).type], CHUNK_BYTES[device.type]
        instants = []
        for start in range(0, len(numbers), 3):
            activations, logits, gradients = numbers[start : start + 3]
            scaled = logits * scale
            if packed:
                scaled = min(logits * max(1.0, scale), max(logits, 2.0 * counted)) * (chunk // counted)
            instants.append(Instant(activations * scale, scaled, gradients))
        return instants

    def _rehearse(self, family: Family, packed: bool, recomputed: bool, budget: int) -> Ends:
        """Four instants of each end, as `Recording.instants` has them."""
        device, recordings = torch.device(self.costs.device), list[list[Recording]]()
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        for engine in small_engines(self._spec, self.costs.dtype, family, device, budget, packed, mode):
            slices = [self._schedule.slices(engine, end, recomputed, budget) for end in family.ends]
            recordings.append([record(engine, mode, self._schedule.tokens, part) for part in slices])
        if family.repeats:
            last = [three.gradients - two.gradients for three, two in zip(*recordings, strict=True)]
        else:
            last = [recording.gradients // 2 for recording in recordings[0]]
        low, high = (
            family.whole([[*itertools.chain(*depth[end].instants(last[end]))] for depth in recordings])
            for end in range(2)
        )
        return low, high
