"""Training steps as on a GPU, without one: what is launched, and where the program waits.

    python benchmarks/fake_gpu.py --model llama --layers 24 --ranks 8 128 256 --seeds 3

The tensors have the shapes, dtypes and device of a GPU's and no data (torch's FakeTensorMode), so that the code takes
the branches that it takes there. A torch without a GPU cannot run a backward over them: its autograd engine asks for
streams of the device. So torch's C++ code is told that they are on the meta device, and Python that they are on a GPU.
Nothing is computed, and no kernel's own conditions are checked: see tests/train/test_attention.py for those.
"""

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.utils import clip_grad
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, PreTrainedModel

from rankscope.data.tokens import Example, Tokens
from rankscope.lora import grouped
from rankscope.lora.adapters import adapter_key, adapter_parameters, inject, lora_config, to_float32
from rankscope.model.mixed import use_mixed_precision
from rankscope.plan.fake_steps import to_fake
from rankscope.spec.candidates import Candidate, Trial
from rankscope.spec.models import TrainingSpec
from rankscope.train import step as step_module
from rankscope.train.engine import PackedEngine, PeftEngine
from rankscope.train.probe import use_packed_forward
from rankscope.train.step import make_train_state, train_step

GPU, META = torch.device("cuda", 0), torch.device("meta")
WAITS = ("nonzero", "unique", "masked_select", "equal", "is_nonzero")
"""Operators whose result the CPU waits for, beside copies from the GPU."""
RECIPE: dict[str, Any] = {
    "learning_rate": 1e-4,
    "lora_alpha": 32,
    "target_modules": "all-linear",
    "lora_dropout": 0.0,
    "use_rslora": False,
    "init_lora_weights": "kaiming",
}
VIEWS = ("detach", "lift_fresh", "_unsafe_view", "alias", "_reshape_alias")
"""Operators that launch nothing and are no views by their schema."""


@contextmanager
def fake_gpu() -> Iterator[FakeTensorMode]:
    """Make fake tensors of the device "cuda" pass for a GPU's in Python, and for meta tensors in C++."""
    own, generator, mode = Tensor._make_subclass, torch.Generator, FakeTensorMode(allow_non_fake_inputs=True)
    own_dispatch = FakeTensorMode.dispatch

    def make_subclass(*args: Any, dispatch_device: bool = False, device_for_backend_keys: Any = None) -> Any:
        keys = META if device_for_backend_keys == GPU else device_for_backend_keys
        return own(*args, dispatch_device=keys is not META, device_for_backend_keys=keys)

    def dispatch(mode: FakeTensorMode, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "meta":  # as C++ code says
            kwargs["device"] = GPU
        return own_dispatch(mode, func, types, args, kwargs)

    with ExitStack() as stack:
        for target, name, value in (
            (Tensor, "_make_subclass", make_subclass),
            (FakeTensorMode, "dispatch", dispatch),
            (FakeTensor, "is_cuda", property(lambda tensor: tensor.device.type == "cuda")),
            (torch, "Generator", lambda *_: generator()),
            (_foreach_utils, "_has_foreach_support", lambda tensors, device: True),
            (clip_grad, "_has_foreach_support", lambda tensors, device: True),
            (FakeTensor, "tolist", lambda tensor: np.zeros(tensor.cpu().shape).tolist()),
        ):
            stack.enter_context(mock.patch.object(target, name, value, create=True))
        stack.enter_context(mode)
        yield mode


class Counted(TorchDispatchMode):
    """Counts operators that launch something, and those for which the CPU waits, with where they were called."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name == "_local_scalar_dense":
            if args[0].device.type == "cuda":
                self.waits[name] += 1
            return 0.0
        out = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if name == "_to_copy" and (made[0].dtype, made[0].device) == (tensors[0].dtype, tensors[0].device):
            return out  # asked for by C++ code, which sees another device
        on_gpu = any(tensor.device.type == "cuda" for tensor in (*tensors, *made))
        if on_gpu and not func.is_view and name not in VIEWS and not name.startswith(("empty", "new_empty")):
            self.launches[name] += 1
        places = {tensor.device.type for tensor in (*tensors, *made)}
        if len(places) > 1 and name in ("_to_copy", "copy_") and not _asynchronous(func, args, kwargs or {}):
            self.waits[f"{name} {' '.join(sorted(places))}"] += 1
        if on_gpu and name in WAITS:
            self.waits[name] += 1
        return out


def _asynchronous(func: Any, args: Any, kwargs: Any) -> bool:
    return bool(kwargs.get("non_blocking") or (func.overloadpacket.__name__ == "copy_" and len(args) > 2 and args[2]))


def shaped(name: str, layers: int) -> PreTrainedModel:
    """Model with the widths of Llama 3.2 1B or opt-350m, without weights."""
    configs = {
        "llama": lambda: LlamaConfig(
            num_hidden_layers=layers, hidden_size=2048, intermediate_size=8192, num_attention_heads=32,
            num_key_value_heads=8, vocab_size=128256,
        ),
        "opt": lambda: OPTConfig(
            num_hidden_layers=layers, hidden_size=1024, ffn_dim=4096, word_embed_proj_dim=512,
            num_attention_heads=16, do_layer_norm_before=False,
        ),
    }  # fmt: skip
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(configs[name]())
    use_mixed_precision(model)
    model.config.use_cache = False
    return model.requires_grad_(False)


def count_step(
    model: PreTrainedModel, trials: Sequence[Trial], tokens: Tokens, training: TrainingSpec, packed: bool = True
) -> Counted:
    """Count the second optimizer step of `trials` over a frozen model, which loses its weights. The first makes states.

    What is read from a fake tensor is zero, so every loss and norm is.
    """
    model.to("meta")
    configs = {trial.name: lora_config(trial.candidate, model) for trial in trials}
    for name, config in configs.items():
        inject(config, model, adapter_key(name), empty=True)
        to_float32(model, name)
        for parameter in adapter_parameters(model, name):
            parameter.requires_grad_(True)
    with fake_gpu() as mode, mock.patch.object(step_module, "add_adapter", lambda _, trial: configs[trial.name]):
        to_fake(model, mode, GPU)
        states = [make_train_state(model, trial, training, 10) for trial in trials]
        engine: PackedEngine | PeftEngine = PeftEngine(model, training.batch_size)
        if packed:
            use_packed_forward(model)
            engine = PackedEngine(model, 1 << 15)
        for step in range(2):
            with Counted() as counted:
                train_step(engine, states, tokens, training, step)
    return counted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("llama", "opt"), default="llama")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 128, 256])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--alone", action="store_true", help="products of one trial each, not of groups of a rank")
    parser.add_argument("--peft", action="store_true", help="one trial after another, by PEFT's forward")
    arguments = parser.parse_args()
    trials = [
        Trial(candidate=Candidate(rank=rank, **RECIPE), seed=seed)
        for seed in range(arguments.seeds)
        for rank in arguments.ranks
    ]
    labels = np.arange(128) > 40
    tokens = Tokens.from_examples([Example(np.arange(128, dtype=np.int32), labels)] * 8)
    if arguments.alone:
        grouped.on_gpu = lambda tensor: False
    model = shaped(arguments.model, arguments.layers)
    counted = count_step(model, trials, tokens, TrainingSpec(steps=10, batch_size=8), not arguments.peft)
    print(f"torch {torch.__version__}: {counted.launches.total()} launches, {counted.waits.total()} waits a step")
    for name, count in counted.launches.most_common(20):
        print(f"{count:8} {name}")
    for name, count in counted.waits.items():
        print(f"{count:8} waits: {name}")


if __name__ == "__main__":
    main()
