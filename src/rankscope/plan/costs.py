"""Parameters, FLOPs and bytes of a study's candidates, counted on fake models before anything is loaded.

All are affine in a candidate's rank and in the number of equal layers: the lowest and the highest rank are counted, on
a few layers (`rankscope.plan.layers`).
"""

import logging
from collections.abc import Hashable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)

from rankscope.errors import StudyError, first_line
from rankscope.lora.adapters import adapter_weights, check_reached, grows_with_rank, layer_of, lora_layers, targets_of
from rankscope.lora.coverage import Coverage, find_coverage
from rankscope.lora.layout import NotPackable, Unpackable
from rankscope.lora.variants import WEIGHT_INIT_VARIANTS
from rankscope.measure.own_process import own_process_bytes
from rankscope.model.device import resolve_device
from rankscope.model.load import resolve_dtype, skeleton
from rankscope.model.quantized import base_bytes, parameter_count, quantized_layers
from rankscope.plan.fake_steps import add_empty_adapter, make_trainable, to_fake, to_random
from rankscope.plan.layers import Repeats, find_repeats
from rankscope.spec.candidates import PLAIN, Candidate, Trial
from rankscope.spec.models import StudySpec
from rankscope.train.engine import LOGIT_BYTES, PackedEngine, PeftEngine
from rankscope.train.flops import Cost, Counted, count_cost
from rankscope.train.optimizer import check_optimizer, state_sizes
from rankscope.train.probe import ATTENTIONS, probe_tokens, use_packed_forward
from rankscope.train.recompute import recompute_layers

_ONLY_FAKE = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException)
"""Errors of fake tensors, which have no values, over a model that may well be packed."""

log = logging.getLogger(__name__)


