"""Bases in nf4 and int8: training over them equals PEFT's over bitsandbytes' own layers, and their size is known."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from marks import mostly_slow
from models import tiny_model
from rankscope.data.tokens import Tokens
from rankscope.errors import MissingExtraError, ModelError, StudyError
from rankscope.lora.adapters import remove_adapters
from rankscope.lora.saved import read_adapter
from rankscope.model.load import fingerprint, load_model, skeleton
from rankscope.model.quantized import base_bytes, parameter_count, quantized_layers
from rankscope.plan.costs import predict
from rankscope.plan.memory import PeakMemory, StudyMemory
from rankscope.resize.loss_budget import held_out_losses
from rankscope.spec.candidates import Trial
from rankscope.spec.models import ModelSpec, TrainingSpec
from rankscope.spec.options import assemble
from rankscope.train.engine import Engine, PackedEngine, PeftEngine
from rankscope.train.probe import make_packable, use_own_forward
from rankscope.train.step import TrainState, make_train_state, save_trained_adapter, train_step
from reference import Trained, make_trial, random_tokens, train_with_peft

STEPS = 12
KINDS = ("nf4", "int8")
TRAINING = TrainingSpec(steps=STEPS, batch_size=4, lr_scheduler_type="linear", warmup_ratio=0.0, weight_decay=0.01)
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MODULES: dict[str, Any] = {"mixtral": ATTENTION}
PACKED = ("opt-post-norm", "gpt2", "llama-gqa", "gemma2", "phi", "mixtral")
"""gpt2 has Conv1D, which transformers turns; mixtral experts, which it leaves as they are."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name in (*PACKED, "bloom", "falcon"):
        found[name] = tmp_path_factory.mktemp(name)
        tiny_model(name).save_pretrained(found[name])
    return found


def spec_of(folder: Path, kind: str | None, dtype: Any = "float32") -> ModelSpec:
    return ModelSpec(id=str(folder), device="cpu", quantization=kind, dtype=dtype)  # type: ignore[arg-type]


def bitsandbytes_own(folder: Path, kind: str) -> PreTrainedModel:
    """Loaded without rankscope, with bitsandbytes' own forwards."""
    nf4: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    config = BitsAndBytesConfig(**nf4) if kind == "nf4" else BitsAndBytesConfig(load_in_8bit=True)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    for layer in model.modules():
        if isinstance(layer, Linear4bit):  # its kernel for AVX512-BF16 rounds to bfloat16 and needs whole blocks
            layer.support_avx512bf16_for_cpu = False
        if isinstance(layer, Linear8bitLt):  # in training on a CPU it multiplies dequantized weights, as rankscope does
            layer.train = lambda mode=True, layer=layer: nn.Module.train(layer)  # type: ignore[method-assign]
    return model.requires_grad_(False).eval()  # type: ignore[no-any-return]


def dequantized(folder: Path, model: PreTrainedModel) -> PreTrainedModel:
    """The model with plain layers that hold what those of `model` stand for."""
    plain: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, layer in model.named_modules():
        if isinstance(layer, Linear4bit):  # its kernel for AVX512-BF16 rounds to bfloat16 and needs whole blocks
            layer.support_avx512bf16_for_cpu = False
        if isinstance(layer, Linear8bitLt):
            weight: Any = layer.weight
            plain.get_submodule(name).weight.data = weight.CB.float() * weight.SCB[:, None] / 127
    return plain.requires_grad_(False).eval()  # type: ignore[no-any-return]


def trained(engine: Engine, members: Sequence[TrainState], tokens: Tokens, training: TrainingSpec) -> list[Trained]:
    losses = [[m.loss for m in train_step(engine, members, tokens, training, step)] for step in range(STEPS)]
    return [
        Trained(list(column), {name: weight.detach() for name, weight in member.weights.items()})
        for column, member in zip(zip(*losses, strict=True), members, strict=True)
    ]


def train_packed(model: PreTrainedModel, trials: Sequence[Trial], training: TrainingSpec, most: int = 1 << 30) -> Any:
    members = [make_train_state(model, trial, training, STEPS) for trial in trials]
    make_packable(model, [trial.name for trial in trials])
    return members, trained(PackedEngine(model, most), members, random_tokens(30), training)


def assert_same(got: Trained, expected: Trained) -> None:
    learnt = [float(value.abs().max()) for key, value in expected.weights.items() if "lora_B" in key]
    assert min(learnt) > 1e-3, "the reference did not learn: nothing is shown"
    np.testing.assert_allclose(got.losses, expected.losses, rtol=1e-5)
    assert got.weights.keys() == expected.weights.keys()
    for key, value in expected.weights.items():
        torch.testing.assert_close(got.weights[key], value, rtol=0, atol=3e-4, msg=lambda m, key=key: f"{key}: {m}")


