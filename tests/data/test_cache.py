"""Tokens made once: what hits, what misses, and what is damaged or cannot be written."""

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from data.conftest import CHAT_TEMPLATE
from folders import prepare
from rankscope import demo
from rankscope.data.cache import cache_key, prepare_cached
from rankscope.data.records import load_records
from rankscope.data.tokens import TokenizedData, save
from rankscope.errors import DataError
from rankscope.files import read_json
from rankscope.spec.models import DataSpec

Write = Callable[..., DataSpec]
ROWS = [
    {"instruction": f"Add {n} and 1.", "input": f"n = {n}" if n % 3 else "", "output": str(n + 1)} for n in range(40)
]
CHAT = [
    {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}!"}]} for n in range(20)
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RANKSCOPE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def forbid(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """`forbid()`: from now on a call of any tokenizer fails the test."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the tokenizer was called")

    def forbid() -> None:
        for name in ("__call__", "apply_chat_template", "encode"):
            monkeypatch.setattr(PreTrainedTokenizerFast, name, refuse)

    return forbid


def prepared(spec: DataSpec, tokenizer: PreTrainedTokenizerFast) -> TokenizedData:
    return prepare_cached(spec, tokenizer, len(tokenizer))


def key(spec: DataSpec, tokenizer: PreTrainedTokenizerBase, vocab_size: int = 400) -> str | None:
    return cache_key(load_records(spec), spec, tokenizer, vocab_size)


def assert_equal(found: TokenizedData, expected: TokenizedData) -> None:
    assert found.facts == expected.facts
    assert list(found.facts) == list(expected.facts)
    for side in ("train", "eval"):
        for name in ("ids", "is_label", "offsets"):
            array = getattr(getattr(found, side), name)
            np.testing.assert_array_equal(array, getattr(getattr(expected, side), name), strict=True)


@pytest.mark.parametrize("rows", [ROWS, CHAT], ids=["alpaca", "chat"])
def test_a_second_study_does_not_tokenise(
    rows: list[Any], spec: Write, chat_tokenizer: PreTrainedTokenizerFast, cache: Path, forbid: Callable[[], None]
) -> None:
    asked = spec("rows.json", json.dumps(rows), max_length=48)
    expected = prepare(asked, chat_tokenizer, len(chat_tokenizer))
    assert not cache.exists()
    assert_equal(prepared(asked, chat_tokenizer), expected)
    assert [path.name for path in cache.iterdir()] == [key(asked, chat_tokenizer, len(chat_tokenizer))]
    forbid()
    with pytest.raises((AssertionError, DataError), match="the tokenizer was called"):  # render words it anew
        prepare(asked, chat_tokenizer, len(chat_tokenizer))
    assert_equal(prepared(asked, chat_tokenizer), expected)


def test_equal_rows_of_another_file_are_a_hit_with_their_own_source(
    spec: Write, tokenizer: PreTrainedTokenizerFast, forbid: Callable[[], None]
) -> None:
    lines = spec("other.jsonl", "".join(json.dumps(row) + "\n" for row in ROWS))
    expected = prepare(lines, tokenizer, len(tokenizer))
    prepared(spec("rows.json", json.dumps(ROWS)), tokenizer)
    forbid()
    assert_equal(prepared(lines, tokenizer), expected)
    assert expected.facts["id"].endswith("other.jsonl")


def test_what_decides_the_tokens_decides_the_key(
    spec: Write, tokenizer: PreTrainedTokenizerFast, make_tokenizer: Callable[..., PreTrainedTokenizerFast]
) -> None:
    text = json.dumps(ROWS)
    chatting, splitting, extended = make_tokenizer(), make_tokenizer(), make_tokenizer()
    chatting.chat_template = "{{ bos_token }}"
    splitting.split_special_tokens = True
    extended.add_tokens(["def"])
    keys = [
        key(spec("a.json", text), tokenizer),
        key(spec("a.json", text), tokenizer, 401),
        key(spec("b.json", json.dumps([*ROWS[:-1], {**ROWS[-1], "output": "41!"}])), tokenizer),
        key(spec("c.json", json.dumps(ROWS[::-1])), tokenizer),
        key(spec("a.json", text, max_rows=39), tokenizer),
        key(spec("a.json", text, template="{instruction}\n{input}\n"), tokenizer),
        key(spec("a.json", text, max_length=1023), tokenizer),
        key(spec("a.json", text, loss_on="all"), tokenizer),
        key(spec("a.json", text, eval_rows=5), tokenizer),
        key(spec("a.json", text, split_seed=1), tokenizer),
        key(spec("a.json", text, template_without_input="{instruction}"), tokenizer),
        key(spec("a.json", text), make_tokenizer(after="$A </s>")),
        key(spec("a.json", text), make_tokenizer(eos_token="<pad>")),
        *(key(spec("a.json", text), other) for other in (chatting, splitting, extended)),
    ]
    assert None not in keys
    assert len(set(keys)) == len(keys)
    same = [key(spec("z.json", text), tokenizer), key(spec("a.json", text, format="alpaca"), make_tokenizer())]
    assert same == [keys[0]] * 2


def test_a_chat_template_of_the_study_s_own_decides_tokens_and_key(
    spec: Write, make_tokenizer: Callable[..., PreTrainedTokenizerFast], cache: Path
) -> None:
    own = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    starts = ((None, "<s><|user|>"), ("chatml", "<|im_start|>user\n"), (own, ""), ("chatml", "<|im_start|>user\n"))
    for template, start in starts:
        tokenizer = make_tokenizer()
        tokenizer.chat_template = CHAT_TEMPLATE
        data = prepared(spec("rows.json", json.dumps(CHAT), chat_template=template), tokenizer)
        assert str(tokenizer.decode(data.train[0].ids)).startswith(f"{start}0?")
    assert len(list(cache.iterdir())) == 3


def test_an_evaluation_set_decides_the_key_and_is_named_as_it_is(
    spec: Write, tokenizer: PreTrainedTokenizerFast, cache: Path, forbid: Callable[[], None]
) -> None:
    train = spec("train.json", json.dumps(ROWS))
    paths = [
        spec(f"{name}.json", json.dumps(rows)).id for name, rows in (("a", ROWS[:9]), ("b", ROWS[:9]), ("c", ROWS[:8]))
    ]
    for path in (None, paths[0], paths[2]):
        prepared(train.model_copy(update={"eval_dataset": path, "eval_rows": 4}), tokenizer)
    assert len(list(cache.iterdir())) == 3
    forbid()
    facts = prepared(train.model_copy(update={"eval_dataset": paths[1], "eval_rows": 4}), tokenizer).facts
    assert facts["eval_id"] == paths[1]
    assert "a.json" not in json.dumps(facts)


def test_a_forced_study_s_tokens_are_not_those_of_another(spec: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    prepared(spec("rows.json", json.dumps(ROWS[:4]), force=True), tokenizer)
    with pytest.raises(DataError, match="only 4 different rows"):
        prepared(spec("rows.json", json.dumps(ROWS[:4])), tokenizer)


@pytest.mark.slow
def test_the_key_is_the_same_in_another_process(spec: Write) -> None:
    asked = spec("rows.json", json.dumps(ROWS))
    code = (
        "import sys; from transformers import AutoTokenizer; from rankscope import demo\n"
        "from rankscope.data.cache import prepare_cached; from rankscope.spec.models import DataSpec\n"
        "prepare_cached(DataSpec(id=sys.argv[1]), AutoTokenizer.from_pretrained(demo.model_path()), 8192)"
    )
    subprocess.run([sys.executable, "-c", code, asked.id], check=True)
    tokenizer = AutoTokenizer.from_pretrained(demo.model_path())
    tokenizer(["once"])  # a tokenizer that was used has the key of a fresh one
    assert key(asked, tokenizer, 8192) is not None
    assert (Path(asked.id).parent / "cache" / "tokens" / str(key(asked, tokenizer, 8192)) / "facts.json").exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: (entry / "tokens.safetensors").write_bytes(b"half"),
        lambda entry: (entry / "tokens.safetensors").unlink(),
        lambda entry: (entry / "facts.json").write_text("{"),
        lambda entry: (entry / "facts.json").unlink(),
    ],
)
def test_a_damaged_entry_is_made_anew(
    damage: Callable[[Path], None],
    spec: Write,
    tokenizer: PreTrainedTokenizerFast,
    cache: Path,
    forbid: Callable[[], None],
) -> None:
    asked = spec("rows.json", json.dumps(ROWS))
    expected = prepared(asked, tokenizer)
    [entry] = cache.iterdir()
    damage(entry)
    assert_equal(prepared(asked, tokenizer), expected)
    forbid()
    assert_equal(prepared(asked, tokenizer), expected)


def test_a_cache_that_cannot_be_written_is_a_warning(
    spec: Write, tokenizer: PreTrainedTokenizerFast, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.parent.write_text("a file where the folder belongs")
    asked = spec("rows.json", json.dumps(ROWS))
    with caplog.at_level(logging.WARNING):
        assert_equal(prepared(asked, tokenizer), prepare(asked, tokenizer, len(tokenizer)))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "RANKSCOPE_CACHE" in caplog.text


def test_what_a_hash_cannot_cover_is_not_cached(
    spec: Write,
    make_tokenizer: Callable[..., PreTrainedTokenizerFast],
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked, dated = spec("rows.json", json.dumps(ROWS)), make_tokenizer()
    dated.chat_template = "{{ strftime_now('%d %b %Y') }}"
    prepared(asked, dated)
    slow = make_tokenizer()
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", False)
    prepared(asked, slow)
    assert not cache.exists()


def test_where_the_cache_is(
    spec: Write, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANKSCOPE_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    asked = spec("rows.json", json.dumps(ROWS))
    for variable, root in ((None, tmp_path / "home" / ".cache"), ("XDG_CACHE_HOME", tmp_path / "xdg")):
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        if variable:
            monkeypatch.setenv(variable, str(root))
        prepared(asked, tokenizer)
        assert len(list((root / "rankscope" / "tokens").glob("*/facts.json"))) == 1


def test_tokens_are_those_of_this_version(spec: Write, tmp_path: Path) -> None:
    """Fails when the code gives other tokens than before: raise TOKENS_VERSION with the hash here. (The embedded
    tokenizer changes the hash too, and is in the key already.)"""
    asked = spec("rows.json", json.dumps([*ROWS, *ROWS[:2]]), max_length=24)
    save(prepare(asked, AutoTokenizer.from_pretrained(demo.model_path()), 8192), tmp_path / "saved")
    assert read_json(tmp_path / "saved" / "facts.json")["tokens_sha256"][:16] == "2f06ecefd7ee082b"


def test_columns_are_those_of_a_source_that_has_them(
    spec: Write, tokenizer: PreTrainedTokenizerFast, cache: Path
) -> None:
    own = spec("own.json", json.dumps(ROWS))
    theirs = spec("theirs.json", json.dumps([{"question": f"q {i}?", "answer": f"a {i}"} for i in range(12)]))
    both = {"id": [own.id, theirs.id], "columns": {"instruction": "question", "output": "answer"}}
    data = prepare_cached(DataSpec(**both), tokenizer, len(tokenizer))
    assert data.facts["rows_read"] == len(ROWS) + 12
    with pytest.raises(DataError, match="no source has a column queston, anser"):
        prepare_cached(
            DataSpec(**both | {"columns": {"instruction": "queston", "output": "anser"}}), tokenizer, len(tokenizer)
        )
