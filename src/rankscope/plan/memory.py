"""How much memory training takes, predicted before anything is loaded, and how a step is divided to fit."""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from rankscope.data.tokens import Tokens
from rankscope.lora.adapters import adapter_parameters, lora_layers
from rankscope.lora.layout import NotPackable
from rankscope.lora.variants import WEIGHT_INIT_VARIANTS
from rankscope.model.device import resolve_device, resolve_dtype
from rankscope.model.load import skeleton
from rankscope.model.quantized import base_bytes, parameter_count
from rankscope.plan.allocator import held_bytes
from rankscope.plan.fake_steps import Event, add_fake_adapters, rehearse
from rankscope.spec.candidates import Candidate, Trial
from rankscope.spec.models import StudySpec
from rankscope.train.engine import LOGIT_BYTES, PackedEngine, PeftEngine, tokens_per_forward
from rankscope.train.flops import Cost, count_cost
from rankscope.train.loss import CHUNK_BYTES
from rankscope.train.optimizer import check_optimizer, state_sizes
from rankscope.train.probe import probe_tokens, use_own_forward, use_packed_forward
from rankscope.train.recompute import recompute_layers

BYTES_PER_PARAMETER = 16
"""In training: weight, gradient and AdamW's two moments, in float32."""

WEIGHT_AND_GRAD_BYTES = 8
"""Of these, weight and gradient: the optimizer's states may be smaller."""

PROCESS_BYTES = {"cpu": 460_000_000, "cuda": 0}
"""Python with torch and transformers loaded, and threads' buffers: measured 0.41 to 0.50 GB on a CPU."""

UNTRACKED_ACTIVATION_FRACTION = {"cpu": 0.5, "cuda": 0.0}
"""Of activations and logits: what operators allocate within themselves, and the holes which that leaves. Fitted to both
the embedded model (4 million parameters) and opt-350m's shape, on one machine with glibc:
docs/results/memory-prediction.md. On a GPU never measured."""

FULL_STEP_TOKENS = {"cpu": 1536, "cuda": 1 << 14}
"""A step of so many tokens keeps the device busy: more trials in its pack take memory and gain no time. On a CPU
measured, docs/lab-notes.md; on a GPU not yet."""


class MemoryBreakdown(NamedTuple):
    """Memory at its peak, in bytes, by what holds it when most is alive."""

    process: int
    """Python with its libraries; on a GPU nothing, since torch's allocator does not count what CUDA takes itself."""
    base: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    """What a forward keeps for its backward, and what is fleeting."""
    logits: int
    retained: int
    """The most that the C library's allocator holds (`rankscope.plan.allocator`) above what is alive; and
    `UNTRACKED_ACTIVATION_FRACTION`."""

    @property
    def total(self) -> int:
        return sum(self)


class PeakMemory(NamedTuple):
    """Of a pack, or of one trial alone."""

    parts: MemoryBreakdown
    forward_tokens: int
    """Of the largest forward."""
    products: Counter[tuple[int, int, int]]
    """Matrix products of that forward, by shape."""
    recomputed_tokens: int
    """Of the longest forward whose layers run again in the backward (gradient checkpointing); 0 where none does."""


