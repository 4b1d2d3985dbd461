"""Tiny random Llama models, each with a tokenizer of another kind, trained on a few lines; and Mistral 7B's own."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoTokenizer,
    ByT5Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

LINES = [
    "### Question: What is two plus two? ### Answer: The answer is four.",
    "user assistant system tool You are helpful. Say hello to Paris and London. Name the capital of France.",
    "The weather in Paris is sunny today. get_weather city arguments name call result. yes no maybe blue green red "
    "one two three four five six seven eight nine ten",
    "think about it step by step, then answer. <think> </think> [INST] [/INST] \n\n",
] * 3
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>"]

_ASSISTANT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" + _ASSISTANT
TOOLS = (  # as Qwen's: tools, calls and thoughts
    "{% if tools %}<|im_start|>system\nTools: {{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n{% endif %}"
    "{% if m.content %}{{ m.content }}{% endif %}"
    "{% if m.tool_calls %}{% for c in m.tool_calls %}"
    "<tool_call>{{ c.function.name }} {{ c.function.arguments | tojson }}</tool_call>"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}" + _ASSISTANT
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
LLAMA2 = (  # the space before the answer is the answer's
    "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
)
NO_SYSTEM = (
    "<s>{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}" + _ASSISTANT
)
R1 = (  # R1-distill: earlier answers lose their thoughts, the generation prompt begins one
    "<s>{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}{% else %}"
    "<|im_start|>assistant {{ m.content.split('</think>')[-1] }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant <think>\n{% endif %}"
)
QWEN35 = (  # the generation prompt ends within the empty thought of an answer without one
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
DROPS_SYSTEM = (
    "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n"
    "{% endfor %}" + _ASSISTANT
)
GENERATION = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>\n{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}" + _ASSISTANT
)


def _byte_level(after: str = "<s> $A") -> Tokenizer:
    """Byte-level BPE; `after` is the post-processor's template ("": it adds nothing)."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(LINES, trainer)
    if after:
        ids = [(token, bpe.token_to_id(token)) for token in ("<s>", "</s>") if token in after]
        bpe.post_processor = processors.TemplateProcessing(single=after, special_tokens=ids)
    return bpe


def _sentencepiece() -> Tokenizer:
    """Llama 2's kind of tokenizer.json: it puts a space before every text."""
    bpe = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
        max_token_length=12,
    )
    bpe.pre_tokenizer = pre_tokenizers.Split(pattern=Regex("▁*[^▁]+|▁+"), behavior="isolated")
    bpe.train_from_iterator(LINES, trainer)
    bpe.pre_tokenizer = None
    content = json.loads(bpe.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if not token["content"].startswith("<0x")]
    bpe = Tokenizer.from_str(json.dumps(content))
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bpe.token_to_id("<s>"))]
    )
    return bpe


@dataclass(frozen=True)
class _Kind:
    tokenizer: Callable[[], Tokenizer]
    template: str | None = None
    special: dict[str, str | None] = field(default_factory=dict)  # other than <s>, </s>, <pad> and <unk>
    tokenizer_class: str | None = None  # that tokenizer_config.json names
    vocab: int | None = None  # rows of the embedding, where they are not the tokenizer's


_IM_END: dict[str, str | None] = {"eos_token": "<|im_end|>"}
_EOS_PADS: dict[str, str | None] = {"pad_token": "</s>"}
_plain = partial(_byte_level, "")  # adds no special tokens

KINDS: dict[str, _Kind] = {
    "plain": _Kind(_byte_level),
    "chatml": _Kind(_byte_level, CHATML, _IM_END),
    "eospad": _Kind(_byte_level, CHATML, {**_IM_END, "pad_token": "<|im_end|>"}),
    "nopad": _Kind(_byte_level, special={"pad_token": None}),
    "noeos": _Kind(_byte_level, special={"eos_token": None}),
    "nobos": _Kind(_plain, special={"bos_token": None}),
    "addseos": _Kind(partial(_byte_level, "<s> $A </s>")),
    "tools": _Kind(_plain, TOOLS, _IM_END),
    "nosystem": _Kind(_byte_level, NO_SYSTEM, _IM_END),
    "r1": _Kind(_byte_level, R1, _IM_END),
    "q35": _Kind(_plain, QWEN35, _IM_END),
    "dropssystem": _Kind(_plain, DROPS_SYSTEM, _IM_END),
    "doublebos": _Kind(_byte_level, "<s>" + CHATML, _IM_END),
    "generation": _Kind(_plain, GENERATION, _IM_END),
    "spm": _Kind(_sentencepiece, ZEPHYR, _EOS_PADS),
    "spm-llama2": _Kind(_sentencepiece, LLAMA2, _EOS_PADS),
    # transformers' LlamaTokenizer makes its own of the vocabulary: Metaspace, a space before the whole text alone
    "spm-ll": _Kind(_sentencepiece, ZEPHYR, _EOS_PADS, tokenizer_class="LlamaTokenizer"),
    "smallvocab": _Kind(_byte_level, CHATML, _IM_END, vocab=300),
}
MISTRAL = {"mistral-zephyr": ZEPHYR, "mistral-llama2": LLAMA2}
"""Mistral-7B-v0.1's tokenizer, from the package mistral-common, with the template of a chat model made of it."""

NAMES = [*KINDS, "byt5", *MISTRAL]


def make_model(name: str, folder: Path) -> Path:
    """Write the model `name`, one of NAMES, to `folder`: weights, configuration and tokenizer. Return `folder`."""
    kind = KINDS.get(name)
    if kind:
        names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", **kind.special}
        given: dict[str, Any] = {key: token for key, token in names.items() if token}
        tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast(tokenizer_object=kind.tokenizer(), **given)
        tokenizer.chat_template = kind.template
    elif name == "byt5":
        tokenizer = ByT5Tokenizer()
    else:
        tokenizer = _mistral(folder)
        tokenizer.chat_template = MISTRAL[name]
    _save_model(tokenizer, folder, (kind and kind.vocab) or (384 if name == "byt5" else len(tokenizer)))
    tokenizer.save_pretrained(folder)
    if kind and kind.tokenizer_class:
        path = folder / "tokenizer_config.json"
        config = json.loads(path.read_text()) | {"tokenizer_class": kind.tokenizer_class}
        config.pop("backend", None)
        path.write_text(json.dumps(config))
    return folder


def _mistral(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer as transformers reads it from Mistral-7B-v0.1's own tokenizer.model."""
    package = find_spec("mistral_common")  # not imported: only its data are needed
    assert package is not None
    assert package.origin is not None
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "tokenizer.model"
    shutil.copyfile(Path(package.origin).with_name("data") / "tokenizer.model.v1", source)
    config = {
        "tokenizer_class": "LlamaTokenizer",
        **{"bos_token": "<s>", "eos_token": "</s>", "pad_token": None, "unk_token": "<unk>"},
        **{"add_bos_token": True, "add_eos_token": False, "legacy": False},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    source.unlink()  # tokenizer.json, which is written, says the same
    return tokenizer


def _save_model(tokenizer: PreTrainedTokenizerBase, folder: Path, vocab: int) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
