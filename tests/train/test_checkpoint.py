"""A pack that is stopped goes on bitwise as if it had not been."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import rankscope.train.loop as loop
from folders import write_model
from rankscope.data.tokens import TokenizedData
from rankscope.errors import ModelError
from rankscope.files import read_json, write_json
from rankscope.model.load import load_model
from rankscope.spec.models import AdapterSpec, DataSpec, ModelSpec, StudySpec, TrainingSpec
from rankscope.study.metrics import read_rows
from rankscope.train.loop import train_pack
from rankscope.train.stopping import StopRequest
from reference import random_tokens

STEPS = 9  # of 8 examples each, of 40: the second epoch begins in the fifth


class Stopped(Exception):
    pass


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def data() -> TokenizedData:
    return TokenizedData(random_tokens(36), random_tokens(8, seed=1), {})


@pytest.fixture(scope="module")
def whole(model: str, data: TokenizedData, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Contents of a pack that was not stopped."""
    folder = tmp_path_factory.mktemp("whole")
    train(study(model), data, folder)
    return contents(folder)


@pytest.fixture(scope="module")
def stopped_pack(model: str, data: TokenizedData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pack that was stopped in its eighth step, with the checkpoints of two."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 7)
        with pytest.raises(Stopped):
            train(study(model), data, folder)
    return folder


@pytest.fixture
def stopped(stopped_pack: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped_pack, tmp_path / "stopped"))


def study(model: str, **training: Any) -> StudySpec:
    recipe = {"steps": STEPS, "batch_size": 4, "gradient_accumulation_steps": 2, "checkpoint_steps": 2, "evals": 3}
    return StudySpec(
        model=ModelSpec(id=model, device="cpu"),
        data=DataSpec(id="unused"),
        ranks=(2, 8),
        seeds=(0,),
        learning_rates=(1e-3,),
        adapter=AdapterSpec(lora_dropout=0.1),
        training=TrainingSpec(**(recipe | training)),
    )


def train(spec: StudySpec, data: TokenizedData, folder: Path, sha: str = "hash", most: int | None = None) -> None:
    trials = spec.trials()[:most]
    folders = {trial.name: folder / trial.name for trial in trials}
    train_pack(load_model(spec.model), spec, trials, folders, folder / "checkpoints", data, "p000", sha, StopRequest())


