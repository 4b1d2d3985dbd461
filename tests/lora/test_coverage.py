"""What adapters reach of a model: layers without gradient lose theirs, and the coverage names what is left out."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    Gemma3Config,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from rankscope.errors import StudyError
from rankscope.lora.adapters import layer_of, lora_layers, unreached_layers
from rankscope.lora.coverage import Coverage, subtrees
from rankscope.lora.saved import read_adapter
from rankscope.plan.costs import predict
from rankscope.spec.models import StudySpec, TrainingSpec
from rankscope.text.catalogue import load
from rankscope.text.coverage import coverage_sentences
from rankscope.train.engine import PeftEngine
from rankscope.train.loop import choose_engine
from rankscope.train.step import TrainState, make_train_state, save_trained_adapter, train_step
from reference import VOCAB, random_tokens

TRAINING = TrainingSpec(steps=3, batch_size=2, warmup_ratio=0.0)
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "bos_token_id": 2, "eos_token_id": 2,
    "pad_token_id": 1,
}  # fmt: skip
CONFIGS: dict[str, PretrainedConfig] = {
    "gemma3": Gemma3Config(
        text_config={**SMALL, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5},
        vision_config={
            "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": 28, "patch_size": 14,
        },
        mm_tokens_per_image=4,
    ),
    "bart": BartConfig(
        vocab_size=VOCAB, d_model=32, decoder_layers=5, decoder_ffn_dim=48, decoder_attention_heads=4, encoder_layers=1,
        max_position_embeddings=64, is_decoder=True, is_encoder_decoder=False,
    ),
    "llama": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "mamba": MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, state_size=4),
    "mixtral": MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=1),
}  # fmt: skip


def make_model(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name])).eval()
    model.requires_grad_(False)
    return model


def study_of(model: PreTrainedModel, folder: Path, modules: Any = "all-linear") -> StudySpec:
    model.save_pretrained(folder)
    adapter = {"target_modules": modules, "alpha": 16}
    values: dict[str, Any] = {"model": {"id": str(folder), "device": "cpu"}, "data": {"id": "unused"}, "ranks": [2, 4]}
    return StudySpec.model_validate(values | {"seeds": [0], "adapter": adapter, "training": TRAINING})


def begin(model: PreTrainedModel, spec: StudySpec) -> tuple[Any, list[TrainState]]:
    members = [make_train_state(model, trial, TRAINING, 3) for trial in spec.trials()]
    return choose_engine(model, members, TRAINING).engine, members


@pytest.mark.parametrize(
    ("name", "dead"),
    [("gemma3", "vision_tower"), pytest.param("bart", "encoder_attn", marks=pytest.mark.slow)],
)
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
def test_layers_that_text_never_reaches_get_no_adapter(name: str, dead: str, tmp_path: Path) -> None:
    """They would stay zero, and be counted, saved, and given ranks that others pay for."""
    model = make_model(name)
    spec = study_of(model, tmp_path / "model")
    prediction = predict(spec)
    assert prediction.reason is None
    assert prediction.coverage is not None
    (part,) = prediction.coverage.left_out["unreached"]
    assert dead in part
    engine, members = begin(model, spec)
    assert any(dead in layer for layer in engine.unreached)
    assert all(dead not in layer for layer, _ in lora_layers(model))
    for member in members:
        assert prediction.params[member.trial.candidate.name] == sum(p.numel() for p in member.parameters)
    tokens = random_tokens(8)
    train_step(engine, members, tokens, TRAINING, 0)
    assert all(weight in member.optimizer.state for member in members for weight in member.parameters), (
        "a gradient each"
    )
    save_trained_adapter(members[1], tmp_path)
    assert all(dead not in layer.layer for layer in read_adapter(tmp_path).layers)
    loaded = PeftModel.from_pretrained(make_model(name), str(tmp_path)).eval()  # warns about missing keys
    assert all(dead not in layer for layer, _ in lora_layers(loaded))
    after, read = (
        PeftEngine(loaded.base_model.model, 4).evaluate(tokens, ["default"]),
        engine.evaluate(tokens, [members[1].trial.name]),
    )
    assert after[0].loss == pytest.approx(read[0].loss, rel=1e-4)


def test_modules_of_which_only_the_weight_is_used_are_refused(tmp_path: Path) -> None:
    """Mamba multiplies by dt_proj.weight itself."""
    model = make_model("mamba")
    spec = study_of(model, tmp_path, ["dt_proj"])
    for act in (lambda: predict(spec), lambda: begin(model, spec)):
        with pytest.raises(StudyError, match="no gradient reaches dt_proj"):
            act()


class _Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList([nn.Module() for _ in range(2)])
        for layer in self.model.layers:
            layer.experts = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.model.tower = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = self.model.layers
        out: torch.Tensor = second.experts[2](first.experts[0](x))
        return out


def test_an_expert_that_gets_no_token_is_not_out_of_reach() -> None:
    model: Any = _Experts()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=r".*(experts|tower)\.\d"), model, "one")
    model(torch.ones(2, 4)).sum().backward()
    assert unreached_layers(model, "one", "model") == ["model.tower.0", "model.tower.1"]


def test_parts_of_a_model_are_named_as_large_as_they_are() -> None:
    dead = ["m.tower.layers.0.q", "m.tower.layers.1.q", "m.layers.0.cross.q", "m.layers.1.cross.q"]
    assert subtrees(dead, ["m.layers.0.self.q", "m.layers.1.self.q"]) == {
        "m.tower": 2, "m.layers.0.cross": 1, "m.layers.1.cross": 1,
    }  # fmt: skip


def coverage_of(name: str, folder: Path, modules: Any = "all-linear") -> Coverage:
    found = predict(study_of(make_model(name), folder, modules)).coverage
    assert found is not None
    return found


def test_shares_are_those_of_the_formula(tmp_path: Path) -> None:
    """A layer of the tiny Llama multiplies by q and o 32 x 32, k and v 32 x 16, and three of 32 x 48; the output layer
    is the embeddings' weight."""
    layer, head, norms = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48, 32 * VOCAB, 5 * 32
    found = coverage_of("llama", tmp_path / "a")
    assert found.modules == dict.fromkeys(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], 2
    )
    assert found.parameters == pytest.approx(2 * layer / (2 * layer + head + norms))
    assert found.flops == pytest.approx(2 * layer / (2 * layer + head))
    assert found.left_out == {"output": {"lm_head": 1}}
    assert found.full_rank == {**dict.fromkeys(found.modules, 32), "k_proj": 16, "v_proj": 16}
    assert found.tied
    one = coverage_of("llama", tmp_path / "b", ["v_proj"])
    assert (one.modules, one.left_out) == ({"v_proj": 2}, {})
    assert one.flops == pytest.approx(2 * 32 * 16 / (2 * layer + head))