PAIRS = [
    pytest.param(name, kind, marks=[] if (name, kind) in {("gpt2", "nf4"), ("llama-gqa", "int8")} else pytest.mark.slow)
    for name in PACKED
    for kind in KINDS
]


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_a_pack_equals_peft_over_bitsandbytes(name: str, kind: str, folders: dict[str, Path]) -> None:
    modules = MODULES.get(name, "all-linear")
    trials = [make_trial(8, 3e-3, 0, modules=modules), make_trial(3, 1e-3, 1, modules=modules)]
    model = load_model(spec_of(folders[name], kind))
    before, attention = fingerprint(model), model.config._attn_implementation
    _, packed = train_packed(model, trials, TRAINING)
    for trial, got in zip(trials, packed, strict=True):
        expected = train_with_peft(bitsandbytes_own(folders[name], kind), trial, random_tokens(30), TRAINING, STEPS)
        assert_same(got, expected)
    use_own_forward(model, attention)
    remove_adapters(model)
    assert fingerprint(model) == before
    plain = train_with_peft(tiny_model(name), trials[0], random_tokens(30), TRAINING, STEPS)
    assert abs(plain.losses[0] - packed[0].losses[0]) > 1e-5, "the base was not quantized"


@pytest.mark.parametrize("kind", mostly_slow(KINDS, "nf4"))
def test_dropout_and_recomputing_too(kind: str, folders: dict[str, Path]) -> None:
    training = TRAINING.model_copy(update={"batch_size": 1})
    trial = make_trial(8, 3e-3, dropout=0.2)
    own = train_with_peft(bitsandbytes_own(folders["opt-post-norm"], kind), trial, random_tokens(30), training, STEPS)
    for most in (1 << 30, 1):
        _, (got,) = train_packed(load_model(spec_of(folders["opt-post-norm"], kind)), [trial], training, most)
        assert_same(got, own)


@pytest.mark.parametrize("kind", mostly_slow(KINDS, "nf4"))
@pytest.mark.parametrize(
    ("name", "variant"),
    [("bloom", "lora"), pytest.param("llama-gqa", "lora", marks=pytest.mark.slow), ("llama-gqa", "dora")],
)
def test_by_pefts_forward_too(name: str, variant: str, kind: str, folders: dict[str, Path]) -> None:
    training, plain = TRAINING.model_copy(update={"weight_decay": 0.0}), make_trial(4, 2e-3)
    trial = Trial(candidate=plain.candidate.model_copy(update={"variant": variant}), seed=0)
    model = load_model(spec_of(folders[name], kind))
    member = make_train_state(model, trial, training, STEPS)
    (got,) = trained(PeftEngine(model, training.batch_size), [member], random_tokens(30), training)
    own = bitsandbytes_own(folders[name], kind)
    if (variant, kind) == ("dora", "int8"):  # bitsandbytes' own forward fails after PEFT has moved the weight
        own = dequantized(folders[name], own)
    expected = train_with_peft(own, trial, random_tokens(30), training, STEPS)
    weights = {key.removesuffix(".weight") if "magnitude" in key else key: w for key, w in expected.weights.items()}
    assert_same(got, expected._replace(weights=weights))


