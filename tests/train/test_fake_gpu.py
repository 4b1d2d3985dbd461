"""Whole packed steps on fake tensors of a GPU: which code runs there, on one device, and how often it waits for it."""

import pytest
import torch

from marks import mostly_slow
from models import tiny_model
from rankscope.spec.models import TrainingSpec
from rankscope.train import attention, step
from reference import make_trial, random_tokens
from scripts import load_benchmark

MORE = ("opt-pre-norm", "gpt2", "llama-gqa", "qwen2", "qwen3", "mistral-window", "gemma2", "gemma3", "gpt-neox", "phi")


@pytest.mark.parametrize("name", mostly_slow(["opt-post-norm", *MORE], "opt-post-norm"))
def test_a_packed_step_waits_for_a_gpu_once(name: str) -> None:
    trials, training = [make_trial(8, 1e-3), make_trial(3, 1e-3)], TrainingSpec(steps=10, batch_size=3)
    model = tiny_model(name, torch.bfloat16)
    counted = load_benchmark("fake_gpu").count_step(model, trials, random_tokens(9), training, True)
    assert counted.waits == {"_to_copy cpu cuda": 1}, "losses and norms of all trials"
    assert counted.launches["_fused_adamw_"] == 2
    assert ("_varlen_attn" in counted.launches) == (name != "gemma2")  # whose scores are capped


def test_a_wait_in_a_layer_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offsets made in every layer, as they once were; and a number read from the GPU."""
    monkeypatch.setattr(attention, "offsets_on", lambda starts, device: torch.tensor(starts, device=device).int())
    monkeypatch.setattr(step, "batch_at", lambda *_: [int(torch.ones(1, device="cuda").sum()), 1, 2])
    model, training = tiny_model("mistral-window", torch.bfloat16), TrainingSpec(steps=10, batch_size=3)
    counted = load_benchmark("fake_gpu").count_step(model, [make_trial(8, 1e-3)], random_tokens(9), training)
    assert counted.waits["_to_copy cpu cuda"] == 1 + 2
    assert counted.waits["_local_scalar_dense"] == 1
