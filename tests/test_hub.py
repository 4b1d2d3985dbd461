"""The hub as its client speaks to it, unpatched: what is asked of it, what is pinned, what works without it, what is
said when it refuses. Commands run in processes of their own, which know the hub by HF_ENDPOINT alone."""

import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load, save
from transformers import AutoModelForCausalLM

from hub_server import HubServer, serving
from rankscope.search.folder import Search
from rankscope.study.folder import StudyFolder
from rankscope.study.study import Study

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_COMMANDS = """
import json, sys
from rankscope import cli
for asked in json.loads(sys.argv[1]):
    sys.argv, code = ["rankscope", *asked], 0
    try:
        cli.main()
    except SystemExit as ended:
        code = ended.code
    print(f"\\nexit {code or 0}\\0", flush=True)
"""
_ROWS = """
import json, sys
from rankscope.data.records import load_records
from rankscope.data.sources import commits, resolve_sources
from rankscope.errors import DataError
from rankscope.spec.models import DataSpec
for asked in json.loads(sys.argv[1]):
    general = asked.pop("general", None)
    spec = DataSpec(**asked)
    try:
        found = [load_records(spec, sources) if sources else None for sources in resolve_sources(spec)]
        texts = [[row["text"] for row in records.rows] if records else [] for records in found]
        print(json.dumps({"texts": texts, "commits": commits(spec, general)}))
    except DataError as error:
        print(json.dumps(str(error)))
"""


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with serving() as server:
        yield server


def environment(hub: str, home: Path) -> dict[str, str]:
    """Of a process that knows this hub alone."""
    given = {name: value for name, value in os.environ.items() if name not in ("HF_TOKEN", "HF_HUB_OFFLINE")}
    given |= {"HF_ENDPOINT": hub, "HF_HOME": str(home), "COLUMNS": "250", "OMP_NUM_THREADS": "1"}
    return given | {"HF_HUB_ETAG_TIMEOUT": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "1"}


def python(code: str, argument: Any, hub: str, home: Path, **more: str) -> str:
    """What a process prints, on both streams."""
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(argument)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=240, check=False,
        env=environment(hub, home) | more,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


def commands(asked: Sequence[Sequence[str]], hub: str, home: Path, **more: str) -> list[tuple[int, str]]:
    """Exit code and output of each of several commands of one process."""
    printed = python(_COMMANDS, asked, hub, home, **more).split("\0")[:-1]
    assert len(printed) == len(asked)
    ends = [text.rpartition("\nexit ") for text in printed]
    return [(int(code), text.strip()) for text, _, code in ends]


def rows(asked: Sequence[dict[str, Any]], hub: str, home: Path, **more: str) -> list[Any]:
    return [json.loads(line) for line in python(_ROWS, asked, hub, home, **more).splitlines()]


def parquet(*texts: str) -> bytes:
    file = io.BytesIO()
    pd.DataFrame({"text": list(texts)}).to_parquet(file)
    return file.getvalue()


def error(output: str) -> str:
    """The message of a failed command; nothing else was printed but the line of what begins."""
    begun, _, message = output.partition("error: ")
    assert begun.count("\n") <= 1, output
    assert len(message.splitlines()) == 2, output
    return message


