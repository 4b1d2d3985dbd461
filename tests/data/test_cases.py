"""Every kind of data that people report trouble with: what is trained on is what the data say.

A folder of `cases` is one report, numbered as in the issue trackers' survey; `OWN` holds those that need no file of
their own. A case is read from inside its folder, as a user would type it. Almost all train; those that are refused are
the ones in which the data are wrong or say nothing.
"""

import csv
import gzip
import io
import json
import os
import re
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any, NamedTuple

import numpy as np
import pytest
from pydantic import ValidationError
from transformers import PreTrainedTokenizerBase

import forking
from rankscope.data.batches import batch_indices, steps_per_epoch
from rankscope.data.cache import prepare_cached
from rankscope.data.records import load_records
from rankscope.data.tokens import Example, TokenizedData
from rankscope.errors import DataError, ModelError, RankscopeError
from rankscope.model.load import load_tokenizer
from rankscope.spec.models import DataSpec, ModelSpec
from rankscope.spec.options import assemble
from rankscope.study.metrics import read_rows

CASES = Path(__file__).parent / "cases"


def conversation(number: int, **answer: Any) -> dict[str, Any]:
    asked = {"role": "user", "content": f"Name number {number}."}
    return {"messages": [asked, {"role": "assistant", "content": f"It is {number}."} | answer]}


def jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _rejected_first(number: int) -> dict[str, Any]:
    first, second = conversation(number, weight=0), conversation(number + 100)
    return {"messages": [*first["messages"], *second["messages"]]}


def _with_system(number: int) -> dict[str, Any]:
    return {"messages": [{"role": "system", "content": "Be brief."}, *conversation(number)["messages"]]}


_TOOL = {"name": "get_weather", "parameters": {"type": "object", "properties": {}}}
_UNANSWERED = {"messages": [*conversation(24)["messages"], {"role": "user", "content": "And the next?"}]}
_HARD_CSV = gzip.decompress((CASES / "23-csv-hard/rows.csv.gz").read_bytes())
OWN: dict[str, dict[str, str | bytes]] = {
    "10-weight-zero": {"rows.jsonl": jsonl([_rejected_first(number) for number in range(24)])},
    "14-tools-column": {
        "rows.jsonl": jsonl([conversation(number) | {"tools": json.dumps([_TOOL])} for number in range(24)])
    },
    "15-thinking": {"rows.jsonl": jsonl([conversation(number, thinking="step by step") for number in range(24)])},
    "17-ends-with-user": {"rows.jsonl": jsonl([*(conversation(number) for number in range(23)), _UNANSWERED])},
    "55-some-system": {
        "rows.jsonl": jsonl([conversation(number) for number in range(20)] + [_with_system(20), _with_system(21)])
    },
    "23-csv-plain": {"rows.csv": _HARD_CSV, "bom.csv": b"\xef\xbb\xbf" + _HARD_CSV},
    "25-tsv": {"rows.tsv": "instruction\tinput\toutput\n" + "".join(f"Name, {n}\t\t{n}; 0{n}\n" for n in range(24))},
    "40-long-row": {
        "rows.jsonl": jsonl(
            [{"instruction": f"Name {n}", "output": "one two " * (60_000 if n == 5 else 1)} for n in range(24)]
        )
    },
    "46-this-folder": {"train.jsonl": jsonl([conversation(number) for number in range(24)])},
    "48-trailing-commas": {
        "rows.csv": "instruction,input,output\n" + "".join(f"Name {n},,{n}\n" for n in range(24)) + ",,\n" * 10
    },
    "85-equal-after-the-cut": {
        "rows.jsonl": jsonl([{"prompt": f"{n % 24} {'a' * 40} {n}", "completion": "x"} for n in range(48)])
    },
}

ASKED, SAID = "Name number 0 of set 0.", "It is one one 0."
TURN = f"<|im_start|>user\n{ASKED}<|im_end|>\n<|im_start|>assistant\n"
NEXT = "<|im_start|>user\nAnd the next?<|im_end|>\n<|im_start|>assistant\n"
SYSTEM = "<|im_start|>system\nBe brief.<|im_end|>\n"
CHAT = (TURN, f"{SAID}<|im_end|>\n")
TWO_TURNS = (SYSTEM + TURN, f"{SAID}<|im_end|>\n", NEXT, "Then one.<|im_end|>\n")
TWO_TURNS_ALONE = (TURN, *TWO_TURNS[1:])
QUESTION = (f"<s>### Question: {ASKED}\n ### Answer:", f" {SAID}</s>")
PAIR = (f"<s>{ASKED}\n", f"{SAID}</s>")
WEATHER = "<|im_start|>user\nWeather in Paris 0?<|im_end|>\n<|im_start|>assistant\n"
CALL = '<tool_call>get_weather {"city": "Paris"}</tool_call><|im_end|>\n'
CALLED = (
    *(WEATHER, CALL),
    *("<|im_start|>tool\nsunny<|im_end|>\n<|im_start|>assistant\n", "It is sunny 0.<|im_end|>\n"),
)
ALPACA = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
ALPACA_WITHOUT_INPUT = "### Instruction:\n{instruction}\n\n### Response:\n"


