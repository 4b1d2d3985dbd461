"""Models and data from somebody else: no code of theirs runs, and only safetensors files are read as weights."""

import io
import json
import os
import pickle  # noqa: TID251  # to show that the trap works
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from folders import write_model
from rankscope.data.conversations import ChatTemplate
from rankscope.data.records import load_records
from rankscope.errors import DataError, ModelError
from rankscope.model.load import commit, load_config, load_model, load_tokenizer, skeleton
from rankscope.spec.models import DataSpec, ModelSpec

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Trap:
    """Leaves a file where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.mark,)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def folder(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A whole model, to be spoilt by a test. What would unpickle is noticed."""

    def unpickled(*_: Any, **__: Any) -> None:
        raise AssertionError("torch.load was called")

    monkeypatch.setattr(torch, "load", unpickled)
    return shutil.copytree(model, tmp_path / "model")


def trapped(folder: Path) -> Path:
    """Code in `folder`, as Python and as pickles under the names that loaders look for, leaves this file."""
    mark = folder.parent / "ran"
    code = f"open({str(mark)!r}, 'w').close()\n"
    for name in ("modeling.py", "model.py", f"{folder.name}.py"):
        (folder / name).write_text(code)
    for name in ("pytorch_model.bin", "adapter_model.bin", "other.bin", "training_args.bin", "data.pkl"):
        (folder / name).write_bytes(pickle.dumps(Trap(mark)))
    return mark


def change(folder: Path, file: str = "config.json", **values: Any) -> None:
    path = folder / file
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | values))


def index(folder: Path, shard: str) -> None:
    """A folder with all weights in `shard`; weights in safetensors lie beside it."""
    weights = shutil.move(folder / "model.safetensors", folder.parent)
    names = load_file(weights)
    change(folder, "model.safetensors.index.json", metadata={}, weight_map=dict.fromkeys(names, shard))


def adapter(folder: Path) -> None:
    change(folder, "adapter_config.json", peft_type="LORA", base_model_name_or_path="someone/else", r=2)


SPOILT: dict[str, tuple[Callable[[Path], None], str]] = {
    "no safetensors": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
    "code for an unknown architecture": (
        lambda folder: change(
            folder, model_type="new", auto_map={"AutoConfig": "modeling.C", "AutoModelForCausalLM": "modeling.M"}
        ),
        "custom code",
    ),
    "a shard that is a pickle": (lambda folder: index(folder, "other.bin"), "'other.bin' as its weights"),
    "a shard elsewhere": (
        lambda folder: index(folder, "../model.safetensors"),
        "'../model.safetensors' as its weights",
    ),
    "weights named by the configuration": (
        lambda folder: change(folder, transformers_weights="adapter_model.bin"),
        "'adapter_model.bin' as its weights",
    ),
    "another index": (
        lambda folder: change(folder, transformers_weights="x.safetensors.index.json"),
        "'x.safetensors.index.json' as its weights",
    ),
    "an adapter in the model": (adapter, "an adapter in it"),
    "attention from the hub": (
        lambda folder: change(folder, attn_implementation="someone/kernel"),
        "someone/kernel",
    ),
    "attention from the hub's own": (
        lambda folder: change(folder, attn_implementation="kernels-community/flash-attn2"),
        "code from the hub",
    ),
}


@pytest.mark.parametrize("what", SPOILT)
def test_a_model_that_would_bring_code_or_pickles_is_refused(what: str, folder: Path) -> None:
    spoil, told = SPOILT[what]
    mark = trapped(folder)
    spoil(folder)
    with pytest.raises(ModelError, match=told):
        load_model(ModelSpec(id=str(folder), device="cpu"))
    assert not mark.exists()


def test_code_beside_a_known_architecture_stays_unread(folder: Path) -> None:
    mark = trapped(folder)
    change(folder, auto_map={"AutoConfig": "modeling.C", "AutoModelForCausalLM": "modeling.M"})
    change(folder, "tokenizer_config.json", auto_map={"AutoTokenizer": ["modeling.T", "modeling.T"]})
    spec = ModelSpec(id=str(folder), device="cpu")
    assert type(load_model(spec)).__module__.startswith("transformers.")
    assert type(skeleton(spec)).__module__.startswith("transformers.")
    assert type(load_tokenizer(spec)).__module__.startswith("transformers.")
    assert not mark.exists()


