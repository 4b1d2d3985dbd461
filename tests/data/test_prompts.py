"""A prompt is what the template says, no input is dropped, and tokens are those of the whole text."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rankscope.data.conversations import Rendered
from rankscope.data.prompts import encode, render_plain
from rankscope.errors import ModelError
from rankscope.spec.models import DEFAULT_TEMPLATE, DataSpec

Make = Callable[..., PreTrainedTokenizerFast]
ALPACA = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
WITHOUT = "### Instruction:\n{instruction}\n\n### Response:\n"


def render(row: dict[str, Any], loss_on: str = "completion", **fields: Any) -> Rendered:
    return render_plain(row, DataSpec(id="x", **fields), loss_on)


def both(rendered: Rendered) -> tuple[str, str]:
    """Text that is read, and text that is learned."""
    [(start, end)] = rendered.learned
    assert end == len(rendered.text)
    return rendered.text[:start], rendered.text[start:]


@pytest.mark.parametrize(
    ("instruction", "given", "fields", "prompt", "answer"),
    [
        ("Sort.", "[2, 1]", {}, "### Question: Sort.\n[2, 1]\n ### Answer:", " o"),
        ("Sort.", "", {}, "### Question: Sort.\n ### Answer:", " o"),
        ("Sort.", " \n\t", {}, "### Question: Sort.\n ### Answer:", " o"),
        ("{input} {0} {", "{instruction} \\1", {},
         "### Question: {input} {0} {\n{instruction} \\1\n ### Answer:", " o"),
        # a line with both keeps the instruction
        ("Go", "", {"template": "Q: {instruction} {input}\nInput {input}!\nA:"}, "Q: Go \nA:", " o"),
        ("Go", "x", {"template": "Q: {instruction} {input}\nInput {input}!\nA:"}, "Q: Go x\nInput x!\nA:", " o"),
        # no space after white space
        ("Go", "x", {"template": ALPACA}, "### Instruction:\nGo\n\n### Input:\nx\n\n### Response:\n", "o"),
        ("Go", "x", {"template": "{instruction} {input} "}, "Go x ", "o"),
        # the standard prompt of alpaca has no heading for an input that is not there
        ("Go", "", {"template": ALPACA, "template_without_input": WITHOUT},
         "### Instruction:\nGo\n\n### Response:\n", "o"),
        ("Go", "", {"template_without_input": "{instruction}:"}, "Go:", " o"),
        ("Go", "x", {"template_without_input": "{instruction}:"}, "### Question: Go\nx\n ### Answer:", " o"),
    ],
)  # fmt: skip
def test_templates(instruction: str, given: str, fields: dict[str, str], prompt: str, answer: str) -> None:
    row = {"instruction": instruction, "input": given, "output": "o"}
    assert both(render(row, **fields)) == (prompt, answer)


def test_system_and_history_stand_in_the_prompt() -> None:
    row = {"instruction": "c", "input": "i", "output": "o", "system": "Be brief.", "history": [["a", "b"]]}
    prompt = "Be brief.\n### Question: a\n ### Answer: b\n### Question: c\ni\n ### Answer:"
    assert both(render(row)) == (prompt, " o")
    lined = "Be brief.\nQ a\nA: b\nQ c i\nA:"
    assert both(render(row, template="Q {instruction} {input}\nA:", template_without_input="Q {instruction}\nA:")) == (
        lined,
        " o",
    )
    first = {"instruction": "a", "input": "", "output": "b", "system": "Be brief."}
    assert render(row).beginning == render(first).beginning  # on one side of the split
    assert render({**first, "system": "Be long."}).beginning != render(first).beginning


@pytest.mark.parametrize("loss_on", ["completion", "assistant", "last", "all"])
def test_pairs_and_texts_are_taken_as_they_are(loss_on: str) -> None:
    pair, text = render({"prompt": "{x} ", "completion": "y\n"}, loss_on), render({"text": " a\n"}, loss_on)
    assert both(pair) == (("", "{x} y\n") if loss_on == "all" else ("{x} ", "y\n"))
    assert both(text) == ("", " a\n")
    assert not pair.is_chat
    assert not text.is_chat
    assert pair.beginning == "{x} "


def pair(prompt: str, completion: str) -> Rendered:
    return Rendered(prompt + completion, [(len(prompt), len(prompt + completion))], prompt, is_chat=False)


def texts(rendered: Rendered, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    [encoded] = encode([rendered], tokenizer)
    border = len(encoded.ids) - int(encoded.is_label.sum())
    assert encoded.is_label.tolist() == [False] * border + [True] * (len(encoded.ids) - border)
    assert encoded.ends == [len(encoded.ids)]
    return str(tokenizer.decode(encoded.ids[:border])), str(tokenizer.decode(encoded.ids[border:]))


@pytest.mark.parametrize(
    ("after", "front"),
    [
        (None, ""),
        ("<s> $A", "<s>"),
        ("</s> $A", "</s>"),
        ("$A </s>", ""),
        ("<s> $A </s>", "<s>"),
        ("<s> <s> $A </s> </s>", "<s><s>"),
    ],
)
def test_special_tokens_stand_in_front_and_eos_ends_it_once(
    after: str | None, front: str, make_tokenizer: Make
) -> None:
    tokenizer = make_tokenizer(after)
    prompt = "### Question: Sort.\n ### Answer:"
    for answer in (" 1, 2", " 1, 2</s>"):
        assert texts(pair(prompt, answer), tokenizer) == (front + prompt, " 1, 2</s>")
    [encoded] = encode([pair(prompt, " 1, 2")], tokenizer)
    read = [token for token, is_label in zip(encoded.ids, encoded.is_label, strict=True) if not is_label]
    assert tokenizer(prompt)["input_ids"][: len(read)] == read


def test_a_beginning_that_the_text_has_already_is_not_doubled(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer("<s> $A")
    assert texts(pair("<s>Q: ", "one"), tokenizer) == ("<s>Q: ", "one</s>")
    assert texts(Rendered("<s>one", [(0, 6)], "", is_chat=False), tokenizer) == ("", "<s>one</s>")


def test_a_tokenizer_written_in_python_works_too() -> None:
    tokenizer = ByT5Tokenizer()  # no files; appends eos
    assert texts(pair("Q: é", " ja"), tokenizer) == ("Q: é", " ja</s>")


PAIRS = [
    (DEFAULT_TEMPLATE.format(instruction="Name it.", input="Paris"), " The answer is four."),
    ("Question:\n", "four"),
    ("Code:\n", "    return 4\n"),
    ("[INST] hello [/INST]", "four"),
    ("Name it: ", "Paris"),
    ("", "The answer"),
]


@pytest.mark.parametrize("name", ["plain", "nobos", "addseos", "byt5", "spm", "spm-ll", "mistral-zephyr"])
def test_ids_are_those_of_the_whole_text_where_the_prompt_s_are_its_beginning(
    name: str, case_model: Callable[[str], Path]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(case_model(name))
    for prompt, answer in PAIRS:
        [encoded] = encode([pair(prompt, answer)], tokenizer)
        before, whole = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, prompt + answer))
        read, learned = encoded.ids[: -encoded.is_label.sum()], encoded.ids[-encoded.is_label.sum() :]
        assert read[len(read) - len(before) :] == before  # as at inference
        assert learned[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(before + learned[:-1]) == tokenizer.decode(whole)  # no space that is not in the text
        assert encoded.spans_border == (before + learned[:-1] != whole) == (prompt[-1:] == " " and name != "byt5")


def test_texts_and_chats_in_one_call_are_each_treated_as_what_they_are(
    chat_tokenizer: PreTrainedTokenizerFast,
) -> None:
    text, chat = pair("a", "b"), Rendered("ab", [(1, 2)], "")
    for rows, expected in (([text, chat], ["<s>ab</s>", "ab"]), ([chat, text, chat], ["ab", "<s>ab</s>", "ab"])):
        assert [chat_tokenizer.decode(encoded.ids) for encoded in encode(rows, chat_tokenizer)] == expected


def test_a_tokenizer_without_eos_is_refused(make_tokenizer: Make) -> None:
    with pytest.raises(ModelError, match=r"no end-of-sequence token.*\n.*Choose a model"):
        encode([pair("a", "b")], make_tokenizer(eos_token=""))


def test_truncation_saved_with_the_tokenizer_is_not_applied(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    assert texts(pair("Sort the list", " 1, 2, 3"), tokenizer) == ("<s>Sort the list", " 1, 2, 3</s>")