class CostModel(NamedTuple):
    """Of a study, by candidate name."""

    device: str  # cpu or cuda
    dtype: torch.dtype
    engine: str  # packed, or peft
    base_params: int
    base_bytes: int
    params: dict[str, int]
    costs: dict[str, Cost]
    """Empty where they are not predictable: see `reason`."""
    reason: str | None
    logit_bytes_per_token: int
    """Of all positions' logits, which PEFT's own forward keeps; 0 for the packed one."""
    full_rank: int
    """The highest rank that an update of any adapted layer can have: a higher one adds parameters and nothing else."""
    optimizer_bytes: Mapping[str, int] = MappingProxyType({})
    """Of the states of one trial's optimizer."""

    def adapter_bytes(self, trials: Sequence[Trial]) -> int:
        """Weights, gradients and optimizer states of all trials' adapters, and what they began with."""
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
        """Of one checkpoint: weights and the optimizer's states."""
        return sum(4 * self.params[trial.candidate.name] + self.states(trial.candidate) for trial in trials)

    def rank_bytes(self, candidate: Candidate) -> float:
        """The least that one more rank takes."""
        return (WEIGHT_AND_GRAD_BYTES * self.params[candidate.name] + self.states(candidate)) / candidate.rank

    def fixed_bytes(self, trials: Sequence[Trial]) -> int:
        """All but what grows with a forward's tokens: process, base model, adapters, the loss's two buffers."""
        return PROCESS_BYTES[self.device] + self.base_bytes + self.adapter_bytes(trials) + 2 * CHUNK_BYTES[self.device]

    def bytes_per_token(self, trials: Sequence[Trial]) -> int:
        """Saved tensors of one token, of the candidate that takes most; 0 where they are not predictable."""
        kept = max((self.costs[t.candidate.name].bytes_per_token for t in trials if self.costs), default=0)
        return kept + self.logit_bytes_per_token

    def peak_bytes(self, trials: Sequence[Trial], free: int, step_tokens: float) -> int:
        """The peak of a pack whose steps have `step_tokens` tokens, on a device with `free` bytes."""
        fixed, per_token = self.fixed_bytes(trials), self.bytes_per_token(trials)
        tokens = min(step_tokens, tokens_per_forward(free - fixed, per_token, self.device))
        return int(fixed + tokens * per_token)


