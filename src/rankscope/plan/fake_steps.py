"""Training steps on fake tensors: what they allocate, and when, without loading or computing anything.

The model's code and rankscope's own run as they are; torch's FakeTensorMode gives every tensor its shape and device,
and no data. Each storage that an operator makes is noted, and when it goes. What an operator allocates and frees
within itself is not seen.
"""

import itertools
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from rankscope.data.tokens import Tokens
from rankscope.lora.adapters import adapter_key, adapter_parameters, inject, lora_config, to_float32
from rankscope.lora.layout import Slice, flatten
from rankscope.lora.variants import WEIGHT_INIT_VARIANTS, iter_initial_factors, record_initial_factors
from rankscope.model.quantized import held_tensors, quantization_tensors
from rankscope.spec.candidates import Candidate, Trial
from rankscope.spec.models import StudySpec
from rankscope.train.engine import PackedEngine, PeftEngine, divide
from rankscope.train.flops import Products
from rankscope.train.loss import label_losses
from rankscope.train.optimizer import state_sizes, step_bytes
from rankscope.train.probe import PROBE_TOKENS
from rankscope.train.step import spread, step_slice, total_steps

RECOMPUTED_TAKES_LESS = 4
"""Times the tokens of a full forward: up to there a recomputed one, which keeps its layers' inputs and one layer, takes
less than a full one, and counts as one."""

MOST_STEPS_SEARCHED = 2000
"""Of a schedule, for its largest forward: more are like these."""


class Event(NamedTuple):
    """A storage that comes (bytes above 0) or goes (below 0)."""

    storage: int
    part: str  # adapter, gradients, optimizer, activations or logits
    bytes: int


class Rehearsal(NamedTuple):
    """Of a pack's trials, or of one trial alone."""

    script: list[Event]
    """The allocations of the steps that a profile takes, and of the schedule's largest forwards."""
    products: Counter[tuple[int, int, int]]
    """Matrix products of the largest forward, by shape."""
    forward_tokens: int
    """Of the largest forward."""
    recomputed_tokens: int
    """Of the longest forward whose layers run again in the backward; 0 where none does."""


class _Group(NamedTuple):
    """One forward."""

    tokens: int  # padding included
    slices: list[Slice]


class _Recording(NamedTuple):
    """What one forward and its backward allocate. The gradients are those of a step's first forward: later ones add."""

    tokens: int
    trials: set[str]
    events: list[Event]


def to_fake(model: nn.Module, mode: FakeTensorMode, device: torch.device) -> None:
    """Turns all tensors of a model on the meta device into fake ones on `device`, in place."""
    made: dict[int, tuple[Tensor, Tensor]] = {}  # the old ones too, so that no id comes twice
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    fake: Tensor = FakeTensor(mode, tensor.detach(), device)
                    if isinstance(tensor, nn.Parameter):
                        fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
                    made[id(tensor)] = tensor, fake
                tensors[name] = made[id(tensor)][1]  # type: ignore[assignment]
    for holder, name in quantization_tensors(model):
        setattr(holder, name, FakeTensor(mode, getattr(holder, name), device))


def add_fake_adapters(
    model: PreTrainedModel, candidates: Mapping[str, Candidate], mode: FakeTensorMode, device: torch.device
) -> None:
    """Gives a model on the meta device an adapter for each name, and makes all of it fake.

    Raises:
        StudyError: the target modules match nothing, or cannot carry LoRA.
    """
    for name, candidate in candidates.items():
        inject(lora_config(candidate), model, adapter_key(name), empty=True)
        to_float32(model, name)
    to_fake(model, mode, device)
    for name in candidates:
        for parameter in adapter_parameters(model, name):
            parameter.requires_grad_(True)
        if candidates[name].variant in WEIGHT_INIT_VARIANTS:
            record_initial_factors(model, name)


