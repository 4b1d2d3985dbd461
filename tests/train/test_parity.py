"""Packed training equals training with PEFT alone, and packed training alone, on every architecture."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from marks import mostly_slow
from models import ATTENTION_KINDS, CONFIGS, tiny_model
from rankscope.data.tokens import Tokens
from rankscope.lora.layout import Slice, flatten
from rankscope.spec.candidates import Trial
from rankscope.spec.models import TrainingSpec
from rankscope.train import loop, recompute
from rankscope.train.engine import PackedEngine, PeftEngine
from rankscope.train.probe import make_packable
from rankscope.train.recompute import recompute_layers
from rankscope.train.step import make_train_state, train_step
from reference import Trained, make_trial, random_tokens, train_with_peft

STEPS = 10
WEIGHT_TOLERANCE = {torch.float32: 3e-4, torch.float64: 1e-9}
"""Absolute, after all steps of AdamW. In float32 AdamW blows rounding up where a gradient is nearly zero (it divides by
its size); float64 shows that nothing but rounding differs."""


def train_packed(
    name: str,
    trials: Sequence[Trial],
    tokens: Tokens,
    training: TrainingSpec,
    tokens_per_forward: int = 1 << 30,
    dtype: torch.dtype = torch.float32,
) -> list[Trained]:
    model = tiny_model(name, dtype)
    members = [make_train_state(model, trial, training, STEPS) for trial in trials]
    make_packable(model, [trial.name for trial in trials])
    engine = PackedEngine(model, tokens_per_forward)
    losses = [[m.loss for m in train_step(engine, members, tokens, training, step)] for step in range(STEPS)]
    return [
        Trained(list(column), {name: weight.detach() for name, weight in member.weights.items()})
        for column, member in zip(zip(*losses, strict=True), members, strict=True)
    ]


def assert_same(got: Trained, expected: Trained) -> None:
    np.testing.assert_allclose(got.losses, expected.losses, rtol=1e-5)
    assert got.weights.keys() == expected.weights.keys()
    for key, value in expected.weights.items():
        tolerance = WEIGHT_TOLERANCE[value.dtype]
        torch.testing.assert_close(
            got.weights[key], value, rtol=0, atol=tolerance, msg=lambda m, key=key: f"{key}: {m}"
        )


def trials_for(name: str, dropout: float) -> list[Trial]:
    """Mixed ranks, learning rates and seeds. PEFT's own all-linear reaches Mixtral's experts."""
    modules = ("q_proj", "k_proj", "v_proj", "o_proj") if name == "mixtral" else "all-linear"
    return [
        make_trial(8, 3e-3, seed=0, dropout=dropout, modules=modules),
        make_trial(3, 1e-3, seed=0, dropout=dropout, modules=modules),
        make_trial(64, 2e-3, seed=1, dropout=dropout, modules=modules),
    ]


def recipe(batch_size: int) -> TrainingSpec:
    return TrainingSpec(
        steps=STEPS,
        batch_size=batch_size,
        lr_scheduler_type="linear",
        warmup_ratio=0.0,
        weight_decay=0.01,
        max_grad_norm=1.0,
    )


FEW = ("opt-post-norm", "gpt2")
"""Architectures that `make test` trains with dropout too, which acts in LoRA's layers alone."""

PARITY = [
    pytest.param(name, dropout, dtype, marks=[] if fast else pytest.mark.slow)
    for name in CONFIGS
    for dropout in (0.0, 0.2)
    for dtype in (torch.float32, torch.float64)
    if (name, dtype) != ("mixtral", torch.float64)  # transformers' experts have no float64 product
    for fast in [
        (name in FEW or not dropout) if dtype == torch.float64 else (name in ("mixtral", FEW[0]) and not dropout)
    ]
]


@pytest.mark.parametrize(("name", "dropout", "dtype"), PARITY, ids=str)
def test_packed_equals_peft(name: str, dropout: float, dtype: torch.dtype) -> None:
    # Dropout is compared on single sequences, since a padded batch draws other numbers; and so is Gemma 2 in float64,
    # whose own attention gives NaN where a padded row sees nothing.
    alone = dropout > 0 or (dtype == torch.float64 and name == "gemma2")
    tokens = random_tokens(30)
    training = recipe(batch_size=1 if alone else 4)
    trials = trials_for(name, dropout)
    packed = train_packed(name, trials, tokens, training, dtype=dtype)
    for trial, got in zip(trials, packed, strict=True):
        expected = train_with_peft(tiny_model(name, dtype), trial, tokens, training, STEPS)
        moved = max(float(weight.abs().max()) for name, weight in expected.weights.items() if "lora_B" in name)
        assert moved > 1e-3, "the reference did not learn: nothing is shown"
        assert_same(got, expected)


@pytest.mark.parametrize("name", mostly_slow(ATTENTION_KINDS, "gpt-oss", "llama4", "falcon"))
def test_attention_of_all_kinds_equals_pefts(name: str) -> None:
    modules = "all-linear" if name in ("falcon", "gpt-neo", "doge") else ("q_proj", "k_proj", "v_proj", "o_proj")
    tokens, training, trial = random_tokens(30), recipe(batch_size=4), make_trial(8, 3e-3, modules=modules)
    (packed,) = train_packed(name, [trial], tokens, training)
    assert_same(packed, train_with_peft(tiny_model(name), trial, tokens, training, STEPS))


ALONE = [
    pytest.param(name, dropout, marks=[] if dropout and name in ("gpt2", "gemma2", "mixtral") else pytest.mark.slow)
    for name in CONFIGS
    for dropout in (0.0, 0.2)
]


