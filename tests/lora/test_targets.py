"""What gets an adapter, and what `all-linear` leaves out."""

import pytest
import torch
from torch import nn

from experts import moe_model
from models import tiny_model
from rankscope.errors import StudyError
from rankscope.lora import targets
from rankscope.lora.adapters import adapter_weights, add_adapter, lora_layers, remove_adapters
from rankscope.lora.targets import Targets, find_targets, for_peft
from reference import make_trial


def names_of(found: Targets) -> tuple[str, ...]:
    return (*found.modules, *found.parameters)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "olmoe", "gpt_oss"])
def test_all_linear_leaves_out_experts_and_routers(name: str) -> None:
    model = moe_model(name)
    found = find_targets(model, "all-linear")
    assert {module.rsplit(".", 1)[-1] for module in names_of(found)} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert len(found.left_out["experts"]) == 4, "two parameters in each of two layers"
    assert len(found.left_out["routers"]) == 2
    assert found.left_out["output"] == ("lm_head",)
    with_experts = find_targets(model, "all-linear+experts")
    assert with_experts.modules == found.modules
    assert with_experts.parameters == found.left_out["experts"]
    assert with_experts.left_out["routers"] == found.left_out["routers"]


def test_a_router_that_is_a_linear_module_is_left_out_and_refused_by_name() -> None:
    model = moe_model("phimoe")
    found = find_targets(model, "all-linear")
    assert any(name.endswith("router") for name in found.left_out["routers"])
    assert not any("router" in name for name in names_of(found))
    with pytest.raises(StudyError, match="router is a router"):
        find_targets(model, ["q_proj", "router"])


def test_what_peft_refuses_is_left_out() -> None:
    """PEFT refuses out_proj of Mamba, so that its own all-linear cannot be trained."""
    model = moe_model("mamba")
    found = find_targets(model, "all-linear")
    assert {name.rsplit(".", 1)[-1] for name in found.left_out["refused"]} == {"out_proj"}
    assert {name.rsplit(".", 1)[-1] for name in names_of(found)} == {"in_proj", "x_proj", "dt_proj"}
    add_adapter(model, make_trial(2, 1e-3))
    with pytest.raises(StudyError, match=r"out_proj.*incompatible"):  # which the user has named
        add_adapter(model, make_trial(2, 1e-3, modules=("out_proj",)))


def test_what_takes_time_to_find_out_is_asked_only_of_modules_that_nothing_else_leaves_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried: list[str] = []
    refused = targets._refused
    monkeypatch.setattr(targets, "_refused", lambda model, name: tried.append(name) or refused(model, name))
    assert list(find_targets(moe_model("mixtral"), "all-linear").modules) == tried


def test_matrices_beside_experts_of_their_own_are_no_experts() -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scales = nn.Parameter(torch.ones(4, 8))
            self.inner = nn.Module()
            self.inner.weight = nn.Parameter(torch.ones(4, 8, 8))

    model = nn.Module()
    model.experts, model.q_proj = Stack(), nn.Linear(8, 8)
    assert find_targets(model, "all-linear").left_out["experts"] == ("experts.inner.weight",)


def test_a_linear_module_with_other_shapes_is_left_out() -> None:
    """DeepSeek-V4's linear layers in groups, (..., groups, D) to (..., groups, O)."""

    class Grouped(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(-1, (2, -1)).flatten(-3) @ self.weight.T

    class Same(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight.T

    model = tiny_model("llama-gqa")
    model.model.layers[0].mlp.up_proj = Grouped(32, 48, bias=False)
    model.model.layers[1].mlp.up_proj = Same(32, 48, bias=False)
    found = find_targets(model, "all-linear")
    assert found.left_out["own_forward"] == ("model.layers.0.mlp.up_proj",)
    assert "model.layers.1.mlp.up_proj" in found.modules
    assert "1.mlp.up_proj" in for_peft(model, found)[0], "up_proj would match the other too"
    with pytest.raises(StudyError, match="up_proj is a Grouped, which cannot carry LoRA"):
        find_targets(model, ["up_proj"])


def test_layers_that_peft_takes_for_experts_are_adapted_as_parameters() -> None:
    """PEFT reads `gate_proj` as the name that experts had before they lay in one tensor."""
    model = moe_model("deepseek_v3")
    found = find_targets(model, "all-linear")
    assert "model.layers.0.mlp.gate_proj.weight" in found.parameters  # a dense layer
    assert "model.layers.1.mlp.shared_experts.down_proj.weight" in found.parameters
    assert found.left_out["experts"] == tuple(f"model.layers.1.mlp.experts.{x}" for x in ("gate_up_proj", "down_proj"))
    assert "gate_proj.weight" in for_peft(model, found)[1]
    add_adapter(model, make_trial(2, 1e-3))
    adapted = {name for name, _ in lora_layers(model)}
    assert adapted == {name.removesuffix(".weight") for name in names_of(found)}
    assert find_targets(model, "all-linear") == found, "adapters are seen through"
    named = find_targets(model, ["down_proj"]).parameters
    assert named == ("model.layers.0.mlp.down_proj.weight", "model.layers.1.mlp.shared_experts.down_proj.weight")
    assert find_targets(model, ["experts.down_proj"]).parameters == ("model.layers.1.mlp.experts.down_proj",)
    dropout = find_targets(model, "all-linear", plain=False)  # PEFT has none on parameters
    assert dropout.left_out["renamed"] == tuple(name.removesuffix(".weight") for name in found.parameters)


@pytest.mark.parametrize("names", [("experts",), ("gate_up_proj", "down_proj")])
def test_experts_by_name(names: tuple[str, ...]) -> None:
    model, trial = moe_model("mixtral"), make_trial(3, 1e-3, modules=names)
    modules = dict(model.named_modules())
    for _ in range(2):
        add_adapter(model, trial)
        sizes = [weight.numel() for weight in adapter_weights(model, trial.name).values()]
        assert sum(sizes) == 2 * 4 * 3 * ((32 + 96) + (48 + 32)), "layers, experts, rank, in and out of both parameters"
        remove_adapters(model)
        assert dict(model.named_modules()) == modules
    with pytest.raises(StudyError, match="neither dropout nor DoRA"):
        add_adapter(model, make_trial(3, 1e-3, dropout=0.1, modules=names))


def test_names_that_cannot_be_adapted_are_explained() -> None:
    model = tiny_model("llama-gqa")
    with pytest.raises(StudyError, match=r"self_attn is a LlamaAttention, and no layer[\s\S]*q_proj"):
        find_targets(model, ["self_attn"])
    with pytest.raises(StudyError, match="no routed experts"):
        find_targets(model, "all-linear+experts")