def test_what_the_hub_refuses_is_said_in_two_lines(hub: HubServer, tmp_path: Path) -> None:
    whole = {CONFIG: b"{}", WEIGHTS: b"x", "tokenizer.json": b"{}"}
    commit = hub.repository("owner/model").push(whole)
    hub.repository("gated/model", gated=True).push(whole)
    hub.repository("owner/pickled").push({CONFIG: b"{}", "pytorch_model.bin": b"x"})
    hub.repository("owner/adapter").push({"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"})
    hub.repository("owner/weights").push({WEIGHTS: b"x"})
    hub.repository("owner/mute").push({name: whole[name] for name in (CONFIG, WEIGHTS)})
    hub.repository("owner/private", private=True).push(whole)
    hub.repository("gated/rows", "datasets", gated=True).push({"README.md": b"", "train.jsonl": b""})
    for id, what in {
        "busy": {"status": 429, "headers": {"Retry-After": "120"}},
        "limited": {"status": 429, "headers": {"RateLimit": '"api";r=0;t=55'}},
        "closed": {"status": 403, "headers": {"X-Error-Message": "Access to this resource is disabled."}},
        "down": {"status": 503},
        "slow": {"seconds": 2.5},
        "cut": {"cut": 9},
        "token": {"status": 401, "headers": {"X-Error-Message": "Invalid credentials in Authorization header"}},
    }.items():
        hub.repository(f"{id}/model").push(whole)
        hub.fail(f"/{id}/model", times=9, **what)
    model, data = "embedded", "embedded"
    expected = {
        ("gone/model", data): ("has none of that name, or it is private", "hf auth login"),
        ("gated/model", data): ("it is gated", f"Accept its terms at {hub.url}/gated/model"),
        ("owner/model --set model.revision=v9", data): ("it has no such revision", "a branch, a tag or a commit"),
        (f"owner/model --set model.revision={commit[:7]}", data): ("it has no such revision", "not shortened"),
        ("owner/private", data): ("has none of that name, or it is private", "hf auth login"),
        ("owner/two--dashes", data): ("no such folder", "a hub id such as owner/name"),
        ("owner/mute", data): ("no file of a tokenizer in it", "save its tokenizer"),
        ("owner/pickled", data): ("no *.safetensors in it, only pytorch_model.bin", "save_pretrained"),
        ("owner/adapter", data): ("an adapter (adapter_config.json), not a model", "base_model_name_or_path"),
        ("owner/weights", data): ("no config.json in it", "as transformers saves it"),
        ("busy/model", data): ("too many requests (429)", "Run again in 120 seconds"),
        ("limited/model", data): ("too many requests (429)", "Run again in 55 seconds"),
        ("closed/model", data): ("has disabled it", "another id"),
        ("down/model", data): ("answers 503", "Run again later"),
        ("slow/model", data): ("no answer in time", "HF_ENDPOINT"),
        ("cut/model", data): ("no connection", "HF_ENDPOINT"),
        ("token/model", data): ("refuses access (401)", "Check the token"),
        (model, "gone/rows"): ("data set gone/rows: ", "hf auth login"),
        (model, "gated/rows"): (
            "data set gated/rows: it is gated",
            f"Accept its terms at {hub.url}/datasets/gated/rows",
        ),
        (model, "owner/two--dashes"): ("no such file or folder", "a hub id such as owner/name"),
        (model, f"{hub.url}/datasets/owner/rows"): ("not the address of a file of data", "a hub id such as owner/name"),
    }
    out = str(tmp_path / "study")
    asked = [["run", "--model", *model.split(), "--dataset", data, "--out", out] for model, data in expected]
    for (code, output), (what, todo) in zip(commands(asked, hub.url, tmp_path), expected.values(), strict=True):
        first, second = error(output).splitlines()
        assert (code, what in first, todo in second) == (3, True, True), output
    assert not Path(out).exists()


