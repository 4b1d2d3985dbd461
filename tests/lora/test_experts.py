"""Adapters on experts: packed as by PEFT's own forward, saved, read back, and their spectra."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor

from experts import moe_model
from marks import mostly_slow
from rankscope.data.tokens import Tokens
from rankscope.errors import ModelError
from rankscope.lora.adapters import adapter_weights, add_adapter, save_adapter
from rankscope.lora.layout import Slice
from rankscope.lora.saved import attach, attached, peft_fault, read_adapter, write_adapter
from rankscope.lora.svd import by_module, check_resizable, decompose, ranks_by_energy, resized, spectrum
from rankscope.model.mixed import use_mixed_precision
from rankscope.spec.models import TrainingSpec
from rankscope.train.engine import PackedEngine
from rankscope.train.loop import choose_engine
from rankscope.train.probe import make_packable
from rankscope.train.step import make_train_state, train_step
from reference import make_trial, random_tokens

PATTERNS = "ignore:The following .*_pattern keys:RuntimeWarning"  # PEFT follows them for parameters, and says this
EVERYTHING = "all-linear+experts"


def by_peft(name: str, folder: Path, tokens: Tokens) -> tuple[list[float], dict[str, Tensor]]:
    """Mean loss of all rows together and its gradient, by PEFT's forward of single rows, in float64."""
    base = moe_model(name).double()
    base.set_experts_implementation("eager")  # the others have no product in float64
    model = PeftModel.from_pretrained(base, str(folder), is_trainable=True)
    for parameter in model.parameters():
        parameter.data = parameter.data.double()
    total, labels = torch.zeros((), dtype=torch.float64), 0
    for ids, is_label in tokens:
        row = torch.from_numpy(ids).long()[None]
        logits = model(input_ids=row).logits[0, :-1]
        wanted = torch.from_numpy(is_label[1:])
        total = total + torch.nn.functional.cross_entropy(logits[wanted], row[0, 1:][wanted], reduction="sum")
        labels += int(wanted.sum())
    (total / labels).backward()
    gradients = {key: weight.grad for key, weight in adapter_weights(model.base_model.model, "default").items()}
    return [float(total.detach()) / labels], gradients


@pytest.mark.parametrize(
    "name", mostly_slow(["mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss"], "mixtral", "gpt_oss")
)
def test_a_pack_with_experts_is_what_peft_does(name: str, tmp_path: Path) -> None:
    model, tokens = moe_model(name), random_tokens(5, shortest=6, longest=12)
    trials = [make_trial(2, 1e-3, modules=EVERYTHING), make_trial(3, 2e-3, modules=EVERYTHING)]
    configs = [add_adapter(model, trial) for trial in trials]
    make_packable(model, [trial.name for trial in trials])
    torch.manual_seed(1)
    for trial in trials:
        for weight in adapter_weights(model, trial.name).values():
            weight.data.normal_(std=0.1)
    found = list(PackedEngine(model, 1 << 30).accumulate(tokens, [Slice(trial.name, range(5)) for trial in trials]))
    for trial, config, loss in zip(trials, configs, found, strict=True):
        weights = adapter_weights(model, trial.name)
        save_adapter(weights, config, tmp_path / trial.name)
        assert peft_fault(model, tmp_path / trial.name) is None
        (expected,), gradients = by_peft(name, tmp_path / trial.name, tokens)
        assert float(loss.double().mean()) == pytest.approx(expected, rel=1e-5)
        assert gradients.keys() == weights.keys()
        for key, gradient in gradients.items():
            torch.testing.assert_close(weights[key].grad.double(), gradient, rtol=1e-3, atol=1e-5)


