"""The optimizers of bitsandbytes: what they do, how large their states are, and where they cannot be had."""

from typing import Any

import pytest
import torch
from torch import nn

from rankscope.errors import MissingExtraError, StudyError
from rankscope.plan.costs import predict
from rankscope.plan.memory import PeakMemory, StudyMemory
from rankscope.spec.models import StudySpec, TrainingSpec
from rankscope.spec.options import assemble
from rankscope.train.optimizer import (
    MIN_8BIT_WEIGHTS,
    check_optimizer,
    make_optimizer,
    saved_state,
    state_sizes,
    step_bytes,
)
from reference import random_tokens

SHAPES = ((64, 64), (63, 65), (300, 40), (5000,))  # 4096 weights, one fewer, several blocks, no weight decay


def weights() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(*shape)) for shape in SHAPES]


def optimized(optim: str, steps: int = 20) -> tuple[list[nn.Parameter], Any]:
    """Two learning rates, as LoRA+ has them; gradients that are the same for each optimizer."""
    found, training = weights(), TrainingSpec(optim=optim, weight_decay=0.1)  # type: ignore[arg-type]
    optimizer = make_optimizer({1e-2: found[:2], 3e-2: found[2:]}, training)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for weight in found:
            weight.grad = torch.randn(weight.shape, generator=generator) + 0.5
        optimizer.step()
    return found, optimizer


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_8bit"])
def test_the_states_are_as_large_as_predicted(optim: str) -> None:
    for weight, (count, optimizer) in zip(*_with_counts(optim), strict=True):
        state = saved_state(optimizer, weight)
        sizes = sorted(value.nbytes for name, value in state.items() if name != "step")
        assert sizes == sorted(state_sizes(optim, count))


def _with_counts(optim: str) -> tuple[list[nn.Parameter], list[tuple[int, Any]]]:
    found, optimizer = optimized(optim, steps=1)
    return found, [(weight.numel(), optimizer) for weight in found]


def test_8_bits_take_a_quarter() -> None:
    assert sum(state_sizes("adamw_8bit", 1 << 20)) == 2 * (1 << 20) + 2 * 4 * (1 << 12)
    assert state_sizes("adamw_8bit", MIN_8BIT_WEIGHTS - 1) == state_sizes("adamw_torch_fused", MIN_8BIT_WEIGHTS - 1)
    assert state_sizes("paged_adamw_8bit", 1 << 20) == state_sizes("adamw_8bit", 1 << 20)
    assert state_sizes("paged_adamw_32bit", 1 << 20) == state_sizes("adamw_torch_fused", 1 << 20)


def test_a_step_in_8_bits_is_near_one_in_32() -> None:
    """Rates of groups, and weight decay of matrices alone: a group that had another's would be far off."""
    exact, start = optimized("adamw_torch_fused")[0], weights()
    for weight, own, first in zip(optimized("adamw_8bit")[0], exact, start, strict=True):
        moved = (own.detach() - first.detach()).norm()
        assert float((weight.detach() - own.detach()).norm() / moved) < 0.05
        assert float(moved) > 1


def test_small_states_are_exact() -> None:
    exact, found = optimized("adamw_torch_fused")[0][1], optimized("adamw_8bit")[0][1]
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("optim", ["paged_adamw_32bit", "paged_adamw_8bit"])
def test_a_cpu_has_nothing_to_page(optim: str) -> None:
    training = TrainingSpec(optim=optim)  # type: ignore[arg-type]
    with pytest.raises(StudyError, match="moves states from a CUDA GPU"):
        check_optimizer(training, torch.device("cpu"))
    check_optimizer(training, torch.device("cuda"))
    with pytest.raises(StudyError, match="moves states from a CUDA GPU"):
        predict(study(optim))
    assert predict(study(optim), torch.device("cuda")).device == "cuda"


def test_bitsandbytes_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankscope.errors.find_spec", lambda name: None)
    predict(study("adamw_torch_fused"))
    with pytest.raises(MissingExtraError, match=r"training.optim: adamw_8bit: .*\n.*pip install .*\[quantization\]"):
        predict(study("adamw_8bit"))


def study(optim: str) -> StudySpec:
    training = {"optim": optim, "steps": 6, "batch_size": 2}
    values = {"model": {"id": "embedded", "device": "cpu"}, "data": {"id": "unused"}, "ranks": [64], "seeds": [0]}
    return assemble(values | {"training": training}, {})


def test_the_prediction_counts_the_states() -> None:
    peaks = []
    for optim in ("adamw_torch_fused", "adamw_8bit"):
        spec = study(optim)
        prediction, trials = predict(spec), spec.trials()
        found = StudyMemory(spec, prediction, random_tokens(8), 10**12).peak(trials)
        assert isinstance(found, PeakMemory), found
        peaks.append((prediction, found.parts, trials))
    (whole, exact, trials), (small, eight, _) = peaks
    params = whole.params[trials[0].candidate.name]
    assert exact.optimizer == 8 * params == whole.optimizer_bytes[trials[0].candidate.name]
    assert whole.checkpoint_bytes(trials) == 12 * params
    states = small.optimizer_bytes[trials[0].candidate.name]
    assert 2 * params < states < 2.2 * params
    assert small.checkpoint_bytes(trials) == 4 * params + states
    assert eight.optimizer in (states, states + step_bytes("adamw_8bit", 64 * 1024, "cpu"))
    assert eight.total < exact.total


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize(("paged", "unpaged"), [("paged_adamw_8bit", "adamw_8bit"), ("paged_adamw_32bit", None)])
def test_paged_ones_are_what_they_are_called(paged: str, unpaged: str | None) -> None:
    """bitsandbytes leaves paging out on a CPU; paging itself needs a GPU and is not tested."""
    found, optimizer = optimized(paged)
    assert optimizer.is_paged
    for weight, expected in zip(found, optimized(unpaged or "adamw_torch_fused")[0], strict=True):
        torch.testing.assert_close(weight, expected, rtol=0, atol=0.0 if unpaged else 1e-5)
        sizes = [value.nbytes for name, value in saved_state(optimizer, weight).items() if name != "step"]
        assert sorted(sizes) == sorted(state_sizes(paged, weight.numel()))
