"""The probe finds models that cannot be packed; they are trained by PEFT's forward."""

import logging

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from models import UNPACKABLE, tiny_model
from rankscope.data.tokens import Tokens
from rankscope.lora.adapters import add_adapter
from rankscope.lora.layout import NotPackable
from rankscope.spec.models import TrainingSpec
from rankscope.train.engine import PackedEngine
from rankscope.train.flops import count_cost
from rankscope.train.loop import choose_engine
from rankscope.train.probe import make_packable, probe_tokens
from rankscope.train.step import make_train_state, train_step
from reference import make_trial, random_tokens, train_with_peft

TRAINING = TrainingSpec(steps=6, batch_size=4, lr_scheduler_type="linear", warmup_ratio=0.0)


@pytest.mark.parametrize("name", UNPACKABLE)
def test_unpackable_architectures_are_trained_as_peft_does(name: str, caplog: pytest.LogCaptureFixture) -> None:
    modules = ("q_proj", "v_proj") if name == "phimoe-window" else "all-linear"  # PEFT cannot adapt its router
    tokens, trial = random_tokens(20), make_trial(4, 1e-3, modules=modules)
    model = tiny_model(name)
    member = make_train_state(model, trial, TRAINING, 6)
    with caplog.at_level(logging.WARNING):
        engine, reason, _ = choose_engine(model, [member], TRAINING, 20)
    assert engine.name == "peft"
    assert reason is not None
    assert "cannot be packed" in caplog.text
    losses = [train_step(engine, [member], tokens, TRAINING, step)[0].loss for step in range(6)]
    expected = train_with_peft(tiny_model(name), trial, tokens, TRAINING, 6)
    assert losses == pytest.approx(expected.losses, rel=1e-5)
    for key, value in expected.weights.items():
        torch.testing.assert_close(member.weights[key].detach(), value, rtol=0, atol=1e-5)


def longrope_model() -> PreTrainedModel:
    """Rotations that change for all positions of a forward when one of them is beyond 12."""
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 12,
        "short_factor": [1.0] * 4, "long_factor": [4.0, 8.0, 16.0, 32.0],
    }  # fmt: skip
    config = LlamaConfig(
        vocab_size=131, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        max_position_embeddings=128, rope_parameters=rope,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)
    model.requires_grad_(False)
    return model


@pytest.mark.parametrize("engine", ["packed", "peft"])
def test_rows_beyond_the_original_length_of_longrope_are_taken_one_at_a_time(engine: str) -> None:
    tokens, trial, model = random_tokens(20, shortest=6, longest=20), make_trial(4, 1e-3), longrope_model()
    assert tokens.lengths.min() <= 12 < tokens.lengths.max()
    training = TRAINING.model_copy(update={"engine": engine})
    member = make_train_state(model, trial, training, 6)
    chosen, reason, _ = choose_engine(model, [member], training, int(tokens.lengths.max()))
    assert chosen.name == "peft"
    assert reason is None if engine == "peft" else "original_max_position_embeddings of 12" in str(reason)
    (together,) = chosen.evaluate(tokens, [trial.name])
    alone = [chosen.evaluate(Tokens.from_examples([tokens[i]]), [trial.name])[0].mean for i in range(len(tokens))]
    assert together.loss == pytest.approx(alone, rel=1e-5)


def test_rows_within_the_original_length_of_longrope_are_packed() -> None:
    tokens, trials, model = random_tokens(20, longest=12), [make_trial(4, 1e-3), make_trial(8, 1e-3)], longrope_model()
    members = [make_train_state(model, trial, TRAINING, 6) for trial in trials]
    engine, reason, _ = choose_engine(model, members, TRAINING, int(tokens.lengths.max()))
    assert (engine.name, reason) == ("packed", None)


def test_an_adapter_on_the_output_layer_is_not_packed() -> None:
    model, trial = tiny_model("llama-gqa"), make_trial(4, 1e-3, modules=("q_proj", "lm_head"))
    add_adapter(model, trial)
    with pytest.raises(NotPackable, match="output layer"):
        make_packable(model, [trial.name])


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")  # PEFT's, of its own pattern
def test_experts_are_not_packed() -> None:
    model, trial = tiny_model("mixtral"), make_trial(4, 1e-3)
    add_adapter(model, trial)
    with pytest.raises(NotPackable, match="ParamWrapper"):
        make_packable(model, [trial.name])


def test_a_model_that_ignores_the_layout_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain sdpa on OPT lets flattened sequences see each other without an error: the probe must see it."""
    import rankscope.train.probe as probe

    monkeypatch.setattr(probe, "NAME", "sdpa")
    model, trial = tiny_model("opt-post-norm"), make_trial(4, 1e-3)
    add_adapter(model, trial)
    with pytest.raises(NotPackable, match="other logits"):
        make_packable(model, [trial.name])


def test_a_failed_probe_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    import rankscope.train.probe as probe

    ids = torch.arange(3, 20)[None]
    model, trial = tiny_model("opt-post-norm"), make_trial(4, 1e-3)
    add_adapter(model, trial)
    before = model(input_ids=ids).logits
    monkeypatch.setattr(probe, "NAME", "sdpa")
    with pytest.raises(NotPackable):
        make_packable(model, [trial.name])
    torch.testing.assert_close(model(input_ids=ids).logits, before)


def test_bytes_per_token_grow_with_adapters() -> None:
    """The probe's count is of what is really saved: the saved A x grows with the rank."""
    counts = []
    for rank in (4, 64):
        model, trial = tiny_model("llama-gqa"), make_trial(rank, 1e-3)
        add_adapter(model, trial)
        make_packable(model, [trial.name])
        engine, tokens = PackedEngine(model, 1 << 30), probe_tokens(model)
        cost = count_cost(model, trial.name, engine.forward, tokens)
        counts.append(cost.bytes_per_token)
    layers, modules = 2, 7
    assert counts[1] - counts[0] == pytest.approx(
        60 * 4 * layers * modules, rel=0.05
    )  # h = A x of each module, float32


def test_bfloat16_packed_is_close_to_peft_under_autocast() -> None:
    tokens, trial = random_tokens(20), make_trial(8, 1e-3)
    losses = {}
    for kind in ("packed", "peft"):
        model = tiny_model("llama-gqa", torch.bfloat16)
        member = make_train_state(model, trial, TRAINING, 6)
        training = TRAINING.model_copy(update={"engine": kind})
        engine = choose_engine(model, [member], training, 20).engine
        assert engine.name == kind
        assert all(weight.dtype == torch.float32 for weight in member.weights.values())
        losses[kind] = [train_step(engine, [member], tokens, training, step)[0].loss for step in range(6)]
    assert losses["packed"] == pytest.approx(losses["peft"], rel=5e-3)


def test_memory_budget_divides_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    import rankscope.train.loop as loop

    monkeypatch.setattr(loop, "free_bytes", lambda device: 1_000_000)
    model, trial = tiny_model("opt-post-norm"), make_trial(4, 1e-3)
    member = make_train_state(model, trial, TRAINING, 6)
    engine = choose_engine(model, [member], TRAINING, 20).engine
    assert isinstance(engine, PackedEngine)
    assert 50 < engine.tokens_per_forward < 500