def test_packed_experts_of_a_bfloat16_base_stay_in_bfloat16() -> None:
    tokens, trial, losses = random_tokens(5), make_trial(2, 1e-2, modules=EVERYTHING), {}
    training = TrainingSpec(steps=3, batch_size=2, warmup_ratio=0.0)
    for dtype in (torch.float32, torch.bfloat16):
        model = moe_model("mixtral")
        if dtype == torch.bfloat16:
            use_mixed_precision(model)
        state = make_train_state(model, trial, training, 3)
        engine = choose_engine(model, [state], training).engine
        assert engine.name == "packed"
        assert {weight.dtype for weight in model.parameters() if weight.dim() == 3} == {dtype}
        losses[dtype] = [train_step(engine, [state], tokens, training, step)[0].loss for step in range(3)]
    assert losses[torch.bfloat16] == pytest.approx(losses[torch.float32], rel=1e-2)
    assert losses[torch.bfloat16] != losses[torch.float32]


def saved_experts(folder: Path, **options: object) -> dict[str, Tensor]:
    """Save an adapter of experts as PEFT does; return the dense update of each of its layers, by PEFT."""
    torch.manual_seed(0)
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], target_parameters=targets, **options)
    model = get_peft_model(moe_model("mixtral"), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.3)
    model.save_pretrained(str(folder))
    layers = [(n, x) for n, x in model.base_model.model.named_modules() if isinstance(x, LoraLayer)]
    return {name: layer.get_delta_weight("default").detach().double() for name, layer in layers}


@pytest.mark.filterwarnings(PATTERNS)
def test_a_spectrum_is_of_each_expert(tmp_path: Path) -> None:
    dense = saved_experts(tmp_path, rank_pattern={"gate_up_proj": 3}, alpha_pattern={"gate_up_proj": 9})
    frame = spectrum(read_adapter(tmp_path).layers).set_index("layer")
    assert len(frame) == 2 * (1 + 2 * 4)
    for leaf, wrapper, rank, scaling in (("gate_up_proj", ".base_layer", 3, 3.0), ("down_proj", "", 4, 2.0)):
        for expert, update in enumerate(dense[f"model.layers.1.mlp.experts{wrapper}"]):
            row = frame.loc[f"model.layers.1.mlp.experts.{expert}.{leaf}"]
            assert (row["rank"], row["scaling"]) == (rank, scaling)
            expected = torch.linalg.svdvals(update)[:rank]
            torch.testing.assert_close(torch.tensor(row["singular_values"]).double(), expected, rtol=1e-4, atol=1e-4)
    table = by_module(frame.reset_index()).set_index("module")
    assert table.loc["mlp.experts.*.down_proj", "layers"] == 8
    assert table.loc["mlp.experts.*.gate_up_proj", "rank"] == 3


@pytest.mark.filterwarnings(PATTERNS)
def test_an_adapter_of_experts_is_attached_as_it_was_saved_and_not_resized(tmp_path: Path) -> None:
    saved_experts(tmp_path, rank_pattern={r".*\.gate_up_proj": 2}, alpha_pattern={r".*\.gate_up_proj": 5})
    expected = PeftModel.from_pretrained(moe_model("mixtral"), str(tmp_path))
    model, adapter = moe_model("mixtral"), read_adapter(tmp_path)
    ids = torch.arange(3, 15)[None]
    with attached(model, "adapter", adapter), torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected(ids).logits)
    with pytest.raises(ModelError, match=r"experts\.\w+ are of many experts"):
        check_resizable(adapter)


@pytest.mark.filterwarnings(PATTERNS)
def test_ranks_by_layer_of_layers_that_are_parameters_to_peft(tmp_path: Path) -> None:
    """DeepSeek-V3's dense layers and shared experts, whose patterns end in `.weight`."""
    model, trial = moe_model("deepseek_v3"), make_trial(4, 1e-3)
    config = add_adapter(model, trial)
    torch.manual_seed(1)
    for number, weight in enumerate(adapter_weights(model, trial.name).values()):
        weight.data.normal_(std=0.1)
        if number % 3 == 0:
            weight.data[1:] *= 0.01
    save_adapter(adapter_weights(model, trial.name), config, tmp_path / "whole")
    adapter = read_adapter(tmp_path / "whole")
    check_resizable(adapter)
    layers = [decompose(factors) for factors in adapter.layers]
    smaller = resized(adapter, layers, ranks_by_energy(layers, 0.95))
    assert any(key.endswith("weight") for key in smaller.config.rank_pattern or {})
    write_adapter(smaller, tmp_path / "smaller")
    other = moe_model("deepseek_v3")
    expected = PeftModel.from_pretrained(moe_model("deepseek_v3"), str(tmp_path / "smaller"))
    ids = torch.arange(3, 15)[None]
    with attached(other, "adapter", read_adapter(tmp_path / "smaller")), torch.no_grad():
        torch.testing.assert_close(other(ids).logits, expected(ids).logits)


