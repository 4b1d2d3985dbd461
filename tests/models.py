"""Tiny random models of many architectures, for parity tests. Weights are large enough for attention to matter."""

from importlib.metadata import version
from typing import Any

import torch
from packaging.version import Version
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CodeGenConfig,
    DogeConfig,
    FalconConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    GptOssConfig,
    Lfm2Config,
    Llama4TextConfig,
    LlamaConfig,
    Mamba2Config,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    PhiConfig,
    PhimoeConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3_5TextConfig,
    Qwen3Config,
)

from rankscope.model.mixed import use_mixed_precision

VOCAB = 131
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 2,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
_GLU: dict[str, Any] = {**_COMMON, "intermediate_size": 48, "num_key_value_heads": 2}
_OPT: dict[str, Any] = {**_COMMON, "ffn_dim": 64, "dropout": 0.1}

_EXPERTS: dict[str, Any] = {
    **_GLU,
    "head_dim": 8,
    "sliding_window": 5,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}

CONFIGS: dict[str, Any] = {
    "opt-post-norm": lambda: OPTConfig(**_OPT, word_embed_proj_dim=16, do_layer_norm_before=False),
    "opt-pre-norm": lambda: OPTConfig(**_OPT, word_embed_proj_dim=32, do_layer_norm_before=True),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=2, eos_token_id=2
    ),
    "llama-gqa": lambda: LlamaConfig(**_GLU),
    "qwen2": lambda: Qwen2Config(**_GLU),
    "qwen3": lambda: Qwen3Config(**_GLU, head_dim=8),
    "mistral-window": lambda: MistralConfig(**_GLU, head_dim=8, sliding_window=5),
    "gemma2": lambda: Gemma2Config(**_GLU, head_dim=8, sliding_window=5, query_pre_attn_scalar=8),
    "gemma3": lambda: Gemma3TextConfig(
        **{**_GLU, "num_hidden_layers": 3}, head_dim=8, sliding_window=5, query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "gpt-neox": lambda: GPTNeoXConfig(**_COMMON, intermediate_size=64),
    "phi": lambda: PhiConfig(**{**_GLU, "num_key_value_heads": 4}),
    "mixtral": lambda: MixtralConfig(**_GLU, head_dim=8, num_local_experts=4, num_experts_per_tok=2),
}  # fmt: skip
UNPACKABLE: dict[str, Any] = {
    "bloom": lambda: BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4, bos_token_id=2, eos_token_id=2),
}
ATTENTION_KINDS: dict[str, Any] = {  # with experts, whose adapters are packed apart from this
    "gpt-oss": lambda: GptOssConfig(**_EXPERTS, layer_types=["sliding_attention", "full_attention"]),  # sinks
    "llama4": lambda: Llama4TextConfig(
        **_GLU, head_dim=8, num_local_experts=2, num_experts_per_tok=1, intermediate_size_mlp=48, moe_layers=[1],
        attention_chunk_size=5, layer_types=["chunked_attention", "full_attention"], no_rope_layers=[1, 0],
    ),
    "phimoe-window": lambda: PhimoeConfig(**_EXPERTS),  # the mask has the window, the attention is not told
    # attention of their own, or a mask, which are not replaced but given a mask of sequences
    "falcon": lambda: FalconConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
    "gpt-neo": lambda: GPTNeoConfig(
        vocab_size=VOCAB, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
        max_position_embeddings=128, window_size=5, bos_token_id=2, eos_token_id=2,
    ),
    "doge": lambda: DogeConfig(**_GLU),
}  # fmt: skip
_SINCE_5_24: dict[str, Any] = {  # before, transformers' attention of these could not be replaced
    "gpt-j": lambda: GPTJConfig(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=128, rotary_dim=8, bos_token_id=2, eos_token_id=2
    ),
    "codegen": lambda: CodeGenConfig(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=128, rotary_dim=8, bos_token_id=2, eos_token_id=2
    ),
}
_GATED = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 16}
HYBRIDS: dict[str, Any] = {  # a short convolution, linear attention, a state beside attention, a state alone
    "lfm2": lambda: Lfm2Config(**_GLU, layer_types=["conv", "full_attention"]),
    "qwen3.5": lambda: Qwen3_5TextConfig(
        **_GLU, **_GATED, head_dim=8, layer_types=["linear_attention", "full_attention"]
    ),
    "falcon-h1": lambda: FalconH1Config(**_GLU, **_MAMBA, mamba_d_ssm=64),
    "mamba2": lambda: Mamba2Config(**_COMMON, num_heads=4, head_dim=16, state_size=8, n_groups=1, chunk_size=16),
}
if Version(version("transformers")) >= Version("5.24"):
    CONFIGS.update(_SINCE_5_24)


def tiny_model(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return a frozen model of architecture `name` with the same weights at each call."""
    config = (CONFIGS | UNPACKABLE | ATTENTION_KINDS | HYBRIDS)[name]()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "norm" not in parameter_name:
                parameter.mul_(2.0)  # 0.02 is so small that a leak or a wrong position would hardly show
    model.eval()
    if dtype == torch.bfloat16:
        use_mixed_precision(model)
    else:
        model.to(dtype)
    model.requires_grad_(False)
    model.config.use_cache = False
    return model
