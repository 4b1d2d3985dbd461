"""Every causal architecture of the installed transformers, tiny: is it packed, and does it train as PEFT does?

    python benchmarks/architectures.py --out FILE.jsonl [--jobs 2] [--only llama,gpt_oss] [--seconds 600]
    python benchmarks/architectures.py --out FILE.jsonl --table docs/reference/architectures.md

Each architecture runs in a child process with a time limit. Its configuration has every kind of layer once, and weights
so large that attention, positions and states move the logits. Two adapters with random factors, on some rows in common
and some not, go through what `rankscope run` does: loading, choice of the engine, losses and gradients, saving.

The reference has none of that code: transformers loads the same folder in float64 (float32 where a model cannot),
PEFT's own reader the saved adapter, and each row is a forward of its own.

- loss: largest relative difference of a trial's mean loss
- gradient: norm of the difference of all gradients of a trial, over that of the reference
- rounding: the same difference of the reference in float32, against itself in float64
- read back: largest difference between the logits of the saved adapter and those of the trained factors, over the
  logits' standard deviation

A line of the output is one result; names that it has are not run again (`--again` runs them anew).
"""

import argparse
import json
import math
import multiprocessing
import os
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

VOCAB = 131
SPECIAL = 112  # ids from here on may mean something to a model (padding, images); rows have none of them
LENGTHS = (19, 7, 26, 12, 3)
TRIALS = {5: range(3), 3: range(1, 5)}  # rank: its rows
TOLERANCE = {"loss": 1e-5, "gradient": 1e-3, "read_back": 1e-5}
"""Differences beyond which a result is not that of PEFT; a gradient may also differ by 20 times its own rounding."""

SIZES: tuple[tuple[str, int], ...] = (
    (r"(?!type_|task_).*vocab_size.*|encoder_hash_byte_group_vocab", VOCAB),
    (r"swa_num_attention_heads|num_(attention_)?heads|n_heads?|.*attention_heads|(linear|gdn)_num_(value_)?heads", 4),
    (r"num_key_value_heads|num_kv_heads|kv_n_heads|swa_num_key_value_heads|linear_num_key_heads", 2),
    (r"qk_rope_head_dim|rotary_dim", 4),
    (r"qk_head_dim", 12),
    (r".*head_dim|head_dim|dim_head|d_kv|d_head|kv_channels|attention_head_size|mamba_d_head|query_pre_attn_scalar", 8),
    (r"(backbone_|router_|global_|cross_attention_|text_)?hidden_size(_global)?|d_model|n_embd|emb_dim|lru_width", 32),
    (
        r".*embed(ding)?_(size|dim)|dim_model_base|(out|projector_input|projector_output)_hidden_size|out_hidden_size",
        32,
    ),
    (r"adapter_input_size|(vision_output|adapter_in|adapter_out|projector_input|projector_output)_dim", 32),
    (r"(moe_|shared_|expert_).*(intermediate|hidden)_size|moe_latent_size", 16),
    (r".*intermediate_size.*|.*ffn_dim|.*ffn_hidden_size|d_ff|dff|dim_ff|n_inner|feed_forward_size|mlp_dim", 48),
    (r"hidden_size_per_layer_input", 8),
    (r"(?!mamba_dt).*(_rank|_lowrank)|d_rel", 8),
    (r"num_(local_|routed_)?experts|n_routed_experts|moe_num_experts", 8),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k|top_k_experts|n_group|(mamba_)?n_?groups|zero_expert_num", 2),
    (r"topk_group|first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    (r".*state_size|mamba_d_state|(mamba_)?chunk_size|.*attention_chunk_size|.*multiple_of|.*_divisible_by", 8),
    (r"sliding_window(_size)?|attention_window_size|window_size|local_attention(_window_len)?|keep_window_size", 5),
    (r"index_topk|index_block_size|block_size|.*attn_chunk_length|rel_extent", 4),
    (r"index_topk_blocks", 2),
    (r"index_n_heads", 16),  # with few, many scores are exactly 0, and which of them are taken is chance
    (r".*max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length|max_(source|target)_positions", 128),
    (r"model_max_length|position_bias_max_distance|log_scaling_n_floor|floor_scale", 128),
)
"""Values of the numbers in a configuration, by name; the first pattern that fits. What is 0, 1 or absent stays."""

DEPTHS = r"num_hidden_layers|n_layers?|num_layers|((num_)?(en|de)coder|n_(in|out)put)_layers|num_blocks|depth"

_ROPE = {"rope_type": "default", "rope_theta": 1e4}
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8},
    "bert-generation": {"is_decoder": True},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE},
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_v4": {
        "o_groups": 2,
        "partial_rotary_factor": 0.5,
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
    },
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 8, "num_experts_per_tok": 2},
    "dots3_note_text": {
        "head_dim": 12, "sliding_window_size": 5, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 8, "swa_kv_lora_rank": 8, "swa_head_dim": 12, "swa_qk_nope_head_dim": 8,
        "swa_qk_rope_head_dim": 4, "swa_v_head_dim": 8,
    },
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "intermediate_size": [48] * 4,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    },
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"mamba_n_heads": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "inkling2_loop_text": {
        "n_layers_per_attn_res_block": 1, "loop_layer_index_start": 1, "loop_layer_index_end": 2,
        "num_hidden_layers": 3, "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding"],
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"head_dim": 4},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "nemotron_h": {"mamba_num_heads": 8},
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
        "indexer_compress_ratio": 4, "num_key_value_heads": 2,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"attn_layers": ["local", "lsh"], "axial_pos_embds": False, "hash_seed": 0, "num_buckets": 4},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "attention_head_dim": 16,
        "attention_hidden_size": 64,
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
    },
}  # fmt: skip
"""What the patterns do not know."""