def test_experts_count_as_far_as_a_token_passes_through_them(tmp_path: Path) -> None:
    found = coverage_of("mixtral", tmp_path)
    attention, experts, rest = 2 * (2 * 32 * 32 + 2 * 32 * 16), 2 * 3 * 32 * 48, 32 * VOCAB
    routers = 2 * 4 * 32
    assert found.flops == pytest.approx(attention / (attention + experts + rest + routers))
    assert {reason: list(names) for reason, names in found.left_out.items()}.keys() == {"output", "experts", "routers"}


def test_sentences(tmp_path: Path) -> None:
    found = coverage_of("llama", tmp_path)._asdict()
    found["left_out"]["unreached"] = {"model.vision_tower": 12}
    assert coverage_sentences(found, [8, 16], load("en")) == [
        "Adapters: 14 modules (q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj), "
        f"{100 * found['parameters']:.3g}% of the model's parameters and {100 * found['flops']:.3g}% of its FLOPs.",
        "Left out: lm_head (output layer); model.vision_tower (no gradient reaches it).",
        "Rank 16 is the full rank of k_proj, v_proj: higher ones only add parameters there.",
        "Input embeddings and output layer share their weights.",
    ]
    assert not any("full rank" in sentence for sentence in coverage_sentences(found, [8], load("en")))
    assert len(coverage_sentences(found, [8, 64], load("ko"))) == 5
    assert coverage_sentences(None, [8], load("en")) == []


def test_layer_of() -> None:
    assert layer_of("base_model.model.a.b.lora_A.weight") == layer_of("base_model.model.a.b.lora_embedding_A") == "a.b"
