"""Runs that other tools really wrote, for the tests of `rankscope judge`. Needs TRL and datasets; takes a minute.

    HF_HUB_OFFLINE=1 python tests/judge/make_runs.py tests/fixtures/runs

A tiny Llama of random weights learns made-up sums. Of each run only text stays: no weights, no training_args.bin.

- `trl-confounded`: TRL's SFTTrainer, ranks 2, 4 and 8 of one seed at one alpha, one after the other; rank 4 takes fewer
  steps, and rank 8 has another learning rate. Its checkpoints are all that is left.
- `trainer`: transformers' Trainer, ranks 1, 4 and 16 with three seeds each, alpha 2r, all else alike, with the model's
  loss before training; with the model cards that Trainer writes.
"""

import itertools
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    DataCollatorForLanguageModeling,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

KEPT = ("trainer_state.json", "adapter_config.json", "README.md")
MODULES = ["q_proj", "v_proj", "up_proj"]
WORDS = ["<pad>", "<eos>", "plus", "is", *map(str, range(20))]
SUMS = [f"{a} plus {b} is {a + b}" for a, b in itertools.product(range(10), range(10))]
HELD_OUT = SUMS[::5]
LEARNED = [row for row in SUMS if row not in HELD_OUT]


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.name_or_path = "made-up/tiny-llama"
    return model


def words() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def settings(folder: Path, steps: int, rate: float, seed: int = 42) -> dict[str, Any]:
    return {
        "output_dir": str(folder), "max_steps": steps, "learning_rate": rate, "seed": seed, "logging_steps": 5,
        "per_device_train_batch_size": 8, "eval_strategy": "steps", "eval_steps": 10, "use_cpu": True,
        "report_to": "none", "disable_tqdm": True,
    }  # fmt: skip


def train_with_trl(folder: Path, rank: int, steps: int, rate: float) -> None:
    rows = [Dataset.from_dict({"text": part}) for part in (LEARNED, HELD_OUT)]
    arguments = SFTConfig(**settings(folder, steps, rate), save_steps=20, max_length=16)
    adapter = LoraConfig(r=rank, lora_alpha=8, target_modules=MODULES, task_type="CAUSAL_LM")
    SFTTrainer(tiny_llama(), arguments, None, *rows, processing_class=words(), peft_config=adapter).train()


def train_with_transformers(folder: Path, rank: int, seed: int) -> None:
    tokenizer = words()
    rows = [[{"input_ids": tokenizer(row + " <eos>")["input_ids"]} for row in part] for part in (LEARNED, HELD_OUT)]
    adapter = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=MODULES, task_type="CAUSAL_LM")
    torch.manual_seed(seed)
    model = get_peft_model(tiny_llama_of(seed), adapter)
    arguments = TrainingArguments(**settings(folder, 60, 5e-3, seed), save_strategy="no", eval_on_start=True)
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = Trainer(model, arguments, collator, *rows, processing_class=tokenizer)
    trainer.train()
    trainer.save_state()
    trainer.save_model()
    trainer.create_model_card(dataset_tags="made-up-sums", dataset="made-up-sums")


def tiny_llama_of(seed: int) -> LlamaForCausalLM:
    """The same base for every seed, which alone decides the adapter's start and the order of the rows."""
    model = tiny_llama()
    torch.manual_seed(seed)
    return model


def main(out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    for rank, steps, rate in ((2, 40, 1e-3), (4, 20, 1e-3), (8, 40, 5e-4)):
        train_with_trl(out / "trl-confounded" / f"rank{rank}", rank, steps, rate)
    for rank, seed in itertools.product((1, 4, 16), range(3)):
        train_with_transformers(out / "trainer" / f"r{rank}-{'abc'[seed]}", rank, seed)
    for file in sorted(out.rglob("*"), reverse=True):
        if file.is_dir() and not any(file.iterdir()):
            file.rmdir()
        elif file.is_file() and (file.name not in KEPT or file.match("checkpoint-*/README.md")):
            file.unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
