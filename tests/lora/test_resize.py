"""Cut adapters against PEFT's own conversion, kohya's rules, and dense SVDs in float64."""

import itertools
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.conversion import convert_to_lora
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models import tiny_model
from rankscope.errors import ModelError
from rankscope.lora.saved import CONFIG, WEIGHTS, Factors, SavedAdapter, read_adapter, write_adapter
from rankscope.lora.svd import (
    Decomposed,
    check_resizable,
    decompose,
    kept_energy,
    order_by_energy,
    parameters,
    ranks_by_energy,
    ranks_by_sum,
    ranks_of,
    ranks_within,
    relative_error,
    resized,
    uniform_ranks,
)

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("opt-post-norm", {"r": 6, "lora_alpha": 9, "target_modules": "all-linear"}),
    "rslora": ("llama-gqa", {"r": 6, "lora_alpha": 9, "use_rslora": True, "target_modules": "all-linear"}),
    "patterns": (
        "opt-pre-norm",
        {
            "r": 5,
            "lora_alpha": 8,
            "rank_pattern": {"q_proj": 3, r"layers\.1\.fc1": 8},
            "alpha_pattern": {"q_proj": 5, r"layers\.0\.fc2": 2},
            "target_modules": ["q_proj", "fc1", "fc2"],
        },
    ),
    "Conv1D": ("gpt2", {"r": 6, "lora_alpha": 9, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "one block": (
        "llama-gqa",
        {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    ),
    "negative": ("llama-gqa", {"r": 4, "lora_alpha": -3, "target_modules": ["up_proj"]}),
}
EMBEDDING = ("opt-pre-norm", {"r": 4, "lora_alpha": 6, "target_modules": ["embed_tokens", "v_proj"]})
IDS = torch.arange(5, 29)[None]

pytestmark = [
    pytest.mark.filterwarnings("ignore:Converting a PEFT adapter to LoRA that is already"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
]


def fill(model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """Random factors whose updates have falling singular values."""
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(weight, std=0.3)
            is_b = "lora_B" in name or "embedding_B" in name
            weight.data *= 0.8 ** torch.arange(weight.shape[1 if is_b else 0]).reshape(
                [-1 if (axis == 1) == is_b and axis < 2 else 1 for axis in range(weight.dim())]
            )
            weight.data = weight.data.to(dtype)


def save(folder: Path, model: nn.Module, options: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    """Saves an adapter by PEFT itself; returns the model that carries it."""
    config = LoraConfig(**({"task_type": "CAUSAL_LM"} | options))
    adapted = get_peft_model(model, config)  # type: ignore[arg-type]
    fill(adapted, dtype)
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    return adapted.eval()


def with_adapter(model: nn.Module, folder: Path) -> Any:
    """Load an adapter as a user of PEFT does."""
    return PeftModel.from_pretrained(model, str(folder)).eval()  # type: ignore[arg-type]  # noqa: TID251  # just written


def dense_updates(model: nn.Module) -> dict[str, Tensor]:
    """Updates of all layers by PEFT, in the layout (O, D) of their decomposition."""
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            update = layer.get_delta_weight("default").detach().double()  # type: ignore[operator]
            turned = isinstance(layer.get_base_layer(), nn.Embedding) or getattr(layer, "fan_in_fan_out", False)
            found[name.removeprefix("base_model.model.")] = (update.T if turned else update).flatten(1)
    return found


def update_of(factors: Factors) -> Tensor:
    return factors.scaling * factors.b.double() @ factors.a.double()


def best(update: Tensor, rank: int) -> Tensor:
    u, values, v = torch.linalg.svd(update, full_matrices=False)
    return u[:, :rank] * values[:rank] @ v[:rank]


def cut_by(folder: Path, rule: Any, value: Any) -> SavedAdapter:
    adapter = read_adapter(folder)
    layers = [decompose(factors) for factors in adapter.layers]
    return resized(adapter, layers, rule(layers, value))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    out: Tensor = model(input_ids=IDS, use_cache=False).logits
    return out


def apart(model: Any, other: Any) -> float:
    """The difference of their logits, relative."""
    return float((logits(model) - logits(other)).norm() / logits(other).norm())


@pytest.mark.parametrize("rank", [2, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_and_updates_are_those_of_pefts_conversion(tmp_path: Path, kind: str, rank: float) -> None:
    name, options = KINDS[kind]
    model = save(tmp_path / "adapter", tiny_model(name), options)
    _, expected = convert_to_lora(model, rank)
    cut = cut_by(tmp_path / "adapter", uniform_ranks if isinstance(rank, int) else ranks_by_energy, rank)
    assert {factors.keys[0] for factors in cut.layers} == {key for key in expected if "lora_A" in key}
    for factors in cut.layers:
        a, b = (expected[key] for key in factors.keys)
        assert factors.rank == a.shape[0], factors.layer
        update = b.double() @ a.double()
        torch.testing.assert_close(update_of(factors), update, rtol=1e-4, atol=1e-5 * float(update.abs().max()))
    if rank == 0.9 and kind not in ("one block", "negative"):
        assert cut.config.rank_pattern, "the ranks must differ, or little is compared"


def kohya_sv_fro(values: Tensor, target: float) -> int:
    """networks/resize_lora.py of kohya-ss/sd-scripts, `index_sv_fro`, from its definition, without its clip."""
    squares = values**2
    return int(torch.searchsorted(squares.cumsum(0) / float(squares.sum()), target**2)) + 1


def kohya_sv_cumulative(values: Tensor, target: float) -> int:
    """Rank by kohya's `index_sv_cumulative`."""
    return int(torch.searchsorted(values.cumsum(0) / float(values.sum()), target)) + 1


@pytest.mark.parametrize("target", [0.3, 0.6, 0.9, 0.97, 0.999])
def test_ranks_are_kohyas_but_for_its_clip(tmp_path: Path, target: float) -> None:
    name, options = KINDS["patterns"]
    updates = dense_updates(save(tmp_path, tiny_model(name), options))
    layers = [decompose(factors) for factors in read_adapter(tmp_path).layers]
    energy, total = ranks_by_energy(layers, target**2), ranks_by_sum(layers, target)
    for layer in layers:
        values = torch.linalg.svdvals(updates[layer.factors.layer])
        assert energy[layer.factors.layer] == kohya_sv_fro(values, target)
        assert total[layer.factors.layer] == kohya_sv_cumulative(values, target)


def test_kohyas_clip_leaves_out_the_last_singular_value_and_ours_does_not() -> None:
    values = torch.tensor([2.0, 1.0, 1.0], dtype=torch.float64)
    layer = Decomposed(factors("all", 3), torch.eye(3).double(), values, torch.eye(3).double())
    assert kohya_sv_fro(values, 0.99) == kohya_sv_cumulative(values, 0.99) == 3
    clipped = max(1, min(3, len(values) - 1))  # their last line
    assert ranks_by_energy([layer], 0.99**2) == ranks_by_sum([layer], 0.99) == {"all": clipped + 1}


@pytest.mark.parametrize("kind", [*KINDS, "embedding"])
def test_a_cut_is_the_best_approximation_and_loads_as_such(tmp_path: Path, kind: str) -> None:
    """Loaded by PEFT, it gives the logits of the base with the truncated dense update in it."""
    name, options = EMBEDDING if kind == "embedding" else KINDS[kind]
    updates = dense_updates(save(tmp_path / "adapter", tiny_model(name), options))
    cut = cut_by(tmp_path / "adapter", ranks_by_energy, 0.9)
    write_adapter(cut, tmp_path / "cut")
    expected = tiny_model(name)
    if kind == "embedding":
        expected.lm_head.weight = nn.Parameter(expected.lm_head.weight.clone())  # only the input's is adapted
    for factors in cut.layers:
        update = best(updates[factors.layer], factors.rank)
        torch.testing.assert_close(update_of(factors), update, rtol=1e-5, atol=1e-6)
        module = expected.get_submodule(factors.layer)
        turned = isinstance(module, nn.Embedding) or kind == "Conv1D"
        module.weight.data += (update.T if turned else update).float()
    loaded = with_adapter(tiny_model(name), tmp_path / "cut")
    assert {layer.scaling["default"] for layer in loaded.modules() if isinstance(layer, LoraLayer)} == {1.0}
    whole = with_adapter(tiny_model(name), tmp_path / "adapter")
    assert apart(loaded, expected) < 1e-5
    assert apart(loaded, whole) > 1e-3, "the cut must show"


@pytest.mark.parametrize("kind", [*KINDS, "embedding"])
def test_at_full_rank_nothing_changes(tmp_path: Path, kind: str) -> None:
    name, options = EMBEDDING if kind == "embedding" else KINDS[kind]
    expected = save(tmp_path / "adapter", tiny_model(name), options)
    cut = cut_by(tmp_path / "adapter", uniform_ranks, 40)
    write_adapter(cut, tmp_path / "cut")
    assert [factors.rank for factors in cut.layers] == [f.rank for f in read_adapter(tmp_path / "adapter").layers]
    assert apart(with_adapter(tiny_model(name), tmp_path / "cut"), expected) < 1e-5
    assert apart(tiny_model(name), expected) > 1e-2


def test_what_is_no_factor_passes_through_unchanged(tmp_path: Path) -> None:
    options = {"r": 4, "target_modules": ["q_proj", "fc1"], "modules_to_save": ["fc2"], "bias": "all"}
    model = save(tmp_path / "adapter", tiny_model("opt-pre-norm"), options)
    torch.manual_seed(2)
    for name, weight in model.named_parameters():
        if name.endswith("bias") or "modules_to_save" in name:
            nn.init.normal_(weight, std=0.2)
    model.save_pretrained(str(tmp_path / "adapter"))
    cut = cut_by(tmp_path / "adapter", uniform_ranks, 4)
    write_adapter(cut, tmp_path / "cut")
    old, new = (load_file(tmp_path / name / WEIGHTS) for name in ("adapter", "cut"))
    others = {key for key in old if "lora_" not in key}
    assert {key.rsplit(".", 2)[-2] for key in others} >= {"fc2", "base_layer", "final_layer_norm"}
    assert old.keys() == new.keys()
    assert all(torch.equal(old[key], new[key]) for key in others)
    loaded = with_adapter(tiny_model("opt-pre-norm"), tmp_path / "cut")
    assert apart(loaded, model) < 1e-5


def test_what_the_configuration_says_of_the_layers_is_kept(tmp_path: Path) -> None:
    options = KINDS["one block"][1] | {"lora_dropout": 0.1, "exclude_modules": ["k_proj"]}
    save(tmp_path, tiny_model("llama-gqa"), options)
    cut = cut_by(tmp_path, uniform_ranks, 2)
    write_adapter(cut, tmp_path / "cut")
    old, new = (json.loads((folder / CONFIG).read_text()) for folder in (tmp_path, tmp_path / "cut"))
    changed = {name for name in old if old[name] != new[name]}
    assert changed == {"r", "lora_alpha"}
    assert (new["r"], new["lora_alpha"]) == (2, 2)


def test_convolutions(tmp_path: Path) -> None:
    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 5, (1, 3)))

    options = {"r": 4, "lora_alpha": 6, "target_modules": ["0", "1"], "task_type": None}
    updates = dense_updates(save(tmp_path / "adapter", net(), options))
    cut = cut_by(tmp_path / "adapter", uniform_ranks, 2)
    write_adapter(cut, tmp_path / "cut")
    expected, image = net(), torch.randn(2, 3, 6, 6)
    for factors in cut.layers:
        update = best(updates[factors.layer], 2)
        torch.testing.assert_close(update_of(factors), update, rtol=1e-5, atol=1e-6)
        weight = expected.get_submodule(factors.layer).weight
        assert isinstance(weight, Tensor)
        weight.data += update.reshape(weight.shape).float()
    torch.testing.assert_close(with_adapter(net(), tmp_path / "cut")(image), expected(image), rtol=1e-4, atol=1e-4)


def test_a_grouped_convolution_is_told_apart_from_damage(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of merging
        model = get_peft_model(
            nn.Sequential(nn.Conv2d(4, 8, 3, groups=2)),  # type: ignore[arg-type]
            LoraConfig(r=4, target_modules=["0"]),
        )
    model.save_pretrained(str(tmp_path))
    with pytest.raises(ModelError, match="grouped convolution"):
        read_adapter(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_file_keeps_its_type_and_what_rounding_costs_is_counted(tmp_path: Path, dtype: torch.dtype) -> None:
    name, options = KINDS["linear"]
    save(tmp_path / "adapter", tiny_model(name), options, dtype)
    adapter = read_adapter(tmp_path / "adapter")
    cut = cut_by(tmp_path / "adapter", uniform_ranks, 3)
    write_adapter(cut, tmp_path / "cut")
    assert {tensor.dtype for tensor in load_file(tmp_path / "cut" / WEIGHTS).values()} == {dtype}
    for old, new, written in zip(adapter.layers, cut.layers, read_adapter(tmp_path / "cut").layers, strict=True):
        update = update_of(old)
        exact = best(update, 3)
        torch.testing.assert_close(update_of(new), exact, rtol=1e-5, atol=1e-6)  # not yet rounded
        error = float((update - update_of(written)).norm() / update.norm())
        assert relative_error(old, new) == pytest.approx(error, rel=1e-9)
        assert error == pytest.approx(float((update - exact).norm() / update.norm()), rel=1e-2)
        assert float((update_of(written) - exact).norm() / exact.norm()) < 2 * torch.finfo(dtype).eps


def test_zero_updates_are_cut_to_rank_1(tmp_path: Path) -> None:
    name, options = KINDS["linear"]
    get_peft_model(tiny_model(name), LoraConfig(task_type="CAUSAL_LM", **options)).save_pretrained(str(tmp_path / "a"))
    adapter = read_adapter(tmp_path / "a")
    layers = [decompose(factors) for factors in adapter.layers]
    ones = dict.fromkeys((factors.layer for factors in adapter.layers), 1)
    assert ranks_by_energy(layers, 0.9) == ranks_by_sum(layers, 0.9) == ranks_within(layers, 10**9) == ones
    assert order_by_energy(layers) == []
    cut = resized(adapter, layers, ones)
    assert kept_energy(layers, ones) == 1.0
    assert {relative_error(old, new) for old, new in zip(adapter.layers, cut.layers, strict=True)} == {0.0}
    write_adapter(cut, tmp_path / "cut")
    assert torch.equal(logits(with_adapter(tiny_model(name), tmp_path / "cut")), logits(tiny_model(name)))


def factors(name: str, rank: int, outputs: int = 3, inputs: int = 3) -> Factors:
    return Factors(name, torch.zeros(rank, inputs), torch.zeros(outputs, rank), 1.0, (f"{name}.A", f"{name}.B"))


def spectra(*values: tuple[int, list[float]]) -> list[Decomposed]:
    """Layers of so many parameters a rank, with these singular values."""
    return [
        Decomposed(
            factors(f"layer{number}", len(ones)),
            torch.zeros(size - 1, len(ones)),
            torch.tensor(ones, dtype=torch.float64),
            torch.zeros(len(ones), 1),
        )
        for number, (size, ones) in enumerate(values)
    ]


def energy_of(layers: list[Decomposed], ranks: dict[str, int]) -> float:
    return sum(float((layer.values[: ranks[layer.factors.layer]] ** 2).sum()) for layer in layers)


@pytest.mark.parametrize("same_size", [True, False])
@pytest.mark.parametrize("seed", range(8))
def test_ranks_within_against_every_division(same_size: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sizes = [7, 7, 7] if same_size else [5, 8, 12]
    layers = spectra(*((size, torch.rand(4, generator=generator).sort(descending=True)[0].tolist()) for size in sizes))
    names = [layer.factors.layer for layer in layers]
    every = [dict(zip(names, ranks, strict=True)) for ranks in itertools.product(range(1, 5), repeat=3)]
    for budget in range(sum(sizes), 4 * sum(sizes) + 2):
        found = ranks_within(layers, budget)
        assert parameters(layers, found) <= budget
        most = max(energy_of(layers, ranks) for ranks in every if parameters(layers, ranks) <= budget)
        left_out = [
            float(layer.values[found[name]] ** 2)
            for name, layer in zip(names, layers, strict=True)
            if found[name] < len(layer.values)
        ]
        lost = most - energy_of(layers, found)
        assert lost == pytest.approx(0) if same_size or not left_out else lost < max(left_out)


def test_many_small_directions_are_better_than_a_large_one() -> None:
    """The large layer's directions have more energy each, but less for each of their parameters."""
    layers = spectra((2, [1.0] * 10), (18, [1.2, 1.2]))
    assert ranks_within(layers, 20 + 18) == {"layer0": 10, "layer1": 1}


def test_the_order_grows_as_its_rule_does(tmp_path: Path) -> None:
    name, options = KINDS["patterns"]
    save(tmp_path, tiny_model(name), options)
    layers = [decompose(factors) for factors in read_adapter(tmp_path).layers]
    by_energy = order_by_energy(layers)
    for length in range(0, len(by_energy), 5):
        ranks = ranks_of(layers, by_energy[:length])
        assert ranks_within(layers, parameters(layers, ranks)) == ranks


def test_a_pattern_is_of_one_layer_alone() -> None:
    """PEFT takes a key for any name that ends in it."""
    model = nn.ModuleDict(
        {"fc": nn.Linear(4, 4), "block": nn.ModuleDict({"fc": nn.Linear(4, 4), "gc": nn.Linear(4, 4)})}
    )
    names = {"fc": 1, "block.fc": 3, "block.gc": 2}
    layers = [
        Decomposed(factors(name, 3, 4, 4), torch.eye(4).double(), torch.ones(4).double(), torch.eye(4).double())
        for name in names
    ]
    adapter = SavedAdapter(LoraConfig(r=3, target_modules=["fc", "gc"]), [layer.factors for layer in layers], {})
    config = resized(adapter, layers, names).config
    assert config.r == 3
    assert set(config.rank_pattern) == {"^fc", "block.gc"}
    injected = get_peft_model(model, config)  # type: ignore[arg-type]
    found = {name: layer for name, layer in injected.named_modules() if isinstance(layer, LoraLayer)}
    assert {name.removeprefix("base_model.model."): layer.r["default"] for name, layer in found.items()} == names


@pytest.mark.filterwarnings("ignore:Adapter 'default'. 2 LoRA tensor")  # PEFT's, of its own biases
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "pissa"}, "base model that pissa changed"),
        ({"init_lora_weights": "pissa_niter_2"}, "base model that pissa_niter_2 changed"),
        ({"init_lora_weights": "olora"}, "base model that olora changed"),
    ],
)
def test_more_than_plain_lora_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], **options)
    get_peft_model(tiny_model("opt-post-norm"), config).save_pretrained(str(tmp_path))
    with pytest.raises(ModelError, match=message):
        check_resizable(read_adapter(tmp_path))


@pytest.mark.parametrize("start", ["mica", "orthogonal", "eva"])
def test_starts_that_leave_the_base_as_it_is_are_cut(tmp_path: Path, start: str) -> None:
    options: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "fc1"], "init_lora_weights": start}
    if start == "eva":
        options["eva_config"] = EvaConfig()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of a start that is not made yet
        model = save(tmp_path / "adapter", tiny_model("opt-pre-norm"), options)
    adapter = read_adapter(tmp_path / "adapter")
    assert adapter.config.init_lora_weights == start
    check_resizable(adapter)
    write_adapter(cut_by(tmp_path / "adapter", uniform_ranks, 4), tmp_path / "cut")
    assert read_adapter(tmp_path / "cut").config.init_lora_weights is True
    assert apart(with_adapter(tiny_model("opt-pre-norm"), tmp_path / "cut"), model) < 1e-5


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights")
def test_pissa_that_peft_made_plain_is_cut(tmp_path: Path) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=2, target_modules=["q_proj"], init_lora_weights="pissa")
    model = get_peft_model(tiny_model("opt-post-norm"), config)
    model.peft_config["default"].init_lora_weights = True  # as PEFT's guide has it
    model.save_pretrained(str(tmp_path / "start"))
    model.peft_config["default"].init_lora_weights = "pissa"
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data += 0.1
    model.save_pretrained(str(tmp_path / "plain"), path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    adapter = read_adapter(tmp_path / "plain")
    check_resizable(adapter)
    cut = cut_by(tmp_path / "plain", uniform_ranks, 4)
    write_adapter(cut, tmp_path / "cut")
    loaded = with_adapter(tiny_model("opt-post-norm"), tmp_path / "cut")
    assert [factors.rank for factors in adapter.layers] == [4, 4]
    assert apart(loaded, model) < 1e-4


@pytest.mark.parametrize(
    ("field", "value"),
    [("use_new_variant", True), ("ensure_weight_tying", True)],
)
def test_what_a_configuration_asks_for_beyond_factors_is_refused(tmp_path: Path, field: str, value: Any) -> None:
    save(tmp_path, tiny_model("opt-post-norm"), KINDS["linear"][1])
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | {"size_of_what_is_off": 16}))
    check_resizable(read_adapter(tmp_path))
    (tmp_path / CONFIG).write_text(json.dumps(config | {field: value}))
    with pytest.raises(ModelError, match=field):
        check_resizable(read_adapter(tmp_path))


def test_files_that_disagree_or_hold_no_numbers_are_refused(tmp_path: Path) -> None:
    save(tmp_path, tiny_model("opt-post-norm"), KINDS["linear"][1])
    config, tensors = json.loads((tmp_path / CONFIG).read_text()), load_file(tmp_path / WEIGHTS)
    (tmp_path / CONFIG).write_text(json.dumps(config | {"r": 5}))
    with pytest.raises(ModelError, match=r"has rank 6, but adapter_config.json says 5"):
        read_adapter(tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps(config))
    first = next(iter(tensors))
    tensors[first][0, 0] = torch.nan
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(ModelError, match="NaN or infinity"):
        read_adapter(tmp_path)