@pytest.mark.parametrize(("name", "dropout"), ALONE)
def test_packed_equals_packed_alone(name: str, dropout: float) -> None:
    tokens = random_tokens(30)
    training = recipe(batch_size=4)
    trials = trials_for(name, dropout)
    together = train_packed(name, trials, tokens, training)
    for trial, got in zip(trials, together, strict=True):
        (alone,) = train_packed(name, [trial], tokens, training)
        assert_same(got, alone)


@pytest.mark.parametrize("name", mostly_slow(CONFIGS, "opt-pre-norm"))
def test_recomputing_changes_rounding_only(name: str) -> None:
    """Forwards of one token at most: each sequence is longer, and every layer runs again in its backward."""
    tokens, trials, training = random_tokens(30), trials_for(name, 0.2), recipe(batch_size=4)
    kept = train_packed(name, trials, tokens, training)
    recomputed = train_packed(name, trials, tokens, training, tokens_per_forward=1)
    for got, expected in zip(recomputed, kept, strict=True):
        assert_same(got, expected)


def test_recomputing_keeps_less() -> None:
    tokens, trial = random_tokens(1), make_trial(8, 1e-3)
    model = tiny_model("opt-post-norm")
    make_train_state(model, trial, recipe(batch_size=1), STEPS)
    make_packable(model, [trial.name])
    engine, saved = PackedEngine(model, 1 << 30), []
    for most_kept in (None, 1):
        batch, kept = flatten(tokens, [Slice(trial.name, [0])], model.device, most_kept), 0

        def note(tensor: Tensor) -> Tensor:
            nonlocal kept
            kept += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            engine.hidden(batch)
        saved.append(kept)
    assert saved[1] < saved[0] / 4


@pytest.mark.parametrize("tokens_per_forward", [40, pytest.param(100, marks=pytest.mark.slow)])
def test_dividing_a_step_changes_rounding_only(tokens_per_forward: int) -> None:
    tokens, trials, training = random_tokens(30), trials_for("opt-post-norm", 0.2), recipe(batch_size=4)
    whole = train_packed("opt-post-norm", trials, tokens, training)
    divided = train_packed("opt-post-norm", trials, tokens, training, tokens_per_forward)
    for got, expected in zip(divided, whole, strict=True):
        assert_same(got, expected)


def test_accumulation_equals_one_large_batch() -> None:
    tokens, trials = random_tokens(30), trials_for("llama-gqa", 0.0)
    large = train_packed("llama-gqa", trials, tokens, recipe(batch_size=6))
    accumulated = train_packed(
        "llama-gqa", trials, tokens, recipe(batch_size=2).model_copy(update={"gradient_accumulation_steps": 3})
    )
    for got, expected in zip(accumulated, large, strict=True):
        assert_same(got, expected)


def test_dropout_acts() -> None:
    """The parity of dropout would also hold if there were none."""
    tokens, training = random_tokens(30), recipe(batch_size=4)
    (dropped,) = train_packed("opt-post-norm", [make_trial(8, 1e-2, dropout=0.2)], tokens, training)
    (plain,) = train_packed("opt-post-norm", [make_trial(8, 1e-2)], tokens, training)
    assert abs(dropped.losses[-1] - plain.losses[-1]) > 1e-4


@pytest.mark.parametrize("dropout", [pytest.param(0.0, marks=pytest.mark.slow), 0.2])
@pytest.mark.parametrize(
    "name", mostly_slow(["opt-post-norm", "gpt2", "gemma2", "bloom", "falcon"], "opt-post-norm", "bloom")
)
def test_recomputing_by_pefts_forward_changes_rounding_only(name: str, dropout: float) -> None:
    """Rows that are longer than a forward may be: as `choose_engine` has it where memory is short."""
    tokens, trial, training = random_tokens(30), make_trial(8, 3e-3, dropout=dropout), recipe(batch_size=1)
    found, kept = [], []
    for tokens_per_forward in (1 << 30, 1):
        model = tiny_model(name)
        member = make_train_state(model, trial, training, STEPS)
        recompute_layers(model)
        engine = PeftEngine(model, training.batch_size, tokens_per_forward=tokens_per_forward)
        losses = [train_step(engine, [member], tokens, training, step)[0].loss for step in range(STEPS)]
        found.append(Trained(losses, {key: weight.detach() for key, weight in member.weights.items()}))
        saved: dict[int, int] = {}

        def note(tensor: Tensor, saved: dict[int, int] = saved) -> Tensor:
            saved[tensor.untyped_storage()._cdata] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            engine.losses(tokens, Slice(trial.name, [0], [0] if dropout else []))
        kept.append(sum(saved.values()))
    assert_same(found[1], found[0])
    assert kept[1] < 0.7 * kept[0], "nothing was recomputed"


@pytest.mark.parametrize("engine", ["packed", "peft"])
@pytest.mark.parametrize(("free", "recomputed"), [(10**12, False), (0, True)])
def test_what_is_recomputed_is_decided_by_the_memory_that_is_free(
    monkeypatch: pytest.MonkeyPatch, engine: str, free: int, recomputed: bool
) -> None:
    monkeypatch.setattr(loop, "free_bytes", lambda device: free)
    model, training = tiny_model("opt-post-norm"), recipe(batch_size=2).model_copy(update={"engine": engine})
    member = make_train_state(model, make_trial(4, 1e-3), training, STEPS)
    chosen = loop.choose_engine(model, [member], training).engine
    calls = []
    own = recompute.checkpoint
    monkeypatch.setattr(recompute, "checkpoint", lambda *args, **kwargs: (calls.append(1), own(*args, **kwargs))[1])
    train_step(chosen, [member], random_tokens(8), training, 0)
    assert chosen.name == engine
    assert len(calls) == (2 * 2 if recomputed else 0)  # two layers, of two sequences