def tiny_config(model_type: str) -> Any:
    """Smallest configuration with every kind of layer that the architecture has by default.

    Raises whatever the configuration's class raises.
    """
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    values = _small(CONFIG_MAPPING[model_type]()) | EXCEPTIONS.get(model_type, {})
    if model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        values |= {"is_decoder": True, "causal": True} if model_type == "xlm" else {"is_decoder": True}
    return CONFIG_MAPPING[model_type](**values)


def _small(config: Any) -> dict[str, Any]:
    """Arguments that make a small configuration of `config`'s class."""
    from transformers import PreTrainedConfig

    own = {key: vars(config).get(config.attribute_map.get(key, key)) for key in _arguments(type(config))}
    depth = next((value for key, value in own.items() if re.fullmatch(DEPTHS, key)), None)
    lists = {
        key: value
        for key, value in own.items()
        if isinstance(value, list) and len(set(map(str, value))) < len(value) == depth
    }
    kinds = list(dict.fromkeys(map(tuple, zip(*(map(str, value) for value in lists.values()), strict=True))))
    where = [list(zip(*(map(str, v) for v in lists.values()), strict=True)).index(kind) for kind in kinds] or [0, 0]
    if len(where) == 1:
        where *= 2
    small: dict[str, Any] = {key: [value[i] for i in where] for key, value in lists.items()}
    for key, value in own.items():
        if isinstance(value, PreTrainedConfig):
            small[key] = {**_small(value), "model_type": value.model_type, **EXCEPTIONS.get(value.model_type, {})}
        elif key in small:
            continue
        elif re.search(r"_(token_id|index)s?$", key):
            small[key] = _low_ids(value)
        elif isinstance(value, bool) or not isinstance(value, int):
            continue
        elif re.fullmatch(DEPTHS, key):
            small[key] = len(where)
        elif value > 1:
            fitting = [size for pattern, size in SIZES if re.fullmatch(pattern, key)]
            small |= {key: fitting[0]} if fitting else {}
    heads = own.get("num_attention_heads")
    if heads is not None and own.get("num_key_value_heads") == heads:
        small["num_key_value_heads"] = small["num_attention_heads"]
    return small


def _arguments(config_class: Any) -> list[str]:
    """Names of the fields that a configuration's class declares."""
    kinds = [kind for kind in config_class.__mro__ if kind.__name__.endswith("Config")]
    return list(dict.fromkeys(name for kind in kinds for name in vars(kind).get("__annotations__", {})))


