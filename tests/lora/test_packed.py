"""The packed forward: gradients, no leak between sequences or trials, dropout."""

import numpy as np
import pytest
import torch

from marks import mostly_slow
from models import CONFIGS, tiny_model
from rankscope.data.tokens import Example, Tokens
from rankscope.lora.adapters import adapter_parameters, add_adapter, lora_layers
from rankscope.lora.layout import FlatBatch, NotPackable, Slice, flatten, use_layout
from rankscope.lora.packed import _PackedLinear
from rankscope.train.engine import PackedEngine
from rankscope.train.probe import make_packable
from reference import VOCAB, make_trial, random_tokens

CPU = torch.device("cpu")


def test_gradients_of_the_packed_update() -> None:
    """Against finite differences, in float64, with and without dropout."""
    rng = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64).requires_grad_()

    spans = [(0, 3, 0.5, None), (3, 8, 2.0, (torch.rand(5, 4, generator=rng) < 0.7, 1 / 0.7))]
    weights = [random(2, 4), random(6, 2), random(3, 4), random(6, 3)]

    weight, bias = random(6, 4).detach(), random(6).detach()

    def layer(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        return _PackedLinear.apply(x, x.detach(), weight, bias, spans, *weights)

    assert torch.autograd.gradcheck(layer, (random(8, 4), *weights))


def test_a_linear_layer_with_a_forward_of_its_own_is_not_packed() -> None:
    class Doubled(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model = tiny_model("qwen2")
    layer = model.model.layers[0].mlp
    layer.up_proj = Doubled(layer.up_proj.in_features, layer.up_proj.out_features, bias=False)
    trial = make_trial(4, 1e-3)
    add_adapter(model, trial)
    with pytest.raises(NotPackable, match="Doubled"):
        make_packable(model, [trial.name])


def with_random_adapters(name: str) -> tuple[PackedEngine, list[str]]:
    """A model with two adapters whose B is not zero, so that a wrong adapter shows."""
    model = tiny_model(name)
    trials = [make_trial(4, 1e-3), make_trial(7, 2e-3)]
    for trial in trials:
        add_adapter(model, trial)
    make_packable(model, [trial.name for trial in trials])
    torch.manual_seed(1)
    for trial in trials:
        for parameter in adapter_parameters(model, trial.name):
            parameter.data.normal_(std=0.2)
    return PackedEngine(model, 1 << 30), [trial.name for trial in trials]


def hidden_states(engine: PackedEngine, batch: FlatBatch) -> torch.Tensor:
    """Hidden states of all tokens, (T, D)."""
    trunk = getattr(engine.model, engine.model.base_model_prefix)
    with torch.no_grad(), use_layout(batch.layout):
        return trunk(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).last_hidden_state[0]


@pytest.mark.parametrize("name", mostly_slow(CONFIGS, "opt-post-norm", "gpt2", "gemma3", "mixtral"))
def test_sequences_do_not_see_each_other(name: str) -> None:
    """Changing one sequence changes its own hidden states and nobody else's, in the same and in the other trial."""
    engine, adapters = with_random_adapters(name)
    tokens = random_tokens(3, shortest=8, longest=12)
    changed = Tokens(ids=tokens.ids.copy(), is_label=tokens.is_label, offsets=tokens.offsets)
    middle = slice(int(tokens.offsets[1]), int(tokens.offsets[2]))
    changed.ids[middle] = (changed.ids[middle] - 3 + 7) % (VOCAB - 3) + 3
    slices = [Slice(adapter, [0, 1, 2]) for adapter in adapters]
    # The second trial keeps the first tokens throughout: only the middle sequence of the first trial differs.
    before = flatten(tokens, slices, CPU)
    after_ids = before.input_ids.clone()
    after_ids[0, middle] = torch.from_numpy(changed.ids[middle].astype(np.int64))
    one, other = hidden_states(engine, before), hidden_states(engine, before._replace(input_ids=after_ids))
    same = torch.ones(len(one), dtype=torch.bool)
    same[middle] = False
    assert not torch.allclose(one[middle], other[middle], atol=1e-2), "the change must show in its own sequence"
    torch.testing.assert_close(other[same], one[same], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", mostly_slow(CONFIGS, "opt-post-norm", "gpt2", "gemma3", "mixtral"))
def test_positions_restart_and_adapters_differ(name: str) -> None:
    """Each sequence gives, wherever it lies, what it gives alone; and the two adapters give different things."""
    engine, adapters = with_random_adapters(name)
    tokens = random_tokens(4, shortest=6, longest=12)
    together = hidden_states(engine, flatten(tokens, [Slice(a, range(4)) for a in adapters], CPU))
    parts = together.split([int(n) for n in tokens.lengths] * 2)
    for number, adapter in enumerate(adapters):
        for i in range(4):
            alone = hidden_states(engine, flatten(tokens, [Slice(adapter, [i])], CPU))
            torch.testing.assert_close(parts[4 * number + i], alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(parts[0], parts[4], atol=1e-2)


def test_a_trial_with_nan_leaves_the_others_alone() -> None:
    engine, adapters = with_random_adapters("opt-post-norm")
    tokens = random_tokens(4)
    slices = [Slice(adapter, range(4)) for adapter in adapters]
    (_, expected) = engine.accumulate(tokens, slices)
    gradients = [p.grad.clone() for p in adapter_parameters(engine.model, adapters[1]) if p.grad is not None]
    for adapter in adapters:
        for parameter in adapter_parameters(engine.model, adapter):
            parameter.grad = None
    adapter_parameters(engine.model, adapters[0])[0].data.fill_(float("nan"))
    broken, got = engine.accumulate(tokens, slices)
    assert broken.isnan().any()
    assert torch.equal(got, expected)
    for parameter, gradient in zip(adapter_parameters(engine.model, adapters[1]), gradients, strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, gradient)


@pytest.mark.parametrize("name", ["llama-gqa", "opt-post-norm"])
def test_filling_up_changes_rounding_only(name: str) -> None:
    """Losses and gradients with parts of 16 tokens, LoRA dropout's included, and no forward is recomputed for it."""
    engine, adapters = with_random_adapters(name)
    for _, layer in lora_layers(engine.model):
        layer.lora_dropout = torch.nn.ModuleDict(dict.fromkeys(layer.lora_dropout, torch.nn.Dropout(0.3)))
    tokens, found = random_tokens(4), []
    slices = [Slice(adapter, range(4), range(5, 9)) for adapter in adapters]
    for engine.multiple in (1, 16):
        layout = flatten(tokens, slices, CPU, 2 * int(tokens.lengths.sum()), engine.multiple).layout
        assert not layout.recompute
        assert all(part.stop % engine.multiple == 0 for part in layout.segments)
        losses = list(engine.accumulate(tokens, slices))
        weights = [weight for adapter in adapters for weight in adapter_parameters(engine.model, adapter)]
        found.append([torch.stack([part.mean() for part in losses]), *[weight.grad for weight in weights]])
        for weight in weights:
            weight.grad = None
    assert layout.tokens > int(2 * tokens.lengths.sum())  # some were filled up
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_a_trials_gradient_is_complete_before_the_next_one_begins() -> None:
    """So that a step can use and drop it: a pack never holds the gradients of all its trials."""
    engine, adapters = with_random_adapters("llama-gqa")
    engine.tokens_per_forward = 1
    slices = [Slice(adapter, range(4)) for adapter in adapters]
    steps = engine.accumulate(random_tokens(4), slices)
    next(steps)
    first, second = (
        {weight.grad is None for weight in adapter_parameters(engine.model, adapter)} for adapter in adapters
    )
    assert (first, second) == ({False}, {True})
    assert len(list(steps)) == 1


def test_dropout_streams_are_those_of_torch() -> None:
    """A sequence's stream draws what nn.Dropout draws after torch.manual_seed, whatever it is packed with."""
    from rankscope.lora.packed import _drop, _dropout_keep

    tokens = Tokens.from_examples([Example(np.arange(n, dtype=np.int32), np.ones(n, bool)) for n in (5, 9)])
    layout = flatten(tokens, [Slice("a", [0, 1], [11, 12])], CPU).layout
    x = torch.randn(14, 6)
    got = _drop(x, _dropout_keep(torch.nn.Dropout(0.3), layout.segments[0], x))
    for seed, part, expected_input in ((11, got[:5], x[:5]), (12, got[5:], x[5:])):
        torch.manual_seed(seed)
        torch.testing.assert_close(part, torch.nn.functional.dropout(expected_input, 0.3))
    assert 0 < int((got == 0).sum()) < got.numel()