class Case(NamedTuple):
    folder: str
    right: str  # what is right, in a line
    model: str = "plain"
    data: str | tuple[str, ...] = "rows.jsonl"
    fields: dict[str, Any] = {}  # noqa: RUF012  of DataSpec
    rows: tuple[int, int] = (18, 6)  # trained on, held out
    shows: tuple[str, ...] = ()  # a row as text: read, learned, read, learned, ...
    facts: dict[str, Any] = {}  # noqa: RUF012
    says: str = ""  # pattern in a note, a warning, or the error
    whole: bool = True  # whether ids are those of the whole text

    @property
    def id(self) -> str:
        data = self.data if isinstance(self.data, str) else "+".join(self.data)
        return " ".join([self.folder, *([self.model] if self.model != "plain" else []), data, *map(str, self.fields)])


TRAINED = [
    Case("01-sharegpt", "from human, from gpt: user and assistant", "chatml", "rows.json", shows=CHAT,
         says="`conversations` as messages"),
    Case("02-sharegpt-renamed", "the same under `messages`", "chatml", "rows.json", shows=CHAT),
    Case("03-conversations-role-content", "only the column's name differs", "chatml", "rows.json", shows=CHAT,
         says="`conversations` as messages"),
    Case("04-text-only", "plain text: all of it is learned", shows=("<s>", f"{ASKED} {SAID}</s>")),
    Case("05-text-as-empty-prompt", "one empty prompt: rows are held out one by one",
         shows=("<s>", f"{ASKED} {SAID}</s>"), says="held out row by row"),
    Case("05-text-as-empty-prompt", "the same as alpaca", data="alpaca.jsonl",
         shows=("<s>### Question: \n ### Answer:", f" {ASKED} {SAID}</s>"), says="held out row by row"),
    Case("06-dolly-columns", "context is input, response is output", shows=QUESTION,
         says="`context` as input", facts={"unread_columns": ["category"]}),
    Case("06-dolly-columns", "the same, as the study says", fields={"columns": {"output": "response"}},
         shows=QUESTION, facts={"unread_columns": ["context", "category"]}),
    Case("07-question-answer", "question and answer fill the template", shows=QUESTION, says="`question` as inst"),
    Case("07-question-answer", "prompt and response fill the template", data="prompt-response.jsonl", shows=QUESTION,
         says="`response` as output"),
    Case("07-question-answer", "or are prompt and completion", fields={"columns": {"prompt": "question",
         "completion": "answer"}}, shows=(f"<s>{ASKED}", f"{SAID}</s>")),
    Case("08-alpaca-system-history", "system and history are part of the prompt", data="rows.json",
         shows=(f"<s>You are a pirate.\n### Question: Hello\n ### Answer: Ahoy\n{QUESTION[0][3:]}", QUESTION[1])),
    Case("09-multi-turn", "every answer is learned", "chatml", shows=TWO_TURNS),
    Case("09-multi-turn", "or the last", "chatml", fields={"loss_on": "last"},
         shows=("".join(TWO_TURNS[:3]), TWO_TURNS[3])),
    Case("09-multi-turn", "or everything but the first token", "chatml", fields={"loss_on": "all"},
         shows=("<|im_start|>", "".join(TWO_TURNS).removeprefix("<|im_start|>"))),
    Case("10-weight-zero", "an answer with weight 0 is read, not learned", "chatml",
         shows=("<|im_start|>user\nName number 0.<|im_end|>\n<|im_start|>assistant\nIt is 0.<|im_end|>\n"
                "<|im_start|>user\nName number 100.<|im_end|>\n<|im_start|>assistant\n", "It is 100.<|im_end|>\n")),
    Case("11-tool-call-content-null", "the call is learned", "tools", shows=CALLED),
    Case("12-tool-call-content-empty", "the call is learned", "tools", shows=CALLED),
    Case("13-tool-call-is-the-answer", "the call is the answer", "tools",
         shows=('<|im_start|>system\nTools: [{"type": "function", "function": {"name": "get_weather", "description": '
                '"Weather of a city", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}]'
                f"<|im_end|>\n{WEATHER}", CALL)),
    Case("13-tool-call-is-the-answer", "also where every answer is one", "tools", "all-calls.jsonl"),
    Case("14-tools-column", "tools, here as JSON text, reach the template", "tools",
         shows=('<|im_start|>system\nTools: [{"type": "function", "function": {"name": "get_weather", "parameters": '
                '{"type": "object", "properties": {}}}}]<|im_end|>\n<|im_start|>user\nName number 0.<|im_end|>\n'
                "<|im_start|>assistant\n", "It is 0.<|im_end|>\n")),
    Case("15-reasoning-content", "thoughts are learned", "tools",
         shows=(TURN, f"<think>\nthink about it step by step\n</think>\n{SAID}<|im_end|>\n")),
    Case("15-thinking", "also under the name that the template does not read", "tools",
         shows=("<|im_start|>user\nName number 0.<|im_end|>\n<|im_start|>assistant\n",
                "<think>\nstep by step\n</think>\nIt is 0.<|im_end|>\n")),
    Case("15-reasoning-content", "a template that does not write thoughts is named", "chatml", shows=CHAT,
         says="does not write `reasoning_content`, which 24 rows have"),
    Case("16-content-parts", "parts that are text are joined", "chatml", shows=CHAT),
    Case("17-ends-with-user", "a row that cannot be learned is skipped on demand", "chatml",
         fields={"skip_bad_rows": True}, rows=(18, 5), facts={"bad_rows_dropped": 1}, says="line 24"),
    Case("18-empty-answers", "blank answers are left out and counted", "chatml", rows=(9, 3), shows=CHAT,
         facts={"blank_rows_dropped": 12}),
    Case("18-empty-answers", "blank answers are left out and counted", data="alpaca.jsonl", rows=(9, 3),
         shows=QUESTION, facts={"blank_rows_dropped": 12}),
    Case("19-json-top-level-key", "rows under a key", data="one-line.json", shows=QUESTION),
    Case("19-json-top-level-key", "rows under a key", data="pretty.json", shows=QUESTION),
    Case("20-columnar-json", "pandas' columns", data="pandas.json", shows=QUESTION),
    Case("20-columnar-json", "columns as lists", data="lists.json", shows=QUESTION),
    Case("21-odd-characters", "separators, NUL, emoji and RTL stay in their row",
         shows=("<s>0: line\u2028sep\n", "line\u2028sep0</s>")),
    Case("21-odd-characters", "also with BOM and CRLF", data="bom-crlf.jsonl",
         shows=("<s>1: next\x85line\n", "nul\x00byte1</s>")),
    Case("23-csv-plain", "quotes, separators and line breaks within a cell", data="rows.csv",
         shows=('<s>### Question: Say "hi", 0\nthen stop; ok\n ### Answer:', ' "q" 0,\r\nnext</s>'),
         facts={"truncated": 1}, whole=False),
    Case("24-csv-semicolon", "the header's separator", data="plain.csv", shows=QUESTION),
    Case("24-csv-semicolon", "also with commas in the text", data="commas.csv",
         shows=(QUESTION[0], f" {SAID}, yes, no</s>")),
    Case("25-tsv", "tabs separate", data="rows.tsv", shows=("<s>### Question: Name, 7\n ### Answer:", " 7; 07</s>")),
    *(Case("26-csv-na-file-and-folder", "None is text", data=data,
           shows=("<s>### Question: Symbol or keyword 0?\nNone\n ### Answer:", " It is 0</s>"))
      for data in ("rows.csv", "folder")),
    *(Case("27-csv-numbers-file-and-folder", "0 is text", data=data, shows=(QUESTION[0], " 0</s>"))
      for data in ("rows.csv", "folder")),
    *(Case("28-json-dates-file-and-folder", "a date is text", data=data,
           shows=("<s>### Question: Day 0 of May 2024?\n ### Answer:", " 2024-05-01</s>"))
      for data in ("rows.jsonl", "folder")),
    Case("29-folder-of-two-types", "every file is read", data="folder", rows=(30, 10),
         shows=("<s>### Question: Other 0\n ### Answer:", " thing 0</s>")),
    Case("30-folder-train-and-test", "test.jsonl is the evaluation set", data="folder", rows=(24, 10),
         shows=QUESTION, says="the split test is the evaluation set"),
    Case("30-folder-train-and-test", "unless both are trained on", data="folder", fields={"split": "train+test"},
         rows=(26, 8)),
    Case("31-save-to-disk", "train, and test beside it", data="dict", rows=(18, 6), shows=QUESTION),
    Case("31-save-to-disk", "the split that is named", data="sft", fields={"split": "train_sft"}, shows=QUESTION),
    Case("31-save-to-disk", "also to evaluate on", data="sft",
         fields={"split": "train_sft", "eval_split": "test_sft"}, rows=(20, 4), shows=QUESTION,
         facts={"eval_rows_in_train_dropped": 4}),
    Case("31-save-to-disk", "the only split there is", data="only_test", shows=QUESTION, says="only split is test"),
    Case("31-save-to-disk", "a slice", data="slice", rows=(15, 5), shows=QUESTION),
    *(Case("32-parquet-types", "other types of text", data=f"{kind}.parquet", shows=PAIR)
      for kind in ("large", "dict")),
    Case("32-parquet-types", "no input at all", data="nul.parquet", shows=QUESTION),
    Case("32-parquet-types", "messages as structs, with nulls", "chatml", "struct.parquet", shows=CHAT),
    *(Case("33-mixed-types", "rows that are no text, on demand", data=data, fields={"skip_bad_rows": True},
           rows=(15, 5), shows=QUESTION, facts={"bad_rows_dropped": 2}) for data in ("rows.jsonl", "folder")),
    Case("34-nulls", "a null input is none", data="input-null.jsonl", shows=QUESTION),
    *(Case("34-nulls", "a row without an answer, on demand", data=data, fields={"skip_bad_rows": True}, rows=(18, 5),
           shows=QUESTION, facts={"bad_rows_dropped": 1}) for data in ("output-null.jsonl", "output-nan.json")),
    Case("35-messages-as-text", "messages as JSON", "chatml", "rows.csv", shows=CHAT),
    Case("35-messages-as-text", "messages as Python writes them", "chatml", "python.csv", shows=CHAT),
    Case("36-same-prompt", "one prompt for all: a quarter is held out row by row",
         shows=("<s>Write a short verse.\n", f"{SAID}</s>"), says="held out row by row"),
    Case("36-same-prompt", "or as many as asked", fields={"eval_rows": 12}, rows=(12, 12)),
    *(Case("37-few-rows", "few rows, on demand", data=f"rows{n}.jsonl", fields={"force": True}, rows=(n - 1, 1))
      for n in (3, 4)),
    Case("39-ultrachat-columns", "messages, whatever is beside them", "chatml", shows=CHAT),
    Case("39-ultrachat-columns", "the format that is named", "chatml", "both.jsonl", {"format": "messages"},
         shows=CHAT),
    Case("39-ultrachat-columns", "the format that is named", data="both.jsonl",
         fields={"format": "prompt_completion"}, shows=PAIR),
    Case("40-long-row", "half a megabyte is cut and counted", fields={"max_length": 64},
         facts={"truncated": 1, "longest": 64}, whole=False,
         shows=("<s>### Question: Name 0\n ### Answer:", " one two </s>")),
    *(Case("41-missing-column-in-some-rows", "rows without a column, on demand", data=data,
           fields={"skip_bad_rows": True}, rows=(15, 5), shows=QUESTION, facts={"bad_rows_dropped": 1})
      for data in ("rows.jsonl", "folder")),
    *(Case("42-two-files-and-globs", "both files", data=data, shows=QUESTION)
      for data in (("a.jsonl", "b.jsonl"), "a.jsonl,b.jsonl", "*.jsonl", ".")),
    Case("43-completion-of-several-messages", "calls are learned, a tool's result is not", "tools", shows=CALLED),
    Case("44-eval-data-of-its-own", "rows of the evaluation set are not trained on", data="train.jsonl",
         fields={"eval_dataset": "test.jsonl"}, rows=(19, 5), shows=QUESTION,
         facts={"eval_rows_in_train_dropped": 5}),
    Case("45-system-column", "system is the first message", "chatml",
         shows=(f"<|im_start|>system\nYou are a pirate.<|im_end|>\n{TURN}", f"{SAID}<|im_end|>\n")),
    *(Case("46-this-folder", "the folder where one is", "chatml", data=data)
      for data in (".", "./", "../46-this-folder")),
    *(Case("47-cloned-hub-repository", "rows, and what belongs to git and the hub is none", data=data, shows=QUESTION)
      for data in ("clone", "llamafactory", "odd [1]", "with space")),
    Case("47-cloned-hub-repository", "the configuration that is named", data="two-configs", fields={"config": "b"},
         rows=(15, 5), shows=QUESTION),
    Case("48-trailing-commas", "rows without a cell are no examples", data="rows.csv",
         shows=("<s>### Question: Name 0\n ### Answer:", " 0</s>"), facts={"blank_rows_dropped": 10}),
    Case("50-eos-is-pad", "the end mark is learned", "eospad", shows=CHAT),
    Case("51-no-pad-no-bos", "no padding is needed", "nopad", shows=PAIR),
    Case("51-no-pad-no-bos", "nor a beginning", "nobos", shows=(PAIR[0].removeprefix("<s>"), PAIR[1])),
    Case("53-tokenizer-adds-eos", "one end, and none before the answer", "addseos", shows=PAIR),
    Case("54-double-bos", "one beginning", "doublebos", shows=(f"<s>{TURN}", CHAT[1])),
    Case("55-system-refused", "a template of one's own", "nosystem", fields={"chat_template": "chatml"},
         shows=TWO_TURNS),
    Case("55-system-refused", "a template of one's own", "nosystem", "two-users.jsonl", {"chat_template": "chatml"},
         shows=(f"<|im_start|>user\nHi<|im_end|>\n{TURN}", CHAT[1])),
    Case("55-some-system", "rows that the template refuses, on demand", "nosystem", fields={"skip_bad_rows": True},
         rows=(15, 5), facts={"bad_rows_dropped": 2}, says="refuses them: 2; the first: .*System role not supported"),
    Case("56-template-drops-system", "a system message that reaches no token is told", "dropssystem",
         shows=TWO_TURNS_ALONE, says="does not write `system`, which 24 rows have"),
    Case("57-no-template", "a template of one's own", fields={"chat_template": "chatml"}, shows=CHAT),
    Case("58-r1-template", "thoughts that the template leaves out are told", "r1", whole=False,
         says="writes the answers of 24 rows otherwise"),
    Case("58-r1-template", "a template of one's own keeps them", "r1", fields={"chat_template": "chatml"},
         shows=(TURN, f"<think>\nstep by step\n</think>\n{SAID}<|im_end|>\n")),
    Case("59-generation-prompt-inside-a-token", "the prompt is that of inference", "q35",
         shows=(f"{TURN}<think>\n", f"\n</think>\n\n{SAID}<|im_end|>\n")),
    Case("62-template-ends-in-newline", "no space after a line break; no heading without input",
         fields={"template": ALPACA, "template_without_input": ALPACA_WITHOUT_INPUT},
         shows=(f"<s>### Instruction:\n{ASKED}\n\n### Response:\n", f"{SAID}</s>")),
    Case("62-template-ends-in-newline", "else a heading that stays is told", fields={"template": ALPACA},
         shows=(f"<s>### Instruction:\n{ASKED}\n\n### Input:\n\n### Response:\n", f"{SAID}</s>"),
         says=r"without an input \(24\) keep the line '### Input:': give them data.template_without_input"),
    Case("65-template-begins-with-brace", "no line is lost", fields={"template": "{instruction} {input}"},
         shows=(f"<s>{ASKED} ", f"{SAID}</s>"), whole=False),
    Case("66-truncation-removes-labels", "rows without a token to learn are counted", fields={"max_length": 16},
         rows=(15, 5), shows=("<s>p 0\n", "a 0</s>"), facts={"rows_without_label_dropped": 20, "answers_cut_off": 20}),
    Case("68-byte-level-slow-tokenizer", "every byte and one end are learned", "byt5",
         shows=("é0\n", "ñ 한 0</s>")),
    Case("69-special-token-in-data", "special tokens in text are read as such, and told",
         shows=("<s>Write HTML 0 </s> done\n", "<s>bold 0</s> more</s>"),
         says="24 rows hold a special token of the model as text"),
    Case("69-special-token-in-data", "also in a conversation", "chatml", "chat.jsonl", says="24 rows hold a special"),
    Case("70-border-merge", "the prompt's tokens are those of inference",
         shows=("<s>Question: what? Answer: ", "the answer 0</s>"), says="tokenised apart", whole=False),
    Case("83-duplicates", "duplicates are left out", shows=PAIR, facts={"duplicates_dropped": 96}),
    Case("83-duplicates", "rows of one prompt are on one side", data="near.jsonl", rows=(85, 35), shows=PAIR),
    Case("84-turns-expanded", "rows of one conversation are on one side", "chatml", rows=(36, 12),
         shows=TWO_TURNS_ALONE),
    Case("85-equal-after-the-cut", "rows equal after the cut are duplicates", fields={"max_length": 32,
         "loss_on": "all"}, facts={"duplicates_dropped": 24}, whole=False),
    Case("86-long-conversation", "the answers that fit are learned", "chatml", fields={"max_length": 128},
         facts={"truncated": 12, "answers_cut_off": 12, "rows_without_label_dropped": 0}, whole=False),
]  # fmt: skip