def test_what_peft_loses_is_found_and_rankscope_reads_it_all_the_same(tmp_path: Path) -> None:
    """transformers' renaming of Laguna's checkpoints also takes the adapter's keys of shared experts."""
    model, trial = moe_model("laguna"), make_trial(2, 1e-3)
    config = add_adapter(model, trial)
    for weight in adapter_weights(model, trial.name).values():
        weight.data.normal_(std=0.1)
    save_adapter(adapter_weights(model, trial.name), config, tmp_path)
    assert "12 of 48 tensors are lost, base_model.model.model.layers.1.mlp.shared_experts" in str(
        peft_fault(model, tmp_path)
    )
    other = moe_model("laguna")
    attach(other, "read", read_adapter(tmp_path))
    for key, weight in adapter_weights(other, "read").items():
        assert torch.equal(weight, adapter_weights(model, trial.name)[key])


def test_dora_and_all_linear_are_read_back(tmp_path: Path) -> None:
    model, trial = moe_model("qwen3_moe"), make_trial(2, 1e-3)
    dora = trial.model_copy(update={"candidate": trial.candidate.model_copy(update={"variant": "dora"})})
    for one in (trial, dora):
        config = add_adapter(model, one)
        save_adapter(adapter_weights(model, one.name), config, tmp_path / one.name)
        assert peft_fault(model, tmp_path / one.name) is None


@pytest.mark.parametrize(
    ("names", "dtype", "message"),
    [
        (("lora_A.default", "lora_B.default"), torch.float32, r"holds no LoRA factors.*lora_[AB]\.default"),
        (("lora_down", "lora_up"), torch.float32, "holds no LoRA factors.*lora_(down|up)"),
        (("lora_A", "lora_B"), torch.float8_e4m3fn, "is of torch.float8_e4m3fn"),
    ],
    ids=["names of adapters in keys", "kohya's names", "fp8"],
)
def test_adapters_that_are_not_read_are_told(
    names: tuple[str, str], dtype: torch.dtype, message: str, tmp_path: Path
) -> None:
    saved_experts(tmp_path)
    file, (a, b) = tmp_path / "adapter_model.safetensors", names
    tensors = {key.replace("lora_A", a).replace("lora_B", b): value for key, value in load_file(file).items()}
    save_file({key: value.to(dtype) for key, value in tensors.items()}, file)
    with pytest.raises(ModelError, match=message):
        read_adapter(tmp_path)


def test_shards_and_pickled_weights_are_named(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "target_modules": ["q_proj"]}))
    (tmp_path / "adapter_model.bin").touch()
    with pytest.raises(ModelError, match=r"adapter_model\.bin is not read"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_model-00001-of-00002.safetensors").touch()
    with pytest.raises(ModelError, match=r"00001-of-00002\.safetensors is not read\n.*not from shards or pickles"):
        read_adapter(tmp_path)


@pytest.mark.parametrize("prefix", ["base_model.model._orig_mod.", "base_model.model._fsdp_wrapped_module.", ""])
def test_keys_that_peft_does_not_know_are_read_and_told(prefix: str, tmp_path: Path) -> None:
    model, trial = moe_model("mixtral"), make_trial(2, 1e-3)
    config = add_adapter(model, trial)
    weights = adapter_weights(model, trial.name)
    save_adapter(weights, config, tmp_path)
    tensors = {key.replace("base_model.model.", prefix, 1): value.detach() for key, value in weights.items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    adapter = read_adapter(tmp_path)
    assert adapter.foreign in tensors
    assert {key for layer in adapter.layers for key in layer.keys} == weights.keys(), "written with PEFT's own keys"