def _low_ids(value: Any) -> Any:
    """Token ids within the small vocabulary, above those of the rows."""
    if isinstance(value, list | tuple):
        return [_low_ids(one) for one in value]
    return SPECIAL + value % (VOCAB - SPECIAL) if isinstance(value, int) and value >= 3 else value


def tiny_model(model_type: str) -> Any:
    """Model with random weights, with which attention, positions and states move the logits."""
    import torch
    from transformers import AutoModelForCausalLM

    config = tiny_config(model_type)
    with torch.device("meta"):
        size = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())
    if size > 5e6:
        raise ValueError(f"its smallest configuration here has {size:,} parameters")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            spread = float(weight.float().square().mean().sqrt())
            if weight.dim() < 2 or spread > 0.5:  # biases, norms, decay rates
                weight.add_(0.1 * torch.randn_like(weight))
            else:
                weight.copy_(torch.randn_like(weight) * weight.shape[-1] ** -0.5)
    return model


def rows() -> list[Any]:
    """Token ids of the rows, each (t,); none twice in a row, which sparse attention may give equal scores."""
    import numpy as np

    rng = np.random.default_rng(1)
    return [rng.permutation(np.arange(3, SPECIAL, dtype=np.int32))[:length] for length in LENGTHS]


def first_label(length: int) -> int:
    """Index of the first label of a row: about a third of it is prompt."""
    return max(1, length // 3)


def examine(model_type: str, folder: Path, note: Any, memory: bool = False) -> None:
    """Run one architecture and pass facts on to `note`, as soon as they are known."""
    note(stage="configuration")
    model = tiny_model(model_type)
    note(stage="saving the model", architecture=type(model).__name__, parameters=model.num_parameters())
    model.save_pretrained(folder / "model")
    note(stage="its own forward")
    causal = is_causal(model)
    note(causal=causal)
    del model
    ours = run_rankscope(folder, note, memory)
    note(stage="reference")
    compare_with_reference(folder, ours, note)
    note(stage=None)


def is_causal(model: Any) -> bool:
    """Whether other later tokens leave a row's earlier logits as they are, by transformers alone."""
    import torch

    ids = torch.from_numpy(rows()[2]).long()[None]
    other = ids.clone()
    other[0, 16:] = ids[0, 16:].flip(0) % 50 + 3
    with torch.no_grad():
        one, two = (model(input_ids=given, use_cache=False).logits[0, :16] for given in (ids, other))
    return bool((one - two).abs().max() <= 1e-4 * one.std())


def run_rankscope(folder: Path, note: Any, memory: bool) -> dict[int, Any]:
    """Losses and gradients of both trials, by rank, as a study computes them; their adapters are saved in `folder`."""
    import numpy as np
    import torch

    from rankscope.data.tokens import Example, Tokens
    from rankscope.lora.layout import Slice
    from rankscope.lora.saved import peft_fault
    from rankscope.model.load import load_model
    from rankscope.plan.costs import predict
    from rankscope.plan.memory import StudyMemory
    from rankscope.spec.models import DataSpec, ModelSpec, StudySpec, TrainingSpec
    from rankscope.train.loop import choose_engine
    from rankscope.train.step import make_train_state, save_trained_adapter

    tokens = Tokens.from_examples([Example(ids, np.arange(len(ids)) >= first_label(len(ids))) for ids in rows()])
    training = TrainingSpec(steps=2, batch_size=2)
    spec = StudySpec(
        model=ModelSpec(id=str(folder / "model"), device="cpu", dtype="float32"),
        data=DataSpec(id="unused"), ranks=tuple(TRIALS), seeds=(0,), training=training,
    )  # fmt: skip
    if memory:
        note(stage="plan")
        planned = StudyMemory(spec, predict(spec), tokens, 10**12)
        note(memory=None if planned.peak(spec.trials()) else planned.reason)
    note(stage="loading")
    model = load_model(spec.model)
    note(stage="adapters")
    states = [make_train_state(model, trial, training, 2) for trial in spec.trials()]
    note(stage="engine")
    choice = choose_engine(model, states, training)
    generator = torch.Generator().manual_seed(2)
    for name, weight in (pair for state in states for pair in state.weights.items()):
        if "lora_B" in name:  # zero until now, as the probe has them
            weight.data.normal_(0, 0.3 * weight.shape[1] ** -0.5, generator=generator)
    note(engine=choice.engine.name, reason=choice.reason, stage="losses and gradients")
    slices = [Slice(state.trial.name, list(TRIALS[state.trial.candidate.rank])) for state in states]
    losses = list(choice.engine.accumulate(tokens, slices))
    found = {}
    for state, losses_of in zip(states, losses, strict=True):
        rank = state.trial.candidate.rank
        save_trained_adapter(state, folder / f"r{rank}")
        note(unread=peft_fault(model, folder / f"r{rank}"))
        gradients = {name: weight.grad for name, weight in state.weights.items()}
        values = {name: weight.detach().clone() for name, weight in state.weights.items()}
        labels = int(tokens.label_counts[list(TRIALS[rank])].sum())  # PEFT's losses have zeros where rows are padded
        found[rank] = (float(losses_of.double().sum()) / labels, gradients, values)
    note(stage="evaluation")
    evaluated = choice.engine.evaluate(tokens, [state.trial.name for state in states])
    for state, part in zip(states, evaluated, strict=True):
        examples = list(TRIALS[state.trial.candidate.rank])
        counts = tokens.label_counts[examples]
        mean, loss = float(np.average(part.loss[examples], weights=counts)), found[state.trial.candidate.rank][0]
        if abs(mean - loss) > 1e-4 * loss:
            note(fault=f"evaluated {mean:.6f}, trained with {loss:.6f}")
    return found


def compare_with_reference(folder: Path, ours: Mapping[int, Any], note: Any) -> None:
    """Compare losses, gradients and the saved adapters with transformers' and PEFT's, row by row."""
    import torch

    exact, differences = torch.float64, {"loss": 0.0, "gradient": 0.0, "read_back": 0.0, "rounding": 0.0}
    for rank, (loss, gradients, values) in ours.items():
        try:
            expected = reference(folder, rank, exact, values)
        except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
            note(float64=str(error).strip().splitlines()[0][:200])
            exact = torch.float32
            expected = reference(folder, rank, exact, values)
        rounded = reference(folder, rank, torch.float32, values) if exact == torch.float64 else expected
        keys = [name for name in expected["gradients"] if expected["gradients"][name] is not None]
        if missing := set(keys) ^ {name for name, gradient in gradients.items() if gradient is not None}:
            note(fault=f"{len(missing)} weights are trained by one alone, {sorted(missing)[0]} for one")
        shared = [name for name in keys if gradients.get(name) is not None]
        truth = torch.cat([expected["gradients"][name].double().flatten() for name in shared])
        size = float(truth.norm())
        for kind, other in (("gradient", gradients), ("rounding", rounded["gradients"])):
            flat = torch.cat([other[name].double().flatten() for name in shared])
            differences[kind] = _worst(differences[kind], float((flat - truth).norm()) / size)
        differences["loss"] = _worst(differences["loss"], abs(loss - expected["loss"]) / abs(expected["loss"]))
        differences["read_back"] = _worst(differences["read_back"], expected["read_back"])
    note(**differences, dtype=str(exact).removeprefix("torch."))


def _worst(one: float, other: float) -> float:
    return max(one, other) if math.isfinite(one) and math.isfinite(other) else math.nan


def reference(folder: Path, rank: int, dtype: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Loss, gradients and what saving changed, by transformers and PEFT alone, one forward for each row."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=dtype, experts_implementation="eager")
    model = PeftModel.from_pretrained(base, folder / f"r{rank}", is_trainable=True).eval()
    inputs = [torch.from_numpy(ids).long()[None] for ids in rows()]
    weights = {n.replace(".default", ""): p for n, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        saved = model(input_ids=inputs[2], use_cache=False).logits
        for name, value in values.items():
            if name in weights:
                weights[name].copy_(value)
        trained = model(input_ids=inputs[2], use_cache=False).logits
    labels = sum(LENGTHS[row] - first_label(LENGTHS[row]) for row in TRIALS[rank])
    total = 0.0
    for row in TRIALS[rank]:
        logits = model(input_ids=inputs[row], use_cache=False).logits
        start = first_label(LENGTHS[row])
        loss = torch.nn.functional.cross_entropy(logits[0, start - 1 : -1], inputs[row][0, start:], reduction="sum")
        (loss / labels).backward()
        total += float(loss.detach()) / labels
    lost = [name for name in values if name not in weights]
    return {
        "loss": total,
        "gradients": {name: weight.grad for name, weight in weights.items()},
        "read_back": math.inf if lost else float((saved - trained).abs().max() / trained.std()),
    }


def verdict(result: Mapping[str, Any]) -> str:
    """One word for what happened: packed, peft, refused, differs, fails, or not built."""
    if result.get("refused"):
        return "refused"
    if result.get("error"):
        return "not built" if result["stage"] in ("configuration", "saving the model", "its own forward") else "fails"
    bounds = TOLERANCE | {"gradient": max(TOLERANCE["gradient"], 20 * result["rounding"])}
    if result.get("unread"):  # as rankscope says in trial.json, card and report
        bounds.pop("read_back")
    if result.get("fault") or not all(result[kind] <= bound for kind, bound in bounds.items()):
        return "differs"
    return str(result["engine"])


def _child(model_type: str, memory: bool, end: Connection) -> None:
    """Run one architecture, and send its facts one by one."""
    import torch

    from rankscope.errors import RankscopeError

    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # progress bars and warnings
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")

    def note(**known: Any) -> None:
        end.send(known)

    with tempfile.TemporaryDirectory() as folder:
        try:
            examine(model_type, Path(folder), note, memory)
        except RankscopeError as error:
            note(refused=str(error).replace(folder, "FOLDER"))
        except BaseException as error:
            text = (str(error).strip().splitlines() or [""])[0][:300].replace(folder, "FOLDER")
            frames = [f"{'/'.join(Path(one.filename).parts[-2:])}:{one.lineno}" for one in _frames(error)]
            note(error=f"{type(error).__name__}: {text}", where=frames)
    end.close()


def _frames(error: BaseException) -> list[traceback.FrameSummary]:
    """Frames in rankscope, PEFT and transformers."""
    wanted = re.compile(r"/(rankscope|peft|transformers)/")
    return [frame for frame in traceback.extract_tb(error.__traceback__) if wanted.search(frame.filename)]


def run_one(model_type: str, limit: float, memory: bool = False) -> dict[str, Any]:
    """Facts about one architecture, from a child process that has at most `limit` seconds."""
    started, result = time.monotonic(), {"name": model_type, "stage": "starting"}
    ours, theirs = multiprocessing.Pipe(duplex=False)
    child = _server().Process(target=_child, args=(model_type, memory, theirs))
    child.start()
    theirs.close()
    try:
        while ours.poll(max(0.0, started + limit - time.monotonic())):
            result.update(ours.recv())
        result["error"] = f"no answer within {limit:.0f} s"
    except EOFError:
        child.join(10)
        if child.exitcode:
            result["error"] = f"its process ended by {child.exitcode}"
    if child.is_alive():
        child.kill()
        child.join()
    return {**result, "verdict": verdict(result), "seconds": round(time.monotonic() - started, 1)}


def _server() -> Any:
    """Fork server that has imported all that children need, which takes seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rankscope.train.loop", "rankscope.plan.memory", "peft", "transformers"])
    return context


def names() -> list[str]:
    """Every architecture with a causal language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def read(file: Path) -> dict[str, dict[str, Any]]:
    """Results in a file, by name; the last one of each."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return {result["name"]: result for result in map(json.loads, lines)}


def results(wanted: Sequence[str], jobs: int, limit: float, until: float, memory: bool) -> Iterator[dict[str, Any]]:
    """Results of `wanted`, as they come; what has not begun at the time `until` is left out."""
    with ThreadPoolExecutor(jobs) as pool:
        waiting = [
            pool.submit(lambda name=name: run_one(name, limit, memory) if time.monotonic() < until else None)
            for name in wanted
        ]
        for future in waiting:
            if result := future.result():
                yield result


HEADINGS = {
    "packed": "Packed",
    "peft": "Trained by PEFT's forward",
    "refused": "Refused",
    "differs": "Other numbers than PEFT's",
    "fails": "Fails",
    "not built": "Not built",
}


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Page of the documentation with all results."""
    groups = {kind: [r for _, r in sorted(found.items()) if r["verdict"] == kind] for kind in HEADINGS}
    missing = [name for name in names() if name not in found]
    built = sum(len(group) for kind, group in groups.items() if kind != "not built")
    lines = [
        "# Architectures",
        "",
        f"Of {built} causal architectures of transformers {version('transformers')} that can be built tiny, "
        f"{len(groups['packed'])} are packed and {len(groups['peft'])} are trained by PEFT's forward, one trial at a "
        "time. A probe on the model itself decides, so this holds for other sizes of an architecture too.",
        "",
        "```",
        "python benchmarks/architectures.py --out architectures.jsonl",
        "python benchmarks/architectures.py --out architectures.jsonl --table docs/reference/architectures.md",
        "```",
        "",
        f"torch {version('torch')}, peft {version('peft')}, float32 on a CPU, `all-linear`. Differences are relative, "
        "to a reference by transformers and PEFT alone, row by row in float64 (float32 where marked *). Rounding is "
        "what float32 alone changes in the reference's gradient.",
        "`no` under read back: PEFT does not find all of the adapter that it saved itself, and rankscope says so.",
        "What is measured: [the head of architectures.py](../../benchmarks/architectures.py).",
    ]
    for kind in ("packed", "peft"):
        lines += ["", f"## {HEADINGS[kind]}", ""]
        why = " why |" if kind == "peft" else ""
        lines += [f"| architecture | class | loss | gradient | rounding | read back |{why}"]
        lines += ["|---|---|---:|---:|---:|---:|" + ("---|" if why else "")]
        for r in groups[kind]:
            star = "*" if r["dtype"] != "float64" else ""
            numbers = " | ".join(f"{r[key]:.0e}" for key in ("loss", "gradient", "rounding"))
            numbers += " | no" if r.get("unread") else f" | {r['read_back']:.0e}"
            lines.append(
                f"| {r['name']}{star} | {r['architecture']} | {numbers} |" + (f" {r['reason']} |" if why else "")
            )
    for kind in ("refused", "differs", "fails", "not built"):
        if groups[kind]:
            lines += ["", f"## {HEADINGS[kind]}", "", "| architecture | what happens |", "|---|---|"]
            lines += [f"| {r['name']} | {_what(r)} |" for r in groups[kind]]
    if missing:
        lines += ["", "## Not run", "", ", ".join(missing)]
    return "\n".join(lines) + "\n"


def _what(result: Mapping[str, Any]) -> str:
    """What happened to an architecture that was not trained, in one line."""
    numbers = ", ".join(f"{kind} {result[kind]:.0e}" for kind in TOLERANCE if kind in result)
    said = result.get("refused") or result.get("error") or "; ".join(filter(None, (result.get("fault"), numbers)))
    return re.sub(r"\s+", " ", said).replace("|", "\\|").replace("model FOLDER/model: ", "")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="file of results, one a line")
    parser.add_argument("--only", type=lambda text: text.split(","), help="names, separated by commas")
    parser.add_argument("--again", action="store_true", help="run what the file has, too")
    parser.add_argument("--jobs", type=int, default=1, help="architectures at a time")
    parser.add_argument("--limit", type=float, default=120, help="seconds of one architecture")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin none after so many seconds")
    parser.add_argument("--memory", action="store_true", help="predict memory too, which takes as long as the rest")
    parser.add_argument("--table", type=Path, help="write the page of the documentation, and run nothing")
    given = parser.parse_args()
    if given.table:
        given.table.write_text(table(read(given.out)), encoding="utf-8")
        return
    known = {} if given.again else read(given.out)
    wanted = [name for name in given.only or names() if name not in known]
    with given.out.open("a", encoding="utf-8") as out:
        for result in results(wanted, given.jobs, given.limit, time.monotonic() + given.seconds, given.memory):
            out.write(json.dumps(result) + "\n")
            out.flush()
            print(result["name"], result["verdict"], result.get("reason") or _what(result), file=sys.stderr)


if __name__ == "__main__":
    main()
