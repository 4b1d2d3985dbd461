"""`adapter.peft` and `--adapter-config`: fields of PEFT's LoraConfig in a study."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from rankscope.errors import StudyError
from rankscope.spec.options import assemble
from rankscope.spec.resolve import resolve_spec, write_yaml

BASE = {"model": {"id": "a/model"}, "data": {"id": "a/dataset"}}
OPTIONS: dict[str, Any] = {
    "exclude_modules": ["lm_head"], "layers_to_transform": [0, 1], "modules_to_save": ["norm"],
    "trainable_token_indices": {"embed_tokens": [3, 4]}, "target_parameters": ["experts.down_proj"],
    "init_lora_weights": "orthogonal", "alpha_pattern": {"q_proj": 8},
}  # fmt: skip


def test_they_are_kept_as_they_are_given() -> None:
    spec = resolve_spec(BASE | {"adapter": {"peft": OPTIONS}})
    assert spec.adapter.peft == OPTIONS
    assert resolve_spec(yaml.safe_load(write_yaml(spec))) == spec
    assert spec.candidates()[0].peft == OPTIONS
    assert len({*spec.trials(), *spec.trials()}) == len(spec.trials()), "trials are keys of mappings"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 8}, "adapter.peft: r is the study's own: give ranks"),
        ({"lora_alpha": 8}, "give adapter.alpha"),
        ({"target_modules": ["q_proj"]}, "give adapter.target_modules"),
        ({"use_dora": True}, r"give variants \(dora\)"),
        ({"rank_pattern": {"q_proj": 2}}, "give adapter.rank_pattern"),
        ({"exclude_module": ["q_proj"]}, "no such field; did you mean exclude_modules?"),
        ({"layers_patern": "h"}, "did you mean layers_pattern?"),
        ({"bias": "all"}, "bias: trains the base's own biases"),
        ({"megatron_core": "os"}, "megatron_core: names code to import"),
        ({"peft_type": "LORA"}, "peft_type: PEFT writes it"),
        ({"init_lora_weights": "pissa_niter_4"}, "variants has pissa and olora"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights: loftq"),
        ({"layers_pattern": "h"}, "layers_to_transform"),  # in PEFT's words
        (["q_proj"], "a mapping of fields"),
    ],
)
def test_what_cannot_be_had_is_named(options: Any, message: str) -> None:
    with pytest.raises(StudyError, match=message):
        resolve_spec(BASE | {"adapter": {"peft": options}})


def written(folder: Path, **changes: Any) -> str:
    """An adapter_config.json as PEFT writes it, with the fields that a newer PEFT has and that are off."""
    from peft import LoraConfig

    values = LoraConfig(r=16, lora_alpha=24, target_modules=["v_proj", "q_proj"], task_type="CAUSAL_LM").to_dict()
    values = values | {"target_modules": ["v_proj", "q_proj"], "from_the_future": None, "also_off": False} | changes
    (folder / "adapter_config.json").write_text(json.dumps(values, default=list))
    return str(folder / "adapter_config.json")


def test_a_file_of_peft_becomes_the_study_s_fields(tmp_path: Path) -> None:
    file = written(tmp_path, lora_dropout=0.1, layers_to_transform=[0], modules_to_save=["norm"], use_rslora=True)
    for source in (file, str(tmp_path)):
        spec = assemble(BASE, {"adapter_config": source})
        assert (spec.adapter.alpha, spec.adapter.lora_dropout, spec.adapter.use_rslora) == (24.0, 0.1, True)
        assert spec.adapter.target_modules == ("q_proj", "v_proj")
        assert spec.adapter.peft == {"layers_to_transform": [0], "modules_to_save": ["norm"]}
        assert spec.ranks == (8, 128, 256), "its rank is no answer to the question"
    over = assemble(BASE, {"alpha": 8, "adapter_config": file, "target_modules": ["k_proj"]})
    assert (over.adapter.alpha, over.adapter.target_modules) == (8.0, ("k_proj",)), "options are over the file"
    assert assemble(BASE, {"adapter_config": written(tmp_path, use_dora=True)}).variants == ("dora",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "not of a LoRA adapter"),
        ({"target_modules": ".*_proj"}, "regular expression"),
        ({"target_modules": ["q_proj", 1]}, "adapter.target_modules: expected all-linear"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern is the study's own"),
        ({"bias": "all"}, "bias: trains"),
        ({"from_the_future": {"a": 1}}, "from_the_future: LoraConfig of PEFT .* has no such field"),
        ({"init_lora_weights": "eva"}, "init_lora_weights: eva"),
    ],
)
def test_what_a_study_cannot_take_from_a_file_is_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=message):
        assemble(BASE, {"adapter_config": written(tmp_path, **changes)})


def test_a_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{")
    for name in ("a.json", "none.json"):
        with pytest.raises(StudyError, match=f"--adapter-config .*{name}: cannot be read"):
            assemble(BASE, {"adapter_config": str(tmp_path / name)})
