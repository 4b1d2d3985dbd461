"""Prompts and completions: records as the text to read and the text to learn, and both as token ids.

Prompt and completion are tokenised separately, so that no token spans the boundary of the loss.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from rankscope.data.records import Format
from rankscope.errors import DataError, ModelError
from rankscope.spec.models import DataSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokenizer: TypeAlias = "PreTrainedTokenizerBase"

_PLACEHOLDER = re.compile(r"\{(instruction|input)\}")
_PROBE = "The answer is 42."


class Rendered(NamedTuple):
    """One row as text."""

    prompt: str
    completion: str
    is_chat: bool  # written by a chat template, with its special tokens


class Encoded(NamedTuple):
    """One row as token ids, not yet truncated."""

    prompt_ids: list[int]
    completion_ids: list[int]


def render(row: dict[str, Any], spec: DataSpec, format: Format, tokenizer: Tokenizer) -> Rendered:
    """Render a record as prompt and completion.

    - alpaca: `spec.template`, filled; the completion is a space and the output. Values are inserted literally, braces
      included. If the input is blank, lines of the template with `{input}` are left out, unless they also have
      `{instruction}`; then the input is empty.
    - prompt_completion: both texts as they are.
    - messages, or lists of messages: the tokenizer's chat template. The completion is the template's text after the
      generation prompt: the last message and its end mark.

    Raises:
        DataError: the tokenizer has no chat template, the template refuses the conversation, or it writes the earlier
            messages differently once the answer follows, so that prompt and answer cannot be separated.
    """
    if format == "alpaca":
        return Rendered(_fill(spec.template, row), " " + row["output"], is_chat=False)
    if format == "messages":
        return _render_chat(row["messages"][:-1], row["messages"][-1:], tokenizer)
    if isinstance(row["prompt"], list):
        return _render_chat(row["prompt"], row["completion"], tokenizer)
    return Rendered(row["prompt"], row["completion"], is_chat=False)


def _fill(template: str, row: dict[str, str]) -> str:
    if not row["input"].strip():
        lines = template.split("\n")
        template = "\n".join(line for line in lines if "{input}" not in line or "{instruction}" in line)
        row = {**row, "input": ""}
    return _PLACEHOLDER.sub(lambda match: row[match[1]], template)  # one pass keeps "{input}" in an instruction


def _render_chat(prompt: list[dict[str, str]], completion: list[dict[str, str]], tokenizer: Tokenizer) -> Rendered:
    if not tokenizer.chat_template:
        raise DataError(
            f"the rows are conversations, but the tokenizer of {tokenizer.name_or_path} has no chat template",
            "Choose a chat (instruct) model, or data in the alpaca or prompt_completion format.",
        )
    try:
        before: Any = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        whole: Any = tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)
    except Exception as error:  # a template is a program and may raise anything
        raise DataError(
            f"the model's chat template refuses the conversation: {error}",
            "Remove such rows (often a system message, or roles out of turn), or take another model.",
        ) from None
    if not whole.startswith(before):
        raise DataError(
            "the model's chat template is not prefix-preserving: it writes the messages before the answer "
            "differently once the answer follows, so that prompt and answer cannot be separated",
            "Choose another model, or data in the alpaca or prompt_completion format.",
        )
    return Rendered(before, whole.removeprefix(before), is_chat=True)


def encode(rows: Sequence[Rendered], tokenizer: Tokenizer) -> list[Encoded]:
    """Tokenise all prompts in one call and all completions in another.

    A plain prompt begins with the tokenizer's leading special tokens (often bos), without trailing ones, which would
    separate prompt and completion. A plain completion ends with one eos. Chat text is tokenised as it is.

    Raises:
        ModelError: the tokenizer has no eos token, and plain completions need one.
    """
    prompts = token_ids([row.prompt for row in rows], tokenizer)
    completions = token_ids([row.completion for row in rows], tokenizer)
    if all(row.is_chat for row in rows):
        return [Encoded(*pair) for pair in zip(prompts, completions, strict=True)]
    front, eos = special_tokens_in_front(tokenizer), tokenizer.eos_token_id
    if not isinstance(eos, int):
        raise ModelError(
            f"model {tokenizer.name_or_path}: the tokenizer has no end-of-sequence token, so no completion could end",
            "Choose a model whose tokenizer has one (eos_token in its tokenizer_config.json).",
        )
    return [
        Encoded(prompt, completion)
        if row.is_chat
        else Encoded(front + prompt, completion if completion[-1:] == [eos] else [*completion, eos])
        for row, prompt, completion in zip(rows, prompts, completions, strict=True)
    ]


def token_ids(texts: list[str], tokenizer: Tokenizer, special: bool = False) -> list[list[int]]:
    """Token ids of each text, not truncated; with the tokenizer's special tokens only if `special`."""
    encoding = tokenizer(
        texts,
        add_special_tokens=special,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # no warning about rows longer than the model takes: they are truncated and counted later
    )
    return [list(ids) for ids in encoding["input_ids"]]


def special_tokens_in_front(tokenizer: Tokenizer) -> list[int]:
    """Leading special tokens of the tokenizer, detected on a probe text with and without special tokens."""
    [bare], [dressed] = token_ids([_PROBE], tokenizer), token_ids([_PROBE], tokenizer, special=True)
    for front in range(len(dressed) - len(bare), -1, -1):
        if dressed[front : front + len(bare)] == bare:
            return dressed[:front]
    raise ModelError(
        f"model {tokenizer.name_or_path}: the tokenizer changes text when it adds special tokens: "
        f"{bare} became {dressed}",
        "Choose another model.",
    )
