"""Merged models and configurations: ends that share a weight, ranges of types, scalings that every server reads."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from models import tiny_model
from rankscope.errors import ModelError
from rankscope.export.show import refusals, serving_lines, vllm_rank
from rankscope.export.write import Exported, merged_model, portable_config
from rankscope.lora.saved import SavedAdapter, load_by_peft, read_adapter, write_adapter
from rankscope.spec.models import ModelSpec

pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")


def saved(folder: Path, name: str, std: float = 0.3, **options: Any) -> Path:
    """Write a random adapter of rank 3 for a tiny model."""
    given: dict[str, Any] = {"task_type": "CAUSAL_LM", "r": 3, "lora_alpha": 6} | options
    model = get_peft_model(tiny_model(name), LoraConfig(**given))
    torch.manual_seed(0)
    for key, weight in model.named_parameters():
        if weight.requires_grad and "magnitude" not in key:
            nn.init.normal_(weight, std=std)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.eval()(torch.arange(3, 19)[None]).logits
    return found


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("opt-pre-norm", {"target_modules": ["lm_head", "q_proj"]}),
        ("opt-pre-norm", {"target_modules": ["embed_tokens", "q_proj"]}),
        ("opt-pre-norm", {"target_modules": ["q_proj"]}),
        ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
        ("llama-gqa", {"target_modules": ["q_proj"], "use_dora": True}),
        ("llama-gqa", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
        ("llama-gqa", {"target_modules": ["q_proj", "k_proj"], "use_rslora": True, "rank_pattern": {"k_proj": 1}}),
    ],
    ids=["output layer", "embedding", "tied", "Conv1D", "DoRA", "whole module", "rsLoRA by layer"],
)
def test_a_merged_model_has_the_adapters_logits(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    source = saved(tmp_path / "adapter", name, **options)
    adapted = load_by_peft(tiny_model(name), source)
    merged_model(tiny_model(name), source, "float32").save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    expected = logits(adapted)
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-4)
    assert (expected - logits(tiny_model(name))).abs().max() > 0.01, "the adapter changes something"
    ends = "lm_head" in options["target_modules"] or "embed_tokens" in options["target_modules"]
    tied = tiny_model(name).config.tie_word_embeddings and not ends
    assert again.config.tie_word_embeddings == tied


def test_weights_beyond_the_range_of_a_type_are_refused(tmp_path: Path) -> None:
    source = saved(tmp_path, "llama-gqa", std=300.0, target_modules=["q_proj"])
    with pytest.raises(ModelError, match=r"--merge fp16: .*q_proj.* is beyond its range"):
        merged_model(tiny_model("llama-gqa"), source, "fp16")
    weights = merged_model(tiny_model("llama-gqa"), source, "bf16").state_dict().values()
    assert {weight.dtype for weight in weights} == {torch.bfloat16}


def test_rslora_becomes_alpha_over_rank(tmp_path: Path) -> None:
    adapter = read_adapter(saved(tmp_path / "a", "llama-gqa", target_modules=["q_proj"], use_rslora=True))
    config = portable_config(adapter, ModelSpec(id="owner/model", commit="0" * 40))
    assert (config.base_model_name_or_path, config.revision, config.use_rslora) == ("owner/model", "0" * 40, False)
    write_adapter(adapter._replace(config=config), tmp_path / "b")
    both = [load_by_peft(tiny_model("llama-gqa"), tmp_path / name) for name in "ab"]
    torch.testing.assert_close(logits(both[0]), logits(both[1]), rtol=1e-5, atol=1e-5)
    assert read_adapter(tmp_path / "b").layers[0].scaling == pytest.approx(6 / 3**0.5)


def exported(adapter: SavedAdapter, **changes: Any) -> Exported:
    config = portable_config(adapter, ModelSpec(id=changes.pop("base", "owner/model")))
    return Exported(Path("/an adapter"), None, adapter, config, False)._replace(**changes)


def test_what_servers_refuse_or_misread(tmp_path: Path) -> None:
    kinds: dict[str, dict[str, Any]] = {
        "plain": {},
        "dora": {"use_dora": True},
        "pattern": {"rank_pattern": {"k_proj": 1}, "alpha_pattern": {"k_proj": 2}},
        "alpha": {"alpha_pattern": {"k_proj": 9}},
        "large": {"r": 520},
    }
    both = ["q_proj", "k_proj"]
    made = {
        kind: read_adapter(saved(tmp_path / kind, "llama-gqa", target_modules=both, **own))
        for kind, own in kinds.items()
    }
    found = {kind: refusals(exported(adapter)) for kind, adapter in made.items()}
    assert found == {
        "plain": {},
        "dora": {"vLLM": "beside_factors", "llama.cpp": "beside_factors"},
        "pattern": {"llama.cpp": "scaling"},  # every layer has alpha over the rank of the configuration
        "alpha": {"vLLM": "scaling", "llama.cpp": "scaling"},
        "large": {"vLLM": "rank"},
    }
    assert list(serving_lines(exported(made["dora"]))) == ["transformers"]
    assert refusals(exported(made["dora"], merged="bf16")) == {}
    assert set(refusals(exported(made["plain"], base="base.gguf"))) == {"transformers", "vLLM", "llama.cpp"}


def test_lines_survive_a_shell(tmp_path: Path) -> None:
    adapter = read_adapter(saved(tmp_path, "llama-gqa", target_modules=["q_proj"]))
    lines = serving_lines(exported(adapter, own_template=True))
    assert lines["transformers"].endswith("from_pretrained('/an adapter')")
    assert lines["vLLM"] == (
        "vllm serve owner/model --enable-lora --max-lora-rank 8 --lora-modules 'an adapter=/an adapter' "
        "--chat-template '/an adapter/chat_template.jinja'"
    )
    assert lines["llama.cpp"] == "python llama.cpp/convert_lora_to_gguf.py '/an adapter' --outfile 'an adapter.gguf'"


def test_ranks_that_a_server_pads_or_refuses() -> None:
    sizes = {rank: vllm_rank(rank) for rank in (1, 8, 9, 64, 300, 320, 500, 512, 513)}
    assert sizes == {1: 8, 8: 8, 9: 16, 64: 64, 300: 320, 320: 320, 500: 512, 512: 512, 513: None}
