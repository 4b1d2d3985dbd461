"""rsLoRA, PiSSA, OLoRA, LoRA+ and rank patterns in packs, and DoRA by PEFT's forward, are what PEFT makes of them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file

from marks import mostly_slow
from models import tiny_model
from rankscope.errors import StudyError
from rankscope.lora.adapters import lora_config, remove_adapters, save_adapter
from rankscope.lora.variants import as_plain_lora
from rankscope.spec.candidates import Candidate, Trial
from rankscope.spec.models import TrainingSpec
from rankscope.spec.resolve import resolve_spec
from rankscope.train.engine import PackedEngine, PeftEngine
from rankscope.train.probe import make_packable, probe_tokens
from rankscope.train.step import make_train_state, train_step
from reference import make_trial, padded_batch, plain_step, random_tokens

STEPS = 12
TRAINING = TrainingSpec(
    steps=STEPS, batch_size=4, lr_scheduler_type="linear", warmup_ratio=0.0, weight_decay=0.01, max_grad_norm=1.0
)
PATTERN = {
    "llama-gqa": {"model.layers.0.self_attn.q_proj": 6, "model.layers.1.mlp.down_proj": 2},
    "gpt2": {"transformer.h.0.attn.c_attn": 6, "transformer.h.1.mlp.c_proj": 2},
}
PACKED = ["rslora", "pissa", "olora", "loraplus", "pattern"]


def variant_trial(name: str, variant: str, rank: int = 4) -> Trial:
    trial = make_trial(rank, 2e-3, seed=1)
    own: dict[str, Any] = {
        "rslora": {"use_rslora": True},
        "loraplus": {"loraplus_lr_ratio": 8.0},
        "pattern": {"rank_pattern": tuple(PATTERN[name].items())},
    }
    candidate = trial.candidate.model_copy(update={"variant": variant, **own.get(variant, {})})
    return Trial(candidate=candidate, seed=trial.seed)


def peft_model_of(name: str, candidate: Candidate, dtype: torch.dtype) -> PeftModel:
    """PEFT's own, whose base PiSSA and OLoRA change."""
    kind, base = candidate.variant, tiny_model(name, dtype)
    pattern = dict(candidate.rank_pattern)
    config = LoraConfig(
        r=candidate.rank,
        lora_alpha=16,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        use_rslora=kind == "rslora",
        use_dora=kind == "dora",
        init_lora_weights=kind if kind in ("pissa", "olora") else True,
        rank_pattern=pattern,
        alpha_pattern={layer: 16 * rank / candidate.rank for layer, rank in pattern.items()},
    )
    torch.manual_seed(1)
    model = get_peft_model(base, config)
    assert isinstance(model, PeftModel)
    return model.eval()


def loaded_with_peft(name: str, dtype: torch.dtype, folder: Path) -> PeftModel:
    """An adapter's folder as PEFT reads it."""
    model = get_peft_model(tiny_model(name, dtype), LoraConfig.from_pretrained(str(folder)))
    assert isinstance(model, PeftModel)
    found = set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
    assert not found.unexpected_keys
    return model.eval()


