"""Shares of an optimizer step by kind of operator: what takes the time that matrix products don't.

    python benchmarks/step_shares.py --model FOLDER --rows FILE.json [--ranks 8,128,256] [--dtypes float32,bfloat16]

One pack of all ranks is trained on the rows; after two steps, which compile kernels for new shapes, a step is timed and
the next one recorded by torch.profiler. A share is the CPU time of a kind's own operators; *other* is what the profiler
sees no operator in: Python, autograd and the profiler itself.
"""

import argparse
import json
import time
from collections import Counter
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from precision import read_tokens
from rankscope.data.tokens import Tokens
from rankscope.measure.machine import hardware
from rankscope.model.load import load_model
from rankscope.spec.candidates import Candidate, Trial
from rankscope.spec.models import ModelSpec, TrainingSpec
from rankscope.train.engine import PackedEngine
from rankscope.train.probe import use_packed_forward
from rankscope.train.step import make_train_state, train_step

KINDS = {
    "matrix products": ("mm", "addmm", "bmm", "linear", "mkldnn", "matmul"),
    "attention": ("scaled_dot_product", "flash", "softmax_backward"),
    "loss over the vocabulary": ("log_softmax", "argmax", "exp_"),
    "copies and conversions": ("copy", "to", "cat", "contiguous", "clone", "empty", "zeros", "fill", "zero", "index"),
    "optimizer": ("adam", "foreach", "norm", "clip"),
}


def kind_of(operator: str) -> str:
    """Kind of an operator by its name, such as `aten::mm`; all else is elementwise."""
    name = operator.rpartition("::")[2].lower()
    words = name.strip("_").split("_")
    for kind, parts in KINDS.items():
        if any(part in words or (len(part) > 4 and part in name) for part in parts):
            return kind
    return "elementwise" if "::" in operator else "other"


def shares(dtype: str, args: argparse.Namespace, tokens: Tokens) -> dict:
    """Seconds of a step, and the profiled seconds of each kind of operator in the next one."""
    model = load_model(ModelSpec(id=args.model, dtype=dtype, device=args.device))
    training = TrainingSpec(steps=8, batch_size=args.batch_size)
    states = []
    for rank in map(int, args.ranks.split(",")):
        candidate = Candidate(
            rank=rank, lora_alpha=2 * rank, learning_rate=2e-4, target_modules="all-linear", lora_dropout=0,
            use_rslora=False, init_lora_weights="kaiming",
        )  # fmt: skip
        states.append(make_train_state(model, Trial(candidate=candidate, seed=0), training, training.steps))
    use_packed_forward(model)
    engine = PackedEngine(model, args.tokens_per_forward)
    for step in range(2):
        train_step(engine, states, tokens, training, step)
    start = time.perf_counter()
    metrics = train_step(engine, states, tokens, training, 2)
    seconds = time.perf_counter() - start
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        start = time.perf_counter()
        train_step(engine, states, tokens, training, 3)
        profiled = time.perf_counter() - start
    found: Counter[str] = Counter()
    for event in profiler.key_averages():
        found[kind_of(event.key)] += event.self_cpu_time_total / 1e6
    if args.operators:
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=args.operators))
    found["other"] += profiled - sum(found.values())
    return {
        "dtype": dtype, "seconds": seconds, "tokens": sum(one.tokens for one in metrics), "profiled": profiled,
        "shares": {kind: spent / profiled for kind, spent in found.most_common()},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=Path, required=True, help="JSON list, or JSON Lines")
    parser.add_argument("--ranks", default="8,128,256")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--most-tokens", type=int, default=128, help="longer rows are left out")
    parser.add_argument("--held-out", type=int, default=8)
    parser.add_argument("--tokens-per-forward", type=int, default=1024)
    parser.add_argument("--operators", type=int, default=0, help="print so many rows of the profiler's own table")
    args = parser.parse_args()
    tokens, _ = read_tokens(args)
    results = [shares(dtype, args, tokens) for dtype in args.dtypes.split(",")]
    kinds = [*KINDS, "elementwise", "other"]
    print("| dtype | tokens | s a step | " + " | ".join(kinds) + " |\n|---" + "|--:" * (2 + len(kinds)) + "|")
    for one in results:
        row = [f"{one['shares'].get(kind, 0):.0%}" for kind in kinds]
        print(f"| {one['dtype']} | {one['tokens']} | {one['seconds']:.2f} | {' | '.join(row)} |")
    print(json.dumps({"machine": hardware(), "torch": torch.__version__}))


if __name__ == "__main__":
    main()