@pytest.mark.parametrize(
    "expression",
    [
        "cycler.__init__.__globals__.os.system('touch MARK')",
        "messages.append(1)",
        "''.__class__.__mro__[1].__subclasses__()",
    ],
)
def test_a_chat_template_is_rendered_in_a_sandbox(expression: str, folder: Path) -> None:
    mark = folder.parent / "ran"
    tokenizer = load_tokenizer(ModelSpec(id=str(folder)))
    tokenizer.chat_template = "{{ " + expression.replace("MARK", str(mark)) + " }}"
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    with pytest.raises(DataError, match=r"refuses the conversation: .*(unsafe|not safely callable)"):
        ChatTemplate(tokenizer, "assistant").render(row)
    assert not mark.exists()


def test_the_traps_work(folder: Path) -> None:
    mark = trapped(folder)
    pickle.loads((folder / "other.bin").read_bytes())  # noqa: S301
    assert mark.exists()
    mark.unlink()
    subprocess.run([sys.executable, folder / "modeling.py"], check=True)
    assert mark.exists()


def test_data_with_a_loading_script_or_a_pickle_run_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    mark = trapped(folder)
    with pytest.raises(DataError, match="holds no data files; its loading script is not executed"):
        load_records(DataSpec(id=str(folder)))
    with pytest.raises(DataError, match="unknown file type"):
        load_records(DataSpec(id=str(folder / "data.pkl")))
    assert not mark.exists()


@pytest.mark.parametrize("kind", ["tar", "h5", "xml", "lance", "eval", "png", "npy.tar"])
def test_files_that_are_no_plain_rows_are_refused_before_they_are_read(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A .tar of .pth files is what `datasets` reads by torch.load."""

    def unpickled(*_: Any, **__: Any) -> None:
        raise AssertionError("torch.load was called")

    (tmp_path / "rows").mkdir()
    with tarfile.open(tmp_path / "rows" / f"a.{kind}", "w") as archive:
        for name in ("0.instruction.txt", "0.pth"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    monkeypatch.setattr(torch, "load", unpickled)
    with pytest.raises(DataError, match="rows: holds no data files"):
        load_records(DataSpec(id=str(tmp_path / "rows")))


@pytest.mark.parametrize("named", ["../elsewhere/a.json", "{root}/elsewhere/a.json", "rows/../../elsewhere/a.json"])
def test_data_do_not_name_files_elsewhere(named: str, tmp_path: Path) -> None:
    folder, row = tmp_path / "rows", '{"instruction": "a", "output": "b"}\n'
    for place in (folder / "rows", tmp_path / "elsewhere"):
        place.mkdir(parents=True)
        (place / "a.json").write_text(row)
    card = "---\nconfigs:\n- config_name: default\n  data_files: {}\n---\n"
    (folder / "README.md").write_text(card.format(named.format(root=tmp_path)))
    with pytest.raises(DataError, match=r"rows: README\.md names files of the split train that are not there"):
        load_records(DataSpec(id=str(folder)))
    (folder / "README.md").write_text(card.format("rows/*.json"))
    assert len(load_records(DataSpec(id=str(folder))).rows) == 1


def test_the_name_of_a_builder_is_no_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` would take all files of the working directory for it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.json").write_text('{"instruction": "a", "output": "b"}\n')
    for name in ("json", "webdataset"):
        with pytest.raises(DataError, match=f"data set {name}: not wholly in the cache"):
            load_records(DataSpec(id=name))


@pytest.mark.slow
def test_the_hub_s_commit_is_known(model: Path, tmp_path: Path) -> None:
    """A process without network, with one model in its hub cache."""
    repository = tmp_path / "hub" / "models--someone--tiny"
    shutil.copytree(model, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    code = (
        "from rankscope.model.load import commit, load_config, load_model\n"
        "from rankscope.spec.models import ModelSpec\n"
        "spec = ModelSpec(id='someone/tiny', device='cpu')\n"
        "load_config(spec), load_model(spec)\n"
        f"print(commit(spec), commit(spec.model_copy(update={{'revision': '{COMMIT}'}})))"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment, check=False
    )
    assert done.stdout.split() == [COMMIT, COMMIT], done.stderr


def test_a_folder_has_no_commit(model: Path) -> None:
    assert commit(ModelSpec(id=str(model))) is None
    assert load_config(ModelSpec(id=str(model))).model_type == "opt"