def train_with_peft(model: PeftModel, trial: Trial) -> list[float]:
    rate = trial.candidate.learning_rate
    named = {"lr": rate, "weight_decay": 0.01, "betas": (0.9, 0.999), "eps": 1e-8}
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer: torch.optim.Optimizer
    if trial.candidate.variant == "loraplus":
        optimizer = create_loraplus_optimizer(
            model, torch.optim.AdamW, loraplus_lr_ratio=8.0, loraplus_weight_decay=0.01, **named
        )
    else:
        groups = [{"params": [p]} | ({} if p.dim() > 1 else {"weight_decay": 0.0}) for p in parameters]
        optimizer = torch.optim.AdamW(groups, **named)
    rates, losses = [group["lr"] for group in optimizer.param_groups], []
    for step in range(STEPS):
        for group, first in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = first * (STEPS - step) / STEPS
        batch = padded_batch(random_tokens(30), trial.seed, step, TRAINING.batch_size)
        losses.append(plain_step(model, batch, parameters, optimizer, TRAINING.max_grad_norm))
    return losses


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("llama-gqa", torch.float32),
        pytest.param("llama-gqa", torch.float64, marks=pytest.mark.slow),
        pytest.param("gpt2", torch.float32, marks=pytest.mark.slow),
        ("gpt2", torch.float64),
    ],
    ids=str,
)
def test_variants_in_one_pack_equal_peft(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    variants = [v for v in PACKED if not (v in ("pissa", "olora") and dtype == torch.float64)]  # PEFT's are float32
    if name == "gpt2":  # PEFT's OLoRA does not know that Conv1D is transposed
        variants.remove("olora") if "olora" in variants else None
    trials = [make_trial(4, 2e-3, seed=1), *(variant_trial(name, variant) for variant in variants)]
    model, tokens = tiny_model(name, dtype), random_tokens(30)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    members = [make_train_state(model, trial, TRAINING, STEPS) for trial in trials]
    make_packable(model, [trial.name for trial in trials])
    engine = PackedEngine(model, 1 << 30)
    losses = [[m.loss for m in train_step(engine, members, tokens, TRAINING, step)] for step in range(STEPS)]
    for trial, member, got in zip(trials, members, zip(*losses, strict=True), strict=True):
        expected_model = peft_model_of(name, trial.candidate, dtype)
        expected = train_with_peft(expected_model, trial)
        assert abs(expected[0] - expected[-1]) > 1e-3
        tolerance = 2e-5 if dtype == torch.float32 else 1e-7  # losses are float32 sums
        np.testing.assert_allclose(got, expected, rtol=tolerance, err_msg=trial.name)
        # What is saved, over the base as it came, is the model that PEFT trained.
        tensors, config = as_plain_lora(member.weights, member.initial, member.config)
        save_adapter(tensors, config, tmp_path / trial.name)
        saved = loaded_with_peft(name, dtype, tmp_path / trial.name)
        batch = padded_batch(tokens, 0, 0, 4)
        with torch.no_grad():
            a, b = (m(input_ids=batch.ids, attention_mask=batch.mask).logits for m in (saved, expected_model))
        torch.testing.assert_close(a, b, rtol=0, atol=2e-4 if dtype == torch.float32 else 1e-8)
    remove_adapters(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), "the base is as it came"


@pytest.mark.parametrize("variant", mostly_slow(["dora", "pissa", "olora", "rslora"], "dora", "pissa"))
def test_by_pefts_forward_too(variant: str) -> None:
    trial, model, tokens = variant_trial("llama-gqa", variant), tiny_model("llama-gqa"), random_tokens(30)
    member = make_train_state(model, trial, TRAINING, STEPS)
    engine = PeftEngine(model, TRAINING.batch_size)
    losses = [train_step(engine, [member], tokens, TRAINING, step)[0].loss for step in range(STEPS)]
    expected = peft_model_of("llama-gqa", trial.candidate, torch.float32)
    np.testing.assert_allclose(losses, train_with_peft(expected, trial), rtol=2e-5)
    if variant == "dora":
        assert any("magnitude" in key for key in member.weights)


def test_doras_magnitudes_are_saved(tmp_path: Path) -> None:
    trial, model = variant_trial("llama-gqa", "dora"), tiny_model("llama-gqa")
    member, tokens = make_train_state(model, trial, TRAINING, STEPS), random_tokens(30)
    engine = PeftEngine(model, TRAINING.batch_size)
    for step in range(STEPS):
        train_step(engine, [member], tokens, TRAINING, step)
    assert member.config is not None
    save_adapter(member.weights, member.config, tmp_path / "adapter")
    assert load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys() == member.weights.keys()
    saved = loaded_with_peft("llama-gqa", torch.float32, tmp_path / "adapter")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(saved(ids).logits, model(ids).logits, rtol=0, atol=1e-6)


def test_a_start_is_gone_from_the_first_forward() -> None:
    """PiSSA and OLoRA begin at the base model's own outputs."""
    model = tiny_model("llama-gqa")
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        plain = model(ids).logits
        make_train_state(model, variant_trial("llama-gqa", "pissa"), TRAINING, STEPS)
        torch.testing.assert_close(model(ids).logits, plain, rtol=0, atol=1e-5)
    engine = PackedEngine(model, 1 << 30)
    make_packable(model, ["r004-lr2e-3-pissa-s1"])
    assert engine.evaluate(probe_tokens(model), ["r004-lr2e-3-pissa-s1"])[0].mean > 0


def test_olora_is_refused_where_peft_has_none() -> None:
    with pytest.raises(StudyError, match="olora cannot initialise transformer"):
        make_train_state(tiny_model("gpt2"), variant_trial("gpt2", "olora"), TRAINING, STEPS)


def spec_with(**fields: Any) -> dict[str, Any]:
    return {"model": {"id": "m"}, "data": {"id": "d"}, "ranks": [4], **fields}


def test_variants_are_candidates_beside_plain_ones() -> None:
    spec = resolve_spec(spec_with(ranks=[4, 8], variants=["pissa", "dora"], learning_rates=[1e-3, 2e-3]))
    names = [candidate.name for candidate in spec.candidates()]
    assert names[:4] == ["r004-lr1e-3", "r004-lr2e-3", "r008-lr1e-3", "r008-lr2e-3"]
    assert names[4:6] == ["r004-lr1e-3-pissa", "r004-lr2e-3-pissa"]
    assert len(names) == len(set(names)) == 12
    assert list(spec.profiled()) == ["r004", "r008", "r004-pissa", "r008-pissa", "r004-dora", "r008-dora", "control"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"variants": ["pisa"]}, "pisa"),
        ({"variants": ["pissa", "pissa"]}, "listed twice"),
        ({"variants": ["rslora"], "adapter": {"use_rslora": True}}, "use_rslora makes of all"),
        ({"variants": ["pattern"]}, "need each other"),
        ({"adapter": {"rank_pattern": {"q": 2}}}, "need each other"),
        ({"ranks": [2, 4], "variants": ["pattern"], "adapter": {"rank_pattern": {"q": 2}}}, "against one rank"),
    ],
)
def test_variants_that_make_no_sense(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(StudyError, match=message):
        resolve_spec(spec_with(**fields))


def test_scaling_does_not_change_with_a_layers_rank() -> None:
    trial = variant_trial("llama-gqa", "pattern")
    config = lora_config(trial.candidate, tiny_model("llama-gqa"))
    assert config.alpha_pattern is not None
    for layer, rank in PATTERN["llama-gqa"].items():
        assert config.alpha_pattern[layer] / rank == trial.candidate.scaling
