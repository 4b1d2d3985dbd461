"""Adapters from somebody else: what their two files say is checked, shown as text, and never executed or matched."""

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners import tuners_utils
from peft.tuners.lora import model as lora_model
from peft.utils.other import get_pattern_key
from rich.table import Table
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from folders import write_model
from rankscope import hub
from rankscope.cli import app
from rankscope.errors import ModelError
from rankscope.lora.saved import CONFIG, WEIGHTS, attached, find_adapter, read_adapter
from rankscope.ui.console import PlainConsole

CONFIGURATION = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
Q, V = "model.decoder.layers.0.self_attn.q_proj", "model.decoder.layers.1.self_attn.v_proj"


def factors(*names: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    both = [(f"base_model.model.{name}.lora_{part}.weight", part) for name in names for part in "AB"]
    return {key: torch.randn(2, 32) if part == "A" else torch.randn(32, 2) for key, part in both}


def write(folder: Path, config: Mapping[str, Any] | str, tensors: Mapping[str, torch.Tensor]) -> Path:
    folder.mkdir()
    (folder / CONFIG).write_text(config if isinstance(config, str) else json.dumps(config))
    save_file(dict(tensors), folder / WEIGHTS)
    return folder


CONFIGURATIONS: dict[str, tuple[dict[str, Any] | str, str]] = {
    "a list": ("[]", r"it is \[\]: Input should be a valid dictionary"),
    "null": ("null", "it is None: Input should be a valid dictionary"),
    "nested": ("[" * 100_000, "cannot be read: .*recursion"),
    "alpha is text": ({"lora_alpha": "x"}, "lora_alpha is 'x'"),
    "alpha is null": ({"lora_alpha": None}, "lora_alpha is None"),
    "alpha is a list": ({"lora_alpha": [1]}, r"lora_alpha is \[1\]"),
    "alpha is no number": ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
    "alpha is infinite": ('{"peft_type": "LORA", "r": 2, "lora_alpha": 1e999}', "lora_alpha is inf"),
    "alpha is beyond a float": (
        '{"peft_type": "LORA", "r": 2, "lora_alpha": 1' + "0" * 400 + "}",
        "lora_alpha is 1000",
    ),
    "alpha is true": ({"lora_alpha": True}, "lora_alpha is True"),
    "a pattern is a list": ({"alpha_pattern": ["q_proj"]}, r"alpha_pattern is \['q_proj'\]"),
    "a pattern's alpha is text": ({"alpha_pattern": {"q_proj": "3"}}, "alpha_pattern.q_proj is '3'"),
    "a pattern's rank is 0": ({"rank_pattern": {"q_proj": 0}}, "rank_pattern.q_proj is 0"),
    "a pattern is broken": ({"alpha_pattern": {"(": 3}}, r"alpha_pattern: key '\(': missing \)"),
    "a pattern refers back": ({"rank_pattern": {r"(a)\1": 3}}, "rank_pattern: key .*: only names, .*are supported"),
    "a pattern looks ahead": ({"rank_pattern": {"a(?=b)": 3}}, "rank_pattern: key .*: only names, .*are supported"),
    "the rank is 0": ({"r": 0}, "r is 0"),
    "the rank is true": ({"r": True}, "r is True"),
    "a switch is text": ({"use_rslora": "false"}, "use_rslora is 'false'"),
    "modules to save are patterns": ({"modules_to_save": ["(a+)+"]}, "modules_to_save.0"),
    "Megatron's": ({"megatron_config": {"a": 1}, "megatron_core": "os"}, "megatron_config is"),
}


@pytest.mark.parametrize("what", CONFIGURATIONS)
def test_a_wrong_configuration_is_refused_by_file_and_field(what: str, tmp_path: Path) -> None:
    config, told = CONFIGURATIONS[what]
    folder = write(tmp_path / "a", config if isinstance(config, str) else CONFIGURATION | config, factors(Q))
    with pytest.raises(ModelError, match=f"{CONFIG}: {told}") as error:
        read_adapter(folder)
    assert len(str(error.value).splitlines()) == 2


TENSORS: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "markup of the terminal": (factors("layers.0.[/x]"), r"'layers.0.\[/x\]' is no name of a module"),
    "markup of pages": (factors("layers.0.</script><script>x"), "is no name of a module"),
    "an escape sequence": (factors("layers.0.\x1b[31mq"), r"'layers.0.\\x1b\[31mq' is no name"),
    "a pattern": (factors("layers.(a+)+$"), "is no name of a module"),
    "a number of thousands of digits": (factors(f"layers.{'9' * 5000}.q"), "is no name of a module"),
    "digits that are no number": (factors("layers.²³.q"), "is no name of a module"),
    "the same factor twice": (
        factors(Q) | {f"{Q}.lora_A.weight": torch.zeros(2, 32)},
        f"{Q}.lora_A.weight and .*{Q}.lora_A.weight are one factor",
    ),
    "whole numbers": (
        {key: torch.ones_like(value, dtype=torch.int8) for key, value in factors(Q).items()},
        "is of torch.int8",
    ),
    "rank 0": (
        {key: value[:0] if "A" in key else value[:, :0].contiguous() for key, value in factors(Q).items()},
        r"A \[0, 32\], B \[32, 0\]: no pair of LoRA factors",
    ),
}