def test_rows_of_several_files_and_configurations(hub: HubServer, tmp_path: Path) -> None:
    """Only files of the chosen split are fetched, once, all of one commit; offline they are read from the cache."""
    plain = hub.repository("owner/plain", "datasets")
    first = plain.push(
        {
            "data/train-00000-of-00002.parquet": parquet("a", "b"),
            "data/train-00001-of-00002.parquet": parquet("c"),
            "data/test-00000-of-00001.parquet": parquet("d"),
        }
    )
    configured = hub.repository("owner/configured", "datasets")
    front = [{"config_name": name, "data_files": f"{name}/*.parquet"} for name in ("code", "math")]
    readme = f"---\nconfigs: {json.dumps(front)}\n---\n".encode()
    configured.push({"README.md": readme, "code/x.parquet": parquet("x"), "math/y.parquet": parquet("y")})
    held = hub.repository("owner/held", "datasets").push({"test.jsonl": b'{"text": "h"}\n'})
    prose = hub.repository("owner/prose", "datasets").push({"train.jsonl": b'{"text": "p"}\n'})
    configured.push({"README.md": b"", "train.jsonl": b'{"text": "old"}\n{'}, branch="v1")
    asked: list[dict[str, Any]] = [
        {"id": "owner/plain", "max_rows": 1},
        {"id": "owner/plain"},
        {"id": "owner/configured", "config": "math"},
        {"id": "owner/configured"},
        {"id": "owner/configured", "revision": "v1"},
        {"id": "owner/plain", "split": "validation"},
        {"id": "owner/plain", "eval_dataset": "owner/held", "general": "owner/prose"},
    ]
    one, both, math, several, broken, unknown, three = rows(asked, hub.url, tmp_path)
    assert (one["texts"], both["texts"], math["texts"]) == ([["a"], ["d"]], [["a", "b", "c"], ["d"]], [["y"], []])
    assert both["commits"] == {"owner/plain": first}
    assert three["texts"] == [["a", "b", "c"], ["h"]]
    assert three["commits"] == {"owner/plain": first, "owner/held": held, "owner/prose": prose}
    assert several.startswith("owner/configured: has several configurations: code, math\n")
    assert broken.startswith("owner/configured/train.jsonl, line 2: not valid JSON")
    assert unknown.startswith("owner/plain: no split validation, only test, train")
    fetched = [request.path for request in hub.asked("/resolve/", "GET")]
    assert sorted(fetched) == sorted(set(fetched))
    assert not any("code/" in path for path in fetched)
    plain.push({"train.jsonl": b'{"text": "new"}\n'})
    asked[0] = {"id": "owner/plain", "commits": {"owner/plain": first}}
    asked[3:] = [{"id": "owner/configured", "config": "code"}]
    pinned, newest = rows(asked[:2], hub.url, tmp_path)
    assert (pinned["texts"], newest["texts"]) == ([["a", "b", "c"], ["d"]], [["new"], []])
    answered = len(hub.requests)
    kept = rows(asked, hub.url, tmp_path, HF_HUB_OFFLINE="1")
    assert [found["texts"] for found in kept[:3]] == [pinned["texts"], newest["texts"], math["texts"]]
    assert kept[3].startswith("data set owner/configured: not wholly in the cache")
    assert len(hub.requests) == answered


_FETCH = """
import json, sys
from rankscope import hub
try:
    print(hub.fetch("owner/rows", "dataset", *json.loads(sys.argv[1])))
except OSError as error:
    print(*hub.explained("datasets/owner/rows", error))
"""


def test_a_download_that_was_killed_goes_on(hub: HubServer, tmp_path: Path) -> None:
    """In another process, from the last 10 MiB; what was damaged meanwhile is fetched anew."""
    part, content = 10 * 2**20, os.urandom(25 * 2**20)
    path = f"/stored/{hashlib.sha256(content).hexdigest()}"
    file = [hub.repository("owner/rows", "datasets").push({"train.parquet": content}), "train.parquet"]
    given = environment(hub.url, tmp_path) | {"HF_TOKEN": "hf_x", "HF_HUB_DOWNLOAD_TIMEOUT": "60"}

    def kill_after(parts: int) -> Path:
        """What is left of a process that goes on, and is killed when so many parts are there."""
        hub.fail(path, cut=part + 100, held=60)
        process = subprocess.Popen([sys.executable, "-c", _FETCH, json.dumps(file)], env=given)
        for _ in range(600):
            if any(one.stat().st_size == parts * part for one in tmp_path.rglob("*.part")):
                break
            time.sleep(0.1)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        (left,) = tmp_path.rglob("*.part")
        return left

    kill_after(1)
    with kill_after(2).open("r+b") as left:
        left.write(b"damaged")
    assert "the download broke off Run again" in python(_FETCH, file, hub.url, tmp_path)
    kill_after(1)
    fetched = Path(python(_FETCH, file, hub.url, tmp_path).splitlines()[-1])
    assert fetched.read_bytes() == content
    asked = [one.range for one in hub.asked(path, "GET")]
    assert asked == [None, f"bytes={part}-", f"bytes={2 * part}-", None, f"bytes={part}-"]
    assert not list(tmp_path.rglob("*.part"))
    assert "it has no file gone.parquet" in python(_FETCH, [file[0], "gone.parquet"], hub.url, tmp_path)


