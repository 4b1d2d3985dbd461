"""Gain of LoRA after some steps in float32 and in bfloat16, as rankscope and as PEFT compute it.

    python benchmarks/precision.py --model FOLDER --rows FILE.json --out RESULTS.jsonl [--settings float32,bfloat16]

float32          the packed forward in float32
float32-divided  the same batches, divided into forwards of fewer tokens: what rounding alone changes
bfloat16         rankscope's mixed precision (`rankscope.model.mixed`)
peft-autocast    PEFT's own forward over float32 weights, under torch.autocast(bfloat16)
peft-weights     PEFT's own forward over weights in bfloat16: an update is added to an output of bfloat16
peft-sums        the same, with outputs of layers in float32: products are as before, sums are not rounded

Every setting trains the same adapter on the same batches. Gain is the untrained model's loss on the held-out rows minus
the trained one's, both in the setting's own precision. A line of JSON is added to --out for each setting and seed; what
stands there already is not run again. At the end a table of gains, in shares of float32's.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from rankscope.data.tokens import Example, Tokens
from rankscope.model.load import load_model
from rankscope.spec.candidates import Candidate, Trial
from rankscope.spec.models import ModelSpec, TrainingSpec
from rankscope.train.engine import Engine, PackedEngine, PeftEngine
from rankscope.train.probe import use_packed_forward
from rankscope.train.step import make_train_state, train_step

SETTINGS = ("float32", "float32-divided", "bfloat16", "peft-autocast", "peft-weights", "peft-sums")
PROMPT = "### Question: {instruction}\n{input}\n ### Answer: "


def read_tokens(args: argparse.Namespace) -> tuple[Tokens, Tokens]:
    """Tokens of the rows to train on and of the held-out ones: those of at most --most-tokens, in the file's order."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    examples, text = [], args.rows.read_text()
    for row in map(json.loads, text.splitlines()) if args.rows.suffix == ".jsonl" else json.loads(text):
        prompt = tokenizer(PROMPT.format(**row))["input_ids"]
        ids = [*prompt, *tokenizer(row["output"])["input_ids"], tokenizer.eos_token_id]
        if len(ids) <= args.most_tokens:
            examples.append(Example(np.array(ids, dtype=np.int32), np.arange(len(ids)) >= len(prompt)))
    return Tokens.from_examples(examples[args.held_out :]), Tokens.from_examples(examples[: args.held_out])


def make_engine(setting: str, args: argparse.Namespace, trial: Trial, training: TrainingSpec) -> tuple[Engine, list]:
    """Model with one adapter, its engine and its training state."""
    if setting in ("peft-weights", "peft-sums"):
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).requires_grad_(False).eval()
    else:
        dtype = "bfloat16" if setting == "bfloat16" else "float32"
        model = load_model(ModelSpec(id=args.model, dtype=dtype, device="cpu"))
    if setting == "peft-sums":
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(lambda module, inputs: inputs[0].to(module.weight.dtype))
                module.register_forward_hook(lambda module, inputs, output: output.float())
    states = [make_train_state(model, trial, training, training.steps)]
    if setting.startswith("peft"):
        engine = PeftEngine(model, args.batch_size)
        engine.mixed = setting == "peft-autocast"
        return engine, states
    use_packed_forward(model)
    return PackedEngine(model, args.most_tokens * 3 // 2 if setting == "float32-divided" else 512), states


def measure(setting: str, seed: int, args: argparse.Namespace) -> dict:
    """Train one adapter; its gain, losses and seconds."""
    train, held_out = read_tokens(args)
    sizes = {"rank": args.rank, "lora_alpha": 2 * args.rank, "learning_rate": args.learning_rate}
    candidate = Candidate(
        **sizes, target_modules="all-linear", lora_dropout=0, use_rslora=False, init_lora_weights="kaiming"
    )
    trial = Trial(candidate=candidate, seed=seed)
    training = TrainingSpec(steps=args.steps, batch_size=args.batch_size)
    engine, states = make_engine(setting, args, trial, training)
    before = engine.evaluate(held_out, [trial.name])[0].mean  # B is zero: the untrained model
    losses, seconds = [], []
    for step in range(args.steps):
        start = time.perf_counter()
        losses.append(train_step(engine, states, train, training, step)[0].loss)
        seconds.append(time.perf_counter() - start)
    after = engine.evaluate(held_out, [trial.name])[0].mean
    return {
        "setting": setting, "seed": seed, "gain": before - after, "before": before, "after": after,
        "train_losses": losses, "step_seconds": statistics.median(seconds),
        "recipe": [args.steps, args.batch_size, args.rank, args.learning_rate, args.most_tokens, args.held_out],
    }  # fmt: skip


def table(results: list[dict]) -> str:
    """Gain of each setting and seed, and its differences from float32's of the same seed, in percent."""
    gains = {(one["setting"], one["seed"]): one["gain"] for one in results}
    seeds = sorted({seed for _, seed in gains})
    header = "| setting | gain of each seed | difference from float32 | mean | seconds a step |"
    lines = [header, "|---|---|---|---|---|"]
    for setting in SETTINGS:
        own = [seed for seed in seeds if (setting, seed) in gains]
        if own:
            beside = [seed for seed in own if ("float32", seed) in gains]
            shares = [gains[setting, seed] / gains["float32", seed] - 1 for seed in beside]
            mean = f"{statistics.mean(shares):+.2%}" if shares else ""
            values = [f"{gains[setting, seed]:.4f}" for seed in own]
            times = [one["step_seconds"] for one in results if one["setting"] == setting]
            told = ", ".join(map("{:+.2%}".format, shares))
            columns = (setting, ", ".join(values), told, mean, f"{statistics.median(times):.2f}")
            lines.append("| " + " | ".join(columns) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=Path, required=True, help="JSON list, or JSON Lines")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--settings", default=",".join(SETTINGS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--held-out", type=int, default=64, help="rows, the first of the file")
    parser.add_argument("--most-tokens", type=int, default=256, help="longer rows are left out")
    args = parser.parse_args()
    lines = args.out.read_text().splitlines() if args.out.exists() else []
    done = {(one["setting"], one["seed"]) for one in map(json.loads, lines)}
    for seed in map(int, args.seeds.split(",")):
        for setting in args.settings.split(","):
            if (setting, seed) not in done:
                result = json.dumps(measure(setting, seed, args))
                with args.out.open("a") as out:
                    out.write(result + "\n")
    print(table([json.loads(line) for line in args.out.read_text().splitlines()]))


if __name__ == "__main__":
    main()
