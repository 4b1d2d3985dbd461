"""What config.json asks for, as far as a forward follows it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CamembertConfig,
    LlamaConfig,
    LlavaConfig,
    Qwen2_5_VLConfig,
    RobertaConfig,
    XLMRobertaConfig,
)

from rankscope.errors import ModelError
from rankscope.model.load import load_config, most_positions, resolve_dtype
from rankscope.spec.models import ModelSpec

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 20, "is_decoder": True,
}  # fmt: skip


def spec_of(config: Any, folder: Path) -> ModelSpec:
    config.save_pretrained(folder)
    return ModelSpec(id=str(folder), device="cpu")


@pytest.mark.parametrize("kind", [RobertaConfig, CamembertConfig, XLMRobertaConfig, LlamaConfig])
@pytest.mark.parametrize("pad", [0, 1])
def test_a_row_has_as_many_tokens_as_the_model_has_positions(kind: Any, pad: int, tmp_path: Path) -> None:
    config = kind(**SIZES, pad_token_id=pad)
    most = most_positions(spec_of(config, tmp_path))
    assert most is not None
    model = AutoModelForCausalLM.from_config(config).eval()
    longest = torch.arange(2, 2 + most)[None]
    assert torch.isfinite(model(input_ids=longest).logits).all()
    if kind is not LlamaConfig:
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.cat([longest, longest[:, :1]], dim=1))


def test_the_form_of_a_forwards_output_is_not_the_configurations(tmp_path: Path) -> None:
    config = LlamaConfig(**SIZES, return_dict=False, output_hidden_states=True)
    loaded = load_config(spec_of(config, tmp_path))
    assert (loaded.return_dict, loaded.output_hidden_states) == (True, False)


@pytest.mark.parametrize(
    ("config", "inside"), [(LlavaConfig, "LlamaForCausalLM"), (Qwen2_5_VLConfig, "qwen2_5_vl_text")]
)
def test_of_a_model_for_images_the_text_model_inside_is_named(config: Any, inside: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no causal language model for") as caught:
        load_config(spec_of(config(), tmp_path))
    assert inside in caught.value.todo


@pytest.mark.parametrize(
    ("has", "wide", "asked", "expected"),
    [
        ("avx512_bf16", 512, "auto", torch.bfloat16),
        ("amx_bf16", 512, "auto", torch.bfloat16),
        ("avx512_f", 512, "auto", torch.float32),
        ("amx_bf16", 504, "auto", torch.float32),
        ("avx512_f", 32, "bfloat16", torch.bfloat16),
        ("amx_bf16", 512, "float32", torch.float32),
    ],
)
def test_auto_multiplies_bfloat16_where_a_cpu_has_it_and_the_model_is_wide(
    has: str, wide: int, asked: Any, expected: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {has: True})
    spec = spec_of(LlamaConfig(**SIZES | {"hidden_size": wide}), tmp_path).model_copy(update={"dtype": asked})
    assert resolve_dtype(spec, torch.device("cpu")) == expected
