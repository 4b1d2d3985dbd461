"""Mixed precision: what is held in which type, and that small updates survive."""

import pytest
import torch
from torch import Tensor

from models import tiny_model
from rankscope.lora.adapters import adapter_weights, add_adapter
from rankscope.lora.layout import Slice, flatten, use_layout
from rankscope.lora.packed import pack_layers
from rankscope.model.mixed import is_mixed, is_product, products_in_float32, use_mixed_precision
from rankscope.train.probe import make_packable
from reference import make_trial, random_tokens


@pytest.mark.parametrize(("name", "whole"), [("llama-gqa", {"norm"}), ("gpt2", {"ln_"}), ("mixtral", {"norm", "gate"})])
def test_products_and_embeddings_are_held_in_bfloat16_alone_and_the_rest_in_float32(name: str, whole: set[str]) -> None:
    model = tiny_model(name, torch.bfloat16)
    for weight, value in model.named_parameters():
        in_float32 = any(part in weight and "gate_" not in weight for part in whole)
        assert value.dtype == (torch.float32 if in_float32 else torch.bfloat16), weight
    assert is_mixed(model)
    assert model(torch.tensor([[3, 4, 5]]), output_hidden_states=True).hidden_states[0].dtype == torch.float32


def test_what_another_module_reads_of_a_layer_stays_float32() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(vocab_size=131, hidden_size=32, num_hidden_layers=1, state_size=4)).eval()
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        use_mixed_precision(model)
        mixer = model.backbone.layers[0].mixer
        assert {weight.dtype for weight in mixer.dt_proj.parameters()} == {torch.float32}
        assert mixer.in_proj.weight.dtype == torch.bfloat16
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected, rtol=0.05, atol=0.02)


def adapted_output(update: float, mixed: bool, packed: bool) -> tuple[Tensor, Tensor]:
    """Outputs of one layer without and with an update of that size, relative to the output."""
    model = tiny_model("llama-gqa", torch.bfloat16 if mixed else torch.float32)
    trial = make_trial(4, 1e-3, modules=("q_proj",))
    add_adapter(model, trial)
    layer = model.model.layers[0].self_attn.q_proj
    tokens = random_tokens(4)
    layout = flatten(tokens, [Slice(trial.name, range(4))], torch.device("cpu")).layout
    x = torch.randn(1, layout.tokens, 32, generator=torch.Generator().manual_seed(0))
    if packed:
        pack_layers(model)
    with torch.no_grad(), use_layout(layout):
        before = layer(x)
        for name, weight in adapter_weights(model, trial.name).items():
            if "layers.0.self_attn.q_proj.lora_B" in name:
                weight.normal_(generator=torch.Generator().manual_seed(1))
        change = layer(x) - before
        for name, weight in adapter_weights(model, trial.name).items():
            if "layers.0.self_attn.q_proj.lora_B" in name:
                weight.mul_(update * before.norm() / change.norm())
        return before, layer(x)


@pytest.mark.parametrize("packed", [True, False])
def test_an_update_of_a_ten_thousandth_of_the_output_is_not_lost(packed: bool) -> None:
    """A sum in bfloat16 keeps an update only where it happens to cross half a step, and then makes it a whole one."""
    (before, after), exact = adapted_output(1e-4, True, packed), adapted_output(1e-4, False, packed)
    wanted = (exact[1].double() - exact[0].double()).flatten()
    found = (after.double() - before.double()).flatten()
    assert before.dtype == torch.float32
    assert (found - wanted).norm() / wanted.norm() < 0.02
    rounded = (after.bfloat16().double() - before.bfloat16().double()).flatten()
    assert (rounded - wanted).norm() / wanted.norm() > 0.5


def test_forwards_in_float32_multiply_the_same_weights_exactly() -> None:
    model = tiny_model("mixtral", torch.bfloat16)
    ids = torch.arange(3, 12)[None]
    with torch.no_grad(), products_in_float32():
        found = model(ids, use_cache=False).logits
    assert {weight.dtype for weight in model.parameters()} == {torch.float32, torch.bfloat16}
    whole = tiny_model("mixtral")
    whole.load_state_dict({name: weight.float() for name, weight in model.state_dict().items()})
    with torch.no_grad():
        torch.testing.assert_close(found, whole(ids, use_cache=False).logits, rtol=1e-5, atol=1e-5)


def test_linear_classes_are_products_by_what_they_compute() -> None:
    from transformers.models.falcon.modeling_falcon import FalconLinear
    from transformers.models.llama4.modeling_llama4 import Llama4Router

    class Doubled(torch.nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    assert [is_product(kind) for kind in (torch.nn.Linear, FalconLinear, Llama4Router, Doubled)] == [
        True,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize("name", ["bloom", "falcon", "gpt-oss"])
def test_own_forwards_take_the_types_as_they_are(name: str) -> None:
    """BLOOM's reads a layer's weight itself on a path that is off; then the layer's bias is float32 as well."""
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        expected, found = (tiny_model(name, kind)(ids).logits for kind in (torch.float32, torch.bfloat16))
    assert found.dtype == torch.float32
    assert (found - expected).norm() / expected.norm() < 0.02


def test_experts_with_adapters_are_probed_in_float32() -> None:
    """PEFT adds their update to the weight itself: converted behind it, the model's own logits would be bfloat16's."""
    model, trial = tiny_model("gpt-oss", torch.bfloat16), make_trial(4, 1e-3, modules="all-linear+experts")
    add_adapter(model, trial)
    types = [weight.dtype for weight in model.parameters()]
    make_packable(model, [trial.name])
    assert [weight.dtype for weight in model.parameters()] == types