def test_caches_that_cannot_be_written(hub: HubServer, tmp_path: Path) -> None:
    hub.repository("owner/rows", "datasets").push({"train.jsonl": b'{"text": "a"}\n'})
    (tmp_path / "file").write_text("")
    (said,) = rows([{"id": "owner/rows"}], hub.url, tmp_path / "file" / "below")
    assert "the hub's cache: Not a directory" in said
    assert "HF_HOME names another folder" in said


def test_ids_that_were_renamed(hub: HubServer, tmp_path: Path) -> None:
    commit = hub.repository("new/rows", "datasets").push({"train.jsonl": b'{"text": "a"}\n'})
    hub.renamed |= {"old/rows": "new/rows", "rows": "new/rows"}
    found = rows([{"id": "old/rows"}, {"id": "rows"}], hub.url, tmp_path)
    assert [one["texts"] for one in found] == [[["a"], []]] * 2
    assert [one["commits"] for one in found] == [{"old/rows": commit}, {"rows": commit}]


_LOAD = """
import json, sys
from rankscope.errors import ModelError
from rankscope.model.load import load_model
from rankscope.spec.models import ModelSpec
for id, commit in json.loads(sys.argv[1]):
    try:
        print("loaded", load_model(ModelSpec(id=id, commit=commit, device="cpu")).num_parameters())
    except ModelError as error:
        print(error)
"""


