"""Whole packed steps on fake tensors of a GPU: which code runs there, on one device, and how often it waits for it."""

import pytest
import torch

from models import tiny_model
from rankscope.spec.models import TrainingSpec
from reference import make_trial, random_tokens
from scripts import load_benchmark


@pytest.mark.parametrize("name", ["opt-post-norm", pytest.param("opt-pre-norm", marks=pytest.mark.slow)])
def test_a_packed_step_waits_for_a_gpu_once(name: str) -> None:
    trials, training = [make_trial(8, 1e-3), make_trial(3, 1e-3)], TrainingSpec(steps=10, batch_size=3)
    model = tiny_model(name, torch.bfloat16)
    counted = load_benchmark("fake_gpu").count_step(model, trials, random_tokens(9), training, True)
    assert counted.waits == {"_to_copy cpu cuda": 1}, "losses and norms of all trials"
    assert counted.launches["_fused_adamw_"] == 2
    assert "_varlen_attn" in counted.launches