REFUSED = [
    Case("13-tool-call-is-the-answer", "a template that writes no calls", "chatml", says="writes no tool calls"),
    Case("17-ends-with-user", "nothing is learned after a question", "chatml",
         says="(?s)line 24.*ends with the role 'user'.*--skip-bad-rows"),
    Case("22-lone-surrogate", "line, field and character",
         says="line 8: `completion` holds half of a surrogate pair at character 5"),
    Case("31-save-to-disk", "no split to train on: both are named", data="sft",
         says="no split train, only train_sft, test_sft"),
    Case("32-parquet-types", "bytes are no text", data="binary.parquet", says="(?s)row 1: `prompt` is bytes"),
    Case("32-parquet-types", "maps are no messages", "chatml", "map.parquet", says=r"row 1: `messages\[0\]` is a"),
    Case("33-mixed-types", "row, field and type",
         says="(?s)2 rows are wrong.*line 21: `output` is a number.*line 22: `instruction` is a list"),
    Case("33-mixed-types", "row, field and type", data="folder",
         says="(?s)2 rows are wrong.*line 21: `output` is a number.*line 22: `instruction` is a list"),
    Case("34-nulls", "row and field", data="output-null.jsonl", says="(?s)1 row is wrong.*line 24: `output` is null"),
    Case("34-nulls", "row and field", data="output-nan.json", says="(?s)1 row is wrong.*row 24: `output` is a number"),
    Case("37-few-rows", "one row", data="rows1.jsonl", says="only 1 different row; at least 8 are needed"),
    Case("37-few-rows", "two rows, whatever is asked", data="rows2.jsonl", fields={"force": True},
         says="only 2 different rows; at least 3 are needed"),
    *(Case("37-few-rows", "how many are needed", data=f"rows{n}.jsonl",
           says=f"(?s)only {n} different rows; at least 8 are needed.*--force") for n in (3, 4)),
    *(Case("38-lfs-pointer", "what stands for the file", data=data, says="(?s)Git LFS pointer.*git lfs pull")
      for data in ("rows.jsonl", "rows.parquet")),
    Case("39-ultrachat-columns", "two formats", "chatml", "both.jsonl",
         says="(?s)fit prompt_completion and messages.*data.format"),
    Case("41-missing-column-in-some-rows", "row and field", says="(?s)1 row is wrong.*line 21: `output` is missing"),
    Case("41-missing-column-in-some-rows", "row and field", data="folder",
         says="(?s)1 row is wrong.*line 21: `output` is missing"),
    Case("47-cloned-hub-repository", "configurations are named", data="two-configs",
         says="(?s)several configurations: a, b.*data.config=a"),
    Case("52-no-eos", "no answer could end", "noeos", says="no end-of-sequence token"),
    Case("55-system-refused", "row, reason and a way", "nosystem",
         says="(?s)line 1: .*System role not supported.*--chat-template chatml"),
    Case("55-system-refused", "row, reason and a way", "nosystem", "two-users.jsonl",
         says="(?s)line 1: .*roles must alternate.*--chat-template chatml"),
    Case("55-system-refused", "all rows skipped: why", "nosystem", fields={"skip_bad_rows": True},
         says="(?s)no row is left: .*System role not supported.*--chat-template"),
    Case("57-no-template", "a way", says="(?s)has no chat template.*--chat-template chatml"),
    Case("66-truncation-removes-labels", "nothing is left", data="all.jsonl", fields={"max_length": 16},
         says="(?s)no row has a token to learn within max_length 16.*data.max_length"),
    Case("67-vocabulary-too-small", "id and size", "smallvocab", says=r"token id \d+, but .*vocabulary has 300"),
]  # fmt: skip


