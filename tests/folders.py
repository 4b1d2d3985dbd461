"""A tiny model with its tokenizer, and instruction data, as the folder and file that a user names."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rankscope.data.records import load_records
from rankscope.data.sources import resolve_sources
from rankscope.data.tokenize import tokenize, with_source_facts
from rankscope.data.tokens import TokenizedData
from rankscope.spec.models import DataSpec

WORDS = ("list", "sum", "sort", "file", "read", "loop", "string", "number", "class", "test")


def write_data(path: Path, rows: int = 120) -> Path:
    """Write Alpaca rows, of which every third has an input."""
    data = [
        {
            "instruction": f"Write code to {WORDS[i % 10]} the {WORDS[i // 10 % 10]} number {i}",
            "input": f"[{i}, {i + 1}]" if i % 3 == 0 else "",
            "output": f"def {WORDS[i % 10]}_{i}(x):\n    return {WORDS[i // 10 % 10]}(x) + {i}",
        }
        for i in range(rows)
    ]
    path.write_text(json.dumps(data))
    return path


def write_model(folder: Path, vocab: int = 300) -> Path:
    """Write a post-norm OPT of 2 layers with random weights, and a byte-level tokenizer."""
    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([" ".join(WORDS) + " return def number code Write ###"] * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="</s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=vocab,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=64,
        word_embed_proj_dim=16,
        do_layer_norm_before=False,
        max_position_embeddings=256,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=2,
    )
    OPTForCausalLM(config).save_pretrained(folder)
    return folder


def prepare(spec: DataSpec, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> TokenizedData:
    """The tokens of `spec`, without the cache."""
    of_train, of_eval = resolve_sources(spec)
    records = load_records(spec, of_train)
    evaluated = load_records(spec, of_eval) if of_eval else None
    return with_source_facts(tokenize(records, spec, tokenizer, vocab_size, evaluated), records, evaluated)
