"""`rankscope export` as a user meets it: what is written loads by plain transformers and PEFT, from any folder."""

import errno
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from peft.utils import CONFIG_NAME as CONFIG
from peft.utils import SAFETENSORS_WEIGHTS_NAME as WEIGHTS
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

from export.loaded import logits, own_logits
from rankscope.cli import app, main
from rankscope.data.tokens import load
from rankscope.errors import ModelError, RankscopeError, StudyDirectoryError, StudyError
from rankscope.export.command import export
from rankscope.export.show import deletable
from rankscope.export.write import load_plain
from rankscope.files import read_json, write_json
from rankscope.lora.saved import read_adapter
from rankscope.model.load import fingerprint, load_model
from rankscope.resize.loss_budget import held_out_losses
from rankscope.spec.models import ModelSpec
from rankscope.study.study import Study

RANK = 8


def run(study: Study, *arguments: object) -> Result:
    return CliRunner().invoke(app, ["export", str(study.path), *map(str, arguments)])


def answer(study: Study, *arguments: object) -> Any:
    done = run(study, *arguments, "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    return json.loads(done.stdout)


def files_of(folder: Path) -> dict[str, int]:
    return {str(file): file.stat().st_mtime_ns for file in sorted(folder.rglob("*")) if not file.name.startswith(".")}


def test_an_adapter_is_used_from_any_folder(trained: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, out = files_of(trained.path), tmp_path / "my adapter's"
    found = answer(trained, "--rank", RANK, "--out", out)
    assert files_of(trained.path) == before, "a study is read only"
    losses = {int(seed): loss for seed, loss in found["seeds"].items()}
    assert set(losses) == {0, 1}
    assert found["trial"] == f"r008-lr3e-2-s{min(losses, key=losses.__getitem__)}"
    assert found["held_out_loss"] == pytest.approx(min(losses.values()))
    config = json.loads((out / CONFIG).read_text())
    assert Path(config["base_model_name_or_path"]).is_absolute()
    assert all("." not in name for name in config["target_modules"])
    shutil.move(out, tmp_path / "moved")
    monkeypatch.chdir("/")
    model = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "moved"))  # just written
    torch.testing.assert_close(logits(model, trained), own_logits(trained, found["trial"]), rtol=1e-5, atol=1e-5)
    assert list(found["deployed"]) == ["float32"]
    deployed = found["deployed"]["float32"]
    assert abs(deployed["lost"]) < 1e-5
    assert deployed["lost_low"] <= deployed["lost"] <= deployed["lost_high"]
    assert AutoTokenizer.from_pretrained(tmp_path / "moved")("Sort")["input_ids"]
    card = (tmp_path / "moved" / "README.md").read_text()
    assert trained.spec.data.template in card
    assert f"| Held-out loss, loaded as float32 | {deployed['loss']:.4f} |" in card


