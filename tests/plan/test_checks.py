"""A base that is larger than its device is refused before it is loaded, with what would make it fit."""

from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rankscope.errors import ModelError
from rankscope.model.load import skeleton
from rankscope.model.quantized import base_bytes
from rankscope.plan.checks import check_base_fits, too_large
from rankscope.plan.costs import CostModel, predict
from rankscope.spec.models import DataSpec, ModelSpec, StudySpec
from rankscope.text.catalogue import load


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=131, pad_token_id=1)).save_pretrained(path)
    return path


@cache
def predicted(folder: Path, device: str | None = None) -> tuple[ModelSpec, CostModel]:
    spec = StudySpec(model=ModelSpec(id=str(folder), device="cpu"), data=DataSpec(id="unused"), ranks=(4,))
    return spec.model, predict(spec, torch.device(device) if device else None)


def test_what_fits_is_let_through(folder: Path) -> None:
    model, prediction = predicted(folder)
    check_base_fits(model, prediction, prediction.base_bytes)
    with pytest.raises(ModelError, match=r"the base alone takes .* in float32, and .* are free"):
        check_base_fits(model, prediction, prediction.base_bytes - 1)


def test_what_would_fit_is_said_with_its_size(folder: Path) -> None:
    model, prediction = predicted(folder)
    held = {
        option: base_bytes(skeleton(model.model_copy(update={key: value}), getattr(torch, dtype)))
        for option, key, value, dtype in [
            ("--dtype bfloat16", "dtype", "bfloat16", "bfloat16"),
            ("--quantization int8", "quantization", "int8", "float32"),
            ("--quantization nf4", "quantization", "nf4", "float32"),
        ]
    }
    assert sorted(held.values(), reverse=True) == list(held.values()), "nf4 is smallest"
    for option, size in held.items():
        found = too_large(model, prediction, size, load("en"))
        assert found is not None
        named = [other for other in held if other in found[1]]
        assert named == [other for other in held if held[other] <= size]
        assert option in named
    nothing = too_large(model, prediction, min(held.values()) - 1, load("en"))
    assert nothing is not None
    assert nothing[1] == "Use a larger device, or a smaller model: one device holds the whole base."


def test_on_a_gpu_the_base_is_in_bfloat16_already(folder: Path) -> None:
    model, prediction = predicted(folder, "cuda")
    found = too_large(model, prediction, prediction.base_bytes - 1, load("en"))
    assert found is not None
    assert "in bfloat16" in found[0]
    assert "--dtype" not in found[1]
    assert "--quantization nf4" in found[1]


def test_without_bitsandbytes_it_is_not_advised(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prediction = predicted(folder)
    monkeypatch.setattr("rankscope.errors.find_spec", lambda name: None)
    found = too_large(model, prediction, prediction.base_bytes - 1, load("en"))
    assert found is not None
    assert "--dtype bfloat16" in found[1]
    assert "--quantization" not in found[1]
