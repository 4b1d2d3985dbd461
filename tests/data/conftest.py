"""Real tokenizers, trained on a few lines, and files for them."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from data.tokenizers import make_model
from rankscope.spec.models import DataSpec

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
LINES = [
    "### Question: Write a function that adds two numbers.\n ### Answer: def add(a, b): return a + b",
    "Sort the list [3, 1, 2] in Python: sorted(values) gives {1, 2, 3}.",
]


def _train(after: str | None = "<s> $A", **special: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE; `after` is the post-processor's template (None: it adds nothing)."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(LINES, trainer)
    if after is not None:
        ids = [(token, bpe.token_to_id(token)) for token in ("<s>", "</s>") if token in after]
        bpe.post_processor = processors.TemplateProcessing(single=after, special_tokens=ids)
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", **special}
    given = {name: text for name, text in names.items() if text}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **given)  # type: ignore[no-untyped-call]


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """`make_tokenizer("$A </s>", eos_token="")`: a post-processor's template, and other special tokens."""
    return _train


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return _train()


@pytest.fixture(scope="session")
def chat_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = _train()
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def case_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`case_model("spm")`: folder of that model of `data.tokenizers`, made when it is first asked for."""

    @cache
    def made(name: str) -> Path:
        return make_model(name, tmp_path_factory.mktemp("models") / name)

    return made


@pytest.fixture
def spec(tmp_path: Path) -> Callable[..., DataSpec]:
    """`spec("data.jsonl", content, max_length=8)` writes the file and asks for it."""

    def write(name: str, content: str | bytes, **fields: Any) -> DataSpec:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return DataSpec(id=str(path), **fields)

    return write