def stop_after(monkeypatch: pytest.MonkeyPatch, calls: int, name: str = "train_step") -> None:
    """Raises at the `calls`th call of a function of the loop after this."""
    own, left = getattr(loop, name), calls

    def stopping(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise Stopped
        return own(*args, **kwargs)

    monkeypatch.setattr(loop, name, stopping)


def contents(folder: Path) -> dict[str, Any]:
    """State that must be the same with and without a stop."""
    found: dict[str, Any] = {}
    for file in sorted(folder.glob("*/*")) + sorted(folder.glob("*/adapter/*")):
        if file.name == "metrics.jsonl":
            found[str(file.relative_to(folder))] = [row | {"step_seconds": 0} for row in read_rows(file)]
        elif file.name == "trial.json":
            record = read_json(file)
            record["results"] = {k: v for k, v in record["results"].items() if "second" not in k}
            del record["files"]["metrics.jsonl"]  # times differ
            found[str(file.relative_to(folder))] = record
        elif file.is_file():
            found[str(file.relative_to(folder))] = file.read_bytes()
    return found


@pytest.mark.parametrize(
    ("training", "stops"),
    [
        pytest.param({}, (1,), marks=pytest.mark.slow),
        pytest.param({}, (8,), marks=pytest.mark.slow),
        ({}, (3, 2, 1)),
        ({"engine": "peft"}, (5,)),
        pytest.param({"lr_scheduler_type": "constant"}, (5,), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_stopped_pack_goes_on_bitwise(
    model: str,
    data: TokenizedData,
    whole: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    training: dict[str, Any],
    stops: Sequence[int],
) -> None:
    spec, expected = study(model, **training), whole
    if training:
        train(spec, data, tmp_path / "whole")
        expected = contents(tmp_path / "whole")
    for stop in stops:
        with monkeypatch.context() as patch:
            stop_after(patch, stop)
            with pytest.raises(Stopped):
                train(spec, data, tmp_path / "stopped")
    done: list[int] = []
    with monkeypatch.context() as patch:
        own = loop.train_step
        patch.setattr(loop, "train_step", lambda *args: (done.append(args[-1]), own(*args))[1])
        train(spec, data, tmp_path / "stopped")
    assert len(done) == STEPS - sum(stop - stop % 2 for stop in stops), "it did not go on from the last checkpoint"
    assert {Path(name).name for name in expected} >= {"metrics.jsonl", "eval.json", "trial.json"}
    assert any(name.endswith("adapter_model.safetensors") for name in expected)
    assert without_checkpoints(contents(tmp_path / "stopped")) == without_checkpoints(expected)


def without_checkpoints(found: dict[str, Any]) -> dict[str, Any]:
    return {name: content for name, content in found.items() if not name.startswith("checkpoints")}


def test_the_bases_own_dropout_goes_on_bitwise(
    model: str, data: TokenizedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = study(model, base_dropout="keep")
    train(spec, data, tmp_path / "whole", most=1)
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(Stopped):
            train(spec, data, tmp_path / "stopped", most=1)
    train(spec, data, tmp_path / "stopped", most=1)
    name = spec.trials()[0].name
    assert contents(tmp_path / "stopped")[f"{name}/eval.json"] == contents(tmp_path / "whole")[f"{name}/eval.json"]


def test_a_trial_that_is_done_stays_as_it_is(
    model: str, data: TokenizedData, whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process ends between the last files of the first trial and those of the second."""
    spec = study(model)
    first, second = (trial.name for trial in spec.trials())
    with monkeypatch.context() as patch:
        stop_after(patch, 1, "_finish")
        with pytest.raises(Stopped):
            train(spec, data, tmp_path)
    files = {file: file.read_bytes() for file in (tmp_path / first).rglob("*") if file.is_file()}
    assert read_json(tmp_path / second / "trial.json")["status"] == "running"
    train(spec, data, tmp_path)
    assert {file: file.read_bytes() for file in files} == files
    assert contents(tmp_path)[f"{second}/eval.json"] == whole[f"{second}/eval.json"]


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        ("tensors.safetensors", "flip"),
        ("tensors.safetensors", "gone"),
        ("state.json", "cut"),
        pytest.param("state.json", "flip", marks=pytest.mark.slow),
        ("manifest.json", "cut"),
        pytest.param("manifest.json", "gone", marks=pytest.mark.slow),
    ],
)
def test_a_damaged_checkpoint_is_seen_and_the_other_used(
    model: str,
    data: TokenizedData,
    whole: dict[str, Any],
    stopped: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    harm: str,
) -> None:
    checkpoints = sorted((stopped / "checkpoints").iterdir())
    assert [folder.name for folder in checkpoints] == ["step-00000004", "step-00000006"]
    file = checkpoints[1] / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    if harm == "gone":
        file.unlink()
    else:
        file.write_bytes(content if harm == "flip" else content[: len(content) // 2])
    steps: list[int] = []
    own = loop.train_step
    monkeypatch.setattr(loop, "train_step", lambda *args: (steps.append(args[-1]), own(*args))[1])
    train(study(model), data, stopped)
    assert steps[0] == 4
    trial = f"{study(model).trials()[1].name}/metrics.jsonl"
    assert contents(stopped)[trial] == whole[trial]


def test_another_model_is_refused(model: str, data: TokenizedData, stopped: Path) -> None:
    with pytest.raises(ModelError, match="not the one that this study began with"):
        train(study(model), data, stopped, sha="another")


def test_a_checkpoint_of_other_trials_is_not_used(
    model: str, data: TokenizedData, stopped: Path, tmp_path: Path
) -> None:
    spec = study(model)
    train(spec, data, stopped, most=1)
    steps = [row["step"] for row in read_rows(stopped / spec.trials()[0].name / "metrics.jsonl")]
    assert sorted(set(steps)) == list(range(STEPS + 1))
    train(spec, data, tmp_path / "alone", most=1)
    name = f"{spec.trials()[0].name}/eval.json"
    assert (stopped / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    assert [folder.name for folder in sorted((stopped / "checkpoints").iterdir())] == [
        "step-00000008",
        "step-00000009",
    ]


@pytest.mark.parametrize("harm", [pytest.param("cut", marks=pytest.mark.slow), "flip"])
def test_damaged_lines_are_seen_and_trained_again(
    model: str, data: TokenizedData, whole: dict[str, Any], stopped: Path, harm: str
) -> None:
    name = f"{study(model).trials()[1].name}/metrics.jsonl"
    file = stopped / name
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:3]) if harm == "cut" else file.read_text().replace("1", "2", 1))
    train(study(model), data, stopped)
    assert contents(stopped)[name] == whole[name]


def test_a_manifest_that_names_other_files_is_none(model: str, data: TokenizedData, stopped: Path) -> None:
    for folder in (stopped / "checkpoints").iterdir():
        write_json(folder / "manifest.json", {"schema": 1, "files": {"../../x": "y"}})
    train(study(model), data, stopped)
    assert json.loads((stopped / study(model).trials()[0].name / "trial.json").read_text())["status"] == "done"


def test_8_bit_states_go_on_bitwise(data: TokenizedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters of 64 by 128 and more have states in 8 bits, biases of none; LoRA+ has rates of its own."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=131, pad_token_id=1)).save_pretrained(tmp_path / "model")
    spec = study(str(tmp_path / "model"), optim="adamw_8bit", weight_decay=0.1)
    spec = spec.model_copy(update={"ranks": (2, 64), "variants": ("loraplus",)})
    train(spec, data, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(Stopped):
            train(spec, data, tmp_path / "stopped")
    kept = load_file(tmp_path / "stopped" / "checkpoints" / "step-00000004" / "tensors.safetensors")
    assert {kept[name].dtype for name in kept if name.endswith("/state1")} == {torch.uint8, torch.float32}
    assert {int(kept[name]) for name in kept if name.endswith("/step")} == {4}
    train(spec, data, tmp_path / "stopped")
    assert without_checkpoints(contents(tmp_path / "stopped")) == without_checkpoints(contents(tmp_path / "whole"))
