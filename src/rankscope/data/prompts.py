"""Prompts: rows as text with the characters to learn, and text as token ids with labels.

Token ids are those of the whole text, as `apply_chat_template` and TRL make them: an answer tokenised alone would begin
with a space that SentencePiece adds, and that the text has not.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from rankscope.data.conversations import Rendered, Tokenizer
from rankscope.data.messages import shared_length
from rankscope.errors import ModelError
from rankscope.spec.models import DataSpec

_PLACEHOLDER = re.compile(r"\{(instruction|input)\}")
_PROBE = "The answer is 42."


class Encoded(NamedTuple):
    """One row as n token ids, not yet truncated."""

    ids: list[int]
    is_label: npt.NDArray[np.bool_]  # (n,)
    ends: list[int]  # number of tokens up to the end of each answer
    spans_border: bool  # a token lies over the border between what is read and what is learned


def render_plain(row: Mapping[str, Any], spec: DataSpec, loss_on: str) -> Rendered:
    """Render a row that is no conversation.

    - alpaca: `spec.template`, filled, and the output, after a space unless the template ends in white space. Values are
      inserted literally, braces included. If the input is blank, `spec.template_without_input` is filled; without one,
      lines of the template with `{input}` are left out, unless they also have `{instruction}`; then the input is empty.
      A system text stands in front; earlier questions and answers are filled in alike, a line break after each.
    - prompt_completion: both texts as they are.
    - text: all of it is learned.
    """
    if "text" in row:
        return Rendered(row["text"], [(0, len(row["text"]))], row["text"], is_chat=False)
    if "prompt" in row:
        prompt, completion, beginning = row["prompt"], row["completion"], row["prompt"]
    else:
        prompt = f"{row['system']}\n" if "system" in row else ""
        earlier = [({"instruction": asked, "input": ""}, said) for asked, said in row.get("history", ())]
        beginning = prompt + _fill(spec, earlier[0][0] if earlier else row)
        for asked, said in earlier:
            question = _fill(spec, asked)
            prompt += f"{question}{_after(question, said)}\n"
        question = _fill(spec, row)
        prompt, completion = prompt + question, _after(question, row["output"])
    start = 0 if loss_on == "all" else len(prompt)
    return Rendered(prompt + completion, [(start, len(prompt + completion))], beginning, is_chat=False)


def _after(prompt: str, answer: str) -> str:
    return answer if prompt[-1:].isspace() else f" {answer}"


def _fill(spec: DataSpec, row: Mapping[str, str]) -> str:
    template, values = spec.template, row
    if not row["input"].strip():
        lines = template.split("\n")
        template = "\n".join(line for line in lines if "{input}" not in line or "{instruction}" in line)
        template = template if spec.template_without_input is None else spec.template_without_input
        values = {**row, "input": ""}
    return _PLACEHOLDER.sub(lambda match: values[match[1]], template)  # one pass keeps "{input}" in an instruction


def heading_without_input(spec: DataSpec) -> str:
    """Heading of the input that prompts of rows without one keep, such as `### Input:`; empty if there is none."""
    before = spec.template.split("{input}")[0].split("\n")
    heading = before[-2].strip() if len(before) > 1 and "{instruction}" not in before[-1] else ""
    asked = spec.template_without_input is not None or "{instruction}" in heading
    return "" if asked or not heading.endswith(":") else heading


def encode(rows: Sequence[Rendered], tokenizer: Tokenizer) -> list[Encoded]:
    """Tokenise whole texts, a batch in one call, and find the tokens to learn.

    A plain text begins with the tokenizer's leading special tokens (often bos) and ends with one eos. A plain prompt is
    tokenised as at inference: where a token would span its border (it ends in a space, say), the answer's tokens are
    those of the text that follows it, and ids differ from the whole text's. Chat text is tokenised as it is. Raises
    ModelError: the tokenizer has no eos token, and plain answers need one.
    """
    encoded: dict[int, Encoded] = {}
    for is_chat, encode_all in ((True, _encode_chats), (False, _encode_plain)):
        if own := [row for row in rows if row.is_chat == is_chat]:
            encoded |= zip(map(id, own), encode_all(own, tokenizer), strict=True)
    return [encoded[id(row)] for row in rows]


def _encode_chats(rows: Sequence[Rendered], tokenizer: Tokenizer) -> list[Encoded]:
    if not tokenizer.is_fast:
        ids = token_ids([row.text for row in rows], tokenizer)
        return [_by_prefixes(row, own, tokenizer) for row, own in zip(rows, ids, strict=True)]
    encoding = _tokenized([row.text for row in rows], tokenizer, return_offsets_mapping=True)
    return [
        _by_offsets(row, list(ids), np.array(offsets, dtype=np.int64).reshape(-1, 2))
        for row, ids, offsets in zip(rows, encoding["input_ids"], encoding["offset_mapping"], strict=True)
    ]


def _by_offsets(row: Rendered, ids: list[int], offsets: npt.NDArray[np.int64]) -> Encoded:
    starts, ends = offsets[:, 0], offsets[:, 1]
    is_label = np.zeros(len(ids), dtype=np.bool_)
    last, over = [], False
    for start, end in row.learned:
        inside = (ends > start) & (ends <= end) & (starts < end)  # a token over the border is learned, as TRL does
        is_label |= inside
        over |= bool(((starts < start) & (ends > start)).any())
        last.append(int(np.flatnonzero(inside)[-1]) + 1 if inside.any() else len(ids))
    return Encoded(ids, is_label, last, over)


def _by_prefixes(row: Rendered, ids: list[int], tokenizer: Tokenizer) -> Encoded:
    """For tokenizers without offsets: a border is where the ids of the text up to it cease to be those of the whole."""
    is_label = np.zeros(len(ids), dtype=np.bool_)
    last, over = [], False
    for start, end in row.learned:
        before, until = token_ids([row.text[:start], row.text[:end]], tokenizer)
        first, stop = shared_length(before, ids), shared_length(until, ids)
        over |= first < len(before)
        is_label[first:stop] = True
        last.append(stop)
    return Encoded(ids, is_label, last, over)


def _encode_plain(rows: Sequence[Rendered], tokenizer: Tokenizer) -> list[Encoded]:
    front, eos = special_tokens_in_front(tokenizer), tokenizer.eos_token_id
    if not isinstance(eos, int):
        what = f"model {tokenizer.name_or_path}: the tokenizer has no end-of-sequence token, so no answer could end"
        raise ModelError(what, "Choose a model whose tokenizer has one (eos_token in its tokenizer_config.json).")
    borders = [row.learned[0][0] for row in rows]
    wholes = token_ids([row.text for row in rows], tokenizer)
    prompts = token_ids([row.text[:border] for row, border in zip(rows, borders, strict=True)], tokenizer)
    over = [whole[: len(prompt)] != prompt for whole, prompt in zip(wholes, prompts, strict=True)]
    apart = [row.text[border:] for row, border, is_over in zip(rows, borders, over, strict=True) if is_over]
    answers = iter(_continuing(apart, tokenizer))
    found = []
    for whole, prompt, is_over in zip(wholes, prompts, over, strict=True):
        body = prompt + next(answers) if is_over else whole
        before = [] if body[: len(front)] == front else front  # a text may have them already
        ids = before + body + ([] if body[-1:] == [eos] else [eos])
        is_label = np.ones(len(ids), dtype=np.bool_)
        is_label[: len(before) + len(prompt)] = False
        found.append(Encoded(ids, is_label, [len(ids)], is_over))
    return found


def _continuing(texts: Sequence[str], tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids of texts that continue another, without the space that SentencePiece puts in front of a text."""
    found: dict[str, list[int]] = {}
    for before in ("\n", ":", "a"):
        if left := [text for text in dict.fromkeys(texts) if text not in found]:
            alone, *both = token_ids([before, *(before + text for text in left)], tokenizer)
            pairs = zip(left, both, strict=True)
            found |= {text: ids[len(alone) :] for text, ids in pairs if ids[: len(alone)] == alone}
    return [found[text] if text in found else token_ids([text], tokenizer)[0] for text in texts]


def token_ids(texts: list[str], tokenizer: Tokenizer, special: bool = False) -> list[list[int]]:
    """Token ids of each text, not truncated; with the tokenizer's special tokens only if `special`."""
    return [list(ids) for ids in _tokenized(texts, tokenizer, add_special_tokens=special)["input_ids"]]


def _tokenized(texts: list[str], tokenizer: Tokenizer, **options: Any) -> Any:
    return tokenizer(
        texts,
        **{"add_special_tokens": False} | options,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # no warning about rows longer than the model takes: they are truncated and counted later
    )


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
