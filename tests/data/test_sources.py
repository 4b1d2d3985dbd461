"""Files, folders, patterns, URLs and the hub: which rows are trained on, which evaluated on, and what is fetched."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets  # type: ignore[import-untyped]
import httpx
import huggingface_hub as hub
import pytest

from rankscope.data.records import load_records
from rankscope.data.sources import resolve_sources
from rankscope.errors import DataError
from rankscope.spec.models import DataSpec


def line(*texts: str) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def put(folder: Path, **files: str) -> Path:
    """Write files with a row each; `data__test` is data/test.jsonl."""
    for name, text in files.items():
        path = folder / f"{name.replace('__', '/')}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(line(text))
    return folder


def texts(id: Any, **fields: Any) -> tuple[list[str], list[str]]:
    """Rows to train on, and rows to evaluate on."""
    spec = DataSpec(id=id, **fields)
    train, heldout = resolve_sources(spec)
    return (
        [row["text"] for row in load_records(spec, train).rows],
        [row["text"] for row in load_records(spec, heldout).rows] if heldout else [],
    )


def notes(id: Any, **fields: Any) -> str:
    train, heldout = resolve_sources(DataSpec(id=id, **fields))
    return "; ".join(note for source in (*train, *heldout) for note in source.notes)


SPLITS = {"train": "a", "test": "b", "dev": "c"}


@pytest.mark.parametrize(
    ("files", "fields", "expected"),
    [
        (SPLITS, {}, (["a"], ["c"])),
        (SPLITS, {"split": "train"}, (["a"], [])),  # a split that is asked for is the whole of the data
        (SPLITS, {"split": "dev"}, (["c"], [])),
        (SPLITS, {"split": "validation", "eval_split": "test"}, (["c"], ["b"])),
        (SPLITS, {"split": "train+test"}, (["a", "b"], [])),
        (SPLITS, {"eval_split": "test"}, (["a"], ["b"])),
        ({"train": "a", "test": "b"}, {}, (["a"], ["b"])),
        ({"train": "a", "more": "b"}, {}, (["b", "a"], [])),
        ({"test": "b"}, {}, (["b"], [])),
        ({"test": "b"}, {"split": "test"}, (["b"], [])),
    ],
)
def test_splits_of_a_folder(
    files: dict[str, str], fields: dict[str, Any], expected: tuple[list[str], list[str]], tmp_path: Path
) -> None:
    assert texts(str(put(tmp_path, **files)), **fields) == expected


def test_what_is_done_with_splits_is_said(tmp_path: Path) -> None:
    both = str(put(tmp_path / "both", **SPLITS))
    assert notes(both) == f"{both}: the split validation is the evaluation set; {both}: not read: the split test"
    assert notes(both, eval_split="test") == (
        f"{both}: the split test is the evaluation set; {both}: not read: the split validation"
    )
    assert notes(both, split="train") == ""
    lone = str(put(tmp_path / "lone", dev="c"))
    assert notes(lone) == f"{lone}: its only split is validation"
    assert notes(str(put(tmp_path / "plain", rows="a"))) == ""


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"split": "code"}, "no split code, only validation, test, train"),
        ({"eval_split": "code"}, "no split code, only .*data.eval_split"),
        ({"split": "train+code"}, "no split code, only .*whole splits"),
        ({"split": "train[:10]"}, r"no split train\[:10\], only .*data.max_rows takes the first rows"),
        ({"config": "code"}, "no configuration 'code', only "),
        ({"revision": "main"}, "data.revision is 'main', but local data has no revision"),
    ],
)
def test_a_split_that_is_not_there_is_named_with_those_that_are(
    fields: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    put(tmp_path, **SPLITS)
    with pytest.raises(DataError) as caught:
        texts(str(tmp_path), **fields)
    assert re.search(problem, str(caught.value).replace("\n", " "))


def test_two_other_splits_need_a_choice(tmp_path: Path) -> None:
    put(tmp_path, test="b", dev="c")
    with pytest.raises(DataError, match="no split train, only validation, test"):
        texts(str(tmp_path))
    assert texts(str(tmp_path), split="test") == (["b"], [])


@pytest.mark.parametrize(("field", "value"), [("split", "test"), ("config", "x"), ("revision", "main")])
def test_a_file_has_no_split_config_or_revision(field: str, value: str, tmp_path: Path) -> None:
    path = put(tmp_path, a="a") / "a.jsonl"
    with pytest.raises(DataError, match=f"data.{field} is '{value}', but local data has no {field}"):
        texts(str(path), **{field: value})
    assert texts(str(path), split="train") == (["a"], [])  # as studies of earlier versions say


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        (["rows.jsonl"], ["own"]),
        (["split"], ["own test"]),  # of several splits, its test split
        (["lone"], ["other"]),
        (["rows.jsonl", "lone"], ["own", "other"]),
    ],
)
def test_an_evaluation_set_of_one_s_own(named: list[str], expected: list[str], tmp_path: Path) -> None:
    put(tmp_path / "data", train="a", test="b")
    put(tmp_path, rows="own", split__train="x", split__test="own test", split__dev="y", lone__code="other")
    asked = tuple(str(tmp_path / name) for name in named)
    found = texts(str(tmp_path / "data"), eval_dataset=asked[0] if len(asked) == 1 else asked)
    assert found == (["a"], expected)
    assert texts(str(tmp_path / "data"), eval_dataset=",".join(asked)) == found


def test_of_a_mixture_no_part_is_evaluated_on_alone(tmp_path: Path) -> None:
    one, other = put(tmp_path / "one", train="a", test="b"), put(tmp_path / "other", rows="c")
    assert texts([str(one), str(other)]) == (["a", "c"], [])
    assert "not read: the split test" in notes([str(one), str(other)])
    put(other, test="d")
    assert texts([str(one), str(other)]) == (["a", "c"], ["b", "d"])


def test_an_evaluation_set_without_a_likely_split_is_refused(tmp_path: Path) -> None:
    put(tmp_path, rows="a")
    saved = {"code": datasets.Dataset.from_list([{"text": "a"}]), "math": datasets.Dataset.from_list([{"text": "b"}])}
    datasets.DatasetDict(saved).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match="no split test, only code, math"):
        texts(str(tmp_path / "rows.jsonl"), eval_dataset=str(tmp_path / "saved"))


def test_saved_data(tmp_path: Path) -> None:
    parts = {name: datasets.Dataset.from_list([{"text": name, "n": 1}]) for name in ("train", "test", "code")}
    both = str(tmp_path / "both")
    datasets.DatasetDict(parts).save_to_disk(both)
    assert texts(both) == (["train"], ["test"])
    assert texts(both, split="code") == (["code"], [])
    assert texts(both, split="code+train") == (["code", "train"], [])
    for split in ("validation", "train+validation"):
        with pytest.raises(DataError, match="both: no split validation, only train, test, code"):
            texts(both, split=split)
    with pytest.raises(DataError, match="local data has no config"):
        texts(both, config="x")
    lone = str(tmp_path / "lone")
    datasets.Dataset.from_list([{"text": "a"}], split="test").save_to_disk(lone)
    assert texts(lone) == (["a"], [])
    (tmp_path / "lone" / "state.json").write_text("{")
    with pytest.raises(DataError, match="lone: cannot be loaded: "):
        texts(lone)


@pytest.mark.parametrize("named", ["../other/data-00000-of-00001.arrow", "/etc/a.arrow", "..", "state.json"])
def test_saved_data_name_no_file_elsewhere(named: str, tmp_path: Path) -> None:
    for name in ("saved", "other"):
        datasets.Dataset.from_list([{"text": name}]).save_to_disk(tmp_path / name)
    state = {"_split": None, "_data_files": [{"filename": named}]}
    (tmp_path / "saved" / "state.json").write_text(json.dumps(state))
    with pytest.raises(DataError, match=r"saved: names the file .*, which is not in it"):
        texts(str(tmp_path / "saved"))


def test_saved_data_name_no_split_elsewhere(tmp_path: Path) -> None:
    datasets.Dataset.from_list([{"text": "a"}]).save_to_disk(tmp_path / "other")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["../other"]}')
    with pytest.raises(DataError, match=r"saved: names the file .*, which is not in it"):
        texts(str(tmp_path / "saved"))


def test_patterns(tmp_path: Path) -> None:
    put(tmp_path, a__one="1", a__two="2", a__test="3", b__three="4")
    assert texts(str(tmp_path / "b/*.jsonl")) == (["4"], [])
    assert texts(str(tmp_path / "a/*.jsonl")) == (["1", "2"], ["3"])  # as the folder itself
    assert texts(str(tmp_path / "**/t*.jsonl"), split="train") == (["2", "4"], [])
    with pytest.raises(DataError, match="no file matches this pattern"):
        texts(str(tmp_path / "c/*.jsonl"))


def test_names_that_look_like_patterns_or_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "odd [1]", train="a")
    put(tmp_path / "a, b", train="b")
    (tmp_path / "odd [1]" / "TRAIN.JSONL").write_text(line("c"))
    assert texts(str(tmp_path / "odd [1]")) == (["c", "a"], [])
    assert texts(str(tmp_path / "odd [1]" / "TRAIN.JSONL")) == (["c"], [])
    assert texts(str(tmp_path / "a, b")) == (["b"], [])
    monkeypatch.chdir(tmp_path / "a, b")
    for here in (".", "./", "../a, b", "train.jsonl", "*.jsonl"):
        assert texts(here) == (["b"], []), here
    monkeypatch.setenv("HOME", str(tmp_path))
    assert texts("~/a, b/train.jsonl") == (["b"], [])


@pytest.mark.parametrize("missing", ["no.json", "./no", "a/b/c", "/no/where", "no.jsonl.gz", "C:\\data", "x.TSV", "\0"])
def test_a_missing_file_is_not_looked_for_on_the_hub(missing: str) -> None:
    with pytest.raises(DataError, match=re.escape(f"{missing}: no such file or folder")):
        texts(missing)


def test_a_url_is_fetched_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content, asked = [line("a").encode()], list[str]()

    class Session:
        @contextmanager
        def stream(self, method: str, url: str, follow_redirects: bool) -> Iterator[SimpleNamespace]:
            asked.append(url)

            def check() -> None:
                if not content:
                    raise httpx.HTTPError("404 Not Found")

            yield SimpleNamespace(raise_for_status=check, iter_bytes=lambda: iter(content))

    monkeypatch.setattr(hub, "get_session", Session)
    monkeypatch.setattr(hub, "cached_assets_path", lambda *parts: put(tmp_path.joinpath(*parts), train="old"))
    url = "https://example.org/rows.jsonl?download=true"
    assert texts(url) == (["a"], [])
    content[:] = [line("b").encode(), line("c").encode()]
    assert texts(url) == (["b", "c"], [])
    content.clear()
    with pytest.raises(DataError, match=rf"^{re.escape(url)}: cannot be loaded: HTTPError: 404"):
        texts(url)
    assert asked == [url] * 3
    with pytest.raises(DataError, match=r"rows.html: not the address of a file of data"):
        texts("https://example.org/rows.html")
    assert len(asked) == 3
