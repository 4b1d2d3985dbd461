"""Memory that training takes, predicted before anything is loaded.

Bytes are affine in a candidate's rank and in the number of equal layers, and nearly proportional to a forward's
tokens. So the lowest and the highest rank are rehearsed on a few layers (`rankscope.plan.fake_steps`), once for a
study, and the peak of any pack follows by arithmetic.
"""

import itertools
import logging
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from transformers import PreTrainedModel

from rankscope.data.tokens import Tokens
from rankscope.errors import StudyError
from rankscope.lora.adapters import adapter_weights, check_reached, grows_with_rank, layer_of, lora_layers, targets_of
from rankscope.lora.coverage import Coverage, find_coverage
from rankscope.lora.layout import NotPackable, Unpackable
from rankscope.lora.variants import WEIGHT_INIT_VARIANTS
from rankscope.measure.own_process import own_process_bytes
from rankscope.model.device import resolve_device, resolve_dtype
from rankscope.model.load import skeleton
from rankscope.model.quantized import base_bytes, parameter_count, quantized_layers
from rankscope.plan.fake_steps import Instant, Recording, add_empty_adapter, make_trainable, record, to_fake
from rankscope.plan.forwards import ForwardSizes
from rankscope.plan.layers import Repeats, find_repeats
from rankscope.spec.candidates import PLAIN, Candidate, Trial
from rankscope.spec.models import StudySpec
from rankscope.train.engine import LOGIT_BYTES, PackedEngine, PeftEngine, tokens_per_forward
from rankscope.train.flops import Cost, Counted, count_cost
from rankscope.train.loss import CHUNK_BYTES
from rankscope.train.optimizer import check_optimizer, state_sizes, step_bytes
from rankscope.train.probe import ATTENTIONS, probe_tokens, use_packed_forward
from rankscope.train.recompute import recompute_layers

_ONLY_FAKE = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException)
"""Errors of fake tensors, which have no values, over a model that may well be packed."""

log = logging.getLogger(__name__)

BYTES_PER_PARAMETER = 16  # in training: weight, gradient and AdamW's two moments, in float32

WEIGHT_AND_GRAD_BYTES = 8  # per parameter, without the optimizer's states, which may be smaller

UNTRACKED_ACTIVATION_FRACTION = {"cpu": 0.65, "cuda": 0.0, "mps": 0.0}
"""Memory that fake tensors do not show, as a fraction of activations and logits: what operators allocate within
themselves, and freed memory that the C library keeps. Fitted on one machine with glibc:
docs/results/memory-prediction.md. On a GPU not measured."""

FULL_STEP_TOKENS = {"cpu": 1536, "cuda": 1 << 14, "mps": 1 << 13}
"""Tokens of a step that keep the device busy: more trials in its pack take memory and gain no time. On a CPU measured,
docs/lab-notes.md; on a GPU not yet."""

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