FORMS = [("bf16", torch.bfloat16, 0.2), pytest.param("float32", torch.float32, 1e-5, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("form", "dtype", "near"), FORMS)
def test_a_merged_model_is_used_alone(
    trained: Study, tmp_path: Path, form: str, dtype: torch.dtype, near: float
) -> None:
    found = answer(trained, "--rank", RANK, "--merge", form, "--out", tmp_path / "merged")
    assert not (tmp_path / "merged" / CONFIG).exists()
    assert {weight.dtype for weight in load_file(tmp_path / "merged" / "model.safetensors").values()} == {dtype}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert model.config.use_cache
    own = own_logits(trained, found["trial"])
    torch.testing.assert_close(logits(model, trained).float(), own, rtol=near, atol=near)
    deployed = found["deployed"][form]
    assert deployed["lost"] == pytest.approx(deployed["loss"] - found["held_out_loss"], abs=1e-9)
    assert (abs(deployed["lost"]) > 1e-6) == (form == "bf16"), "rounded weights have another loss"
    assert list(found["serve"]) == ["transformers", "vLLM", "llama.cpp"]
    assert "--enable-lora" not in found["serve"]["vLLM"]


def test_what_is_said(trained: Study, tmp_path: Path) -> None:
    for language, said in (("en", "lowest held-out loss of 2 seeds"), ("ko", "시드 2개 중 검증 손실이 가장 낮습니다")):
        done = run(trained, "--rank", RANK, "--out", tmp_path / language, "--lang", language)
        assert done.exit_code == 0, done.exception
        assert said in done.stdout
        lines = " ".join(done.stdout.split())
        assert f"--enable-lora --max-lora-rank 8 --lora-modules {language}={tmp_path / language}" in lines
        assert "convert_lora_to_gguf.py" in done.stdout
        assert "2 → 8" in done.stdout
        assert "trials/*/adapter" in done.stdout
        assert "{" not in done.stdout.replace("{input}", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rank", 3], "no trial of rank 3 is done"),
        (["--rank", 2, "--trial", "r002-lr3e-2-s0"], "Name one of trials/, without --rank"),
        (["--trial", "r008-lr3e-2-s9"], "--trial r008-lr3e-2-s9: no trial of that name is done"),
        (["--rank", 2, "--merge", "bf61"], "--merge bf61: unknown"),
        (["--rank", 2, "--over", "nf4,fp8"], "--over fp8: unknown"),
        (["--rank", 2, "--push", "mine"], "--push mine: not OWNER/NAME"),
        (["--rank", 2, "--push", "me/mine"], "is on this machine alone"),
        (["--rank", 2, "--model", "/no/such"], "no such folder"),
    ],
)
def test_what_cannot_be_meant_is_refused(trained: Study, tmp_path: Path, arguments: list[Any], message: str) -> None:
    done = run(trained, *arguments, "--out", tmp_path / "out")
    assert isinstance(done.exception, RankscopeError), done.output
    assert message in str(done.exception)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten_and_nothing_is_left_by_a_failure(
    trained: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("mine")
    with pytest.raises(StudyError, match="not empty"):
        export(trained, tmp_path / "taken", RANK)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("rankscope.export.write.shutil.copyfile", full)
    with pytest.raises(StudyDirectoryError, match="cannot be written: No space left on device"):
        export(trained, tmp_path / "out", RANK)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken"]


def test_where_a_base_is_now_is_asked_for(trained: Study, tmp_path: Path) -> None:
    spec = trained.spec.model_copy(update={"model": trained.spec.model.model_copy(update={"id": "gone"})})
    with pytest.raises(ModelError, match="model gone: the study began with a folder") as found:
        export(Study.of(trained, spec), tmp_path / "out", RANK)
    assert "--model PATH" in found.value.todo


def test_a_base_that_is_another_now_is_refused(trained: Study, tmp_path: Path) -> None:
    shutil.copytree(trained.spec.model.id, tmp_path / "model")
    elsewhere = export(trained, tmp_path / "moved", RANK, model=str(tmp_path / "model"))
    assert elsewhere.made.config.base_model_name_or_path == str(tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    changed = {name: weight + 0.01 for name, weight in weights.items()}
    save_file(changed, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    for merge in (None, "bf16"):
        with pytest.raises(ModelError, match="not the weights that the study was trained on"):
            export(trained, tmp_path / "out", RANK, merge=merge, model=str(tmp_path / "model"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("merge", [None, "bf16"])
def test_a_quantized_base_that_is_another_now_is_refused(trained: Study, tmp_path: Path, merge: str | None) -> None:
    base = trained.spec.model.model_copy(update={"quantization": "nf4"})
    study = Study.of(trained, trained.spec.model_copy(update={"model": base}))
    with pytest.raises(ModelError, match="not the weights that the study was trained on"):
        export(study, tmp_path / "out", RANK, merge=merge)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantized_base_has_the_hash_of_the_study(trained: Study, kind: str) -> None:
    spec = ModelSpec.model_validate(trained.spec.model.model_dump() | {"quantization": kind})
    model = load_plain(spec, kind, fingerprint(load_model(spec)))
    assert not any(getattr(layer, "support_avx512bf16_for_cpu", False) for layer in model.modules())


@pytest.mark.parametrize("command", ["export", "resize"])
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory. Tried to allocate 9 GiB."),
        MemoryError("Tried to allocate 9 GiB."),
        OSError(errno.ENOMEM, "Tried to allocate 9 GiB."),
    ],
    ids=lambda error: type(error).__name__,
)
def test_out_of_memory_has_a_way_out(
    trained: Study,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    error: Exception,
) -> None:
    """Where the base is loaded for an export and, by `load_model`, to measure an adapter."""

    def full(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("rankscope.export.write.AutoModelForCausalLM.from_pretrained", full)
    adapter = trained.adapter_file(trained.spec.trials()[0]).parent
    asked = {"export": [trained.path, "--rank", 8], "resize": [adapter, "--max-loss-increase", 0.1]}
    monkeypatch.setattr(sys, "argv", ["rankscope", command, *map(str, asked[command]), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="1"):
        main()
    assert re.search(r"(?s)error: .*Tried to allocate 9 GiB\..*--device cpu", capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


def test_a_corrupt_adapter_is_refused(trained: Study, tmp_path: Path) -> None:
    shutil.copytree(trained.path, tmp_path / "study")
    for folder in (tmp_path / "study" / "trials").iterdir():
        (folder / "adapter" / WEIGHTS).write_bytes(b"x")
    with pytest.raises(StudyDirectoryError, match="does not match its hash"):
        export(Study.open(tmp_path / "study"), tmp_path / "out", RANK)


def test_one_trained_again_has_a_card_of_its_own_and_is_not_to_be_deleted(trained: Study, tmp_path: Path) -> None:
    shutil.copytree(trained.path, tmp_path / "study")
    study = Study.open(tmp_path / "study")
    own, other = [trial for trial in study.trials if trial.candidate.rank == RANK]
    data = load(study.path / "data")
    rows = len(data.train) + len(data.eval)
    again = tmp_path / "study" / "retrained" / f"{own.name}-{rows}-rows"
    shutil.copytree(study.trial_folder(other), again)  # as if it had been trained: what is done is used again
    record = read_json(again / "trial.json")
    record["results"] |= {"steps": 7, "train_loss": 1.2345}
    write_json(again / "trial.json", record)
    found = export(study, study.path / "retrained" / "out", trial=own.name, retrain=True)
    card = (study.path / "retrained" / "out" / "README.md").read_text()
    assert "| Steps | 7, 4 examples per step |" in card
    assert "| Training loss | 1.2345, " in card
    assert f": {rows} rows, none held out, loss on " in card
    assert [name for name in ("| Held-out loss", "Perplexity", "Token accuracy") if name in card] == []
    assert list(deletable(found)) == ["adapters"]
    elsewhere = found._replace(made=found.made._replace(folder=tmp_path / "out"))
    assert list(deletable(elsewhere)) == ["adapters", "retrained", "study"]


@pytest.mark.slow
def test_trained_again_on_all_rows(trained: Study, tmp_path: Path) -> None:
    shutil.copytree(trained.path, tmp_path / "study")
    study, said = Study.open(tmp_path / "study"), list[str]()
    found = export(study, tmp_path / "out", RANK, retrain=True, merge="float32", say=said.append)
    data = load(study.path / "data")
    rows = len(data.train) + len(data.eval)
    assert f"Training {found.trial.name} on all {rows:,} rows" in said
    again = read_adapter(study.path / "retrained" / f"{found.trial.name}-{rows}-rows" / "adapter")
    own = read_adapter(study.trial_folder(found.trial) / "adapter")
    assert any(not torch.equal(one.b, other.b) for one, other in zip(again.layers, own.layers, strict=True))
    whole = held_out_losses(load_model(study.spec.model), again, data.eval).mean
    assert found.before.mean == pytest.approx(whole, rel=1e-5)
    assert found.deployed["float32"][0].mean == pytest.approx(whole, rel=1e-5)
    assert "After training on the held-out rows too" in (tmp_path / "out" / "README.md").read_text()
    said.clear()
    export(study, tmp_path / "again", RANK, retrain=True, say=said.append)
    assert not any("Training" in line for line in said), "what is done is used again"
    assert study.results()["status"].eq("done").all()