@pytest.mark.parametrize("kind", mostly_slow(KINDS, "nf4"))
def test_adapters_load_in_peft(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    model = load_model(spec_of(folders["llama-gqa"], kind))
    (member,), _ = train_packed(model, [make_trial(4, 1e-2)], TRAINING)
    save_trained_adapter(member, tmp_path)
    use_own_forward(model, "sdpa")
    own: Any = PeftModel.from_pretrained(bitsandbytes_own(folders["llama-gqa"], kind), str(tmp_path)).eval()
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        expected = own(ids).logits
        torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-4)
    remove_adapters(model)
    with torch.no_grad():
        assert (model(ids).logits - expected).abs().max() > 1e-2, "the adapter does nothing: nothing is shown"
    losses = held_out_losses(model, read_adapter(tmp_path), random_tokens(8))
    found = []
    for row, is_label in random_tokens(8):
        batch = torch.from_numpy(row.astype(np.int64))
        with torch.no_grad():
            logits = own(batch[None]).logits[0, :-1]
        wanted = torch.from_numpy(is_label[1:])
        found.append(float(nn.functional.cross_entropy(logits[wanted], batch[1:][wanted])))
    np.testing.assert_allclose(losses.loss, found, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", mostly_slow([*PACKED, "bloom"], "gpt2", "mixtral"))
def test_the_bytes_of_a_base_are_known_before_it_is_loaded(
    name: str, kind: str, dtype: str, folders: dict[str, Path]
) -> None:
    spec = spec_of(folders[name], kind, dtype)
    model, planned = load_model(spec), skeleton(spec, getattr(torch, dtype))
    assert [name for name, _ in quantized_layers(planned)] == [name for name, _ in quantized_layers(model)]
    assert all(parameter.is_meta for parameter in planned.parameters())
    held = {id(value): value.nbytes for value in tensors_of(model)}
    assert base_bytes(planned) == base_bytes(model) == sum(held.values())
    assert parameter_count(planned) == parameter_count(model) == sum(p.numel() for p in tiny_model(name).parameters())


def tensors_of(model: PreTrainedModel) -> list[torch.Tensor]:
    """Bytes of all weights and of bitsandbytes' quantization state, without the offset of the scales."""
    found = list(model.parameters())
    for _, layer in quantized_layers(model):
        state = layer.state_dict(keep_vars=True)
        found += [v for key, v in state.items() if key == "SCB" or ("weight." in key and "bitsandbytes" not in key)]
        if layer.weight.dtype == torch.uint8:
            found.append(layer.quant_state.offset)
    return found


def study(folder: Path, kind: str | None, **values: Any) -> Any:
    model = {"id": str(folder), "device": "cpu", "quantization": kind}
    values = {"ranks": [4], "seeds": [0], "training": {"steps": 6, "batch_size": 4}} | values
    return assemble({"model": model, "data": {"id": "unused"}} | values, {})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_memory_is_predicted_over_a_quantized_base(kind: str, tmp_path: Path) -> None:
    """On few tokens one dequantized layer is larger than their activations."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=131, pad_token_id=1)).save_pretrained(tmp_path)
    spec, plain = (study(tmp_path, k, variants=["dora"]) for k in (kind, None))
    peaks = []
    for one in (spec, plain):
        prediction = predict(one)
        assert prediction.reason is None
        for trial in one.trials():
            found = StudyMemory(one, prediction, random_tokens(8, longest=6), 10**12).peak([trial])
            assert isinstance(found, PeakMemory), found
            peaks.append(found.parts)
    quantized_lora, quantized_dora, lora, dora = peaks
    assert quantized_lora.base == quantized_dora.base == base_bytes(load_model(spec.model))
    assert lora.base == dora.base > 2.5 * quantized_lora.base
    assert quantized_lora.activations >= lora.activations + 3 * 256 * 512, "the dequantized weight is left out"
    assert quantized_lora.adapter == lora.adapter
    assert quantized_dora.activations > 0


def test_what_cannot_be_quantized_is_refused(folders: dict[str, Path]) -> None:
    """Falcon's linear layers are of a class of their own."""
    with pytest.raises(ModelError, match="no layer of a FalconForCausalLM can be quantized"):
        predict(study(folders["falcon"], "nf4"))
    with pytest.raises(ModelError, match="no layer of a FalconForCausalLM can be quantized"):
        load_model(spec_of(folders["falcon"], "nf4"))


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"ranks": [4, "full"]}, "reference.full: the weights of a model in nf4"),
        ({"variants": ["pissa"]}, "variants: pissa begins from the base's weights"),
        ({"variants": ["dora", "olora"]}, "variants: olora begins from the base's weights"),
    ],
)
def test_what_trains_or_takes_apart_the_base_is_refused(values: dict[str, Any], match: str) -> None:
    with pytest.raises(StudyError, match=match):
        study(Path("m"), "nf4", **values)
    study(Path("m"), None, **values)


def test_bitsandbytes_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankscope.errors.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install .*\[quantization\]'"):
        predict(study(Path("embedded"), "nf4"))
    with pytest.raises(MissingExtraError, match=r"pip install .*\[quantization\]'"):
        load_model(spec_of(Path("embedded"), "int8"))


def test_checkpoints_are_told_apart(folders: dict[str, Path], tmp_path: Path) -> None:
    """Fingerprints differ by one weight of a quantized layer, and by the kind of quantization."""
    model = tiny_model("llama-gqa")
    model.get_submodule("model.layers.1.mlp.up_proj").weight.data[0, 0] += 5.0
    model.save_pretrained(tmp_path)
    found = [fingerprint(load_model(spec_of(f, k))) for f in (folders["llama-gqa"], tmp_path) for k in (None, *KINDS)]
    assert len(set(found)) == 6
    assert fingerprint(load_model(spec_of(tmp_path, "nf4"))) == found[4]


@pytest.mark.parametrize("kind", mostly_slow(KINDS, "int8"))
def test_over_a_bfloat16_base_both_engines_agree(kind: str, folders: dict[str, Path]) -> None:
    """Adapters are float32 and products bfloat16, as on a GPU."""
    trial = make_trial(8, 3e-3)
    _, (packed,) = train_packed(load_model(spec_of(folders["llama-gqa"], kind, "bfloat16")), [trial], TRAINING)
    model = load_model(spec_of(folders["llama-gqa"], kind, "bfloat16"))
    member = make_train_state(model, trial, TRAINING, STEPS)
    (found,) = trained(PeftEngine(model, TRAINING.batch_size), [member], random_tokens(30), TRAINING)
    assert {weight.dtype for weight in found.weights.values()} == {torch.float32}
    np.testing.assert_allclose(packed.losses, found.losses, rtol=2e-3)
    for key in (key for key in found.weights if "lora_B" in key):
        got, expected = packed.weights[key], found.weights[key]
        assert float((got - expected).norm() / expected.norm()) < 0.2, key