def rehearse(
    model: PreTrainedModel,
    engine: PackedEngine | PeftEngine,
    mode: FakeTensorMode,
    spec: StudySpec,
    trials: Sequence[Trial],
    tokens: Tokens,
    device: str,
) -> Rehearsal:
    """Runs the largest forwards of the trials' schedule and puts the allocations of whole steps together from them.

    A forward of other sequences allocates as the largest does, in proportion to its tokens. `model` is fake and
    carries the trials' adapters, by trial name; `device` is the type of the one that it stands for.
    """
    steps = total_steps(spec.training, len(tokens))
    chosen = spread(steps, spec.measure.warmup_steps + spec.measure.steps)
    searched = sorted({*chosen, *range(min(steps, MOST_STEPS_SEARCHED))})
    schedule = {step: _groups(engine, spec, trials, tokens, step) for step in searched}
    largest: dict[bool, tuple[int, _Group]] = {}  # by whether it is recomputed
    for step, groups in schedule.items():
        for group in groups:
            long = group.tokens > engine.tokens_per_forward
            if long not in largest or group.tokens >= largest[long][1].tokens:
                largest[long] = step, group
    recomputed = largest[True][1].tokens if True in largest else 0
    if len(largest) == 2 and largest[True][1].tokens <= RECOMPUTED_TAKES_LESS * engine.tokens_per_forward:
        del largest[True]
    chosen += [step for step, _ in largest.values()]
    parameters = {trial.name: adapter_parameters(model, trial.name) for trial in trials}
    recorder = _Recorder(model)
    with mode:
        recordings = {
            long: _record(engine, recorder, tokens, group, list(itertools.chain(*parameters.values())))
            for long, (_, group) in largest.items()
        }
    starts = [tensor.untyped_storage().nbytes() for tensor in iter_initial_factors(model)]
    script = _Script(parameters, starts, spec.training.optim, device)
    some = next(iter(recordings.values()))
    script.count(some)
    for step in chosen:
        forwards = [(recordings.get(g.tokens > engine.tokens_per_forward, some), g.tokens) for g in schedule[step]]
        script.step([(recording, min(tokens, recording.tokens)) for recording, tokens in forwards])
    most = max((group for _, group in largest.values()), key=lambda group: group.tokens)
    return Rehearsal(script.events, recorder.products.shapes, most.tokens, recomputed)


def _groups(
    engine: PackedEngine | PeftEngine, spec: StudySpec, trials: Sequence[Trial], tokens: Tokens, step: int
) -> list[_Group]:
    """The forwards of one step."""
    slices = [step_slice(trial, trial.candidate.lora_dropout, tokens, spec.training, step) for trial in trials]
    if isinstance(engine, PackedEngine):
        groups = divide(tokens, slices, engine.tokens_per_forward)
        return [_Group(sum(int(tokens.lengths[s.examples].sum()) for s in group), group) for group in groups]
    return [
        _Group(len(part.examples) * int(tokens.lengths[list(part.examples)].max()), [part])
        for slice_ in slices
        for part in engine.parts(tokens, slice_)
    ]


def _record(
    engine: PackedEngine | PeftEngine, recorder: "_Recorder", tokens: Tokens, group: _Group, parameters: list[Tensor]
) -> _Recording:
    """Runs one forward and its backward."""
    for parameter in parameters:
        parameter.grad = None
    engine.model.train(engine.base_dropout)
    with recorder.products:
        events = _forward(engine, recorder, tokens, group)
    gradients = {recorder.number(p.grad) for p in parameters if p.grad is not None}
    for parameter in parameters:
        parameter.grad = None
    events = [event._replace(part="gradients") if event.storage in gradients else event for event in events]
    return _Recording(group.tokens, {part.adapter for part in group.slices}, events)


def _forward(engine: PackedEngine | PeftEngine, recorder: "_Recorder", tokens: Tokens, group: _Group) -> list[Event]:
    """One forward and its backward, as the engines' `accumulate` has them."""
    events: list[Event] = []
    recorder.events = events
    with recorder:
        if isinstance(engine, PackedEngine):
            batch = flatten(tokens, group.slices, engine.model.device, most_kept=engine.tokens_per_forward)
            weights = torch.ones(len(batch.targets), dtype=torch.float64, device=engine.model.device)
            # Given a mask, transformers does not look for sequences in the positions' values, which are not there.
            hidden = engine.hidden(batch, torch.ones_like(batch.input_ids))
            out = label_losses(engine.head, hidden, batch.targets, weights)
            del hidden
            out.total.backward()
            del batch, out, weights
        else:
            (slice_,) = group.slices
            loss = engine.losses(tokens, slice_)
            loss.sum().backward()
            del loss
    return events


