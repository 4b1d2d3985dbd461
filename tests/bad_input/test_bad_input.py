"""Malformed data, models and studies: a few lines that say what, where and what to do, and nothing half made."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM

import forking
from folders import write_data, write_model
from rankscope import cli

ROWS = [{"instruction": f"Do {i}", "input": "", "output": f"done {i}"} for i in range(40)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
CHAT = "".join(
    json.dumps({"messages": [{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "ok"}]}) + "\n"
    for i in range(40)
)


def chat(*messages: dict[str, str]) -> str:
    return CHAT + json.dumps({"messages": messages}) + "\n"


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


# name of the file, its content, further options, what the error says
DATA: dict[str, tuple[str, str | bytes, list[str], list[str]]] = {
    "empty": ("a.json", "", [], ["a.json: no rows"]),
    "blank lines": ("a.jsonl", "\n\n  \n", [], ["a.jsonl: no rows"]),
    "json at line 3": ("a.jsonl", LINES.replace('"Do 2"', "Do 2"), [], ["a.jsonl, line 3: not valid JSON"]),
    "torn list": ("a.json", json.dumps(ROWS)[:-9], [], ["a.json, line 1: not valid JSON"]),
    "html": ("a.json", "<!DOCTYPE html>\n", [], ["a.json, line 1: not valid JSON"]),
    "list of text": ("a.json", '["a", "b"]', [], ["a.json", "text"]),
    "line is no object": ("a.jsonl", LINES + "3\n", [], ["a.jsonl, line 41"]),
    "utf-16": ("a.json", LINES.encode("utf-16"), [], ["a.json, line 1: not valid UTF-8", "Save the file as UTF-8"]),
    "utf-8": ("a.jsonl", LINES.encode().replace(b"Do 5", b"Do \xff"), [], ["a.jsonl, line 6: not valid UTF-8"]),
    "wrong columns": ("a.json", '[{"q": "a", "a": "b"}]', [], ["found the columns q, a", "--columns"]),
    "null": ("a.json", json.dumps([*ROWS, ROWS[0] | {"output": None}]), [], ["`output` is null, expected text"]),
    "number": ("a.jsonl", LINES + '{"instruction": 3, "output": "y"}\n', [], ["line 41: `instruction` is a number"]),
    "list for text": (
        "a.jsonl",
        LINES + '{"instruction": "x", "output": ["y"]}\n',
        [],
        ["line 41: `output` is a list"],
    ),
    "many wrong": ("a.json", json.dumps([{"instruction": "x", "output": None}] * 99), [], ["99 rows are wrong", "..."]),
    "all masked": (
        "a.json",
        json.dumps(ROWS),
        ["--max-length", "4"],
        ["no row has a token to learn", "data.max_length"],
    ),
    "one row": ("a.json", json.dumps(ROWS[:1]), [], ["only 1 different row", "Give more rows"]),
    "only duplicates": ("a.json", json.dumps(ROWS[:1] * 40), [], ["only 1 different row"]),
    "seven rows": ("a.json", json.dumps(ROWS[:7]), [], ["only 7 different rows", "--force"]),
    "held out all": ("a.json", json.dumps(ROWS), ["--set", "data.eval_rows=40"], ["data.eval_rows"]),
    "split of a file": ("a.json", json.dumps(ROWS), ["--set", "data.split=test"], ["data.split is 'test'"]),
    "another format": ("a.json", json.dumps(ROWS), ["--set", "data.format=messages"], ["the format messages needs"]),
    "csv with semicolons": ("a.csv", "instruction;output\na;b;c\n", [], ["line 2: 3 values for 2 columns", "';'"]),
    "csv without a column": ("a.csv", "instruction,input\na,b\n", [], ["instruction, input", "--columns"]),
    "no parquet": ("a.parquet", "PAR1 but no more", [], ["a.parquet: not readable as Parquet"]),
    "unknown type": ("a.txt", "hello", [], ["unknown file type .txt", ".jsonl"]),
    "empty conversation": ("a.jsonl", chat(), [], ["line 41: `messages` is an empty list"]),
    "no answer": ("a.jsonl", chat(said("user", "x")), [], ["line 41", "at least two"]),
    "ends with a question": (
        "a.jsonl",
        chat(said("user", "x"), said("user", "y")),
        [],
        ["line 41", "expected assistant"],
    ),
    "conversations": (
        "a.jsonl",
        '{"conversations": [{"from": "human"}]}',
        [],
        ["line 1: `conversations[0].value` is null"],
    ),
    "escape sequence": ("a.json", '[{"\\u001b[31mred": 1}]', [], ["\ufffd[31mred"]),
    "gzip named .json, cut": (
        "a.json",
        gzip.compress(LINES.encode())[:-20],
        [],
        ["a.json: cannot be read: Compressed"],
    ),
    "gzip of no text": ("a.json", gzip.compress(b"\xff\n"), [], ["a.json, line 1: not valid UTF-8"]),
    "general text missing": (
        "a.json",
        json.dumps(ROWS),
        ["--set", "measure.forgetting=no.txt"],
        ["no.txt: no such file"],
    ),
    "general text has none": ("a.json", json.dumps(ROWS), ["--set", "measure.forgetting=a.json"], ["a `text` column"]),
}


def config(folder: Path, drop: tuple[str, ...] = (), file: str = "config.json", **values: Any) -> None:
    path = folder / file
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in content.items() if key not in drop}))


def weights(folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor | None]) -> None:
    changed = {name: change(name, value) for name, value in load_file(folder / "model.safetensors").items()}
    kept = {name: value.contiguous() for name, value in changed.items() if value is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def only_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def encoder(folder: Path) -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    BertForMaskedLM(BertConfig(vocab_size=300, **sizes)).save_pretrained(folder)


def index(folder: Path, **content: Any) -> None:
    """An index, and the weights under another name than the one that is taken without it."""
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def without_tokenizer(folder: Path) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).unlink()


MODELS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no config.json": (lambda f: (f / "config.json").unlink(), ["must hold config.json"]),
    "config.json damaged": (lambda f: (f / "config.json").write_text('{"model_type": '), ["Correct config.json"]),
    "no such dtype": (lambda f: config(f, dtype="float99"), ["float99", "Correct config.json"]),
    "unknown architecture": (lambda f: config(f, model_type="wonder"), ["wonder"]),
    "encoder and decoder": (lambda f: config(f, model_type="t5"), ["AutoModelForCausalLM", "causal language model"]),
    "no language model": (lambda f: config(f, model_type="vit"), ["causal language model"]),
    "an encoder": (encoder, ["not a causal language model: BertForMaskedLM is an encoder", "is_decoder"]),
    "attention to both sides": (lambda f: config(f, is_causal=False), ["not a causal language model: is_causal"]),
    "negative size": (lambda f: config(f, hidden_size=-32), ["none can be made of its config.json", "-32"]),
    "no positions": (
        lambda f: config(f, max_position_embeddings=0),
        ["config.json: max_position_embeddings is 0, expected a number of at least 1"],
    ),
    "less than no positions": (
        lambda f: config(f, max_position_embeddings=-1),
        ["config.json: max_position_embeddings is -1"],
    ),
    "architectures as a number": (lambda f: config(f, architectures=3), ["config.json: architectures is 3"]),
    "architectures of numbers": (lambda f: config(f, architectures=[3]), ["config.json: architectures is [3]"]),
    "heads that do not divide": (lambda f: config(f, num_attention_heads=5), ["divisible by num_heads"]),
    "unknown activation": (lambda f: config(f, activation_function="wonder"), ["wonder"]),
    "remote code": (lambda f: config(f, model_type="wonder", auto_map={"AutoConfig": "m.C"}), ["custom code"]),
    "an adapter inside": (lambda f: (f / "adapter_config.json").write_text("{}"), ["there is an adapter in it"]),
    "weights as a pickle": (only_a_pickle, ["model.safetensors"]),
    "weights cut": (lambda f: os.truncate(f / "model.safetensors", 50_000), ["incomplete metadata"]),
    "a weight missing": (lambda f: weights(f, lambda n, v: None if "1.fc1.weight" in n else v), ["lack 1 weights"]),
    "a weight of another shape": (
        lambda f: weights(f, lambda n, v: v[:9] if "fc1.weight" in n else v),
        ["layers.0.fc1.weight is [9, 32], expected [64, 32]", "from the same checkpoint"],
    ),
    "an index without weights": (lambda f: index(f, metadata={}), ["model.safetensors.index.json: no weight_map"]),
    "an index of numbers": (lambda f: index(f, metadata={}, weight_map={"a": 1}), ["index.json: no weight_map"]),
    "an index of lists": (lambda f: index(f, metadata={}, weight_map={"a": []}), ["index.json: no weight_map"]),
    "an index without metadata": (lambda f: index(f, weight_map={"a": "model-1.safetensors"}), ["no metadata"]),
    "a shard missing": (
        lambda f: index(f, metadata={}, weight_map={"a": "model-00002-of-00002.safetensors"}),
        ["names model-00002-of-00002.safetensors, which is not in the folder", "all of its *.safetensors"],
    ),
    "no tokenizer": (without_tokenizer, ["there is no file of a tokenizer in the folder", "save_pretrained"]),
    "not a number": (lambda f: weights(f, lambda n, v: v * float("nan")), ["not finite before training"]),
    "no tokenizer.json": (lambda f: (f / "tokenizer.json").unlink(), ["there is no file of a tokenizer in the folder"]),
    "tokenizer.json damaged": (lambda f: (f / "tokenizer.json").write_text("{"), ["tokenizer of model cannot be"]),
    "no end of sequence": (lambda f: config(f, ("eos_token",), "tokenizer_config.json"), ["no end-of-sequence token"]),
    "ids beyond the embedding": (
        lambda f: config(f, file="tokenizer_config.json", eos_token="<|new|>"),
        ["token id 300", "300 entries"],
    ),
    "four positions": (lambda f: config(f, max_position_embeddings=4), ["no row has a token to learn within"]),
}

BASE = "model:\n  id: model\ndata:\n  id: data.json\n"
STUDIES: dict[str, tuple[str | bytes, list[str]]] = {
    "a list": ("- a\n- b\n", ["study.yaml: expected fields", "list"]),
    "nothing": ("", ["found nothing"]),
    "damaged": (BASE + "ranks: [8\nseeds: 3\n", ["study.yaml, line 6: not valid YAML"]),
    "a field twice": (BASE + "ranks: [8]\nranks: [4]\n", ["line 6", "ranks is on line 5 already"]),
    "an object": ("name: !!python/object/apply:os.system [ls]\n", ["line 1: not valid YAML", "os.system"]),
    "no utf-8": (b"a: 1\nname: \xff\n", ["study.yaml, line 2: not valid UTF-8"]),
    "two documents": ("a: 1\n---\nb: 2\n", ["line 2", "another document"]),
    "unknown field": (BASE + "rankz: [8]\n", ["line 5, rankz: unknown field; did you mean ranks?"]),
    "unknown field of a group": (BASE + "training:\n  stepz: 3\n", ["line 6, training.stepz", "did you mean steps?"]),
    "field of two groups": (BASE + "steps: 4\n", ["line 5, steps", "did you mean measure.steps or training.steps?"]),
    "text for a group": (BASE + "training: fast\n", ["line 5, training: expected a group of the fields"]),
    "another tool's name": (BASE + "lora_alpha: 2x\n", ["line 5, adapter.alpha: expected a number above 0"]),
    "two names of one field": (BASE + "ranks: 8\nr: 4\n", ["r and ranks are the same field"]),
    "no field of a study": (BASE + "load_in_4bit: true\n", ["line 5, load_in_4bit", "give model.quantization: nf4"]),
    "no model": ("ranks: [8]\n", ["model: Field required", "data: Field required"]),
    "true for a rank": (BASE + "ranks: [true]\n", ["line 5, ranks", "true or false"]),
    "steps and epochs": (BASE + "training:\n  steps: 5\n  epochs: 1\n", ["give steps or epochs, not both"]),
    "many wrong fields": (
        BASE + "training: {steps: -1, batch_size: 0, evals: 0, engine: x, warmup_ratio: 9, weight_decay: -1}\n",
        ["..."],
    ),
}

OPTIONS: dict[str, list[str]] = {
    "--ranks 0": ["ranks, 1st value", "greater than 0"],
    "--ranks -8": ["ranks, 1st value", "greater than 0"],
    "--ranks 8,8": ["ranks: listed twice: 8"],
    "--ranks eight": ["ranks, 1st value", "integer", "'eight'"],
    "--ranks 8-64": ["8-64: no such range; ranges are 8..64 of ranks"],
    "--ranks 8.5": ["ranks, 1st value", "integer"],
    "--ranks full": ["give at least one number"],
    "--ranks 64": ["ranks: 64 is larger than 32, the full rank", "Leave it out"],
    "--ranks 1000000000000": ["ranks, 1st value"],
    "--learning-rates 0": ["learning_rates, 1st value", "greater than 0"],
    "--learning-rates nan": ["learning_rates, 1st value", "finite"],
    "--learning-rates 1e-4,1e-4": ["learning_rates: listed twice"],
    "--seeds -1": ["seeds, 1st value"],
    "--seeds 0,0": ["seeds: listed twice: 0"],
    "--seeds 1000000000000000000000": ["seeds, 1st value"],
    "--alpha 2x": ["adapter.alpha", "multiple of the rank such as 2r"],
    "--alpha -3": ["adapter.alpha"],
    "--steps 0": ["training.steps"],
    "--steps 9000000000000000000": ["training: 9e+18 optimizer steps a trial, more than 1,000,000", "Lower its steps"],
    "--epochs 1e300": ["optimizer steps a trial, more than 1,000,000"],
    "--epochs 1e308 --batch-size 1": ["training: inf optimizer steps a trial"],
    "--steps 5 --epochs 1": ["give steps or epochs, not both"],
    "--device tpu": ["device"],
    "--device cuda:7": ["cuda"],
    "--dtype float15": ["dtype"],
    "--max-gpu-memory much": ["max_gpu_memory"],
    "--max-runtime soon": ["max_runtime"],
    "--target-modules query": ["adapter.target_modules", "query", "Linear modules of this model"],
    "--target-modules q_proj,query": ["query matches no module", "Linear modules of this model: fc1, fc2, k_proj"],
    "--target-modules q_porj,v_proj": ["q_porj matches no module of this model; did you mean q_proj or v_proj?"],
    "--set measure.forgetting=": ["--set measure.forgetting=: no value is given", "measure.forgetting=null"],
    "--set training.steps=#x": ["no value is given"],
    "--set data.eval=test.jsonl": ["data.eval: unknown field; did you mean eval_dataset?"],
    "--eval-dataset data.json": ["eval_dataset: data.json is what is trained on"],
    "--columns question=prompt": ["data.columns.question", "no format reads a column of that name", "completion"],
    "--chat-template none.jinja": ["data.chat_template: no such file", "'none.jinja'"],
    "--set training.steps": ["expected KEY=VALUE"],
    "--set training.nothing=3": ["training.nothing: unknown field"],
    "--set training.steps.x=3": ["training.steps"],
    "--set name=../up": ["name"],
    "--set adapter.lora_dropout=1.5": ["adapter.lora_dropout", "less than 1"],
    "--set verdict.margin=2": ["verdict.margin"],
    "--set verdict.confidence=0": ["verdict.confidence"],
    "--set training.lr_scheduler_type=x": ["training.lr_scheduler_type", "'cosine'"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bad")
    write_model(root / "model")
    write_data(root / "data.json")
    return root


@pytest.fixture
def here(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def check(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, code: int, fragments: list[str], *options: str
) -> None:
    """Runs the command, and holds what it says against what it must."""
    monkeypatch.setattr(sys, "argv", ["rankscope", "run", *options, "--out", "out"])
    monkeypatch.setenv("COLUMNS", "1000")
    capsys.readouterr()  # what the making of the bad thing has said
    with pytest.raises(SystemExit) as ended:
        cli.main()
    error = capsys.readouterr().err.strip()
    lines = error.splitlines()
    assert ended.value.code == code, error
    assert "Traceback" not in error
    assert lines[0].startswith("error: "), "something stands before the error\n" + error
    assert 2 <= len(lines) <= 9, error
    for fragment in fragments:
        assert fragment in error, error
    assert not Path("out").exists(), "a half-made study"


@pytest.mark.parametrize("name", DATA)
def test_data(name: str, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    file, content, options, fragments = DATA[name]
    (here / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    check(capsys, monkeypatch, 3, fragments, "--model", "model", "--dataset", file, "--ranks", "2", *options)


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    harm, fragments = MODELS[name]
    harm(here / "model")
    options = ["--ranks", "2", "--seeds", "0", "--steps", "1", "--set", "measure.profiles=false"]
    check(capsys, monkeypatch, 3, fragments, "--model", "model", "--dataset", "data.json", *options)


@pytest.mark.parametrize("name", STUDIES)
def test_studies(name: str, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    content, fragments = STUDIES[name]
    (here / "study.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    check(capsys, monkeypatch, 2, fragments, "study.yaml")


@pytest.mark.parametrize("options", OPTIONS)
def test_options(options: str, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--model", "model", "--dataset", "data.json", *([] if "--ranks" in options else ["--ranks", "2"])]
    check(capsys, monkeypatch, 2, OPTIONS[options], *arguments, *options.split())


@pytest.mark.parametrize(("model", "data"), [("./nowhere", "data.json"), ("owner/name", "data.json")])
def test_models_that_are_not_there(
    model: str, data: str, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    check(capsys, monkeypatch, 3, [model, "Check the id"], "--model", model, "--dataset", data, "--ranks", "2")


@pytest.mark.parametrize("data", ["nowhere.json", "owner/name"])
def test_data_that_are_not_there(
    data: str, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    check(capsys, monkeypatch, 3, [data, "Check"], "--model", "model", "--dataset", data, "--ranks", "2")


@pytest.mark.parametrize("name", ["d", "d.json"])
def test_a_folder_without_data(
    name: str, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / name).mkdir()
    fragments = [f"{name}: holds no data files", ".jsonl"]
    check(capsys, monkeypatch, 3, fragments, "--model", "model", "--dataset", name, "--ranks", "2")


def test_a_folder_for_a_study(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "study.yaml").mkdir()
    check(capsys, monkeypatch, 2, ["study.yaml: cannot be read", "path of a .yaml file"], "study.yaml")


@pytest.mark.slow
def test_the_same_from_a_process_of_its_own(here: Path) -> None:
    (here / "a.json").write_text("")
    command = [sys.executable, "-m", "rankscope.cli", "run", "--model", "model", "--dataset", "a.json", "--ranks", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert done.stderr.splitlines()[0] == "error: a.json: no rows"


def test_what_is_no_mistake_is_taken(here: Path) -> None:
    """A byte order mark, duplicates, over-long rows and a tokenizer without padding: read, and said."""
    rows = [*ROWS, ROWS[0], {"instruction": "long", "output": "word " * 400}]
    (here / "a.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(rows).encode())
    config(here / "model", ("pad_token",), "tokenizer_config.json")
    command = ["plan", "--model", "model", "--dataset", "a.json", "--ranks", "2"]
    done = forking.rankscope(command, here, os.environ)
    assert done.returncode == 0, done.stderr
    assert "; 1 cut to 256 tokens; rows left out: 1 duplicate\n" in done.stdout
