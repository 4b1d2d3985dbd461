"""Grouped products of a GPU, by torch's own stand-in for them on a CPU, against one product a trial."""

import pytest
import torch

from marks import mostly_slow
from models import tiny_model
from rankscope.lora import grouped, packed
from rankscope.lora.layout import Slice
from rankscope.spec.models import TrainingSpec
from rankscope.train.engine import PackedEngine
from rankscope.train.probe import use_packed_forward
from rankscope.train.step import make_train_state
from reference import make_trial, random_tokens


@pytest.mark.parametrize("name", mostly_slow(["llama-gqa", "opt-post-norm", "gpt2"], "llama-gqa"))
def test_grouped_products_equal_one_for_each_trial(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks 8, 8 and 16, 16 are groups; 3 is too small for them, 16 alone, and dropout stays by itself."""
    trials = [make_trial(rank, 1e-3, seed) for rank, seed in [(8, 0), (8, 1), (16, 0), (16, 1), (3, 0), (16, 2)]]
    trials += [make_trial(8, 1e-3, 2, dropout=0.5), make_trial(8, 1e-3, 3, dropout=0.5)]
    tokens, found, sizes = random_tokens(6), [], []

    def noted(out: torch.Tensor, x: torch.Tensor, operand: torch.Tensor, groups: list[list[grouped.Span]]) -> object:
        sizes.append([len(group) for group in groups])
        return add_updates(out, x, operand, groups)

    add_updates = grouped.add_updates
    monkeypatch.setattr(packed, "add_updates", noted)
    for on_gpu in (False, True):
        monkeypatch.setattr(grouped, "on_gpu", lambda _, on_gpu=on_gpu: on_gpu)
        model = tiny_model(name, torch.bfloat16)
        members = [make_train_state(model, trial, TrainingSpec(steps=1), 1) for trial in trials]
        for number, member in enumerate(members):
            for weight in (w for n, w in member.weights.items() if "lora_B" in n):
                weight.data.fill_(0.01 * (number + 1))  # so that A gets a gradient too, and each trial its own
        use_packed_forward(model)
        slices = [Slice(trial.name, [0, 1, 2], [7, 8, 9] if trial.candidate.lora_dropout else []) for trial in trials]
        losses = list(PackedEngine(model, 1 << 30).accumulate(tokens, slices))
        gradients = [torch.cat([p.grad.flatten() for p in member.parameters]) for member in members]
        found.append((torch.stack([loss.mean() for loss in losses]), gradients))
    assert sizes
    assert all(size == [2, 2] for size in sizes)
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-3, atol=0)
    for got, expected in zip(found[1][1], found[0][1], strict=True):
        torch.testing.assert_close(got.norm(), expected.norm(), rtol=1e-2, atol=0)
        assert torch.cosine_similarity(got, expected, dim=0) > 0.999
