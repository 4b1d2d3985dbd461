"""The probe finds models that cannot be packed; they are trained by PEFT's forward."""

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    CpmAntConfig,
    CpmAntForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForCausalLM,
    ZambaConfig,
    ZambaForCausalLM,
)

from marks import mostly_slow
from models import UNPACKABLE, tiny_model
from rankscope.errors import ModelError
from rankscope.lora.adapters import adapter_weights, add_adapter, remove_adapters
from rankscope.lora.layout import NotPackable, Unpackable
from rankscope.model.mixed import use_mixed_precision
from rankscope.spec.candidates import Trial
from rankscope.spec.models import TrainingSpec
from rankscope.train.engine import PackedEngine
from rankscope.train.flops import count_cost
from rankscope.train.loop import choose_engine
from rankscope.train.probe import check_causal, make_packable, probe_tokens, use_own_forward
from rankscope.train.step import TrainState, make_train_state, train_step
from reference import make_trial, random_tokens, train_with_peft

TRAINING = TrainingSpec(steps=6, batch_size=4, lr_scheduler_type="linear", warmup_ratio=0.0)


@pytest.mark.parametrize("name", UNPACKABLE)
def test_unpackable_architectures_are_trained_as_peft_does(name: str, caplog: pytest.LogCaptureFixture) -> None:
    tokens, trial = random_tokens(20), make_trial(4, 1e-3)
    model = tiny_model(name)
    member = make_train_state(model, trial, TRAINING, 6)
    with caplog.at_level(logging.WARNING):
        engine, reason, _ = choose_engine(model, [member], TRAINING)
    assert engine.name == "peft"
    assert reason in set(Unpackable)
    assert "cannot be packed" in caplog.text
    losses = [train_step(engine, [member], tokens, TRAINING, step)[0].loss for step in range(6)]
    expected = train_with_peft(tiny_model(name), trial, tokens, TRAINING, 6)
    assert losses == pytest.approx(expected.losses, rel=1e-5)
    for key, value in expected.weights.items():
        torch.testing.assert_close(member.weights[key].detach(), value, rtol=0, atol=1e-5)


LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 12,
    "short_factor": [1.0] * 4, "long_factor": [4.0, 8.0, 16.0, 32.0],
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
ROTATIONS = {"longrope": (LONGROPE, 128), "dynamic": (DYNAMIC, 12)}


def rotated_model(kind: str) -> PreTrainedModel:
    """Rotations that change for all positions of a forward when one of them is beyond 12."""
    rope, positions = ROTATIONS[kind]
    config = LlamaConfig(
        vocab_size=131, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        max_position_embeddings=positions, rope_parameters=rope,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)
    model.requires_grad_(False)
    return model


@pytest.mark.parametrize("kind", ROTATIONS)
@pytest.mark.parametrize("engine", ["packed", "peft"])
def test_rows_get_the_rotations_that_they_would_get_alone(engine: str, kind: str) -> None:
    tokens, trial, model = random_tokens(8, shortest=6, longest=20), make_trial(4, 1e-2), rotated_model(kind)
    assert tokens.lengths.min() <= 12 < tokens.lengths.max()
    training = TRAINING.model_copy(update={"engine": engine})
    member = make_train_state(model, trial, training, 6)
    chosen, reason, _ = choose_engine(model, [member], training)
    assert (chosen.name, reason) == (engine, None)
    losses = [train_step(chosen, [member], tokens, training, step)[0].loss for step in range(4)]
    singly = TRAINING.model_copy(update={"batch_size": 1, "gradient_accumulation_steps": 4, "engine": "peft"})
    other = rotated_model(kind)
    alone = make_train_state(other, trial, singly, 6)
    one_by_one = choose_engine(other, [alone], singly).engine
    expected = [train_step(one_by_one, [alone], tokens, singly, step)[0].loss for step in range(4)]
    assert losses == pytest.approx(expected, rel=2e-5)
    (together,) = chosen.evaluate(tokens, [trial.name])
    for number in range(len(tokens)):
        fresh = rotated_model(kind)  # of dynamic RoPE, a model that has seen no other row
        ids, is_label = tokens[number]
        batch = torch.from_numpy(ids)[None].long()
        with torch.no_grad():
            logits = with_weights_of(fresh, member)(input_ids=batch).logits[0, :-1]
        losses_of = torch.nn.functional.cross_entropy(logits, batch[0, 1:], reduction="none")
        assert together.loss[number] == pytest.approx(float(losses_of[is_label[1:]].mean()), rel=1e-4)


def with_weights_of(model: PreTrainedModel, member: TrainState) -> PreTrainedModel:
    """The model with the trained adapter of another."""
    assert isinstance(member.trial, Trial)
    add_adapter(model, member.trial)
    for name, weight in adapter_weights(model, member.trial.name).items():
        weight.data = member.weights[name].data
    return model


