"""Bases that are not plain safetensors weights: quantized checkpoints, GGUF files, leftovers, and Apple's GPUs."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GptOssConfig

from gguf_files import write_gguf
from models import tiny_model
from rankscope.errors import MissingExtraError, ModelError, StudyError
from rankscope.model import checks, device
from rankscope.model.load import load_config, load_model, load_tokenizer, resolve_dtype, skeleton
from rankscope.model.quantized import base_bytes, quantized_layers
from rankscope.plan import memory, packs
from rankscope.plan.costs import predict
from rankscope.spec.models import ModelSpec, StudySpec, TrainingSpec
from rankscope.train import engine as engines
from rankscope.train import loss
from rankscope.train.loop import choose_engine
from rankscope.train.step import make_train_state, train_step
from reference import VOCAB, make_trial, random_tokens

TRAINING = TrainingSpec(steps=2, batch_size=2)


def spec_of(folder: Path, **values: Any) -> ModelSpec:
    return ModelSpec.model_validate({"id": str(folder), "device": "cpu", "dtype": "float32"} | values)


def study_of(model: ModelSpec, **values: Any) -> StudySpec:
    question = {"model": model, "data": {"id": "unused"}, "ranks": [2], "seeds": [0], "training": TRAINING}
    return StudySpec.model_validate(question | values)


def change_config(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def train_one(model: Any) -> str:
    """Take a step; return the engine's name."""
    member = make_train_state(model, make_trial(2, 1e-2, modules=("q_proj", "v_proj")), TRAINING, 2)
    engine = choose_engine(model, [member], TRAINING).engine
    assert train_step(engine, [member], random_tokens(6), TRAINING, 0)[0].finite
    return engine.name


@pytest.mark.parametrize(
    "own",
    [
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        pytest.param(
            {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False},
            marks=pytest.mark.slow,
        ),
        {"load_in_8bit": True},
    ],
    ids=["nf4", "fp4", "int8"],
)
def test_a_checkpoint_of_bitsandbytes_is_the_base_that_it_is(own: dict[str, Any], tmp_path: Path) -> None:
    tiny_model("llama-gqa").save_pretrained(tmp_path / "whole")
    config = BitsAndBytesConfig(**own)
    saved: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path / "whole", quantization_config=config, dtype=torch.float32
    )
    saved.save_pretrained(tmp_path / "model")
    spec = spec_of(tmp_path / "model")
    model = load_model(spec)
    ids = torch.arange(3, 15)[None]
    for layer in saved.modules():
        layer.support_avx512bf16_for_cpu = False  # whose kernel needs whole blocks
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, saved(ids).logits, rtol=1e-2, atol=1e-2)
    assert base_bytes(skeleton(spec)) == base_bytes(model)
    assert len(list(quantized_layers(model))) == 14
    assert predict(study_of(spec)).base_bytes == base_bytes(model)
    assert train_one(model) == "packed"
    with pytest.raises(ModelError, match=r"quantized already \(bitsandbytes\), and model.quantization is nf4"):
        load_config(spec_of(tmp_path / "model", quantization="nf4"))
    with pytest.raises(ModelError, match="used as they are"):
        load_config(spec_of(tmp_path / "model", dequantize=True))
    with pytest.raises(StudyError, match="the weights of a model in a quantized checkpoint cannot be trained"):
        predict(study_of(spec, reference={"full": True}))
    with pytest.raises(StudyError, match="pissa begins from the base's weights"):
        predict(study_of(spec, variants=["pissa"]))