def predict(spec: StudySpec, device: torch.device | None = None) -> CostModel:
    """Counts on a model of fake tensors that carries all candidates' adapters. What the study asks of bitsandbytes is
    looked at first.

    `device` need not exist; without it the study's own is taken. On a GPU that does not exist `auto` is bfloat16.

    Raises:
        StudyError: the target modules match nothing in this model, or the study's device does not exist.
        ModelError: transformers has no causal language model of this architecture, or none that can be quantized.
        MissingExtraError: bitsandbytes is asked for, and not installed.
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
    candidates = {candidate.name: candidate for candidate in spec.candidates() if candidate.packable}
    params, states, costs, engine_name, reason = _count(model, spec, candidates, device)
    full_rank = max(min(layer.in_features or 1, layer.out_features or 1) for _, layer in lora_layers(model))
    logits = LOGIT_BYTES * model.config.get_text_config().vocab_size
    others = {candidate.name: candidate for candidate in spec.candidates() if not candidate.packable}
    if others:
        found = _count(skeleton(spec.model, dtype), spec, others, device)
        params |= found.params
        states |= found.states
        extra = 0 if engine_name == "peft" else logits
        costs |= {n: cost._replace(bytes_per_token=cost.bytes_per_token + extra) for n, cost in found.costs.items()}
        reason = reason or found.reason
    logits = logits if engine_name == "peft" else 0
    return CostModel(device.type, dtype, engine_name, base, held, params, costs, reason, logits, full_rank, states)


class _Counted(NamedTuple):
    """Of the candidates that one model carries, by name."""

    params: dict[str, int]
    states: dict[str, int]  # bytes of the optimizer's
    costs: dict[str, Cost]
    engine: str
    reason: str | None
    """Why there are no costs."""


def _count(
    model: PreTrainedModel, spec: StudySpec, candidates: Mapping[str, Candidate], device: torch.device
) -> _Counted:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    add_fake_adapters(model, candidates, mode, _stand_in(device))
    sizes = {name: [p.numel() for p in adapter_parameters(model, name)] for name in candidates}
    params = {name: sum(own) for name, own in sizes.items()}
    states = {name: sum(sum(state_sizes(spec.training.optim, size)) for size in own) for name, own in sizes.items()}
    engine_name = str(spec.training.engine)
    try:
        with mode:
            engine = _engine(model, spec, 1 << 30)
            engine_name = engine.name
            tokens = probe_tokens(model)
            costs = {name: count_cost(model, name, engine.forward, tokens) for name in candidates}
            return _Counted(params, states, costs, engine_name, None)
    except Exception as error:  # whatever a model does that fake tensors cannot: it is not to keep a study from running
        return _Counted(params, states, {}, engine_name, _reason(error))


def predict_peak(
    spec: StudySpec, prediction: CostModel, trials: Sequence[Trial], tokens: Tokens, free: int
) -> PeakMemory | str:
    """The peak of these trials, trained together on a device with `free` bytes; why not, where it cannot be told.

    Their steps are rehearsed on fake tensors, and on a CPU what the allocator keeps of them is asked of itself.
    """
    device = _stand_in(torch.device(prediction.device))
    most = tokens_per_forward(
        free - prediction.fixed_bytes(trials), prediction.bytes_per_token(trials), prediction.device
    )
    try:
        model = skeleton(spec.model, prediction.dtype)
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        add_fake_adapters(model, {trial.name: trial.candidate for trial in trials}, mode, device)
        with mode:
            engine = _engine(model, spec, most)
        rehearsal = rehearse(model, engine, mode, spec, trials, tokens, prediction.device)
    except Exception as error:
        return _reason(error)
    held = None
    if prediction.device == "cpu":
        held = held_bytes((event.storage, event.bytes) for event in rehearsal.script)
    at_peak = peak_of(rehearsal.script, held)
    if device.type != prediction.device and prediction.engine == "packed":
        at_peak["logits"] *= CHUNK_BYTES[prediction.device] // CHUNK_BYTES[device.type]
    at_peak["retained"] += int(UNTRACKED_ACTIVATION_FRACTION[prediction.device] * most_kept(rehearsal.script))
    parts = MemoryBreakdown(process=PROCESS_BYTES[prediction.device], base=prediction.base_bytes, **at_peak)
    return PeakMemory(parts, rehearsal.forward_tokens, rehearsal.products, rehearsal.recomputed_tokens)


def peak_of(script: Sequence[Event], held: Sequence[int] | None) -> dict[str, int]:
    """What is alive by part when most is alive, and what more than that is held from the system when most is."""
    live = dict.fromkeys(("adapter", "gradients", "optimizer", "activations", "logits"), 0)
    most, total, at_peak = -1, 0, dict(live)
    for event in script:
        live[event.part] += event.bytes
        total += event.bytes
        if total > most:
            most, at_peak = total, dict(live)
    return at_peak | {"retained": max(0, max(held or (), default=0) - most)}


def most_kept(script: Sequence[Event]) -> int:
    """The most bytes of activations and logits together."""
    sizes = (event.bytes for event in script if event.part in ("activations", "logits"))
    return max(itertools.accumulate(sizes), default=0)


def largest_rank(totals: Mapping[int, int], most: int, budget: float, least_slope: float = 0.0) -> int:
    """The largest rank up to `most` whose peak is within `budget` bytes; 0 where none is.

    `totals` holds the peaks of two ranks or more; between and beyond the lowest and the highest they lie on a line,
    since all that depends on the rank is proportional to it. A rank adds `least_slope` bytes at least: where memory is
    short the higher rank was predicted with smaller forwards.
    """
    low, high = min(totals), max(totals)
    slope = max(least_slope, (totals[high] - totals[low]) / (high - low))
    known = max((rank for rank in totals if totals[rank] <= budget), default=0)
    low = known or low
    fits, too_large = known, max(most, known) + 1
    while too_large - fits > 1:
        rank = (fits + too_large) // 2
        if totals[low] + slope * (rank - low) <= budget:
            fits = rank
        else:
            too_large = rank
    return fits


def _stand_in(device: torch.device) -> torch.device:
    """Where fake tensors lie: a torch without CUDA has no backward for a GPU's, so the CPU's stand for them."""
    return device if device.type == "cpu" or torch.backends.cuda.is_built() else torch.device("cpu")


def _engine(model: PreTrainedModel, spec: StudySpec, most: int) -> PackedEngine | PeftEngine:
    """The one that `rankscope.train.loop.choose_engine` takes, but for what only a comparison of logits can show."""
    training, dropout = spec.training, spec.training.base_dropout == "keep"
    if training.engine == "packed":
        own_attention = model.config._attn_implementation
        try:
            use_packed_forward(model)
            return PackedEngine(model, most, dropout)
        except NotPackable:
            use_own_forward(model, own_attention)
    recompute_layers(model)
    return PeftEngine(model, training.batch_size, dropout, most)


def _reason(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