class Family(NamedTuple):
    """Candidates that differ in rank alone, as far as memory and time go: both are affine in rank."""

    low: Candidate
    high: Candidate
    optim: str
    sizes: tuple[tuple[int, bool], ...]  # parameters of each tensor at the lowest rank, and whether they grow with rank
    costs: tuple[Cost, Cost] | None  # at the lowest and the highest rank; None where they are not predictable
    repeats: Repeats | None
    attention: str | None = ATTENTIONS[0]  # of the packed forward

    def sizes_at(self, rank: int) -> list[int]:
        """Parameters of each tensor of the adapter at `rank`."""
        return [size // self.low.rank * rank if grows else size for size, grows in self.sizes]

    def at(self, rank: int, low: Sequence[float], high: Sequence[float]) -> list[float]:
        """Numbers at `rank`, from those at the lowest and at the highest rank."""
        return _line(low, high, (rank - self.low.rank) / max(1, self.high.rank - self.low.rank))


def _line(first: Sequence[float], second: Sequence[float], x: float) -> list[float]:
    """Points on the lines through `first` at 0 and `second` at 1."""
    return [one + (other - one) * x for one, other in zip(first, second, strict=True)]


def family_key(candidate: Candidate) -> Hashable:
    """Key that candidates of one family share."""
    kind = candidate.variant if candidate.variant in (*WEIGHT_INIT_VARIANTS, "dora") else PLAIN
    patterned = (candidate.rank, candidate.rank_pattern) if candidate.rank_pattern else None
    return kind, candidate.target_modules, bool(candidate.lora_dropout), patterned


class CostModel(NamedTuple):
    """Parameter counts, FLOPs and bytes of a study's candidates, by name."""

    device: str  # cpu or cuda
    dtype: torch.dtype
    engine: str  # packed, or peft
    base_params: int
    base_bytes: int
    params: dict[str, int]
    costs: dict[str, Cost]  # empty where they are not predictable: see `reason`
    reason: str | None
    engine_reason: str | None  # why the model is not packed, as far as its weights need not be known
    logit_bytes_per_token: int  # logits of all positions, which PEFT's own forward keeps; 0 for the packed one
    full_rank: int  # highest rank that an update of any adapted layer can have: higher ones only add parameters
    optimizer_bytes: Mapping[str, int] = MappingProxyType({})  # states of one trial's optimizer
    families: Mapping[Hashable, Family] = MappingProxyType({})
    coverage: Coverage | None = None
    process_bytes: int = 0  # of the process itself: `own_process_bytes`; 0 on a GPU, whose memory it does not take

    def adapter_bytes(self, trials: Sequence[Trial]) -> int:
        """Weights, gradients, optimizer states and initial factors of all trials' adapters."""
        return sum(
            self.params[trial.candidate.name]
            * (WEIGHT_AND_GRAD_BYTES + 4 * (trial.candidate.variant in WEIGHT_INIT_VARIANTS))
            + self.states(trial.candidate)
            for trial in trials
        )

    def states(self, candidate: Candidate) -> int:
        """Bytes of the optimizer's states; in float32 for a candidate that was not counted."""
        return self.optimizer_bytes.get(candidate.name, 8 * self.params[candidate.name])

    def checkpoint_bytes(self, trials: Sequence[Trial]) -> int:
        """Size of one checkpoint: weights and the optimizer's states."""
        return sum(4 * self.params[trial.candidate.name] + self.states(trial.candidate) for trial in trials)

    def fixed_bytes(self, trials: Sequence[Trial]) -> int:
        """Memory that does not grow with a forward's tokens: process, base, adapters, the loss's two buffers."""
        return self.process_bytes + self.base_bytes + self.adapter_bytes(trials) + 2 * CHUNK_BYTES[self.device]

    def bytes_per_token(self, trials: Sequence[Trial]) -> int:
        """Saved tensors of one token, for the candidate that takes most; 0 where they are not predictable."""
        kept = max((self.costs[t.candidate.name].bytes_per_token for t in trials if self.costs), default=0)
        return kept + self.logit_bytes_per_token

    def forward_budget(self, trials: Sequence[Trial], free: int) -> int:
        """Most tokens of one forward of a pack on a device with `free` bytes."""
        return tokens_per_forward(free - self.fixed_bytes(trials), self.bytes_per_token(trials), self.device)

    def peak_bytes(self, trials: Sequence[Trial], free: int, step_tokens: float) -> int:
        """Rough peak of a pack whose steps have `step_tokens` tokens, where nothing can be rehearsed."""
        tokens = min(step_tokens, self.forward_budget(trials, free))
        return int(self.fixed_bytes(trials) + tokens * self.bytes_per_token(trials))

    def including(self, candidate: Candidate) -> "CostModel":
        """The model with one more candidate of a family that it knows, at any rank."""
        family, name, rank = self.families[family_key(candidate)], candidate.name, candidate.rank
        sizes = family.sizes_at(rank)
        costs = {name: Cost(*map(round, family.at(rank, *family.costs)))} if family.costs else {}
        states = sum(sum(state_sizes(family.optim, size)) for size in sizes)
        return self._replace(
            params=self.params | {name: sum(sizes)},
            costs=self.costs | costs,
            optimizer_bytes=dict(self.optimizer_bytes) | {name: states},
        )


def predict(spec: StudySpec, device: torch.device | None = None) -> CostModel:
    """Count parameters, FLOPs and bytes of a study's candidates, on models of fake tensors.

    `device` need not exist; without it the study's own is taken. On a GPU that does not exist `auto` is bfloat16.

    Raises:
        StudyError: the target modules match nothing in this model, or the study's device does not exist.
        ModelError: transformers has no causal language model of this architecture, or none that can be quantized.
        MissingExtraError: the study uses bitsandbytes, which is not installed.
    """
    if device is None:
        device = resolve_device(spec.model.device)
        dtype = resolve_dtype(spec.model.dtype, device)
    else:
        auto = spec.model.dtype == "auto"
        dtype = torch.bfloat16 if auto and device.type == "cuda" else resolve_dtype(spec.model.dtype, device)
    check_optimizer(spec.training, device)
    model = skeleton(spec.model, dtype)
    base, held = parameter_count(model), base_bytes(model)
    if any(quantized_layers(model)) and (wrong := spec.trains_the_base("a quantized checkpoint")):
        raise StudyError(wrong, "Leave it out, or give the model that the checkpoint was made of.")
    all_logits = LOGIT_BYTES * model.config.get_text_config().vocab_size
    members: dict[Hashable, list[Candidate]] = {}
    for candidate in sorted(spec.candidates(), key=lambda candidate: not candidate.packable):
        members.setdefault(family_key(candidate), []).append(candidate)
    families, engine, reason, full_rank, coverage = {}, str(spec.training.engine), None, 0, None
    engine_reason: str | None = None
    for key, candidates in members.items():
        counted = _count(spec, candidates, dtype, device)
        family, packable = counted.family, candidates[0].packable
        if packable:
            engine, engine_reason = counted.engine, counted.engine_reason
        elif family.costs and engine == "packed":  # these alone keep the logits of all positions
            low, high = (cost._replace(bytes_per_token=cost.bytes_per_token + all_logits) for cost in family.costs)
            family = family._replace(costs=(low, high))
        families[key], reason, full_rank = family, reason or counted.reason, counted.full_rank
        coverage = coverage or counted.coverage
    logits = all_logits if engine == "peft" else 0
    costs = CostModel(device.type, dtype, engine, base, held, {}, {}, reason, engine_reason, logits, full_rank)
    own = 0 if device.type == "cuda" else own_process_bytes()
    costs = costs._replace(families=families, coverage=coverage, process_bytes=own)
    for candidate in spec.candidates():
        costs = costs.including(candidate)
    return costs


class _Counted(NamedTuple):
    family: Family
    engine: str
    engine_reason: str | None  # for PEFT's where the packed one was asked for
    reason: str | None  # for missing costs
    full_rank: int
    coverage: Coverage


def _count(spec: StudySpec, candidates: Sequence[Candidate], dtype: torch.dtype, device: torch.device) -> _Counted:
    """Count one family of candidates."""
    low, high = (pick(candidates, key=lambda candidate: candidate.rank) for pick in (min, max))
    if low.rank == high.rank:  # a second rank all the same, for the largest that fits
        high = low.model_copy(update={"rank": 2 * low.rank})
    model = skeleton(spec.model, dtype)
    add_empty_adapter(model, low)
    found = _count_costs(spec, Family(low, high, spec.training.optim, (), None, find_repeats(model)), dtype, device)
    repeats, layers = found.family.repeats, lora_layers(model)
    dead = {name for name, _ in layers if (repeats.in_kept(name, 3) if repeats else name) in found.unreached}
    weights = {name: w for name, w in adapter_weights(model, low.name).items() if layer_of(name) not in dead}
    check_reached(weights, dead)
    sizes = tuple((weight.numel(), grows_with_rank(name)) for name, weight in weights.items())
    ranks = [min(x.in_features or 1, x.out_features or 1) for name, x in layers if name not in dead]
    coverage = find_coverage(model, targets_of(low, model).left_out, sorted(dead))
    family = found.family._replace(sizes=sizes)
    return _Counted(family, found.engine, found.engine_reason, found.reason, max(ranks, default=0), coverage)


class _CountedCosts(NamedTuple):
    family: Family
    unreached: set[str]  # layers without gradient: those that the fake model has kept stand for all
    engine: str
    engine_reason: str | None  # for PEFT's where the packed one was asked for
    reason: str | None  # for missing costs


def _count_costs(spec: StudySpec, family: Family, dtype: torch.dtype, device: torch.device) -> _CountedCosts:
    """Count the costs of one family's lowest and highest rank."""
    packed, why_not = spec.training.engine == "packed" and family.low.packable, None
    for attention in ATTENTIONS if packed else ():  # as `rankscope.train.probe.make_packable` has it
        packing = family._replace(attention=attention)
        try:
            return _CountedCosts(*_with_costs(spec, dtype, packing, device, True), "packed", None, None)
        except _ONLY_FAKE as error:
            return _CountedCosts(packing, set(), "packed", None, _reason(error))
        except NotPackable as error:
            why_not = why_not or str(error.reason)
        except Exception as error:
            log.info("not packed", exc_info=error)
            why_not = why_not or str(Unpackable.FAILS)
    try:
        return _CountedCosts(*_with_costs(spec, dtype, family, device, False), "peft", why_not, None)
    except Exception as error:  # whatever a model does that fake tensors cannot: it is not to keep a study from running
        return _CountedCosts(family, set(), "peft", why_not, _reason(error))


def _with_costs(
    spec: StudySpec, dtype: torch.dtype, family: Family, device: torch.device, packed: bool
) -> tuple[Family, set[str]]:
    """The family with the costs of its lowest and highest rank, counted by an engine, and its layers without
    gradient."""
    counted: list[list[Counted]] = []
    for engine, mode in _fake_engines(spec, dtype, family, device, 1 << 30, packed):
        with mode:
            tokens = probe_tokens(engine.model)
            ends = (family.low.name, family.high.name)
            counted.append([count_cost(engine.model, name, engine.forward, tokens) for name in ends])
    costs = ([end.cost for end in depth] for depth in counted)
    lower, higher = (Cost(*map(round, _whole(family, ends))) for ends in zip(*costs, strict=True))
    return family._replace(costs=(lower, higher)), set(counted[0][0].unreached)


def _fake_engines(
    spec: StudySpec, dtype: torch.dtype, family: Family, device: torch.device, budget: int, packed: bool
) -> Iterator[tuple[PackedEngine | PeftEngine, FakeTensorMode]]:
    """The engine over a fake model that carries the family's lowest and highest rank.

    The model is whole, or has first three periods of its repeating layers and then two.
    """
    model, ends = skeleton(spec.model, dtype), (family.low, family.high)
    repeats = family.repeats.keep(model, 3) if family.repeats else None
    for candidate in ends:
        add_empty_adapter(model, candidate)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    to_fake(model, mode, _stand_in(device))
    make_trainable(model, ends)
    rotary: list[Any] = [module for module in model.modules() if hasattr(module, "rope_type")]
    for module in rotary:  # whose rotations may depend on the positions' values, which are not there
        module.rope_type = dict.fromkeys(module.rope_type, "default") if isinstance(module.rope_type, dict) else ""
    with mode:
        engine = _engine(model, spec, budget, packed, family.attention)
    yield engine, mode
    if repeats:
        repeats.keep(model, 2)
        yield engine, mode


def _whole(family: Family, counted: Sequence[Sequence[float]]) -> list[float]:
    """Numbers of the whole model, from those of the models that `_fake_engines` gives, in their order."""
    if family.repeats is None:
        return list(counted[0])
    three, two = counted
    return _line(two, three, family.repeats.periods - 2)


class _Rehearsal(NamedTuple):
    """Memory of a forward and its backward, for a family's lowest and highest rank."""

    tokens: int
    packed: bool
    low: list[float]  # four instants, as `Recording.instants` has them
    high: list[float]
    products: Counter[tuple[int, int, int]]  # matrix products of the lowest rank, by shape


class StudyMemory:
    """Predicted peaks of a study's packs, on a device with `free` bytes.

    A family of candidates is rehearsed when it is first needed, which takes a second or two; after that a peak takes
    some microseconds a trial.
    """

    def __init__(self, spec: StudySpec, costs: CostModel, tokens: Tokens, free: int) -> None:
        self.costs, self.free = costs, free
        self.reason: str | None = None  # for a peak that cannot be predicted
        self._spec, self._schedule = spec, ForwardSizes(spec, tokens)
        self._rehearsals: dict[tuple[Hashable, bool], _Rehearsal] = {}

    def peak_bytes(self, trials: Sequence[Trial]) -> int:
        """Peak of a pack, in bytes: from `peak`, or roughly where that cannot be predicted."""
        peak = self.peak(trials)
        if peak is not None:
            return peak.parts.total
        return self.costs.peak_bytes(trials, self.free, len(trials) * self._schedule.step_tokens)

    def peak_at(self, candidate: Candidate, rank: int) -> int:
        """Peak of a trial alone, in bytes, with the candidate's family at any rank."""
        other = candidate.model_copy(update={"rank": rank})
        self.costs = self.costs.including(other)
        return self.peak_bytes([Trial(candidate=other, seed=0)])

    def peak(self, trials: Sequence[Trial]) -> PeakMemory | None:
        """Peak of a pack, by part; None where it cannot be predicted, for `reason`."""
        if self.reason is not None:
            return None
        costs, device = self.costs, self.costs.device
        packed = costs.engine == "packed" and trials[0].candidate.packable
        budget = costs.forward_budget(trials, self.free)
        forwards = self._forwards(len(trials), packed, budget)
        gradients = sum(4 * costs.params[trial.candidate.name] for trial in trials)
        fullest, stepping = Instant(0, 0, gradients), max(self._step_bytes(trial.candidate) for trial in trials)
        total, tracked, optimizer = float(gradients + stepping), 0.0, stepping
        try:
            for recomputed, size in ((False, forwards.kept), (True, forwards.recomputed)):
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
            self.reason = _reason(error)
            return None
        initial = sum(4 * costs.params[t.candidate.name] for t in trials if t.candidate.variant in WEIGHT_INIT_VARIANTS)
        parts = MemoryBreakdown(
            process=costs.process_bytes,
            base=costs.base_bytes,
            adapter=sum(4 * costs.params[trial.candidate.name] for trial in trials) + initial,
            gradients=int(fullest.gradients),
            optimizer=sum(costs.states(trial.candidate) for trial in trials) + optimizer,
            activations=int(fullest.activations),
            logits=int(fullest.logits),
            retained=int(UNTRACKED_ACTIVATION_FRACTION[device] * tracked),
        )
        return PeakMemory(parts, max(forwards.kept, forwards.recomputed), forwards.longest)

    @property
    def products(self) -> Counter[tuple[int, int, int]]:
        """Matrix products of a forward and its backward, by shape; none before a peak was predicted."""
        rehearsals = self._rehearsals.values()
        return next(iter(rehearsals)).products if rehearsals else Counter()

    def _forwards(self, trials: int, packed: bool, budget: int) -> "_PackForwards":
        """The largest forwards of a pack: those of one trial are searched for, those of several are full."""
        one = self._schedule.forwards(packed, budget)
        kept, several, recomputed = one.kept, one.several, one.recomputed
        if trials > 1:
            together = trials * self._schedule.step_tokens
            several |= not packed or together > budget
            kept = min(together, budget) if packed and kept else kept
        if kept and recomputed <= RECOMPUTED_TAKES_LESS * budget:
            recomputed = 0
        return _PackForwards(kept, recomputed, several, one.recomputed)

    def _step_bytes(self, candidate: Candidate) -> int:
        """Short-lived memory of an optimizer step."""
        family = self.costs.families[family_key(candidate)]
        return max(step_bytes(family.optim, size, self.costs.device) for size in family.sizes_at(candidate.rank))

    def _instants(self, candidate: Candidate, recomputed: bool, tokens: int, budget: int) -> list[Instant]:
        """The fullest instants of one trial's forward of so many tokens, and of its backward."""
        key = family_key(candidate)
        family = self.costs.families[key]
        if (key, recomputed) not in self._rehearsals:
            self._rehearsals[key, recomputed] = self._rehearse(family, recomputed, budget)
        rehearsal = self._rehearsals[key, recomputed]
        numbers = [max(0.0, number) for number in family.at(candidate.rank, rehearsal.low, rehearsal.high)]
        instants = (Instant(*numbers[start : start + 3]) for start in range(0, len(numbers), 3))
        return [self._scaled(instant, tokens / rehearsal.tokens, rehearsal.packed) for instant in instants]

    def _scaled(self, instant: Instant, scale: float, packed: bool) -> Instant:
        """An instant with more or fewer tokens. The packed engine makes logits in chunks of limited size."""
        device = torch.device(self.costs.device)
        logits = instant.logits * scale
        if packed:
            counted, chunk = CHUNK_BYTES[_stand_in(device).type], CHUNK_BYTES[device.type]
            logits = min(instant.logits * max(1.0, scale), max(instant.logits, 2.0 * counted)) * (chunk // counted)
        return Instant(instant.activations * scale, logits, instant.gradients)

    def _rehearse(self, family: Family, recomputed: bool, budget: int) -> _Rehearsal:
        ends, device = (family.low, family.high), torch.device(self.costs.device)
        recordings: list[list[Recording]] = []
        packed = self.costs.engine == "packed" and family.low.packable
        for engine, mode in _fake_engines(self._spec, self.costs.dtype, family, device, budget, packed):
            slices = [self._schedule.slices(engine, end, recomputed, budget) for end in ends]
            recordings.append([record(engine, mode, self._schedule.tokens, part) for part in slices])
        if family.repeats:
            last = [three.gradients - two.gradients for three, two in zip(*recordings, strict=True)]
        else:
            last = [recording.gradients // 2 for recording in recordings[0]]
        low, high = (
            _whole(family, [[*itertools.chain(*depth[end].instants(last[end]))] for depth in recordings])
            for end in range(len(ends))
        )
        shapes = recordings[0][0].products
        counts = _whole(family, [[depth[0].products[shape] for shape in shapes] for depth in recordings])
        products = Counter({shape: round(count) for shape, count in zip(shapes, counts, strict=True)})
        forwards = self._schedule.forwards(packed, budget)
        return _Rehearsal(forwards.recomputed if recomputed else forwards.kept, packed, low, high, products)


class _PackForwards(NamedTuple):
    """Largest forwards of a pack, in tokens with padding; 0 where it has none of that kind."""

    kept: int
    recomputed: int  # only where it can take more memory than a kept one
    several: bool  # whether a step has more than one forward, so that later ones meet all gradients
    longest: int  # recomputed forward, whether it takes more or not


def predict_peak(
    spec: StudySpec, costs: CostModel, trials: Sequence[Trial], tokens: Tokens, free: int
) -> PeakMemory | str:
    """Peak of one pack on a device with `free` bytes; the reason where it cannot be predicted.

    For several packs make one `StudyMemory`, which rehearses once.
    """
    memory = StudyMemory(spec, costs, tokens, free)
    return memory.peak(trials) or memory.reason or "not predictable"


def _stand_in(device: torch.device) -> torch.device:
    """Device of the fake tensors: a torch without CUDA has no backward for a GPU's, so the CPU's stand for them."""
    return device if device.type == "cpu" or torch.backends.cuda.is_built() else torch.device("cpu")


def _engine(
    model: PreTrainedModel, spec: StudySpec, budget: int, packed: bool, attention: str | None
) -> PackedEngine | PeftEngine:
    """An engine over a fake model. Raises NotPackable where the packed one cannot be."""
    dropout = spec.training.base_dropout == "keep"
    if packed:
        use_packed_forward(model, attention)
        return PackedEngine(model, budget, dropout)
    recompute_layers(model)
    return PeftEngine(model, spec.training.batch_size, dropout, budget)


def _reason(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
