"""Training steps on fake tensors: the memory they allocate, without loading or computing anything; and on random ones,
for their time.

The model's code and rankscope's own run as they are; torch's FakeTensorMode gives every tensor its shape and device,
and no data. Each storage that an operator makes is noted, and when it is freed. Memory that an operator allocates and
frees within itself is not seen.
"""

import itertools
import logging
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
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
from rankscope.model.device import synchronize
from rankscope.model.quantized import held_tensors, quantization_tensors
from rankscope.spec.candidates import Candidate
from rankscope.train.engine import PackedEngine, PeftEngine
from rankscope.train.flops import Products
from rankscope.train.loss import label_losses

logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # it logs tracebacks of what is caught


class Event(NamedTuple):
    """A storage that is allocated (bytes above 0) or freed (below 0)."""

    storage: int
    part: str  # gradients, activations or logits
    bytes: int


class Instant(NamedTuple):
    """Bytes alive at one instant of a forward and its backward, beside weights and optimizer states."""

    activations: float
    logits: float
    gradients: float

    @property
    def tracked(self) -> float:
        """Activations and logits."""
        return self.activations + self.logits

    @property
    def total(self) -> float:
        return self.tracked + self.gradients


class Recording(NamedTuple):
    """Allocations of one forward and its backward, for one trial."""

    events: list[Event]

    @property
    def gradients(self) -> int:
        """Bytes of all gradients."""
        return sum(event.bytes for event in self.events if event.part == "gradients")

    def instants(self, last_gradients: float) -> list[Instant]:
        """The fullest instants before any gradient, between, and once all but `last_gradients` bytes of them are there;
        and the one with most activations and logits.

        Activations are freed while gradients are made, so memory is fullest near the loss or near the backward's end:
        each of these instants is affine in the number of equal layers, where the fullest of all need not be.
        """
        live = dict.fromkeys(Instant._fields, 0.0)
        fullest = [Instant(0, 0, 0)] * 4
        begins = self.gradients - last_gradients
        for event in self.events:
            live[event.part] += event.bytes
            phase = 0 if not live["gradients"] else 2 if live["gradients"] >= begins else 1
            now = Instant(**live)
            if now.total > fullest[phase].total:
                fullest[phase] = now
            if now.tracked > fullest[3].tracked:
                fullest[3] = now
        return fullest


def to_random(model: nn.Module, device: torch.device) -> None:
    """Give a model on the meta device weights on `device`, random ones, in place; buffers are zero."""

    def make(tensor: Tensor) -> Tensor:
        new = torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)
        return new.normal_(std=0.02) if isinstance(tensor, nn.Parameter) and tensor.is_floating_point() else new

    if quantization_tensors(model):
        raise NotImplementedError("quantized weights cannot be drawn")
    _replace_tensors(model, make)


def to_fake(model: nn.Module, mode: FakeTensorMode, device: torch.device) -> None:
    """Turn all tensors of a model into fake ones on `device`, in place. DiffLlama's are not all on the meta device."""
    _replace_tensors(model, lambda tensor: FakeTensor(mode, tensor.detach().to("meta"), device))
    for holder, name in quantization_tensors(model):
        setattr(holder, name, FakeTensor(mode, getattr(holder, name), device))


def _replace_tensors(model: nn.Module, make: Callable[[Tensor], Tensor]) -> None:
    made: dict[int, tuple[Tensor, Tensor]] = {}  # the old ones too, so that no id comes twice
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    new = make(tensor)
                    if isinstance(tensor, nn.Parameter):
                        new = nn.Parameter(new, requires_grad=tensor.requires_grad)
                    made[id(tensor)] = tensor, new
                tensors[name] = made[id(tensor)][1]  # type: ignore[assignment]


def add_empty_adapter(model: PreTrainedModel, candidate: Candidate) -> None:
    """Give a model on the meta device the candidate's adapter, under its name. Raises StudyError: the target modules
    match nothing, or cannot carry LoRA."""
    inject(lora_config(candidate, model), model, adapter_key(candidate.name), empty=True)
    to_float32(model, candidate.name)


def make_trainable(model: PreTrainedModel, candidates: Iterable[Candidate]) -> None:
    """Turn on the gradients of the candidates' adapters, and note what those that begin from the weights began with."""
    for candidate in candidates:
        for parameter in adapter_parameters(model, candidate.name):
            parameter.requires_grad_(True)
        if candidate.variant in WEIGHT_INIT_VARIANTS:
            record_initial_factors(model, candidate.name)


def record(
    engine: PackedEngine | PeftEngine, mode: FakeTensorMode, tokens: Tokens, slices: Sequence[Slice]
) -> Recording:
    """Run one forward of `slices` and its backward, as the engines' `accumulate` does, on a fake model. The gradients
    are those of a step's first forward: later ones add to them."""
    recorder = _Recorder(engine.model)
    with mode, Products():  # which gives grouped products on fake tensors their shapes
        _forward_and_backward(engine, recorder, tokens, slices)
    grads = _take_gradients(engine.model, slices)
    gradients = {recorder.number(grad) for grad in grads}
    events = [event._replace(part="gradients") if event.storage in gradients else event for event in recorder.events]
    return Recording([e for e in events if e.part != "gradients" or e.bytes > 0])


def forward_seconds(engine: PackedEngine | PeftEngine, tokens: Tokens, slices: Sequence[Slice]) -> float:
    """Seconds of one forward of `slices` and its backward, on a model with weights."""
    device = engine.model.device
    synchronize(device)
    start = time.perf_counter()
    _forward_and_backward(engine, nullcontext(), tokens, slices)
    synchronize(device)
    seconds = time.perf_counter() - start
    _take_gradients(engine.model, slices)
    return seconds


def _take_gradients(model: PreTrainedModel, slices: Sequence[Slice]) -> list[Tensor]:
    """Gradients of the slices' adapters, which have none afterwards."""
    parameters = [parameter for part in slices for parameter in adapter_parameters(model, part.adapter)]
    found = [parameter.grad for parameter in parameters if parameter.grad is not None]
    for parameter in parameters:
        parameter.grad = None
    return found


def _forward_and_backward(
    engine: PackedEngine | PeftEngine,
    recorder: AbstractContextManager[object],
    tokens: Tokens,
    slices: Sequence[Slice],
) -> None:
    engine.model.train(engine.base_dropout)
    with recorder:
        if isinstance(engine, PackedEngine):
            batch = flatten(tokens, slices, engine.model.device, engine.tokens_per_forward, engine.multiple)
            weights = torch.ones(len(batch.targets), dtype=torch.float64, device=engine.model.device)
            # Given a mask, transformers does not look for sequences in the positions' values, which are not there.
            hidden = engine.hidden(batch, torch.ones_like(batch.input_ids))
            out = label_losses(engine.head, hidden, batch.targets, weights)
            del hidden
            out.total.backward()
        else:
            (slice_,) = slices
            engine.losses(tokens, slice_).sum().backward()


class _Recorder(TorchDispatchMode):
    """Notes in `events` each storage that is allocated and freed while it is active, but for the model's weights."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.events: list[Event] = []
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
        """The number of the tensor's storage, which must have been noted."""
        return self._numbers[tensor.untyped_storage()._cdata]

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._numbers or not size:
            return
        event = Event(next(self._next), "logits" if self._vocab in tensor.shape else "activations", size)
        self.events.append(event)
        self._numbers[key] = event.storage

        def freed(_: Any) -> None:
            del self._numbers[key], self._references[event.storage]
            self.events.append(event._replace(bytes=-size))

        self._references[event.storage] = weakref.ref(storage, freed)