@pytest.fixture(scope="session")
def own_cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cases")
    for folder, files in OWN.items():
        (root / folder).mkdir()
        for name, content in files.items():
            (root / folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return root


@pytest.fixture(scope="session")
def load_case_tokenizer(case_model: Callable[[str], Path]) -> Callable[..., PreTrainedTokenizerBase]:
    """Tokenizer of a model, loaded once for each chat template that is given to it."""
    return cache(lambda name, _: load_tokenizer(ModelSpec(id=str(case_model(name)))))


class Prepared(NamedTuple):
    data: TokenizedData
    tokenizer: PreTrainedTokenizerBase

    def rows(self) -> list[tuple[str, ...]]:
        """Every row as text, divided where it begins or ceases to be learned; what is read comes first."""
        return [self.divided(example) for side in (self.data.train, self.data.eval) for example in side]

    def divided(self, example: Example) -> tuple[str, ...]:
        edges = [0, *(np.flatnonzero(np.diff(example.is_label)) + 1), len(example.ids)]
        return tuple(str(self.tokenizer.decode(example.ids[start:end])) for start, end in pairwise(edges))


@pytest.fixture
def prepared(
    own_cases: Path, load_case_tokenizer: Callable[..., PreTrainedTokenizerBase], monkeypatch: pytest.MonkeyPatch
) -> Callable[[Case], Prepared]:
    def prepare(case: Case) -> Prepared:
        monkeypatch.chdir((own_cases if case.folder in OWN else CASES) / case.folder)
        tokenizer = load_case_tokenizer(case.model, case.fields.get("chat_template"))
        vocab = 300 if case.model == "smallvocab" else len(tokenizer)
        spec = DataSpec(**{"id": case.data, "max_length": 256} | case.fields)
        return Prepared(prepare_cached(spec, tokenizer, vocab), tokenizer)

    return prepare


@pytest.mark.parametrize("case", TRAINED, ids=lambda case: case.id)
def test_what_the_data_say_is_what_is_trained(case: Case, prepared: Callable[[Case], Prepared]) -> None:
    found = prepared(case)
    data, facts = found.data, found.data.facts
    assert (len(data.train), len(data.eval)) == case.rows, case.right
    if case.shows:
        assert case.shows in found.rows(), case.right
    assert {name: facts[name] for name in case.facts} == case.facts, case.right
    assert re.search(case.says, "\n".join([*facts["notes"], *facts["warnings"]])), case.right
    kept = facts["rows_train"] + (0 if "eval_id" in facts else facts["rows_eval"])
    assert facts["rows_read"] == kept + sum(number for name, number in facts.items() if name.endswith("_dropped"))
    train = {example.ids.tobytes() for example in data.train}
    assert train.isdisjoint(example.ids.tobytes() for example in data.eval), "a held-out row is trained on"
    if case.whole:
        for example in [*data.train, *data.eval]:
            text = found.tokenizer.decode(example.ids)
            assert found.tokenizer(text, add_special_tokens=False)["input_ids"] == example.ids.tolist()


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.id)
def test_what_cannot_be_trained_is_told(case: Case, prepared: Callable[[Case], Prepared]) -> None:
    with pytest.raises(RankscopeError) as caught:
        prepared(case)
    assert isinstance(caught.value, DataError | ModelError)
    assert re.search(case.says, str(caught.value)), case.right


