"""Spectra against a dense SVD of PEFT's own updates, in float64, on adapters of every kind of scaling."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from folders import write_model
from rankscope.cli import app
from rankscope.errors import ModelError, StudyError
from rankscope.lora.saved import CONFIG, WEIGHTS, find_adapter, read_adapter
from rankscope.lora.svd import by_module, effective_rank, energy_rank, spectrum, split_layer_name, stable_rank

KINDS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 7},
    "rslora": {"r": 4, "lora_alpha": 7, "use_rslora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {"q_proj": 2, r"layers\.1\.fc1": 6},
        "alpha_pattern": {"q_proj": 3, r"layers\.0\.self_attn\.v_proj": 5},
    },
    "embedding": {"r": 3, "lora_alpha": 3, "target_modules": ["q_proj", "embed_tokens"]},
    "more than the layer": {"r": 40, "lora_alpha": 40},
}


def write_adapter(root: Path, options: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Saves an adapter with random factors by PEFT itself; returns its dense updates, by layer."""
    write_model(root / "model")
    model = AutoModelForCausalLM.from_pretrained(root / "model")
    config = LoraConfig(task_type="CAUSAL_LM", **({"target_modules": ["q_proj", "v_proj", "fc1"]} | options))
    adapted = get_peft_model(model, config)
    torch.manual_seed(0)
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight)
    adapted.save_pretrained(root / "adapter", save_embedding_layers=False)
    layers = [(name, module) for name, module in adapted.named_modules() if isinstance(module, LoraLayer)]
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach() for name, module in layers
    }


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("kind", KINDS)
def test_singular_values_are_those_of_the_whole_update(tmp_path: Path, kind: str) -> None:
    updates = write_adapter(tmp_path, KINDS[kind])
    frame = spectrum(read_adapter(tmp_path / "adapter").layers)
    assert set(frame["layer"]) == set(updates)
    for row in frame.to_dict("records"):
        dense = torch.linalg.svdvals(updates[row["layer"]].double())
        found = torch.tensor(row["singular_values"], dtype=torch.float64)
        torch.testing.assert_close(found, dense[: len(found)], rtol=1e-5, atol=1e-5)
        assert row["frobenius_norm"] == pytest.approx(float(updates[row["layer"]].norm()), rel=1e-5)
        assert 1 <= row["stable_rank"] <= row["effective_rank"] <= row["rank"]
        assert row["rank_90"] <= row["rank_95"] <= row["rank_99"] <= row["rank"]


def test_ranks_of_known_spectra() -> None:
    equal = torch.ones(5, dtype=torch.float64)
    assert effective_rank(equal) == pytest.approx(5)
    assert stable_rank(equal) == pytest.approx(5)
    assert [energy_rank(equal, share) for share in (0.2, 0.21, 0.8, 1.0)] == [1, 2, 4, 5]
    one = torch.tensor([3.0, 0.0], dtype=torch.float64)
    assert effective_rank(one) == pytest.approx(1)
    assert stable_rank(one) == pytest.approx(1)
    assert energy_rank(one, 0.99) == 1
    zero = torch.zeros(4, dtype=torch.float64)
    assert (effective_rank(zero), stable_rank(zero), energy_rank(zero, 0.9)) == (0, 0, 0)


def test_modules_are_told_apart_within_their_block() -> None:
    assert split_layer_name("model.layers.3.self_attn.q_proj") == (3, "self_attn.q_proj")
    assert split_layer_name("transformer.h.11.attn.c_proj") == (11, "attn.c_proj")
    assert split_layer_name("lm_head") == (-1, "lm_head")


def test_means_by_module(tmp_path: Path) -> None:
    write_adapter(tmp_path, KINDS["patterns"])
    frame = spectrum(read_adapter(tmp_path / "adapter").layers)
    table = by_module(frame).set_index("module")
    assert table.loc["fc1", "rank"] == 5  # 4 and 6
    assert table.loc["fc1", "layers"] == 2
    assert table.loc["fc1", "rank_99_max"] == frame[frame["module"] == "fc1"]["rank_99"].max()


def test_what_is_no_factor_is_named(tmp_path: Path) -> None:
    write_adapter(tmp_path, {"r": 2, "use_dora": True})
    adapter = read_adapter(tmp_path / "adapter")
    assert len(adapter.others) == len(adapter.layers)
    assert all("magnitude" in name for name in adapter.others)


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    write_adapter(tmp_path, KINDS["plain"])
    folder = tmp_path / "adapter"
    with pytest.raises(ModelError, match=f"no {CONFIG}"):
        read_adapter(tmp_path / "model")
    tensors = load_file(folder / WEIGHTS)
    first = next(name for name in tensors if "lora_B" in name)
    save_file({name: tensor for name, tensor in tensors.items() if name != first}, folder / WEIGHTS)
    with pytest.raises(ModelError, match="no pair of LoRA factors"):
        read_adapter(folder)
    (folder / WEIGHTS).write_bytes(b"12345678")
    with pytest.raises(ModelError, match="corrupt or incomplete"):
        read_adapter(folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(ModelError, match="missing"):
        read_adapter(folder)
    (folder / CONFIG).write_text('{"peft_type": "IA3"}')
    with pytest.raises(ModelError, match=CONFIG):
        read_adapter(folder)
    with pytest.raises(ModelError, match="no adapter_config"):
        read_adapter(find_adapter(str(tmp_path / "nowhere")))


def test_the_command_shows_draws_and_prints_for_scripts(tmp_path: Path) -> None:
    write_adapter(tmp_path, KINDS["plain"])
    adapter, ask = str(tmp_path / "adapter"), CliRunner().invoke
    table = ask(app, ["spectrum", adapter])
    assert table.exit_code == 0
    assert {"fc1", "self_attn.q_proj", "self_attn.v_proj"} <= set(table.stdout.split())
    found = json.loads(ask(app, ["spectrum", adapter, "--json"]).stdout)
    expected = spectrum(read_adapter(tmp_path / "adapter").layers)
    assert [row["effective_rank"] for row in found["layers"]] == list(expected["effective_rank"])
    for name, begin in (("a.svg", b"<svg"), ("a.png", b"\x89PNG"), ("a.html", b"<!doctype html>")):
        assert ask(app, ["spectrum", adapter, "--chart", str(tmp_path / name)]).exit_code == 0
        assert (tmp_path / name).read_bytes().lstrip().startswith(begin)
    assert "https://cdn" not in (tmp_path / "a.html").read_text()
    other = ask(app, ["spectrum", adapter, "--chart", str(tmp_path / "a.gif")])
    assert isinstance(other.exception, StudyError)
