"""Tokens and labels that TRL's SFTTrainer makes of the rows in tests/data/trl: what rankscope's are compared with.

    python benchmarks/trl_tokens.py            # writes tests/data/trl/reference.json
    python benchmarks/trl_tokens.py --show     # prints the tokens of every case instead, those with a loss in brackets
    python benchmarks/trl_tokens.py --show messages-chatml

It needs trl, which the tests do not. Each case is one file of a few rows, read by `datasets` and prepared by the
trainer's own constructor with one tokenizer of tests/data/tokenizers.py, TRL's defaults and the case's options. The
file holds for each case its `rows`, `model` and `options` (SFTConfig's, and `template`: a file of
tests/data/trl/templates), and

- `sequences`: for each row that TRL trains on its index `row`, `input_ids`, and `labels` as half-open spans of
  positions; everywhere else TRL's label is -100. The model shifts labels by one: one at position 0 has no effect.
- or `error`: the type and the message of what TRL raises.
"""

import argparse
import contextlib
import io
import json
import os
import re
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

TESTS = Path(__file__).parents[1] / "tests"
FOLDER = TESTS / "data" / "trl"
sys.path.insert(0, str(TESTS))
from data.tokenizers import make_model  # noqa: E402

MAX_LENGTH = 256


@dataclass(frozen=True)
class Case:
    """One dataset, prepared with one tokenizer."""

    rows: str  # tests/data/trl/ROWS.jsonl
    model: str  # a name of tests/data/tokenizers.py
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        options = [key if value is True else f"{key}={value}" for key, value in self.options.items()]
        return "-".join([self.rows, self.model, *options])


def cases() -> list[Case]:
    """All that is compared, and what TRL refuses."""
    assistant = {"assistant_only_loss": True}
    spm = ["spm", "spm-ll", "spm-llama2", "mistral-zephyr", "mistral-llama2"]
    plain = ["plain", "chatml", "addseos", "nobos", "noeos", "spm", "spm-ll", "byt5", "mistral-zephyr"]
    chat = ["chatml", "generation", "tools", "doublebos", "q35", "r1", *spm]
    found = [Case("prompt_completion", model) for model in plain]
    found.append(Case("prompt_completion", "plain", {"completion_only_loss": False}))
    found += [Case("text", model) for model in plain]
    found += [Case("messages", model) for model in (*chat, "plain")]
    found += [Case("messages", model, assistant) for model in ("generation", "chatml")]
    found += [Case("system", model) for model in ("chatml", "dropssystem", "nosystem", "q35", *spm)]
    found += [Case("system", "generation", assistant)]
    found += [Case("user_last", "generation", options) for options in ({}, assistant)]
    found += [Case("conversational", model) for model in chat]
    found += [Case("conversational", "generation", assistant)]
    found += [Case("conversational", "chatml", {"completion_only_loss": False})]
    found += [Case(f"tools{kind}", "tools") for kind in ("", "_text", "_completion", "_mixed")]
    found += [Case("reasoning", "tools")]
    chatml = ("parts", "weight", "conversations", "sharegpt", "sharegpt_roles", "roles", "system_column")
    found += [Case(rows, "chatml") for rows in chatml]
    found += [Case(rows, "generation", assistant) for rows in ("weight", "sharegpt_roles")]
    found += [Case("template_kwargs", "plain", {"template": "mood"})]
    found += [Case(rows, "chatml", {"max_length": 64}) for rows in ("long", "long_completion")]
    found += [Case("long", "generation", {"max_length": 64, **assistant})]
    for template in ("qwen2_5", "qwen3", "phi3"):
        own = {"template": template}
        found += [Case(rows, "chatml", own | assistant) for rows in ("messages", "system", "conversational", "think")]
        found += [Case("conversational", "chatml", own)]
    for template in ("qwen2_5", "qwen3"):
        own = {"template": template, "max_length": 1024, **assistant}
        found += [Case(rows, "chatml", own) for rows in ("tools", "tools_completion", "reasoning")]
    return found


def prepare(case: Case, folder: Path) -> tuple[Any, Dataset]:
    """Return the tokenizer and the rows as the trainer holds them, with their indices."""
    model = folder / case.model
    if not model.exists():
        make_model(case.model, model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    options = {"max_length": MAX_LENGTH, **case.options}
    if template := options.pop("template", None):
        options["chat_template_path"] = str(FOLDER / "templates" / f"{template}.jinja")
    path = str(FOLDER / f"{case.rows}.jsonl")
    rows = load_dataset("json", data_files=path, split="train", cache_dir=str(folder / "cache"))
    settings = SFTConfig(output_dir=str(folder / "out"), report_to="none", use_cpu=True, bf16=False, **options)
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(model),
        args=settings,
        train_dataset=rows.add_column("row", list(range(len(rows)))),
        processing_class=tokenizer,
    )
    return tokenizer, trainer.train_dataset


def spans(labels: list[int]) -> list[list[int]]:
    """Half-open spans of the positions with a label."""
    runs = [
        [position for position, _ in run]
        for learned, run in groupby(enumerate(labels), lambda pair: pair[1] != -100)
        if learned
    ]
    return [[run[0], run[-1] + 1] for run in runs]


def outcome(case: Case, folder: Path) -> dict[str, Any]:
    """Sequences or error of a case, without TRL's own progress bars and warnings."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            _, prepared = prepare(case, folder)
    except Exception as error:
        message = re.sub(r"\s+", " ", str(error)).replace(str(folder), "")
        return {"error": f"{type(error).__name__}: {message[:400]}"}
    found = []
    for example in prepared:
        ids, labels = example["input_ids"], example["labels"]
        assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
        found.append({"row": example["row"], "input_ids": ids, "labels": spans(labels)})
    return {"sequences": found}


def show(case: Case, folder: Path) -> None:
    """Print every sequence of a case, and what is learned of it."""
    print(f"\n## {case.name}")
    try:
        tokenizer, prepared = prepare(case, folder)
    except Exception as error:
        print(f"   {type(error).__name__}: {error}")
        return
    for example in prepared:
        ids, labels = example["input_ids"], example["labels"]
        tokens = tokenizer.convert_ids_to_tokens(ids)
        shown = (f"[{token}]" if label != -100 else token for token, label in zip(tokens, labels, strict=True))
        print(f"{example['row']}: {' '.join(shown)}")
        print(f"   {tokenizer.decode(ids)!r}\n   {tokenizer.decode([label for label in labels if label != -100])!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--show", action="store_true", help="print tokens, write nothing")
    parser.add_argument("names", nargs="*", help="beginnings of the cases' names (default: all)")
    args = parser.parse_args()
    if args.names and not args.show:
        parser.error("only all cases together are written: names need --show")
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory(prefix="rankscope-trl-") as name:
        folder = Path(name)
        chosen = [case for case in cases() if not args.names or case.name.startswith(tuple(args.names))]
        if args.show:
            for case in chosen:
                show(case, folder)
            return
        packages = ("trl", "transformers", "tokenizers", "datasets", "mistral-common")
        record: dict[str, Any] = {"versions": {package: version(package) for package in packages}, "cases": []}
        for case in chosen:
            record["cases"].append({"name": case.name, **asdict(case), **outcome(case, folder)})
            print(case.name, record["cases"][-1].get("error", ""), flush=True)
    text = json.dumps(record, ensure_ascii=False, separators=(",", ":"))
    text = text.replace('{"name"', '\n{"name"').replace('{"row"', '\n {"row"')  # one line a sequence, for diffs
    (FOLDER / "reference.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