def leak(kind: str, size: float) -> Callable[[Any, Any, Tensor], Tensor]:
    """A hook by which a layer's tokens take something from others, whatever sequence those are of."""

    def hook(module: Any, args: Any, out: Tensor) -> Tensor:
        others = {
            "convolution": out.roll(1, dims=1),
            "state": out.cumsum(dim=1),
            "norm over time": out / out.square().mean(dim=(1, 2), keepdim=True).sqrt(),
            "norm of each feature": out / out.square().mean(dim=1, keepdim=True).sqrt(),
        }[kind]
        return out + size * others

    return hook


LEAKS = [
    pytest.param(kind, size, dtype, marks=[] if (size, dtype) == fast else pytest.mark.slow)
    for kind, fast in (
        ("convolution", (1e-5, torch.float32)),
        ("state", (1e-5, torch.bfloat16)),
        ("norm over time", (1e-2, torch.float32)),
        ("norm of each feature", (1e-5, torch.float32)),
    )
    for size in (1e-5, 1e-2)
    for dtype in (torch.float32, torch.bfloat16)
]


@pytest.mark.parametrize(("kind", "size", "dtype"), LEAKS, ids=str)
def test_leaks_of_any_kind_and_size_are_caught(kind: str, size: float, dtype: torch.dtype) -> None:
    model, trial = tiny_model("llama-gqa", dtype), make_trial(4, 1e-3)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    add_adapter(model, trial)
    make_packable(model, [trial.name])
    use_own_forward(model, "sdpa")
    model.model.layers[0].mlp.register_forward_hook(leak(kind, size))
    with pytest.raises(NotPackable) as caught:
        make_packable(model, [trial.name])
    assert caught.value.reason == Unpackable.LEAKS
    remove_adapters(model)
    after = model.state_dict()
    assert all(after[name].dtype == kept.dtype and torch.equal(after[name], kept) for name, kept in before.items())


def test_a_state_over_time_leaks_at_the_scale_of_initialisation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Zamba's logits are within a thousandth of the right ones there, and train to leak more."""
    import rankscope.train.probe as probe

    monkeypatch.setattr(probe, "divide_mixers", lambda model: None)  # which would call its states by sequence
    config = ZambaConfig(
        vocab_size=131, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, attention_hidden_size=64, attention_head_dim=16, mamba_d_state=4, n_mamba_heads=2,
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
    )  # fmt: skip
    torch.manual_seed(0)
    model, trial = ZambaForCausalLM(config).eval(), make_trial(4, 1e-3, modules=("q_proj",))
    add_adapter(model, trial)
    with pytest.raises(NotPackable) as caught:
        make_packable(model, [trial.name])
    assert caught.value.reason == Unpackable.LEAKS


def test_experts_may_round_by_which_tokens_they_get_but_not_leak() -> None:
    config = MixtralConfig(
        vocab_size=131, hidden_size=64, intermediate_size=48, num_hidden_layers=12, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model, trial = MixtralForCausalLM(config).eval(), make_trial(4, 1e-3, modules=("q_proj",))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4.0 if weight.dim() > 1 else 1.0)
    add_adapter(model, trial)
    check_causal(model)
    make_packable(model, [trial.name])
    use_own_forward(model, "sdpa")
    model.model.layers[0].self_attn.o_proj.register_forward_hook(leak("convolution", 1e-4))
    with pytest.raises(NotPackable, match="rows beside it"):
        make_packable(model, [trial.name])


def test_a_model_that_casts_to_its_output_layers_dtype_is_probed_in_float32() -> None:
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=131, hidden_size=32, num_hidden_layers=1, state_size=4)
    model = MambaForCausalLM(config).eval()
    use_mixed_precision(model)
    types = {name: weight.dtype for name, weight in model.named_parameters()}
    check_causal(model)
    assert {name: weight.dtype for name, weight in model.named_parameters()} == types
    assert set(types.values()) == {torch.float32, torch.bfloat16}


@pytest.mark.parametrize("engine", ["packed", "peft"])
def test_a_model_whose_logits_see_later_tokens_is_refused(engine: str) -> None:
    config = CpmAntConfig(
        vocab_size=131, hidden_size=32, num_attention_heads=4, dim_head=8, dim_ff=48, num_hidden_layers=2,
        prompt_length=4,
    )  # fmt: skip
    torch.manual_seed(0)
    model, training = CpmAntForCausalLM(config).eval(), TRAINING.model_copy(update={"engine": engine})
    member = make_train_state(model, make_trial(4, 1e-3, modules=("project_q",)), training, 6)
    with pytest.raises(ModelError, match="CpmAntForCausalLM is not a causal language model"):
        choose_engine(model, [member], training)


