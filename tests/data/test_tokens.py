"""Masks, counts, the cut and the drop, and the file that trials read."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from folders import prepare
from rankscope.data import tokens as tokens_module
from rankscope.data.tokens import Example, TokenizedData, Tokens, load, save
from rankscope.errors import DataError, ModelError, StudyDirectoryError
from rankscope.files import read_json, write_json
from rankscope.spec.models import DataSpec

Write = Callable[..., DataSpec]


def alpaca(count: int, start: int = 0) -> list[dict[str, str]]:
    """Different rows, every third without input."""
    return [
        {
            "instruction": f"Add {number} and {number + 1}.",
            "input": f"a = {number}" if number % 3 else "",
            "output": f"{2 * number + 1}",
        }
        for number in range(start, start + count)
    ]


def prepared(spec: Write, rows: list[Any], tokenizer: PreTrainedTokenizerFast, **fields: Any) -> TokenizedData:
    return prepare(spec("rows.json", json.dumps(rows), **fields), tokenizer, len(tokenizer))


def texts(tokens: Tokens, tokenizer: PreTrainedTokenizerFast) -> list[tuple[str, str]]:
    """Text without labels and text of the labels, for every sequence."""
    return [(str(tokenizer.decode(ids[~is_label])), str(tokenizer.decode(ids[is_label]))) for ids, is_label in tokens]


def test_labels_are_the_completion_and_eos_and_no_input_is_lost(
    spec: Write, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = alpaca(40)
    data = prepared(spec, rows, tokenizer, eval_rows=5)
    expected = {
        (
            f"<s>### Question: {row['instruction']}\n" + (f"{row['input']}\n" if row["input"] else "") + " ### Answer:",
            f" {row['output']}</s>",
        )
        for row in rows
    }
    assert set(texts(data.train, tokenizer) + texts(data.eval, tokenizer)) == expected
    assert (len(data.train), len(data.eval)) == (35, 5)


def test_loss_on_all_learns_everything_but_the_first_token(spec: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    data = prepared(spec, alpaca(40), tokenizer, loss_on="all")
    for ids, is_label in data.train:
        assert not is_label[0]
        assert is_label[1:].all()
        assert len(ids) == len(is_label)
    assert data.facts["train_label_tokens"] == data.facts["train_tokens"] - len(data.train)


def test_the_first_token_is_never_a_label(spec: Write, make_tokenizer: Callable[..., PreTrainedTokenizerFast]) -> None:
    bare = make_tokenizer(after=None)
    rows = [{"prompt": "" if number < 9 else "q", "completion": f"{number} x"} for number in range(20)]
    data = prepared(spec, rows, bare, eval_rows=11)  # the rows without prompt are one group
    assert not any(is_label[0] for _, is_label in [*data.train, *data.eval])


def test_long_rows_are_cut_at_the_end_and_rows_without_label_are_dropped(
    spec: Write, tokenizer: PreTrainedTokenizerFast
) -> None:
    fitting = [{"prompt": f"p{number}", "completion": "c"} for number in range(10, 30)]
    cut = [{"prompt": f"q{number}", "completion": "long " * 50} for number in range(10, 15)]
    hopeless = [{"prompt": f"{number} long " * 50, "completion": "c"} for number in range(10, 17)]
    data = prepared(spec, fitting + cut + hopeless, tokenizer, max_length=16)
    facts = data.facts
    assert (facts["rows_read"], facts["rows_without_label_dropped"], facts["truncated"]) == (32, 7, 5)
    assert facts["rows_train"] + facts["rows_eval"] == 25
    assert facts["longest"] == 16
    assert max(data.train.lengths.max(), data.eval.lengths.max()) == 16
    learned = [label for _, label in texts(data.train, tokenizer) + texts(data.eval, tokenizer)]
    assert sum(label.endswith("</s>") for label in learned) == 20  # a cut row does not learn to end


def test_a_row_of_exactly_max_length_is_not_cut(spec: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": letter, "completion": letter} for letter in "abcdef"]  # <s> a a </s>
    assert prepared(spec, rows, tokenizer, max_length=4).facts["truncated"] == 0
    assert prepared(spec, rows, tokenizer, max_length=3).facts["truncated"] == 6


def test_exact_duplicates_are_dropped_and_the_first_is_kept(spec: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = alpaca(10)
    data = prepared(spec, [*rows, *rows[:4], {**rows[0], "input": None, "id": 1}], tokenizer, eval_rows=2)
    assert data.facts["duplicates_dropped"] == 5
    assert data.facts["rows_train"] + data.facts["rows_eval"] == 10


def test_facts_agree_with_the_tokens(spec: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    data = prepared(spec, alpaca(100), tokenizer, max_rows=80)
    facts = data.facts
    assert set(facts) == {
        *("id", "revision", "fingerprint", "format", "loss_on", "max_length", "rows_read", "rows_train"),
        *("rows_eval", "duplicates_dropped", "rows_without_label_dropped", "truncated", "train_tokens"),
        *("train_label_tokens", "eval_tokens", "eval_label_tokens", "mean_length", "longest"),
    }
    assert (facts["rows_read"], facts["rows_train"], facts["rows_eval"]) == (80, 48, 32)
    for side in ("train", "eval"):
        tokens = getattr(data, side)
        assert facts[f"{side}_tokens"] == tokens.offsets[-1] == len(tokens.ids) == tokens.lengths.sum()
        assert facts[f"{side}_label_tokens"] == tokens.is_label.sum()
        assert (tokens.ids.dtype, tokens.is_label.dtype, tokens.offsets.dtype) == (
            np.int32,
            np.bool_,
            np.int64,
        )
    assert facts["mean_length"] == (facts["train_tokens"] + facts["eval_tokens"]) / 80


def test_train_keeps_the_order_of_the_file(spec: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = alpaca(50)
    data = prepared(spec, rows, tokenizer)
    order = [int(label.removesuffix("</s>")) for _, label in texts(data.train, tokenizer)]
    assert order == sorted(order)


def test_the_split_does_not_depend_on_the_order_of_the_file(spec: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [*alpaca(60), *({**row, "output": "again"} for row in alpaca(20))]
    data = prepared(spec, rows, tokenizer)
    shuffled = prepared(spec, rows[::-1], tokenizer)
    sides = [texts(data.train, tokenizer), texts(data.eval, tokenizer)]
    assert [sorted(side) for side in sides] == [
        sorted(texts(tokens, tokenizer)) for tokens in (shuffled.train, shuffled.eval)
    ]
    assert not {prompt for prompt, _ in sides[0]} & {prompt for prompt, _ in sides[1]}


def test_chunks_do_not_show(spec: Write, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = prepared(spec, alpaca(50), tokenizer)
    monkeypatch.setattr(tokens_module, "_ROWS_PER_CALL", 7)
    assert_equal(prepared(spec, alpaca(50), tokenizer), whole)


def test_messages_from_file_to_labels(spec: Write, chat_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}!"}]}
        for n in range(20)
    ]
    data = prepared(spec, rows, chat_tokenizer)
    both = texts(data.train, chat_tokenizer) + texts(data.eval, chat_tokenizer)
    assert set(both) == {(f"<s><|user|>{n}?</s>\n<|assistant|>", f"{n}!</s>\n") for n in range(20)}


def test_a_wrong_row_is_named_with_the_file(spec: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}]
    with pytest.raises(DataError, match=r"rows.json, row 1: .*no chat template"):
        prepared(spec, rows, tokenizer)


@pytest.mark.parametrize(
    ("rows", "fields", "problem"),
    [
        (
            alpaca(9),
            {"max_length": 4},
            r"no row has a token to learn within max_length 4 \(9 rows were dropped\)",
        ),
        (alpaca(1), {}, "fewer than 2 to train on"),
        (alpaca(2), {}, "fewer than 2 to train on"),
        (alpaca(1) * 50, {}, "1 different rows with 0 held out"),
        (alpaca(9), {"eval_rows": 9}, "9 different rows with 9 asked to be held out leave fewer than 2"),
        (alpaca(9), {"eval_rows": 500}, "500 asked to be held out"),
        ([{"prompt": "", "completion": str(n)} for n in range(50)], {}, "too few different prompts"),
    ],
)
def test_too_few_rows_are_explained(
    rows: list[Any], fields: dict[str, Any], problem: str, spec: Write, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(DataError, match=problem) as caught:
        prepared(spec, rows, tokenizer, **fields)
    assert "rows.json" in caught.value.what
    assert caught.value.todo


def test_three_rows_are_enough(spec: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    data = prepared(spec, alpaca(3), tokenizer)
    assert (len(data.train), len(data.eval)) == (2, 1)


def test_ids_that_the_model_does_not_have_are_refused(spec: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    asked = spec("rows.json", json.dumps(alpaca(9)))
    data = prepare(asked, tokenizer, len(tokenizer))
    highest = int(max(data.train.ids.max(), data.eval.ids.max()))
    prepare(asked, tokenizer, highest + 1)
    with pytest.raises(ModelError, match=f"token id {highest}, but the model's vocabulary has {highest} entries"):
        prepare(asked, tokenizer, highest)


def test_tokens_are_a_sequence() -> None:
    examples = [Example(np.arange(n, dtype=np.int32), np.arange(n) > 1) for n in (3, 1, 4)]
    tokens = Tokens.from_examples(examples)
    assert len(tokens) == 3
    assert tokens.lengths.tolist() == [3, 1, 4]
    assert [ids.tolist() for ids, _ in tokens] == [[0, 1, 2], [0], [0, 1, 2, 3]]
    assert tokens[-1].is_label.tolist() == [False, False, True, True]
    with pytest.raises(IndexError):
        tokens[3]
    assert len(Tokens.from_examples([])) == 0


def assert_equal(found: TokenizedData, expected: TokenizedData) -> None:
    assert found.facts == expected.facts
    for side in ("train", "eval"):
        for name in ("ids", "is_label", "offsets"):
            array = getattr(getattr(found, side), name)
            np.testing.assert_array_equal(array, getattr(getattr(expected, side), name), strict=True)


def test_what_is_saved_is_what_is_loaded(spec: Write, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    data = prepared(spec, alpaca(40), tokenizer)
    save(data, tmp_path / "data")
    found = load(tmp_path / "data")
    assert_equal(found, data)
    # torch.from_numpy warns of arrays that cannot be written
    assert all(array.flags.writeable for array in (found.train.ids, found.train.is_label, found.eval.offsets))
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["facts.json", "tokens.safetensors"]


def test_the_same_data_gives_the_same_bytes(spec: Write, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    for name in ("a", "b"):
        save(prepared(spec, alpaca(40), tokenizer), tmp_path / name)
    for file in ("tokens.safetensors", "facts.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def _flip(folder: Path) -> None:
    content = bytearray((folder / "tokens.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "tokens.safetensors").write_bytes(content)


def _forget_hash(folder: Path) -> None:
    facts = read_json(folder / "facts.json")
    del facts["tokens_sha256"]
    write_json(folder / "facts.json", facts)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (_flip, "not the tokens that facts.json was written for"),
        (_forget_hash, "not the tokens that facts.json was written for"),
        (lambda folder: (folder / "tokens.safetensors").write_bytes(b""), "not the tokens"),
        (lambda folder: (folder / "tokens.safetensors").unlink(), "tokens.safetensors: missing"),
        (lambda folder: (folder / "facts.json").unlink(), "facts.json: missing"),
        (lambda folder: (folder / "facts.json").write_text("{"), "facts.json: damaged"),
    ],
)
def test_damaged_files_are_refused(
    damage: Callable[[Path], None],
    problem: str,
    spec: Write,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "data"
    save(prepared(spec, alpaca(40), tokenizer), folder)
    damage(folder)
    with pytest.raises(StudyDirectoryError, match=problem):
        load(folder)


def test_neither_import_nor_load_needs_torch(spec: Write, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    save(prepared(spec, alpaca(40), tokenizer), tmp_path / "data")
    code = (
        "import sys, pathlib, rankscope.data.tokens as data; data.load(pathlib.Path(sys.argv[1]));"
        "print(sorted({'torch', 'transformers', 'datasets', 'pandas'} & set(sys.modules)))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "data")], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"