def in_fp8(folder: Path, block: int = 16) -> dict[str, Tensor]:
    """Store the linear weights of a model's folder as FP8 in blocks with scales; returns what they stand for."""
    file, meant = folder / "model.safetensors", {}
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight = tensors.pop(name)
        blocks = weight.view(weight.shape[0] // block, block, weight.shape[1] // block, block)
        scales = blocks.abs().amax(dim=(1, 3)) / 448
        stored = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
        meant[name] = (stored.float() * scales[:, None, :, None]).view_as(weight)
        tensors |= {name: stored.view(weight.shape), f"{name}_scale_inv": scales}
    save_file(tensors, file, metadata={"format": "pt"})
    own = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [block, block]}
    change_config(folder, quantization_config=own)
    return meant


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def in_mxfp4(folder: Path) -> dict[str, Tensor]:
    """Store the experts of a gpt-oss folder as MXFP4: random digits in blocks of 32 with an exponent each."""
    file, meant = folder / "model.safetensors", {}
    tensors, generator = load_file(file), torch.Generator().manual_seed(0)
    for name in [name for name in tensors if re.search(r"experts\.(gate_up|down)_proj$", name)]:
        experts, inputs, outputs = tensors.pop(name).shape
        digits = torch.randint(0, 16, (experts, outputs, inputs // 32, 32), generator=generator)
        exponents = torch.randint(121, 124, (experts, outputs, inputs // 32), generator=generator)
        values = torch.cat([E2M1, -E2M1])[digits] * (exponents.float() - 127).exp2()[..., None]
        meant[name] = values.flatten(2).mT
        packed = digits[..., ::2] | (digits[..., 1::2] << 4)
        tensors |= {f"{name}_blocks": packed.to(torch.uint8), f"{name}_scales": exponents.to(torch.uint8)}
    save_file(tensors, file, metadata={"format": "pt"})
    change_config(folder, quantization_config={"quant_method": "mxfp4"})
    return meant


def gpt_oss() -> Any:
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=1, max_position_embeddings=64,
        layer_types=["sliding_attention", "full_attention"], sliding_window=5, bos_token_id=2, eos_token_id=2,
        pad_token_id=1,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    ("make", "quantize", "method"),
    [(lambda: tiny_model("llama-gqa"), in_fp8, "fp8"), (gpt_oss, in_mxfp4, "mxfp4")],
    ids=["fp8", "mxfp4"],
)
def test_fp8_and_mxfp4_are_dequantized_on_request(
    make: Callable[[], Any], quantize: Callable[[Path], dict[str, Tensor]], method: str, tmp_path: Path
) -> None:
    make().save_pretrained(tmp_path)
    meant = quantize(tmp_path)
    with pytest.raises(ModelError, match=rf"quantized already \({method}\)[\s\S]*--dequantize"):
        load_config(spec_of(tmp_path))
    for kind, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        spec = spec_of(tmp_path, dequantize=True, dtype=kind)
        model = load_model(spec)
        assert {weight.dtype for weight in model.parameters()} == {dtype, torch.float32}, "norms stay in float32"
        for name, weight in meant.items():
            torch.testing.assert_close(model.get_parameter(name).float(), weight.float(), rtol=1e-2, atol=1e-4)
        assert base_bytes(skeleton(spec, dtype)) == base_bytes(model)
        assert model.left_over == []
    assert train_one(load_model(spec_of(tmp_path, dequantize=True))) in ("packed", "peft")


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_others_are_refused_with_the_way_out(method: str, tmp_path: Path) -> None:
    tiny_model("llama-gqa").save_pretrained(tmp_path)
    change_config(tmp_path, quantization_config={"quant_method": method, "bits": 4})
    for options in ({}, {"dequantize": True}):
        with pytest.raises(ModelError, match=rf"\({method}\), in a form that[\s\S]*base_model.*--quantization nf4"):
            load_config(spec_of(tmp_path, **options))


def test_dequantize_without_anything_to_dequantize(tmp_path: Path) -> None:
    tiny_model("llama-gqa").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="its weights are not quantized"):
        load_config(spec_of(tmp_path, dequantize=True))
    with pytest.raises(ValueError, match="give dequantize or quantization: nf4, not both"):
        spec_of(tmp_path, dequantize=True, quantization="nf4")


def test_weights_that_are_left_over_are_named(tmp_path: Path) -> None:
    """Layers beyond those that config.json has: a study of the first ones says so."""
    tiny_model("llama-gqa").save_pretrained(tmp_path)
    assert load_model(spec_of(tmp_path)).left_over == []
    change_config(tmp_path, num_hidden_layers=1)
    left = load_model(spec_of(tmp_path)).left_over
    assert left
    assert all(name.startswith("model.layers.1.") for name in left)


def test_sentencepiece_is_named_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers asks for tiktoken, and for protobuf."""
    tiny_model("llama-gqa").save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x05\n\x01a")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    monkeypatch.setattr(checks, "find_spec", lambda name: None if name == "sentencepiece" else name)
    with pytest.raises(ModelError, match=r"takes the package sentencepiece.*pip install sentencepiece"):
        load_tokenizer(spec_of(tmp_path))


def test_a_gguf_file_is_a_base(tmp_path: Path) -> None:
    expected = write_gguf(tmp_path / "tiny.gguf").eval()
    spec = spec_of(tmp_path / "tiny.gguf")
    model, ids = load_model(spec), torch.arange(3, 15)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected(ids).logits, rtol=1e-4, atol=1e-4)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert load_tokenizer(spec)("ab", add_special_tokens=False)["input_ids"]
    assert base_bytes(skeleton(spec)) == base_bytes(model)
    assert train_one(model) == "packed"
    with pytest.raises(ModelError, match=r"model.quantization is not for a GGUF file"):
        load_config(spec_of(tmp_path / "tiny.gguf", quantization="nf4"))


def test_gguf_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr("rankscope.errors.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install .*\[gguf\]'"):
        load_config(spec_of(tmp_path / "a.gguf"))


def test_a_folder_with_a_gguf_file_alone_points_to_the_file(tmp_path: Path) -> None:
    tiny_model("llama-gqa").config.save_pretrained(tmp_path)
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=rf"--model {re.escape(str(tmp_path / 'a.gguf'))}"):
        load_model(spec_of(tmp_path))


def test_what_can_be_seen_of_apple_s_gpus_on_a_machine_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is accepted where torch has it, every table knows it, and a study on it can be planned."""
    if not torch.backends.mps.is_available():
        with pytest.raises(StudyError, match="finds no GPU of Apple's"):
            device.resolve_device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    mps = device.resolve_device("mps")
    assert (mps.type, resolve_dtype(ModelSpec(id="embedded"), mps)) == ("mps", torch.float32)
    for table in (
        memory.UNTRACKED_ACTIVATION_FRACTION, packs.FULL_STEP_TOKENS,
        engines.TOKENS_PER_FORWARD, loss.CHUNK_BYTES,
    ):  # fmt: skip
        assert "mps" in table
    bytes_of = {"recommended_max_memory": 8 << 30, "driver_allocated_memory": 1 << 30}
    monkeypatch.setattr(torch, "mps", SimpleNamespace(**{name: lambda n=n: n for name, n in bytes_of.items()}))
    assert device.free_bytes(mps) == 7 << 30
    prediction = predict(study_of(ModelSpec(id="embedded", device="mps")))
    assert (prediction.device, prediction.reason) == ("mps", None)