def of_case(folder: str, data: str, model: str = "plain", **fields: Any) -> Case:
    return Case(folder, "", model, data, fields)


def test_a_file_and_a_folder_hold_the_same_rows(prepared: Callable[[Case], Prepared]) -> None:
    for folder, file in (("26-csv-na-file-and-folder", "rows.csv"), ("28-json-dates-file-and-folder", "rows.jsonl")):
        alone, within = (prepared(of_case(folder, data)).data.facts["fingerprint"] for data in (file, "folder"))
        assert alone == within


def test_texts_are_unchanged(own_cases: Path) -> None:
    def read(path: Path) -> list[dict[str, str]]:
        return load_records(DataSpec(id=str(path))).rows

    odd = CASES / "21-odd-characters"
    lines = (odd / "rows.jsonl").read_bytes().decode().split("\n")
    assert read(odd / "rows.jsonl") == read(odd / "bom-crlf.jsonl") == [json.loads(line) for line in lines if line]
    csv.field_size_limit(2**20)
    expected = list(csv.DictReader(io.StringIO(_HARD_CSV.decode(), newline="")))
    assert max(len(row["output"]) for row in expected) > 300_000
    for path in (
        own_cases / "23-csv-plain/rows.csv",
        own_cases / "23-csv-plain/bom.csv",
        CASES / "23-csv-hard/rows.csv.gz",
    ):
        assert read(path) == expected


