"""Mixtures of experts from end to end: two packs, answers, and a report that says what is not read back."""

import json
import shutil
from pathlib import Path

import pytest

import rankscope
from experts import moe_model
from rankscope.lora.saved import read_adapter
from small_study import OPTIONS, SETS


def model_like(root: Path, folder: Path, name: str) -> Path:
    """A mixture of experts with the tokenizer of the model in `root`."""
    shutil.copytree(root / "model", folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    moe_model(name, json.loads((root / "model" / "config.json").read_text())["vocab_size"]).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("name", "modules"), [("mixtral", "all-linear+experts"), ("laguna", "all-linear")])
def test_a_second_pack_trains_and_answers(root: Path, tmp_path: Path, name: str, modules: str) -> None:
    """PEFT nests wrappers around experts, which the first pack's end must not put into themselves."""
    folder = model_like(root, tmp_path / "model", name)
    study = rankscope.run(
        model=str(folder),
        dataset=str(root / "data.json"),
        out=tmp_path / "study",
        target_modules=modules,
        sets=(*SETS, "training.trials_per_pack=1"),
        **(OPTIONS | {"seeds": [0]}),
    )
    assert list(study.results()["status"]) == ["done"] * 2
    assert len(study.division().packs) == 2
    assert set(study.results()["engine"]) == {"packed"}
    assert study.answers() is not None
    folder = study.adapter_file(study.trials[0]).parent
    assert any(layer.of_experts for layer in read_adapter(folder).layers) == (name == "mixtral")
    told = "PEFT does not read back" in (study.path / "report" / "report.md").read_text()
    assert told == ("PEFT does not read back" in (folder / "README.md").read_text()) == (name == "laguna")