class Family(NamedTuple):
    """Candidates that differ in rank alone, as far as memory and time go: both are affine in rank."""

    low: Candidate
    high: Candidate
    optim: str
    repeats: Repeats | None
    sizes: tuple[tuple[int, bool], ...] = ()  # parameters of each tensor at the lowest rank, and whether they grow
    costs: tuple[Cost, Cost] | None = None  # at the lowest and the highest rank; None where they are not predictable
    attention: str | None = ATTENTIONS[0]  # of the packed forward
    engine: str = "packed"
    engine_reason: str | None = None  # for PEFT's where the packed one was asked for
    reason: str | None = None  # for missing costs
    full_rank: int = 0
    coverage: Coverage | None = None

    @property
    def ends(self) -> tuple[Candidate, Candidate]:
        return self.low, self.high

    def sizes_at(self, rank: int) -> list[int]:
        """Parameters of each tensor of the adapter at `rank`."""
        return [size // self.low.rank * rank if grows else size for size, grows in self.sizes]

    def at(self, rank: int, low: Sequence[float], high: Sequence[float]) -> list[float]:
        """Numbers at `rank`, from those at the lowest and at the highest rank."""
        return _line(low, high, (rank - self.low.rank) / max(1, self.high.rank - self.low.rank))

    def whole(self, counted: Sequence[Sequence[float]], periods: int = 3) -> list[float]:
        """Numbers of the whole model, from those of the models that `small_engines` gives, in their order: of one with
        so many periods, and of one with two."""
        if self.repeats is None:
            return list(counted[0])
        more, two = counted
        return _line(two, more, (self.repeats.periods - 2) / (periods - 2))


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
    optimizer_bytes: dict[str, int]  # states of one trial's optimizer
    families: dict[Hashable, Family]
    coverage: Coverage | None
    process_bytes: int  # of the process itself: `own_process_bytes`; 0 on a GPU, whose memory it does not take

    def checkpoint_bytes(self, trials: Sequence[Trial]) -> int:
        """Size of one checkpoint: weights and the optimizer's states."""
        return sum(
            4 * self.params[trial.candidate.name] + self.optimizer_bytes[trial.candidate.name] for trial in trials
        )

    def bytes_per_token(self, trials: Sequence[Trial]) -> int:
        """Saved tensors of one token, for the candidate that takes most; 0 where they are not predictable."""
        kept = max((self.costs[t.candidate.name].bytes_per_token for t in trials if self.costs), default=0)
        return kept + self.logit_bytes_per_token

    def including(self, candidate: Candidate) -> "CostModel":
        """The model with one more candidate of a family that it knows, at any rank."""
        family, name, rank = self.families[family_key(candidate)], candidate.name, candidate.rank
        sizes = family.sizes_at(rank)
        costs = {name: Cost(*map(round, family.at(rank, *family.costs)))} if family.costs else {}
        states = sum(sum(state_sizes(family.optim, size)) for size in sizes)
        return self._replace(
            params=self.params | {name: sum(sizes)},
            costs=self.costs | costs,
            optimizer_bytes=self.optimizer_bytes | {name: states},
        )


def predict(spec: StudySpec, device: torch.device | None = None) -> CostModel:
    """Count parameters, FLOPs and bytes of a study's candidates, on models of fake tensors.

    `device` need not exist; without it the study's own is taken. On a GPU that does not exist `auto` is bfloat16.
    Raises StudyError: the target modules match nothing in this model, or the study's device does not exist;
    ModelError: transformers has no causal language model of this architecture, or none that can be quantized;
    MissingExtraError: the study uses bitsandbytes, which is not installed.
    """
    imagined, device = device is not None, device or resolve_device(spec.model.device)
    as_auto = imagined and spec.model.dtype == "auto" and device.type == "cuda"
    dtype = torch.bfloat16 if as_auto else resolve_dtype(spec.model, device)
    check_optimizer(spec.training, device)
    model = skeleton(spec.model, dtype)
    if any(quantized_layers(model)) and (wrong := spec.trains_the_base("a quantized checkpoint")):
        raise StudyError(wrong, "Leave it out, or give the model that the checkpoint was made of.")
    all_logits = LOGIT_BYTES * model.config.get_text_config().vocab_size
    members: dict[Hashable, list[Candidate]] = {}
    for candidate in sorted(spec.candidates(), key=lambda candidate: not candidate.packable):
        members.setdefault(family_key(candidate), []).append(candidate)
    families = {key: _count(spec, candidates, dtype, device) for key, candidates in members.items()}
    packable = [family for family in families.values() if family.low.packable]
    engine = packable[-1].engine if packable else str(spec.training.engine)
    for key, family in families.items():
        if not family.low.packable and family.costs and engine == "packed":  # these alone keep all logits
            low, high = (cost._replace(bytes_per_token=cost.bytes_per_token + all_logits) for cost in family.costs)
            families[key] = family._replace(costs=(low, high))
    counted = list(families.values())
    costs = CostModel(
        device=device.type,
        dtype=dtype,
        engine=engine,
        base_params=parameter_count(model),
        base_bytes=base_bytes(model),
        params={},
        costs={},
        optimizer_bytes={},
        reason=next((family.reason for family in counted if family.reason), None),
        engine_reason=packable[-1].engine_reason if packable else None,
        logit_bytes_per_token=all_logits if engine == "peft" else 0,
        full_rank=counted[-1].full_rank,
        families=families,
        coverage=counted[0].coverage,
        process_bytes=0 if device.type == "cuda" else own_process_bytes(),
    )
    for candidate in spec.candidates():
        costs = costs.including(candidate)
    return costs


def _count(spec: StudySpec, candidates: Sequence[Candidate], dtype: torch.dtype, device: torch.device) -> Family:
    """Count one family of candidates."""
    low, high = (pick(candidates, key=lambda candidate: candidate.rank) for pick in (min, max))
    if low.rank == high.rank:  # a second rank all the same, for the largest that fits
        high = low.model_copy(update={"rank": 2 * low.rank})
    model = skeleton(spec.model, dtype)
    add_empty_adapter(model, low)
    repeats, layers = find_repeats(model), lora_layers(model)
    family, unreached = _count_costs(spec, Family(low, high, spec.training.optim, repeats), dtype, device)
    dead = {name for name, _ in layers if (repeats.in_kept(name, 3) if repeats else name) in unreached}
    weights = {name: w for name, w in adapter_weights(model, low.name).items() if layer_of(name) not in dead}
    check_reached(weights, dead)
    ranks = [min(x.in_features or 1, x.out_features or 1) for name, x in layers if name not in dead]
    return family._replace(
        sizes=tuple((weight.numel(), grows_with_rank(name)) for name, weight in weights.items()),
        full_rank=max(ranks, default=0),
        coverage=find_coverage(model, targets_of(low, model).left_out, sorted(dead)),
    )


def _count_costs(spec: StudySpec, family: Family, dtype: torch.dtype, device: torch.device) -> tuple[Family, set[str]]:
    """The family with the costs of its lowest and highest rank by the engine that can train it, and its layers without
    gradient: of equal layers those that the fake model has kept."""
    packed, why_not = spec.training.engine == "packed" and family.low.packable, None
    for attention in ATTENTIONS if packed else ():  # as `rankscope.train.probe.make_packable` has it
        packing = family._replace(attention=attention)
        try:
            return _with_costs(spec, dtype, packing, device)
        except _ONLY_FAKE as error:
            return packing._replace(reason=first_line(error)), set()
        except NotPackable as error:
            why_not = why_not or str(error.reason)
        except Exception as error:
            log.info("not packed", exc_info=error)
            why_not = why_not or str(Unpackable.FAILS)
    family = family._replace(engine="peft", engine_reason=why_not)
    try:
        return _with_costs(spec, dtype, family, device)
    except Exception as error:  # whatever a model does that fake tensors cannot: it is not to keep a study from running
        return family._replace(reason=first_line(error)), set()


def _with_costs(spec: StudySpec, dtype: torch.dtype, family: Family, device: torch.device) -> tuple[Family, set[str]]:
    counted: list[list[Counted]] = []
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    for engine in small_engines(spec, dtype, family, device, 1 << 30, family.engine == "packed", mode):
        with mode:
            tokens = probe_tokens(engine.model)
            counted.append([count_cost(engine.model, end.name, engine.forward, tokens) for end in family.ends])
    costs = ([end.cost for end in depth] for depth in counted)
    lower, higher = (Cost(*map(round, family.whole(ends))) for ends in zip(*costs, strict=True))
    return family._replace(costs=(lower, higher)), set(counted[0][0].unreached)


def small_engines(
    spec: StudySpec,
    dtype: torch.dtype,
    family: Family,
    device: torch.device,
    budget: int,
    packed: bool,
    mode: FakeTensorMode | None,
    periods: int = 3,
) -> Iterator[PackedEngine | PeftEngine]:
    """The engine over a model that carries the family's lowest and highest rank, on fake tensors of `mode`, or, without
    one, on random weights. The model is whole, or has first `periods` of its repeating layers' periods and then two.
    Raises NotPackable where the packed engine is asked for and cannot be."""
    model = skeleton(spec.model, dtype)
    repeats = family.repeats.keep(model, periods) if family.repeats else None
    for candidate in family.ends:
        add_empty_adapter(model, candidate)
    if mode:
        to_fake(model, mode, stand_in(device))
    else:
        to_random(model, device)
    make_trainable(model, family.ends)
    rotary: list[Any] = [module for module in model.modules() if hasattr(module, "rope_type")]
    for module in rotary:  # whose rotations may depend on the positions' values, which are not there
        module.rope_type = dict.fromkeys(module.rope_type, "default") if isinstance(module.rope_type, dict) else ""
    dropout = spec.training.base_dropout == "keep"
    engine: PackedEngine | PeftEngine
    with mode or nullcontext():
        if packed:
            use_packed_forward(model, family.attention)
            engine = PackedEngine(model, budget, dropout)
        else:
            recompute_layers(model)
            engine = PeftEngine(model, spec.training.batch_size, dropout, budget)
    yield engine
    if repeats:
        repeats.keep(model, 2)
        yield engine


def stand_in(device: torch.device) -> torch.device:
    """Device of the fake tensors. Where no GPU is, torch has no backward for those of one: the CPU's stand for them."""
    return device if device.type == "cpu" or torch.cuda.is_available() else torch.device("cpu")