@pytest.mark.parametrize(
    ("model", "learned"),
    [
        ("spm-ll", "The ▁answer ▁is ▁one ▁ <0x30> . </s> \n"),
        ("spm", "The ▁answer ▁is ▁one ▁ <0x30> . </s> ▁ \n"),  # the older form begins again after each special token
        ("spm-llama2", "▁The ▁answer ▁is ▁one ▁ <0x30> . ▁ </s>"),  # this template writes a space before the answer
        ("mistral-zephyr", "The ▁answer ▁is ▁one ▁ 0 . </s> <0x0A>"),
    ],
)
@pytest.mark.parametrize("data", ["rows.jsonl", "pc.jsonl"])
def test_sentencepiece_puts_no_space_before_an_answer(
    model: str, learned: str, data: str, prepared: Callable[[Case], Prepared]
) -> None:
    found, tokenizer = prepared(of_case("60-sentencepiece-chat", data, model))
    rows = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    whole = [tokenizer.apply_chat_template(row["messages"])["input_ids"] for row in rows]
    ours = {tuple(example.ids): example for side in (found.train, found.eval) for example in side}
    assert ours.keys() == set(map(tuple, whole))
    first = ours[tuple(whole[0])]
    assert tokenizer.convert_ids_to_tokens(first.ids[first.is_label].tolist()) == learned.split(" ")


