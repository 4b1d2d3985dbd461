"""Hybrids are packed: their mixers run by sequence, and a pack equals each trial alone and PEFT."""

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import rankscope.train.probe as probe
from marks import mostly_slow
from models import HYBRIDS, tiny_model
from rankscope.data.tokens import Tokens
from rankscope.lora.adapters import adapter_key, adapter_weights, add_adapter, lora_layers
from rankscope.lora.layout import NotPackable, Slice, Unpackable
from rankscope.spec.candidates import Trial
from rankscope.train.engine import PackedEngine
from rankscope.train.mixers import mixers
from rankscope.train.probe import make_packable, use_own_forward
from reference import make_trial, random_tokens

MODULES = {
    "lfm2": ("in_proj", "out_proj", "q_proj", "w1"),
    "qwen3.5": ("in_proj_qkv", "in_proj_z", "in_proj_a", "out_proj", "q_proj", "down_proj"),
    "falcon-h1": ("in_proj", "q_proj", "down_proj"),
    "mamba2": ("in_proj",),
}
EXAMPLES = {0: [0, 1, 2], 1: [3, 0, 1]}  # by seed, as in a study


def trials_of(name: str) -> list[Trial]:
    return [
        make_trial(rank, 1e-3, seed, dropout, MODULES[name])
        for rank, seed, dropout in ((8, 0, 0), (3, 0, 0.2), (4, 1, 0))
    ]


def packed_model(name: str, trials: list[Trial]) -> PreTrainedModel:
    """A packed model with the trials' adapters, whose B are not zero, so that every factor gets a gradient."""
    model = tiny_model(name)
    for trial in trials:
        add_adapter(model, trial)
    make_packable(model, [trial.name for trial in trials])
    for trial in trials:
        generator = torch.Generator().manual_seed(trial.candidate.rank)
        for key, weight in adapter_weights(model, trial.name).items():
            if ".lora_B." in key:
                weight.data.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    return model


def slice_of(trial: Trial) -> Slice:
    examples = EXAMPLES[trial.seed]
    return Slice(trial.name, examples, examples if trial.candidate.lora_dropout else ())


def taken_gradients(model: PreTrainedModel, trial: Trial) -> dict[str, Tensor]:
    gradients = {}
    for name, weight in adapter_weights(model, trial.name).items():
        assert weight.grad is not None
        gradients[name], weight.grad = weight.grad, None
    return gradients


def by_peft(model: PreTrainedModel, trial: Trial, tokens: Tokens) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients by transformers' and PEFT's own forward, one row at a time."""
    slice_ = slice_of(trial)
    labels, total = sum(int(tokens[row].is_label[1:].sum()) for row in slice_.examples), 0.0
    for _, layer in lora_layers(model):
        layer.set_adapter(adapter_key(trial.name))
        layer.lora_dropout.train(bool(slice_.dropout_seeds))
    for row in slice_.examples:
        ids, is_label = (torch.from_numpy(part) for part in tokens[row])
        torch.manual_seed(row)
        logits = model(input_ids=ids.long()[None], use_cache=False).logits[0, :-1][is_label[1:]]
        loss = torch.nn.functional.cross_entropy(logits, ids[1:][is_label[1:]].long(), reduction="sum") / labels
        loss.backward()
        total += float(loss.detach())
    return total, taken_gradients(model, trial)


def assert_near(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    scale = max(float(gradient.norm()) for gradient in expected.values())
    for name, gradient in expected.items():
        difference = float((got[name] - gradient).norm()) / max(float(gradient.norm()), 1e-3 * scale)
        assert difference <= tolerance, f"{name}: {difference:.1e}"


@pytest.mark.parametrize("name", mostly_slow(HYBRIDS, "lfm2", "mamba2"))
def test_a_pack_of_hybrids_equals_peft_and_each_trial_alone(name: str) -> None:
    trials, tokens = trials_of(name), random_tokens(4)
    model = packed_model(name, trials)
    slices = [slice_of(trial) for trial in trials]
    packs = [(1 << 30, slices), (1, slices[1:2]), *((1 << 30, [slice_]) for slice_ in slices)]
    found: dict[str, list[tuple[float, dict[str, Tensor]]]] = {trial.name: [] for trial in trials}
    for tokens_per_forward, pack in packs:  # together; one by sequence, its layers run again; alone
        losses = list(PackedEngine(model, tokens_per_forward).accumulate(tokens, pack))
        for loss, part in zip(losses, pack, strict=True):
            (trial,) = (trial for trial in trials if trial.name == part.adapter)
            found[trial.name].append((float(loss.double().mean()), taken_gradients(model, trial)))
    (evaluated,) = PackedEngine(model, 1 << 30).evaluate(tokens, [trials[0].name])
    use_own_forward(model, tiny_model(name).config._attn_implementation)
    for trial in trials:
        expected_loss, expected = by_peft(model, trial, tokens)
        assert len(found[trial.name]) == (3 if trial is trials[1] else 2)
        for loss, gradients in found[trial.name]:
            assert loss == pytest.approx(expected_loss, rel=2e-7)
            assert_near(gradients, expected, 6e-5)
    rows = [by_peft(model, trials[0], Tokens.from_examples([tokens[row]] * 3))[0] for row in EXAMPLES[0]]
    np.testing.assert_allclose(evaluated.loss[EXAMPLES[0]], rows, rtol=5e-7)


def test_sequences_of_equal_length_go_as_one_batch() -> None:
    trials, tokens = trials_of("lfm2")[:2], random_tokens(4)
    model = packed_model("lfm2", trials)
    ((_, mixer),) = mixers(model)
    shapes: list[tuple[int, ...]] = []
    mixer.in_proj.register_forward_hook(lambda module, args, out: shapes.append(args[0].shape[:2]))
    list(PackedEngine(model, 1 << 30).accumulate(tokens, [slice_of(trial) for trial in trials]))
    lengths = [int(tokens.lengths[row]) for row in EXAMPLES[0]]
    assert shapes == [(2 * lengths.count(length), length) for length in sorted(set(lengths))]


@pytest.mark.parametrize("name", mostly_slow(HYBRIDS, "lfm2", "mamba2"))
def test_a_hybrid_whose_mixers_run_on_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "divide_mixers", lambda model: None)
    with pytest.raises(NotPackable) as caught:
        packed_model(name, trials_of(name)[:1])
    assert caught.value.reason is Unpackable.LEAKS