def roberta_decoder() -> PreTrainedModel:
    """Decoder with a linear layer behind its trunk, and positions that begin behind the padding id."""
    config = RobertaConfig(
        vocab_size=131, hidden_size=32, num_attention_heads=4, intermediate_size=48, num_hidden_layers=1,
        max_position_embeddings=40, is_decoder=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = RobertaForCausalLM(config).eval()
    model.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("make", "modules"),
    [(lambda: tiny_model("llama-gqa"), ("q_proj", "lm_head")), (roberta_decoder, "all-linear")],
    ids=["lm_head", "roberta"],
)
def test_adapters_behind_the_trunk_are_packed(make: Callable[[], PreTrainedModel], modules: Any) -> None:
    tokens, model = random_tokens(20), make()
    trials = [make_trial(4, 3e-3, modules=modules), make_trial(8, 1e-3, seed=1, modules=modules)]
    members = [make_train_state(model, trial, TRAINING, 6) for trial in trials]
    engine, reason, _ = choose_engine(model, members, TRAINING)
    assert (engine.name, reason) == ("packed", None)
    losses = [[m.loss for m in train_step(engine, members, tokens, TRAINING, step)] for step in range(6)]
    for column, member, trial in zip(zip(*losses, strict=True), members, trials, strict=True):
        expected = train_with_peft(make(), trial, tokens, TRAINING, 6)
        assert column == pytest.approx(expected.losses, rel=1e-5)
        for key, value in expected.weights.items():
            torch.testing.assert_close(member.weights[key].detach(), value, rtol=0, atol=1e-4)


def test_blocks_that_are_longer_than_the_probes_rows_are_not_packed() -> None:
    model, trial = tiny_model("llama-gqa"), make_trial(4, 1e-3)
    model.config.index_block_size = 128  # as MiniMax-M3 has it
    add_adapter(model, trial)
    with pytest.raises(NotPackable, match="blocks of tokens"):
        make_packable(model, [trial.name])


def test_dropout_behind_the_trunk_is_not_packed() -> None:
    model, trial = tiny_model("llama-gqa"), make_trial(4, 1e-3, dropout=0.1, modules=("q_proj", "lm_head"))
    add_adapter(model, trial)
    with pytest.raises(NotPackable, match=r"output layer.*dropout"):
        make_packable(model, [trial.name])


def test_a_model_that_ignores_the_layout_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain sdpa on OPT lets flattened sequences see each other without an error: the probe must see it."""
    import rankscope.train.probe as probe

    monkeypatch.setattr(probe, "ATTENTIONS", ("sdpa",))
    model, trial = tiny_model("opt-post-norm"), make_trial(4, 1e-3)
    add_adapter(model, trial)
    with pytest.raises(NotPackable, match="rows beside it"):
        make_packable(model, [trial.name])


def test_a_failed_probe_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    import rankscope.train.probe as probe

    ids = torch.arange(3, 20)[None]
    model, trial = tiny_model("opt-post-norm"), make_trial(4, 1e-3)
    add_adapter(model, trial)
    before = model(input_ids=ids).logits
    monkeypatch.setattr(probe, "ATTENTIONS", ("sdpa",))
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
        cost = count_cost(model, trial.name, engine.forward, tokens).cost
        counts.append(cost.bytes_per_token)
    layers, modules = 2, 7
    assert counts[1] - counts[0] == pytest.approx(
        60 * 4 * layers * modules, rel=0.05
    )  # h = A x of each module, float32


@pytest.mark.parametrize("name", mostly_slow(["llama-gqa", "gpt2", "mixtral", "lfm2"], "llama-gqa", "mixtral"))
def test_in_bfloat16_packed_is_solo_and_close_to_peft(name: str) -> None:
    """A pack's products round as those of a trial alone; PEFT's round A x and the update too."""
    tokens, trials, losses = random_tokens(12), [make_trial(8, 3e-3, seed=0), make_trial(3, 1e-3, seed=1)], {}
    for kind, own in (("packed", trials), ("solo", trials[1:]), ("peft", trials), ("float32", trials)):
        model = tiny_model(name, torch.float32 if kind == "float32" else torch.bfloat16)
        members = [make_train_state(model, trial, TRAINING, 6) for trial in own]
        training = TRAINING.model_copy(update={"engine": "peft" if kind == "peft" else "packed"})
        engine = choose_engine(model, members, training).engine
        assert engine.name == training.engine
        assert all(weight.dtype == torch.float32 for member in members for weight in member.weights.values())
        steps = [train_step(engine, members, tokens, training, step) for step in range(6)]
        losses[kind] = np.array([[one.loss for one in step] for step in steps])
    np.testing.assert_allclose(losses["solo"][:, 0], losses["packed"][:, 1], rtol=1e-6)
    np.testing.assert_allclose(losses["peft"], losses["packed"], rtol=1e-3)
    np.testing.assert_allclose(losses["float32"], losses["packed"], rtol=1e-3)
    assert not np.allclose(losses["float32"], losses["packed"], rtol=1e-6), "no product was in bfloat16"


def test_memory_budget_divides_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    import rankscope.train.loop as loop

    monkeypatch.setattr(loop, "free_bytes", lambda device: 1_000_000)
    model, trial = tiny_model("opt-post-norm"), make_trial(4, 1e-3)
    member = make_train_state(model, trial, TRAINING, 6)
    engine = choose_engine(model, [member], TRAINING).engine
    assert isinstance(engine, PackedEngine)
    assert 50 < engine.tokens_per_forward < 500