def test_unknown_placeholders_are_refused() -> None:
    """Case 63: `{output}` would stand literally in every prompt."""
    with pytest.raises(ValidationError, match=r"unknown placeholder \{output\}.*the answer follows by itself"):
        DataSpec(id="rows.jsonl", template="Q: {instruction}\n{input}\nA: {output}")


@pytest.mark.parametrize(
    ("given", "template"),
    [
        ("Ask {instruction}\n{input}\nReply", "Ask {instruction}\n{input}\nReply"),
        (r'"Ask {instruction}\n{input}\nReply"', "Ask {instruction}\n{input}\nReply"),
        ("Answer {instruction} {input} ### Answer:", "Answer {instruction} {input} ### Answer:"),
        ("### Question: {instruction}\n{input}\n### Answer:", "### Question: {instruction}\n{input}\n### Answer:"),
        ("{instruction} {input}", "{instruction} {input}"),
        ("Question: {instruction} {input}", "Question: {instruction} {input}"),
    ],
)
def test_templates_are_taken_literally(given: str, template: str) -> None:
    """Cases 64 and 65: ` #` begins no comment, and a brace or a colon no mapping."""
    options = {"model": "embedded", "dataset": ["rows.jsonl"]}
    assert assemble({}, options, [f"data.template={given}"]).data.template == template


def test_every_row_is_seen_once_an_epoch() -> None:
    """Case 81: the last batch is smaller, and each epoch has another order."""
    for size, sizes in ((2, [2, 2, 2, 1]), (3, [3, 3, 1]), (8, [7])):
        steps = steps_per_epoch(7, size)
        first, second = ([batch_indices(7, size, 0, step) for step in range(at, at + steps)] for at in (0, steps))
        assert [len(batch) for batch in first] == sizes
        assert sorted(np.concatenate(first)) == sorted(np.concatenate(second)) == list(range(7))
        assert np.concatenate(first).tolist() != np.concatenate(second).tolist()


def test_the_order_of_rows_does_not_choose_those_held_out(prepared: Callable[[Case], Prepared]) -> None:
    """Case 82: `rows2.jsonl` is `rows1.jsonl` in another order."""
    one, other = (prepared(of_case("82-seed", data)).data for data in ("rows1.jsonl", "rows2.jsonl"))
    assert {row.ids.tobytes() for row in one.eval} == {row.ids.tobytes() for row in other.eval}
    assert one.train.ids.tolist() != other.train.ids.tolist()


@pytest.mark.parametrize(
    "case", [of_case("83-duplicates", "near.jsonl"), of_case("84-turns-expanded", "rows.jsonl", "chatml")]
)
def test_what_begins_alike_is_on_one_side(case: Case, prepared: Callable[[Case], Prepared]) -> None:
    found = prepared(case)
    train, heldout = ({found.divided(row)[0] for row in side} for side in (found.data.train, found.data.eval))
    assert train.isdisjoint(heldout)
    assert len(train) + len(heldout) == 24


