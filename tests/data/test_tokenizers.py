"""The tiny models of `data.tokenizers` load as a user's would, with the tokenizer that their name promises."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from data.tokenizers import NAMES
from rankscope.model.load import load_tokenizer
from rankscope.spec.models import ModelSpec


@pytest.mark.parametrize("name", NAMES)
def test_models_load(name: str, case_model: Callable[[str], Path]) -> None:
    folder = case_model(name)
    tokenizer = load_tokenizer(ModelSpec(id=str(folder)))
    rows: Any = AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().num_embeddings
    assert (len(tokenizer) > rows) == (name == "smallvocab")


def test_spaces_that_are_not_in_the_text(case_model: Callable[[str], Path]) -> None:
    """A SentencePiece tokenizer begins every text with a space; the older form does so after each special token."""

    def joined(name: str) -> str:
        return "".join(load_tokenizer(ModelSpec(id=str(case_model(name)))).tokenize("the</s>the"))

    assert joined("plain") == "the</s>the"
    assert joined("spm-ll") == joined("mistral-zephyr") == "▁the</s>the"
    assert joined("spm") == "▁the</s>▁the"