class _Recorder(TorchDispatchMode):
    """Notes in `events` each storage that comes and goes while it is active; those of the model's weights are known."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.events: list[Event] = []
        self.products = Products()
        self._vocab = model.config.get_text_config().vocab_size
        self._numbers: dict[int, int] = {}  # of storages alive
        self._references: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._next = itertools.count()
        for tensor in itertools.chain(held_tensors(model), model.buffers(), iter_initial_factors(model)):
            self._numbers[tensor.untyped_storage()._cdata] = -1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._note(leaf)
        return out

    def number(self, tensor: Tensor) -> int:
        """Of the tensor's storage, which must have been noted."""
        return self._numbers[tensor.untyped_storage()._cdata]

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._numbers or not size:
            return
        event = Event(next(self._next), "logits" if self._vocab in tensor.shape else "activations", size)
        self.events.append(event)
        self._numbers[key] = event.storage

        def gone(_: Any) -> None:
            del self._numbers[key], self._references[event.storage]
            self.events.append(event._replace(bytes=-size))

        self._references[event.storage] = weakref.ref(storage, gone)


class _Script:
    """Puts recordings together to steps."""

    def __init__(
        self, parameters: Mapping[str, Sequence[Tensor]], starts: Sequence[int], optim: str, device: str
    ) -> None:
        self.events: list[Event] = []
        self._numbers = itertools.count()
        self._gradients: list[Event] = []
        self._sizes = {trial: [p.untyped_storage().nbytes() for p in group] for trial, group in parameters.items()}
        self._optim, self._device = optim, device
        self._optimizer = False
        for size in itertools.chain(starts, *self._sizes.values()):
            self._add("adapter", size)

    def count(self, recording: _Recording) -> None:
        """The forward that counts costs before the first step."""
        self._play(recording.events, PROBE_TOKENS / recording.tokens)
        self._zero_grad()

    def _zero_grad(self) -> None:
        for event in self._gradients:
            self.events.append(event._replace(bytes=-event.bytes))
        self._gradients = []

    def step(self, forwards: Sequence[tuple[_Recording, int]]) -> None:
        """One optimizer step of these forwards: a recording of each, and its tokens."""
        self._zero_grad()
        for number, (recording, tokens) in enumerate(forwards):
            events = [event for event in recording.events if event.part != "gradients"] if number else recording.events
            self._play(events, tokens / recording.tokens)
        recorded = set().union(*(recording.trials for recording, _ in forwards))
        for trial in self._sizes.keys() - recorded:
            self._gradients += [self._add("gradients", size) for size in self._sizes[trial]]
        counts = [size // 4 for size in itertools.chain(*self._sizes.values())]
        if not self._optimizer:  # whose states its first step makes
            for size in itertools.chain.from_iterable(state_sizes(self._optim, count) for count in counts):
                self._add("optimizer", size)
            self._optimizer = True
        if most := max(step_bytes(self._optim, count, self._device) for count in counts):
            fleeting = self._add("optimizer", most)
            self.events.append(fleeting._replace(bytes=-most))

    def _add(self, part: str, size: int) -> Event:
        event = Event(next(self._numbers), part, size)
        self.events.append(event)
        return event

    def _play(self, events: Sequence[Event], scale: float) -> None:
        alive: dict[int, Event] = {}
        for storage, part, size in events:
            if size > 0:
                event = self._add(part, max(1, int(size * scale)) if part == "activations" else size)
                if part == "gradients":
                    self._gradients.append(event)
                else:
                    alive[storage] = event
            elif storage in alive:
                gone = alive.pop(storage)
                self.events.append(gone._replace(bytes=-gone.bytes))
        for event in alive.values():  # what reference cycles still held
            self.events.append(event._replace(bytes=-event.bytes))
