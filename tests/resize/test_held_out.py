"""Held-out losses of saved adapters against PEFT's own loading and forward, one example at a time."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from models import tiny_model
from rankscope.data.tokens import Tokens
from rankscope.errors import ModelError
from rankscope.lora.saved import WEIGHTS, read_adapter
from rankscope.resize.loss_budget import difference, held_out_losses
from rankscope.train.engine import ExampleLosses, PeftEngine
from reference import random_tokens

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "packed": ("llama-gqa", {"target_modules": ["q_proj", "up_proj"]}),
    "packed, Conv1D": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "not packed": ("bloom", {"target_modules": ["query_key_value"]}),
    "output layer": ("llama-gqa", {"target_modules": ["lm_head", "q_proj"]}),
    "embedding": ("opt-pre-norm", {"target_modules": ["embed_tokens", "q_proj"]}),
    "biases": ("opt-pre-norm", {"target_modules": ["q_proj"], "bias": "all"}),
    "biases of the layers": ("opt-pre-norm", {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "whole modules": ("llama-gqa", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "down_proj"]}),
    "DoRA": ("llama-gqa", {"target_modules": ["q_proj"], "use_dora": True}),
}
pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")


def save(folder: Path, name: str, options: dict[str, Any], seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=6, **options)
    model = get_peft_model(tiny_model(name, dtype), config)
    torch.manual_seed(seed)
    for key, weight in model.named_parameters():
        if weight.requires_grad and "magnitude" not in key:
            nn.init.normal_(weight, std=0.3)
    model.save_pretrained(str(folder), save_embedding_layers=False)


@torch.no_grad()
def losses_by_peft(folder: Path, name: str, tokens: Tokens) -> list[float]:
    model: Any = PeftModel.from_pretrained(tiny_model(name), str(folder)).eval()  # noqa: TID251  # just written
    found = []
    for ids, is_label in tokens:
        wanted = torch.from_numpy(is_label[1:])
        row = torch.from_numpy(ids.astype(np.int64))
        logits = model(input_ids=row[None], use_cache=False).logits[0, :-1]
        found.append(float(F.cross_entropy(logits[wanted], row[1:][wanted])))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_those_of_peft_alone(tmp_path: Path, kind: str) -> None:
    """Two adapters one after the other: nothing of the first remains in the model or for the second."""
    name, options = KINDS[kind]
    tokens = random_tokens(12)
    for seed in (0, 1):
        save(tmp_path / str(seed), name, options, seed)
    model = tiny_model(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = {key: held_out_losses(model, read_adapter(tmp_path / key), tokens) for key in ("0", "1")}
    for key, losses in found.items():
        np.testing.assert_allclose(losses.loss, losses_by_peft(tmp_path / key, name, tokens), rtol=1e-5)
        assert losses.label_tokens.tolist() == tokens.label_counts.tolist()
    assert abs(found["0"].mean - found["1"].mean) > 1e-4
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not hasattr(model, "peft_config")


def test_over_a_bfloat16_base_adapters_are_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, "opt-pre-norm", KINDS["embedding"][1])
    kinds: set[torch.dtype] = set()
    original = PeftEngine.evaluate

    def spying(engine: Any, *arguments: Any) -> Any:
        kinds.update(weight.dtype for key, weight in engine.model.named_parameters() if "lora_" in key)
        return original(engine, *arguments)

    monkeypatch.setattr(PeftEngine, "evaluate", spying)
    tokens, adapter = random_tokens(12), read_adapter(tmp_path)
    model = tiny_model("opt-pre-norm", torch.bfloat16)
    found = held_out_losses(model, adapter, tokens).mean
    assert kinds == {torch.float32}
    whole = held_out_losses(tiny_model("opt-pre-norm"), adapter, tokens).mean
    assert found == pytest.approx(whole, rel=1e-2)


def test_rows_are_not_padded_where_that_would_change_their_losses(tmp_path: Path) -> None:
    """A model whose logits grow with the longest row of their forward."""
    save(tmp_path, "llama-gqa", {"target_modules": ["q_proj"]})
    adapter, tokens, model = read_adapter(tmp_path), random_tokens(12), tiny_model("llama-gqa")

    def grow(_: nn.Module, arguments: Any, out: Any) -> None:
        out.logits = out.logits * (1 + 0.1 * out.logits.shape[1])

    model.register_forward_hook(grow)
    rows = [Tokens.from_examples([row]) for row in tokens]
    alone = [float(held_out_losses(model, adapter, row).loss[0]) for row in rows]
    np.testing.assert_allclose(held_out_losses(model, adapter, tokens).loss, alone, rtol=1e-5)


def test_an_adapter_of_another_model_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    save(tmp_path, "llama-gqa", {"target_modules": ["k_proj"]})
    model = tiny_model("opt-pre-norm")
    with pytest.raises(ModelError, match="does not fit"):
        held_out_losses(model, read_adapter(tmp_path), random_tokens(4))
    assert not [key for key, _ in model.named_parameters() if "lora_" in key]


def test_losses_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    save(tmp_path, "opt-pre-norm", {"target_modules": ["q_proj"]})
    adapter = read_adapter(tmp_path)
    large = [factors._replace(b=factors.b * 1e30, a=factors.a * 1e30) for factors in adapter.layers]
    with pytest.raises(ModelError, match="not a finite number"):
        held_out_losses(tiny_model("opt-pre-norm"), adapter._replace(layers=large), random_tokens(4))
    assert (tmp_path / WEIGHTS).exists()


def test_the_difference_is_paired() -> None:
    """Against the jackknife, which knows nothing of the formula."""
    rng = np.random.default_rng(0)
    labels = rng.integers(1, 40, 200)
    hard = rng.normal(3, 1, 200)
    first = ExampleLosses(hard, labels, np.zeros(200))
    second = ExampleLosses(hard + rng.normal(0.1, 0.05, 200), labels, np.zeros(200))
    found = difference(second, first)
    assert found.mean == pytest.approx(second.mean - first.mean, rel=1e-9)
    without = []
    for left_out in range(200):
        kept = np.arange(200) != left_out
        without.append(float(np.average(second.loss[kept] - first.loss[kept], weights=labels[kept])))
    jackknife = np.sqrt(199 / 200 * np.sum((np.array(without) - np.mean(without)) ** 2))
    assert found.standard_error == pytest.approx(jackknife, rel=0.01)
    alone = ExampleLosses(hard[:1], labels[:1], np.zeros(1))
    assert difference(alone, alone) == (0.0, None, 1)