# The same through the command line


def rankscope(*arguments: str, cwd: Path) -> CompletedProcess[str]:
    return forking.rankscope(arguments, cwd, {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200"})


@pytest.mark.parametrize(
    ("folder", "arguments", "rows"),
    [
        ("42-two-files-and-globs", "--dataset a.jsonl --dataset b.jsonl --columns output=output", (18, 6)),
        ("44-eval-data-of-its-own", "--dataset train.jsonl --eval-dataset test.jsonl", (19, 5)),
        ("57-no-template", "--dataset rows.jsonl --chat-template chatml --skip-bad-rows", (18, 6)),
    ],
)
def test_the_command_line_reads_them_too(
    folder: str, arguments: str, rows: tuple[int, int], case_model: Callable[[str], Path]
) -> None:
    options = ["--model", str(case_model("plain")), *arguments.split(), "--ranks", "2", "--steps", "3", "--json"]
    done = rankscope("plan", *options, cwd=CASES / folder)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)["data"]
    assert (facts["rows_train"], facts["rows_eval"]) == rows


def test_rows_are_shown_as_they_are_trained_on(case_model: Callable[[str], Path]) -> None:
    options = ["--model", str(case_model("spm-llama2")), "--dataset", "rows.jsonl", "--ranks", "2", "--steps", "3"]
    shown, told = (
        rankscope("plan", *options, "--show-rows", "2", *more, cwd=CASES / "60-sentencepiece-chat").stdout
        for more in ([], ["--json"])
    )
    lines = ["Row 1: 21 tokens, 9 learned", '  read    "<s> [INST] Name number 0. [/INST]"']
    assert "\n".join([*lines, '  learned " The answer is one 0. </s>"', "Row 2: 21 tokens"]) in shown
    first, _ = json.loads(told)["rows"]
    learned = [token for token, label in zip(first["ids"], first["labels"], strict=True) if label != -100]
    assert learned == [label for label in first["labels"] if label != -100] == first["ids"][-9:]
    assert first["spans"][1] == {"is_learned": True, "text": " The answer is one 0. </s>"}


@pytest.mark.parametrize(
    ("folder", "arguments", "code", "says"),
    [
        ("22-lone-surrogate", ["--dataset", "rows.jsonl"], 3, "line 8: `completion` holds half of a surrogate pair"),
        ("44-eval-data-of-its-own", ["--dataset", "train.jsonl", "--set", "data.eval=test.jsonl"], 2, "eval_dataset"),
        (
            "64-template-backslash-n",
            ["--dataset", "rows.jsonl", "--set", r"data.template=Q {instruction}\n{input}"],
            2,
            r"data.template: holds a backslash and an n; a line break is \n in double quotes",
        ),
        (
            "64-template-backslash-n",
            ["--dataset", "rows.jsonl", "--set", "data.template=Q {instruction} {output}"],
            2,
            "data.template: unknown placeholder {output}",
        ),
    ],
)
def test_the_command_line_says_what_is_wrong(
    folder: str, arguments: list[str], code: int, says: str, case_model: Callable[[str], Path]
) -> None:
    done = rankscope("plan", "--model", str(case_model("plain")), *arguments, "--ranks", "2", cwd=CASES / folder)
    assert (done.returncode, says in done.stderr) == (code, True), done.stderr


def losses(folder: str, data: str, out: Path, model: Path, *options: str) -> list[float]:
    """Losses of training, step by step, of one trial of four steps."""
    options = ("--ranks", "2", "--seeds", "0", "--steps", "4", "--device", "cpu", *options)
    sets = [f"--set={field}" for field in ("measure.profiles=false", "measure.answers=0")]
    done = rankscope(
        "run", "--model", str(model), "--dataset", data, *options, *sets, "--out", str(out), cwd=CASES / folder
    )
    assert done.returncode == 0, done.stderr
    (metrics,) = out.glob("trials/*/metrics.jsonl")
    return [row["train_loss"] for row in read_rows(metrics) if "train_loss" in row]


@pytest.mark.slow
def test_accumulation_is_the_mean_over_the_tokens(case_model: Callable[[str], Path], tmp_path: Path) -> None:
    """Case 80: of 2 times 1 row and 1 times 2 rows, whose answers are of 2 and of 32 words."""
    one, other = (
        losses("80-accumulation", "rows.jsonl", tmp_path / name, case_model("plain"), "--batch-size", name, "--set",
               f"training.gradient_accumulation_steps={2 // int(name)}")
        for name in ("1", "2")
    )  # fmt: skip
    assert len(one) == 4
    assert one == pytest.approx(other, rel=1e-6)


@pytest.mark.slow
def test_the_same_data_give_the_same_losses(case_model: Callable[[str], Path], tmp_path: Path) -> None:
    """Case 82: twice the same file, bit by bit."""
    one, other = (losses("82-seed", "rows1.jsonl", tmp_path / name, case_model("plain")) for name in ("a", "b"))
    assert len(one) == 4
    assert one == other