@pytest.mark.parametrize("what", TENSORS)
def test_wrong_weights_are_refused_by_file_and_name(what: str, tmp_path: Path) -> None:
    tensors, told = TENSORS[what]
    with pytest.raises(ModelError, match=f"{WEIGHTS}: .*{told}"):
        read_adapter(write(tmp_path / "a", CONFIGURATION, tensors))


def test_null_for_a_switch_is_off(tmp_path: Path) -> None:
    assert read_adapter(write(tmp_path / "a", CONFIGURATION | {"use_rslora": None}, factors(Q))).layers[0].scaling == 2


HOSTILE = r"(([a-z_.]|[0-9])+)+!"


@pytest.fixture
def no_patterns(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT is given names alone, escaped."""

    def refuse(pattern: str, *_: object) -> None:
        raise AssertionError(f"PEFT matches {pattern}")

    def find(keys: Iterable[str], layer: str) -> str:
        assert all("+" not in key for key in keys)
        return get_pattern_key(list(keys), layer)

    monkeypatch.setattr(tuners_utils, "match_target_against_key", refuse)
    monkeypatch.setattr(lora_model, "get_pattern_key", find)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.usefixtures("no_patterns")
def test_patterns_of_the_adapter_do_not_come_to_peft(tmp_path: Path) -> None:
    patterns = {"exclude_modules": HOSTILE, "alpha_pattern": {r"layers\.\d+\.self_attn\.v_proj": 6}}
    config = CONFIGURATION | patterns | {"target_modules": HOSTILE}
    adapter = read_adapter(write(tmp_path / "a", config, factors(Q, V)))
    write_model(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with attached(model, "a", adapter):
        update = model.get_submodule(V).get_delta_weight("a")
        assert not hasattr(model.get_submodule(V.replace("1", "0")), "lora_A")
    layer = next(layer for layer in adapter.layers if layer.layer == V)
    assert layer.scaling == 3
    torch.testing.assert_close(update, layer.scaling * layer.b @ layer.a)


@pytest.mark.usefixtures("no_patterns")
def test_patterns_of_an_adapter_of_experts_do_not_come_to_peft_either(tmp_path: Path) -> None:
    config = CONFIGURATION | {"target_parameters": ["experts.down_proj"], "exclude_modules": HOSTILE}
    adapter = read_adapter(write(tmp_path / "a", config, factors(Q)))
    write_model(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with attached(model, "a", adapter):
        assert hasattr(model.get_submodule(Q), "lora_A")


def test_a_table_shows_text_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(title="[/y]")
    table.add_column("[red]h")
    table.add_row("[/x] :smile: \x1b]0;t\x07")
    PlainConsole(width=60).print(table)
    shown = capsys.readouterr().out
    assert "[/x] :smile: \ufffd]0;t\ufffd" in shown
    assert "[red]h" in shown
    assert "[/y]" in shown


def test_a_revision_of_a_folder_is_an_error(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", CONFIGURATION, factors(Q))
    for arguments in (["spectrum", str(folder)], ["resize", str(folder), "--rank", "1"]):
        found = CliRunner().invoke(app, [*arguments, "--revision", "x"])
        assert isinstance(found.exception, ModelError)
        assert "--revision x, but a folder has no revision" in str(found.exception)


def test_an_adapter_on_the_hub_without_safetensors_is_called_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "repository", lambda *_: hub.Repository("0" * 40, [CONFIG, "adapter_model.bin"], True))
    monkeypatch.setattr(hub, "fetch", lambda *of: Path("/x") / of[-1])
    with pytest.raises(ModelError, match=f"the hub has it, but without {CONFIG} or {WEIGHTS}"):
        find_adapter("someone/adapter")
    monkeypatch.undo()
    with pytest.raises(ModelError, match="not from the hub: not wholly in the cache, and HF_HUB_OFFLINE is set"):
        find_adapter("someone/adapter")


def test_nothing_beside_the_two_files_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unpickled(*_: Any, **__: Any) -> None:
        raise AssertionError("torch.load was called")

    monkeypatch.setattr(torch, "load", unpickled)
    folder = write(tmp_path / "a", CONFIGURATION, factors(Q))
    shutil.move(folder / WEIGHTS, folder / "adapter_model.bin")
    with pytest.raises(ModelError, match=f"{WEIGHTS}: missing"):
        read_adapter(folder)
