"""FLOPs and bytes a token: against a formula, and predicted without weights as on the loaded model."""

from pathlib import Path

import pytest
import torch

from models import CONFIGS, tiny_model
from rankscope.lora.adapters import add_adapter, remove_adapters
from rankscope.plan.costs import predict
from rankscope.spec.models import DataSpec, ModelSpec, StudySpec, TrainingSpec
from rankscope.train.engine import TOKENS_PER_FORWARD, tokens_per_forward
from rankscope.train.flops import Products
from rankscope.train.loop import choose_engine
from rankscope.train.step import make_train_state
from reference import VOCAB, make_trial

TRAINING = TrainingSpec(steps=4, batch_size=2)
DATA = DataSpec(id="unused")


@pytest.mark.parametrize("engine", ["packed", "peft"])
def test_flops_are_those_of_the_formula(engine: str) -> None:
    """2 D O a token forward and 2 D O backward for the base, 6 R (D + O) for LoRA (3 products each way of A and B);
    the first layer's q, k and v need no gradient of their input, which saves 2 D O and 2 R D each."""
    model, rank = tiny_model("llama-gqa"), 4
    member = make_train_state(model, make_trial(rank, 1e-3), TRAINING, 4)
    cost = choose_engine(model, [member], TRAINING.model_copy(update={"engine": engine})).costs[member.trial.name]
    expected = 0
    for name, module in model.model.named_modules():
        if hasattr(module, "base_layer"):
            d, o = module.in_features, module.out_features
            expected += 4 * d * o + 6 * rank * (d + o)
            if name.startswith("layers.0.self_attn.") and not name.endswith("o_proj"):
                expected -= 2 * d * o + 2 * rank * d
    assert cost.flops_per_token == pytest.approx(expected, rel=1e-3)
    assert cost.flops_per_label == 4 * 32 * VOCAB


@pytest.mark.parametrize("name", CONFIGS)
def test_prediction_without_weights_is_that_of_the_loaded_model(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    model.save_pretrained(tmp_path)
    spec = StudySpec(
        model=ModelSpec(id=str(tmp_path), device="cpu"), data=DATA, ranks=(4, 16), seeds=(0,), training=TRAINING
    )
    prediction = predict(spec)
    assert prediction.reason is None
    members = [make_train_state(model, trial, spec.training, 4) for trial in spec.trials()]
    costs = choose_engine(model, members, spec.training).costs
    for trial, member in zip(spec.trials(), members, strict=True):
        assert prediction.params[trial.candidate.name] == sum(p.numel() for p in member.parameters)
        predicted, real = prediction.costs[trial.candidate.name], costs[trial.name]
        assert predicted.flops_per_token == real.flops_per_token
        assert predicted.flops_per_label == real.flops_per_label
        assert predicted.bytes_per_token == pytest.approx(real.bytes_per_token, rel=0.15)


def test_forwards_shrink_with_memory_and_never_vanish() -> None:
    assert tokens_per_forward(10**12, 1000, "cpu") == TOKENS_PER_FORWARD["cpu"]
    assert tokens_per_forward(100_000, 1000, "cpu") == 60
    assert tokens_per_forward(-5, 1000, "cpu") == 1


def test_products_are_counted_by_shape() -> None:
    a, b = torch.rand(3, 4), torch.rand(4, 5)
    with Products() as products:
        torch.addmm(torch.zeros(5), a, b)
        torch.zeros(3, 5).addmm_(a, b)
        _ = b.T @ a.T
    assert products.shapes == {(3, 4, 5): 2, (5, 4, 3): 1}
    assert products.flops == 3 * 2 * 60


def test_removing_adapters_leaves_the_model_as_it_was() -> None:
    model = tiny_model("opt-post-norm")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids = torch.arange(3, 20)[None]
    logits = model(input_ids=ids).logits
    for rank in (2, 5):
        add_adapter(model, make_trial(rank, 1e-3))
    remove_adapters(model)
    assert not any("lora" in name for name, _ in model.named_modules())
    assert model.state_dict().keys() == before.keys()
    assert torch.equal(model(input_ids=ids).logits, logits)
    add_adapter(model, make_trial(2, 1e-3))
    assert torch.equal(model(input_ids=ids).logits, logits)