@pytest.mark.slow
def test_weights_in_shards_and_weights_that_are_missing(hub: HubServer, root: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(root / "model").save_pretrained(tmp_path / "model", max_shard_size="40KB")
    files = files_of(tmp_path / "model")
    shards = sorted(name for name in files if name.endswith(".safetensors"))
    assert len(shards) > 1
    pickled = {"pytorch_model.bin": b"x", "another.safetensors": b"x"}
    asked = {
        "owner/shards": files,
        "owner/lacking": {name: file for name, file in files.items() if name != shards[1]},
        "owner/pickled": {name: file for name, file in files.items() if name.endswith("config.json")} | pickled,
    }
    commits = [(id, hub.repository(id).push(pushed)) for id, pushed in asked.items()]
    said = python(_LOAD, commits, hub.url, tmp_path / "hf", HF_HUB_DISABLE_PROGRESS_BARS="1")
    assert "loaded" in said
    assert f"model owner/lacking: it has no file {shards[1]}" in said
    assert f"model of owner/pickled cannot be loaded: no {WEIGHTS} in it, nor an index of several" in said
    assert "use_safetensors" not in said
    assert not hub.asked(r"\.bin")


STUDY = ("--model", "owner/model", "--dataset", "owner/rows", "--ranks", "2", "--steps", "2", "--batch-size", "2")
FAST = [
    part for field in ("measure.profiles=false", "measure.answers=0", "data.eval_rows=4", "data.max_length=32")
    for part in ("--set", field)
]  # fmt: skip


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def another_model(files: dict[str, bytes]) -> dict[str, bytes]:
    """The same files with other weights, as training goes on and is pushed."""
    weights = {name: value + 1 for name, value in load(files[WEIGHTS]).items()}
    return files | {WEIGHTS: save(weights, {"format": "pt"})}


def alpaca(rows: range, more: int = 0) -> bytes:
    """Parquet of some rows, with so many bytes `more` in a column that is not read."""
    file, columns = io.BytesIO(), [{"instruction": f"Add {n}", "output": f"return {n}"} for n in rows]
    note = {"note": [os.urandom(more // len(rows)) for _ in rows]} if more else {}
    pd.DataFrame(columns).assign(**note).to_parquet(file)
    return file.getvalue()


@pytest.fixture
def published(hub: HubServer, root: Path) -> HubServer:
    """A hub with the tiny model and a data set of two files."""
    hub.repository("owner/model").push(files_of(root / "model"))
    hub.repository("owner/rows", "datasets").push(
        {f"data/train-{n:05}-of-00002.parquet": alpaca(range(30 * n, 30 * n + 30)) for n in range(2)}
    )
    return hub


_LOAD_DATASET = """
import json, sys
import datasets
datasets.disable_progress_bars()
found = datasets.load_dataset(json.loads(sys.argv[1]))
print(json.dumps({split: found[split]["text"][:] for split in found}))
"""


@pytest.mark.slow
def test_rows_are_those_of_datasets_itself(hub: HubServer, tmp_path: Path) -> None:
    files = [f"{split}-0000{part}-of-00002.parquet" for split in ("train", "test") for part in range(2)]
    pushed = {f"data/{name}": parquet(*(f"{name} {row}" for row in range(3))) for name in files}
    hub.repository("owner/rows", "datasets").push(pushed | {"README.md": b"---\nlicense: mit\n---\n"})
    theirs = json.loads(python(_LOAD_DATASET, "owner/rows", hub.url, tmp_path / "theirs"))
    (ours,) = rows([{"id": "owner/rows"}], hub.url, tmp_path / "ours")
    assert ours["texts"] == [theirs["train"], theirs["test"]]
    assert len(theirs["train"]) == 6


@pytest.mark.slow
@pytest.mark.timeout(900)  # five studies
def test_a_study_stays_at_the_commits_it_began_with(published: HubServer, tmp_path: Path) -> None:
    """Whatever is pushed, and without the hub; another study by the same ids begins where the hub is now."""
    hub, out, home = published, tmp_path / "study", tmp_path / "hf"
    model, data = hub.repository("owner/model"), hub.repository("owner/rows", "datasets")
    commits = model.refs["main"], data.refs["main"]
    asked = ["run", *STUDY, *FAST, "--out", str(out), "--set", "model.revision=main"]
    [(code, said)] = commands([[*asked, "--seeds", "0"]], hub.url, home)
    assert code == 0, said
    pinned = StudyFolder.open(out)
    assert (pinned.spec.model.commit, pinned.spec.data.commits) == (commits[0], {"owner/rows": commits[1]})
    assert (pinned.machine["model"]["revision"], pinned.data_facts["revision"]) == commits
    assert pinned.data_facts["rows_read"] == 60
    for config in out.glob("trials/*/adapter/adapter_config.json"):
        assert json.loads(config.read_text())["revision"] == commits[0]
    by_branch = [one.path for one in hub.asked("/main/", "GET")]
    assert by_branch == ["/owner/model/resolve/main/config.json"]
    weights = hub.asked("/stored/", "GET")
    assert len(weights) == 3
    model.push(another_model(model.commits[commits[0]]))
    data.push({"train.parquet": alpaca(range(40))})
    answered = len(hub.requests)
    [(code, said)] = commands([[*asked, "--seeds", "0,1"]], hub.url, home)
    assert code == 0, said
    later = [one.path for one in hub.requests[answered:] if one.path != "/api/agent-harnesses"]
    assert [path for path in later if commits[0] not in path or "/resolve/" in path] == []  # but the tokenizer's list
    gone = "http://127.0.0.1:9"
    [(code, said)] = commands([[*asked, "--seeds", "2"]], gone, home)
    assert code == 0, said
    study = StudyFolder.open(out)
    assert {study.trial_record(trial).status for trial in study.trials} == {"done"}
    assert len({study.trial_record(trial).model_sha256 for trial in study.trials}) == 1
    for where, offline in ((gone, "0"), (hub.url, "1")):
        again = tmp_path / f"again-{offline}"
        [(code, said)] = commands([["run", *STUDY, *FAST, "--out", str(again)]], where, home, HF_HUB_OFFLINE=offline)
        assert code == 0, said
        assert ("which was fetched before" in said) == (offline == "0")
        assert StudyFolder.open(again).spec.model.commit == commits[0]  # what was fetched
        assert StudyFolder.open(again).spec.data.commits == {"owner/rows": commits[1]}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_downloads_that_break_off_and_caches_that_are_damaged(published: HubServer, tmp_path: Path) -> None:
    hub, home = published, tmp_path / "hf"
    [weights] = (files[WEIGHTS] for files in hub.repository("owner/model").commits.values())
    part = 10 * 2**20  # what the client writes at a time
    large, small = (alpaca(rows, more) for rows, more in ((range(30), part + 2**19), (range(30, 60), 0)))
    names = [f"data/train-{n:05}-of-00002.parquet" for n in range(2)]
    hub.repository("owner/rows", "datasets").push(dict(zip(names, (large, small), strict=True)))
    stored = [f"/stored/{hashlib.sha256(file).hexdigest()}" for file in (weights, large)]
    for path, cut in zip(stored, (200, part + 200), strict=True):
        hub.fail(path, times=1, cut=cut)
    run = ["run", *STUDY, *FAST, "--seeds", "0"]
    [(code, said)] = commands([[*run, "--out", str(tmp_path / "one")]], hub.url, home)
    assert code == 0, said
    assert "resume" not in said
    assert "%|" not in said
    assert [[one.range for one in hub.asked(path, "GET")] for path in stored] == [[None] * 2, [None, f"bytes={part}-"]]
    for file in home.rglob(WEIGHTS):
        file.write_bytes(weights[: len(weights) // 2])
    [(code, said)] = commands([[*run, "--out", str(tmp_path / "two")]], hub.url, home)
    assert code == 3, said
    assert f"error: model owner/model: {WEIGHTS} in the hub's cache: corrupt or incomplete" in said
    for file in home.rglob("*.parquet"):
        file.write_bytes(file.read_bytes()[:40])
    [(code, unread)] = commands([[*run, "--out", str(tmp_path / "three")]], hub.url, home)
    assert code == 3, unread
    assert "error: owner/rows/data/train-00000-of-00002.parquet: not readable as Parquet" in unread
    for message in (said, unread):
        assert "Traceback" not in message
        [file] = re.findall(r"Delete (\S+), and run again", message)
        Path(file).unlink()
    for file in home.rglob("train-00001*.parquet"):
        file.resolve().unlink()
    [(code, said)] = commands([[*run, "--out", str(tmp_path / "four")]], hub.url, home)
    assert code == 0, said


@pytest.mark.slow
def test_a_hub_that_is_not_there(tmp_path: Path) -> None:
    asked = [("owner/model", "embedded"), ("embedded", "owner/rows")]
    runs = [["run", "--model", model, "--dataset", data, "--out", str(tmp_path / "study")] for model, data in asked]
    for offline, reason in (("0", "no connection"), ("1", "not wholly in the cache, and HF_HUB_OFFLINE is set")):
        for code, said in commands(runs, "http://127.0.0.1:9", tmp_path, HF_HUB_OFFLINE=offline):
            assert (code, reason in error(said)) == (3, True), said
    assert not (tmp_path / "study").exists()


@pytest.mark.slow
def test_adapters_by_hub_id(hub: HubServer, trained: Study, tmp_path: Path) -> None:
    folder = trained.trial_folder(trained.trials[0]) / "adapter"
    adapter = hub.repository("owner/adapter")
    first = adapter.push(files_of(folder), "v1")
    adapter.push({"adapter_config.json": b"{}", "adapter_model.bin": b""})
    hub.repository("gated/adapter", gated=True).push(files_of(folder))
    out = str(tmp_path / "small")
    found = commands(
        [
            ["spectrum", "owner/adapter", "--revision", "v1"],
            ["resize", "owner/adapter", "--revision", "v1", "--rank", "1", "--out", out],
            ["spectrum", "owner/adapter"],
            ["spectrum", "gated/adapter"],
            ["spectrum", "gone/adapter"],
        ],
        hub.url,
        tmp_path,
    )
    assert [code for code, _ in found] == [0, 0, 3, 3, 3], found
    assert "adapter_model.safetensors" in error(found[2][1])
    assert "it is gated" in error(found[3][1])
    assert "none of that name" in error(found[4][1])
    assert (Path(out) / "adapter_model.safetensors").is_file()
    assert all(first in one.path for one in hub.asked("owner/adapter/resolve.*safetensors"))
    asked = [["spectrum", "gated/adapter"]]
    [(code, said)] = commands(asked, hub.url, tmp_path, HF_TOKEN="hf_accepted")
    assert code == 0, said
    assert {one.token for one in hub.asked("/stored/")} == {None}  # another host
    answered = len(hub.requests)
    [(code, said)] = commands(asked[:1], hub.url, tmp_path, HF_HUB_OFFLINE="1")
    assert (code, len(hub.requests)) == (0, answered), said


@pytest.mark.slow
def test_a_folder_is_pushed_to_a_private_repository(hub: HubServer, tmp_path: Path) -> None:
    """By huggingface_hub as it is, without Xet, whose protocol this hub does not speak. A token is needed; a second
    push goes to the same repository."""
    folder = tmp_path / "an adapter"
    folder.mkdir()
    (folder / "README.md").write_text("---\ntags: [lora]\n---\n# Card\n")
    (folder / "adapter_model.safetensors").write_bytes(save({"a": torch.ones(9)}))
    code = (
        "import json, sys\nfrom pathlib import Path\n"
        "from rankscope import hub\nfrom rankscope.errors import StudyError\n"
        "try:\n    print(hub.push('owner/new', Path(json.loads(sys.argv[1])), 'Export'))\n"
        "except StudyError as error:\n    print('refused', error)\n"
    )
    refused = python(code, str(folder), hub.url, tmp_path / "hf", HF_HUB_DISABLE_XET="1")
    assert "refuses access (401)" in refused
    assert f"hf upload owner/new '{folder}'" in refused
    for _ in range(2):
        said = python(code, str(folder), hub.url, tmp_path / "hf", HF_HUB_DISABLE_XET="1", HF_TOKEN="hf_x")
        assert f"{hub.url}/owner/new/commit/" in said
    repository = hub.repository("owner/new")
    assert repository.private
    assert files_of(folder) in repository.commits.values()


@pytest.mark.slow
def test_a_search_stays_at_the_commits_it_began_with(published: HubServer, tmp_path: Path) -> None:
    hub, out = published, tmp_path / "search"
    model, data = hub.repository("owner/model"), hub.repository("owner/rows", "datasets")
    commits = model.refs["main"], data.refs["main"]
    where = ["--model", "owner/model", "--dataset", "owner/rows", "--ranks", "2,4", "--batch-size", "2"]
    asked = ["search", *where, "--steps", "2", "--set", "data.eval_rows=4", "--device", "cpu", "--out", str(out)]
    for trials in ("1", "2"):
        [(code, said)] = commands([[*asked, "--trials", trials]], hub.url, tmp_path / "hf")
        assert code == 0, said
        study = Search.open(out).spec.study
        assert (study.model.commit, study.data.commits) == (commits[0], {"owner/rows": commits[1]})
        model.push(another_model(model.commits[commits[0]]))
        data.push({"train.parquet": alpaca(range(40))})
    read = {one.path.split("/")[4] for one in hub.asked("/owner/model/resolve/.*safetensors")}
    assert read == {commits[0]}
