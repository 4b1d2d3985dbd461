"""Models that see later tokens are refused as not causal; each model's own outputs show whether it does."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BertConfig,
    ElectraConfig,
    Gemma3TextConfig,
    LlamaConfig,
    RobertaConfig,
    XLMConfig,
    XLNetConfig,
)

from models import CONFIGS, UNPACKABLE
from rankscope.model.checks import not_causal_reason

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 64,
}  # fmt: skip
GEMMA: dict[str, Any] = {**SIZES, "head_dim": 8, "num_key_value_heads": 2}
XLM: dict[str, Any] = {"vocab_size": 64, "emb_dim": 32, "n_layers": 2, "n_heads": 4}
ASKED: dict[str, Callable[[], Any]] = {
    **CONFIGS,
    **UNPACKABLE,
    "bert": lambda: BertConfig(**SIZES),
    "bert-decoder": lambda: BertConfig(**SIZES, is_decoder=True),
    "roberta": lambda: RobertaConfig(**SIZES),
    "roberta-decoder": lambda: RobertaConfig(**SIZES, is_decoder=True),
    "electra": lambda: ElectraConfig(**SIZES, embedding_size=32),
    "xlm": lambda: XLMConfig(**XLM),
    "xlm-causal": lambda: XLMConfig(**XLM, causal=True),
    "xlnet": lambda: XLNetConfig(vocab_size=64, d_model=32, n_layer=2, n_head=4, d_inner=48),
    "xlnet-causal": lambda: XLNetConfig(vocab_size=64, d_model=32, n_layer=2, n_head=4, d_inner=48, attn_type="uni"),
    "llama-both-sides": lambda: LlamaConfig(**SIZES, is_causal=False),
    "gemma3-both-sides": lambda: Gemma3TextConfig(**GEMMA, use_bidirectional_attention=True),
}


@pytest.mark.parametrize("name", ASKED)
def test_what_sees_later_tokens_is_refused(name: str) -> None:
    config = ASKED[name]()
    reason = not_causal_reason(config)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5.0)  # large enough for attention to show
        ids = torch.arange(5, 13)[None]
        other = torch.cat([ids[:, :-1], ids[:, :1]], dim=1)
        before, after = (model(input_ids=given, use_cache=False).logits[:, :-1] for given in (ids, other))
    assert torch.allclose(before, after, atol=1e-4) == (reason is None), reason


@pytest.mark.parametrize(
    ("architectures", "refused"), [(["BartForConditionalGeneration"], True), (["BartForCausalLM"], False)]
)
def test_an_encoder_besides_the_decoder_is_refused(architectures: list[str], refused: bool) -> None:
    assert (not_causal_reason(BartConfig(architectures=architectures)) is not None) == refused
