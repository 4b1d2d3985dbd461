"""How much memory training takes, predicted before anything is loaded, and how a step is divided to fit."""

from collections.abc import Sequence
from typing import NamedTuple

from rankscope.lora.adapters import adapter_key, adapter_parameters, inject, lora_config
from rankscope.lora.base import resolve_device, resolve_dtype
from rankscope.lora.layout import NotPackable
from rankscope.lora.skeleton import skeleton
from rankscope.spec import StudySpec, Trial
from rankscope.train.cost import Cost, count_costs
from rankscope.train.engine import PackedEngine, PeftEngine
from rankscope.train.loss import CHUNK_BYTES
from rankscope.train.probe import probe_tokens, use_packed_forward

BYTES_PER_PARAMETER = 16
"""Of an adapter in training: weight, gradient and AdamW's two moments, in float32."""

PROCESS_BYTES = {"cpu": 500_000_000, "cuda": 0}
"""Python with torch and transformers loaded, and threads' buffers: measured 0.41 to 0.50 GB on a CPU."""

SHARE_OF_FREE_MEMORY = 0.6
"""Of the memory that is free beside weights and adapters, what a forward's saved tensors may take; the rest is for
what is fleeting."""

TOKENS_PER_FORWARD = {"cpu": 512, "cuda": 1 << 15}
"""Larger forwards gain nothing: on a CPU measured, docs/lab-notes.md; on a GPU not yet."""

FULL_STEP_TOKENS = {"cpu": 1536, "cuda": 1 << 14}
"""A step of so many tokens keeps the device busy: more trials in its pack take memory and gain no time. On a CPU
measured, docs/lab-notes.md; on a GPU not yet."""


class Prediction(NamedTuple):
    """Of a study, by candidate name."""

    device: str  # cpu or cuda
    base_params: int
    base_bytes: int
    params: dict[str, int]
    costs: dict[str, Cost]
    """Empty where they are not predictable: see `reason`."""
    reason: str | None

    def adapter_bytes(self, trials: Sequence[Trial]) -> int:
        """Weights, gradients and optimizer states of all trials' adapters."""
        return sum(self.params[trial.candidate.name] * BYTES_PER_PARAMETER for trial in trials)

    def fixed_bytes(self, trials: Sequence[Trial]) -> int:
        """All but what grows with a forward's tokens: process, base model, adapters, the loss's two buffers."""
        return PROCESS_BYTES[self.device] + self.base_bytes + self.adapter_bytes(trials) + 2 * CHUNK_BYTES[self.device]

    def bytes_per_token(self, trials: Sequence[Trial]) -> int:
        """Saved tensors of one token, of the candidate that takes most; 0 where they are not predictable."""
        return max((self.costs[t.candidate.name].bytes_per_token for t in trials if self.costs), default=0)

    def peak_bytes(self, trials: Sequence[Trial], free: int, step_tokens: float) -> int:
        """The peak of a pack whose steps have `step_tokens` tokens, on a device with `free` bytes."""
        fixed, per_token = self.fixed_bytes(trials), self.bytes_per_token(trials)
        tokens = min(step_tokens, tokens_per_forward(free - fixed, per_token, self.device))
        return int(fixed + tokens * per_token)


def tokens_per_forward(free: int, bytes_per_token: int, device: str) -> int:
    """The most tokens of one forward, where `free` bytes are left for it; at least 1."""
    fitting = int(free * SHARE_OF_FREE_MEMORY / max(1, bytes_per_token))
    return max(1, min(fitting, TOKENS_PER_FORWARD[device]))


def predict(spec: StudySpec) -> Prediction:
    """Counts on a model without weights (the meta device) that carries all candidates' adapters.

    Raises:
        StudyError: the target modules match nothing in this model, or the device does not exist.
        ModelError: transformers has no causal language model of this architecture.
    """
    device = resolve_device(spec.model.device)
    dtype = resolve_dtype(spec.model.dtype, device)
    model = skeleton(spec.model, dtype)
    base = sum(parameter.numel() for parameter in model.parameters())
    candidates = spec.candidates()
    for candidate in candidates:
        inject(lora_config(candidate), model, adapter_key(candidate.name), empty=True)
    params = {c.name: sum(p.numel() for p in adapter_parameters(model, c.name)) for c in candidates}
    costs: dict[str, Cost] = {}
    reason = None
    try:
        engine: PackedEngine | PeftEngine = PeftEngine(model, spec.training.batch_size)
        if spec.training.engine == "packed":
            use_packed_forward(model)
            engine = PackedEngine(model, 1 << 30)
        for candidate in candidates:
            for parameter in adapter_parameters(model, candidate.name):
                parameter.requires_grad_(True)
        costs = count_costs(model, [c.name for c in candidates], engine.forward, probe_tokens(model))
    except (NotPackable, NotImplementedError, RuntimeError, ValueError, TypeError, AttributeError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return Prediction(device.type, base, base * dtype.itemsize, params, costs, reason)
