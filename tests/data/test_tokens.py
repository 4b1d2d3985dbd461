"""Masks, counts, the cut and the drop, and the file that trials read."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AddedToken, PreTrainedTokenizerFast

from data.conftest import CHAT_TEMPLATE
from folders import prepare
from rankscope.data import tokenize as tokenize_module
from rankscope.data.prompts import Encoded, encode
from rankscope.data.tokens import Example, TokenizedData, Tokens, load, save
from rankscope.errors import DataError, ModelError, StudyDirectoryError
from rankscope.files import read_json, write_json
from rankscope.spec.models import DataSpec

Make = Callable[..., PreTrainedTokenizerFast]
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
    rows = [{"prompt": letter, "completion": letter} for letter in "abcdefgh"]  # <s> a a </s>
    assert prepared(spec, rows, tokenizer, max_length=4).facts["truncated"] == 0
    assert prepared(spec, rows, tokenizer, max_length=3).facts["truncated"] == 8


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
        *("bad_rows_dropped", "blank_rows_dropped", "unwanted_rows_dropped"),
        *("eval_rows_in_train_dropped", "answers_cut_off"),
        *("unread_columns", "notes", "warnings"),
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
    monkeypatch.setattr(tokenize_module, "_CHARACTERS_PER_CALL", 200)
    assert_equal(prepared(spec, alpaca(50), tokenizer), whole)


CHATS = [
    {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}!"}]} for n in range(20)
]


def test_messages_from_file_to_labels(spec: Write, chat_tokenizer: PreTrainedTokenizerFast) -> None:
    data = prepared(spec, CHATS, chat_tokenizer)
    both = texts(data.train, chat_tokenizer) + texts(data.eval, chat_tokenizer)
    assert set(both) == {(f"<s><|user|>{n}?</s>\n<|assistant|>", f"{n}!</s>\n") for n in range(20)}


def test_a_conversation_that_the_template_refuses_is_named_or_skipped(spec: Write, make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer()
    with pytest.raises(DataError, match=r"rows are conversations, but the model's tokenizer has no chat template"):
        prepared(spec, CHATS, tokenizer, skip_bad_rows=True)
    tokenizer.chat_template = (
        CHAT_TEMPLATE + "{% if '7' in messages[0].content %}{{ raise_exception('no 7') }}{% endif %}"
    )
    with pytest.raises(DataError, match=r"rows.json, row 8: .*refuses the conversation: no 7\n.*rows.json, row 18: "):
        prepared(spec, CHATS, tokenizer)
    facts = prepared(spec, [*CHATS, {"messages": 1}], tokenizer, skip_bad_rows=True).facts
    assert (facts["rows_read"], facts["bad_rows_dropped"], facts["rows_train"] + facts["rows_eval"]) == (21, 3, 18)


def test_a_conversation_is_cut_after_the_last_answer_that_fits(
    spec: Write, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    turns = [(f"{n}?", f"{n} {text}") for n, text in enumerate(("yes", "no", "no " * 40))]
    rows = [
        {"messages": [
            {"role": role, "content": f"{n}{text}"}
            for turn in turns for role, text in zip(("user", "assistant"), turn, strict=True)
        ]}
        for n in range(20)
    ]  # fmt: skip
    data = prepared(spec, rows, chat_tokenizer, max_length=80)
    assert all(text.endswith("1 no</s>\n") for _, text in texts(data.train, chat_tokenizer))
    facts = data.facts
    assert (facts["truncated"], facts["answers_cut_off"], facts["rows_without_label_dropped"]) == (20, 20, 0)
    assert facts["longest"] < 80
    whole = prepared(spec, rows, chat_tokenizer).facts
    assert (whole["truncated"], whole["answers_cut_off"], whole["loss_on"]) == (0, 0, "assistant")
    last = prepared(spec, [*rows, *CHATS], chat_tokenizer, max_length=80, loss_on="last").facts
    assert (last["rows_without_label_dropped"], last["answers_cut_off"]) == (20, 20)


def test_rows_that_are_alike_after_the_cut_are_duplicates(spec: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": f"{n % 12:02} long " * 20 + str(n), "completion": "c"} for n in range(24)]
    facts = prepared(spec, rows, tokenizer, loss_on="all", max_length=16).facts
    assert (facts["duplicates_dropped"], facts["rows_train"] + facts["rows_eval"]) == (12, 12)


def test_blank_answers_are_left_out_and_counted(spec: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    facts = prepared(spec, [*alpaca(20), {"instruction": "q", "input": "", "output": " "}], tokenizer).facts
    assert (facts["rows_read"], facts["blank_rows_dropped"], facts["rows_train"]) == (21, 1, 15)


def evaluated(
    folder: Path, rows: list[Any], heldout: list[Any], tokenizer: PreTrainedTokenizerFast, **fields: Any
) -> TokenizedData:
    for name, content in (("train", rows), ("test", heldout)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    asked = DataSpec(id=str(folder / "train.json"), eval_dataset=str(folder / "test.json"), **fields)
    return prepare(asked, tokenizer, len(tokenizer))


def test_rows_of_an_evaluation_set_of_one_s_own_are_left_out_of_training(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    data = evaluated(tmp_path, alpaca(40), alpaca(20, start=30), tokenizer)
    assert (len(data.train), len(data.eval)) == (30, 20)
    facts = data.facts
    assert (facts["eval_rows_in_train_dropped"], facts["rows_read"], facts["eval_rows_read"]) == (10, 40, 20)
    assert facts["eval_id"] == str(tmp_path / "test.json")
    assert not set(texts(data.train, tokenizer)) & set(texts(data.eval, tokenizer))
    some = evaluated(tmp_path, alpaca(40), alpaca(20, start=40), tokenizer, eval_rows=5)
    assert (len(some.train), len(some.eval)) == (40, 5)
    assert any("5 of the 20 rows of the evaluation set" in note for note in some.facts["notes"])
    cut = evaluated(
        tmp_path, alpaca(40), alpaca(20, start=40), tokenizer, eval_rows=5, loss_on="all", max_length=16
    ).facts
    assert cut["truncated"] == 45
    with pytest.raises(DataError, match="fewer than 2 rows to train on are not in the evaluation set"):
        evaluated(tmp_path, alpaca(10), alpaca(10), tokenizer)


def test_a_test_split_found_beside_is_used_in_part(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text(json.dumps(alpaca(10)))
    (tmp_path / "test.json").write_text(json.dumps(alpaca(1100, start=10)))
    for fields, rows in (({}, 1000), ({"eval_split": "test"}, 1100), ({"split": "train"}, 2)):
        assert len(prepare(DataSpec(id=str(tmp_path), **fields), tokenizer, len(tokenizer)).eval) == rows


@pytest.mark.parametrize(
    ("rows", "fields", "problem"),
    [
        (alpaca(9), {"max_length": 4}, r"no row has a token to learn within max_length 4 \(9 rows were dropped\)"),
        (alpaca(1), {"force": True}, r"only 1 different row; at least 3 are needed\n"),
        (alpaca(2), {"force": True}, r"only 2 different rows; at least 3 are needed\n"),
        (alpaca(7), {}, r"only 7 different rows; at least 8 are needed\n.*--force"),
        (alpaca(1) * 50, {}, r"only 1 different row; at least 8 are needed\n"),
        (alpaca(9), {"eval_rows": 9}, "9 different rows with 9 asked to be held out leave fewer than 2"),
        (alpaca(9), {"eval_rows": 500}, "500 asked to be held out"),
    ],
)
def test_too_few_rows_are_explained(
    rows: list[Any], fields: dict[str, Any], problem: str, spec: Write, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(DataError, match=problem) as caught:
        prepared(spec, rows, tokenizer, **fields)
    assert "rows.json" in caught.value.what
    assert caught.value.todo


def test_rows_whose_answers_all_have_weight_0_are_explained(
    spec: Write, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    asked, answer = {"role": "user", "content": "?"}, {"role": "assistant", "content": "!", "weight": 0}
    with pytest.raises(DataError, match=r"no row has an answer to learn \(9 rows were dropped\)\n.*weight than 0"):
        prepared(spec, [{"messages": [asked, answer]}] * 9, chat_tokenizer)


def test_few_rows_are_enough_where_they_must_be(spec: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    for rows, fields, sizes in ((8, {}, (6, 2)), (3, {"force": True}, (2, 1))):
        data = prepared(spec, alpaca(rows), tokenizer, **fields)
        assert (len(data.train), len(data.eval)) == sizes


def test_one_prompt_for_all_rows_is_divided_row_by_row(spec: Write, tokenizer: PreTrainedTokenizerFast) -> None:
    data = prepared(spec, [{"prompt": "A verse:", "completion": str(n)} for n in range(40)], tokenizer)
    assert (len(data.train), len(data.eval)) == (30, 10)
    assert "too few different prompts to keep equal ones together: held out row by row" in data.facts["notes"]


def test_tokens_to_learn_that_are_not_the_answer_s_are_told(
    spec: Write, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shifted(*arguments: Any) -> list[Encoded]:
        return [row._replace(is_label=np.roll(row.is_label, -3)) for row in encode(*arguments)]

    assert prepared(spec, alpaca(20), tokenizer).facts["warnings"] == []
    monkeypatch.setattr(tokenize_module, "encode", shifted)
    [warning] = prepared(spec, alpaca(20), tokenizer).facts["warnings"]
    assert warning.startswith("the tokens to learn are not the answer's: ")


@pytest.mark.parametrize(
    ("answer", "is_told"),
    [
        ("{{ m.content }}{{ eos_token }}\n", False),
        ("{{ m.content }}\n", True),
        ("{% generation %}{{ m.content }}{% endgeneration %}{{ eos_token }}", True),
        ("{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}", False),
    ],
)
def test_answers_that_teach_no_end_are_told(answer: str, is_told: bool, spec: Write, make_tokenizer: Make) -> None:
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'user' %}{{ m.content }}{% else %}ANSWER{% endif %}"
    )
    template += "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    tokenizer = make_tokenizer(None)
    tokenizer.chat_template = template.replace("ANSWER", answer)
    warnings = prepared(spec, CHATS, tokenizer).facts["warnings"]
    assert [warning.startswith("the chat template ends answers without a special token") for warning in warnings] == [
        True
    ] * is_told


def test_answers_that_the_template_s_marks_leave_out_are_told(spec: Write, make_tokenizer: Make) -> None:
    tokenizer, asked = make_tokenizer(None), {"role": "user", "content": "?"}
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{% if m.content in '?!' %}{{ m.content }}{% else %}"
        "{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
    )
    rows = [{"messages": [asked, {"role": "assistant", "content": text}]} for text in [*map(str, range(9)), "!"]]
    [warning] = prepared(spec, rows, tokenizer).facts["warnings"]
    assert warning.startswith(
        "the chat template's {% generation %} leaves out answers of 1 rows, which are not learned"
    )


def test_doubtful_rows_are_told(spec: Write, chat_tokenizer: PreTrainedTokenizerFast) -> None:
    def told(*rows: Any) -> str:
        facts = prepared(spec, [*CHATS, *rows], chat_tokenizer).facts
        return "\n".join(facts["warnings"])

    answer = {"role": "assistant", "content": "!"}
    assert told() == ""
    assert "1 row has" in told({"messages": [{"role": "user", "content": "?", "name": "Ann"}, answer]})
    assert "special token of the model as text (</s>)" in told(
        {"messages": [{"role": "user", "content": "</s>"}, answer]}
    )


def test_special_tokens_that_have_no_name_are_told_too(spec: Write, make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer()
    assert prepared(spec, [*alpaca(9), {"instruction": "<|x|>", "output": "y"}], tokenizer).facts["warnings"] == []
    tokenizer.add_tokens([AddedToken("<|x|>", special=True)])
    [warning] = prepared(spec, [*alpaca(9), {"instruction": "<|x|>", "output": "y"}], tokenizer).facts["warnings"]
    assert "1 rows hold a special token of the model as text (<|x|>)" in warning


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
