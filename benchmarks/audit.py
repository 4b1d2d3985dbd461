"""The original exercise's measurement of memory, in three orders of its ranks, beside rankscope's of the same ones.

    python benchmarks/audit.py [--model FOLDER] [--rows FILE.json] [--ranks 8,128,256] [--steps 6] [--study DIR]

The original trained one rank after the other in one process, on one model object that `get_peft_model` was given again
for each rank, and took as a rank's memory the mean of two readings, before and after its training: of the process's
resident memory, and of the GPU's allocated memory. Here the same loop runs once for each order, each in a process of
its own. rankscope's figures are those of `rankscope run` on the same rows and steps: the mean of the private memory
sampled during training, each rank in processes of its own. Its study is written to --study, and taken up if it is
there.
"""

import argparse
import json
import multiprocessing
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import rankscope
from rankscope.data.batches import batch_indices
from rankscope.measure.machine import hardware
from rankscope.spec.models import StudySpec
from rankscope.train.prepare import prepare_data

MB = 1e6


def study_values(args: argparse.Namespace) -> dict:
    return {
        "name": "audit",
        "model": {"id": args.model, "dtype": "float32"},
        "data": {"id": args.rows, "max_length": 128, "eval_rows": 16},
        "ranks": [int(rank) for rank in args.ranks.split(",")],
        "seeds": [0],
        "learning_rates": [5e-4],
        "adapter": {"alpha": 32, "lora_dropout": 0.1},
        "training": {"steps": args.steps, "batch_size": 16, "evals": 1, "warmup_ratio": 0.1},
        "measure": {"answers": 0, "steps": args.steps},
    }


def original_loop(order: Sequence[int], values: dict, results: "multiprocessing.Queue") -> None:
    """Train one rank after the other on one model object; put each rank's readings of RSS and of the GPU, in bytes."""
    import psutil
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from rankscope.model.checks import location
    from rankscope.train.engine import pad

    spec = StudySpec.model_validate(values)
    tokens, device = prepare_data(spec).train, "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(location(spec.model)).to(device)

    def reading() -> tuple[int, int]:
        return psutil.Process().memory_info().rss, torch.cuda.memory_allocated() if device == "cuda" else 0

    found = {}
    for rank in order:
        before = reading()
        config = LoraConfig(r=rank, lora_alpha=32, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM")
        trained = get_peft_model(model, config).train()
        optimizer = torch.optim.AdamW([weight for weight in trained.parameters() if weight.requires_grad], lr=5e-4)
        for step in range(spec.training.steps or 0):
            ids, mask, is_label = pad(tokens, batch_indices(len(tokens), 16, 0, step), torch.device(device))
            trained(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(~is_label, -100)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        found[rank] = [before, reading()]
    results.put(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--rows", default="embedded")
    parser.add_argument("--ranks", default="8,128,256")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--study", type=Path, help="directory of rankscope's study; default: a temporary one")
    args = parser.parse_args()
    values = study_values(args)
    ranks = values["ranks"]
    context, rows = multiprocessing.get_context("spawn"), {}
    for order in (ranks, ranks[::-1], ranks[1:] + ranks[:1]):
        results = context.Queue()
        process = context.Process(target=original_loop, args=(order, values, results))
        process.start()
        rows[tuple(order)] = results.get()
        process.join()
    print("| measured | " + " | ".join(f"rank {rank}, MB" for rank in ranks) + " |\n|---" + "|--:" * len(ranks) + "|")
    for order, found in rows.items():
        for number, what in enumerate(("RSS", "allocated on the GPU")):
            means = [sum(reading[number] for reading in found[rank]) / 2 for rank in ranks]
            if any(means):
                cells = " | ".join(f"{mean / MB:.0f}" for mean in means)
                print(f"| {what}, mean of two readings, order {', '.join(map(str, order))} | {cells} |", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        study = rankscope.run(study=values, out=args.study or Path(scratch, "audit"))
        profiles = study.profiles()
    own = profiles[~profiles["control"]].groupby("rank")["private_mean_bytes"].mean()
    print(f"| rankscope: private memory, mean in training | {' | '.join(f'{own[rank] / MB:.0f}' for rank in ranks)} |")
    libraries = {name: version(name) for name in ("torch", "transformers", "peft", "rankscope")}
    print(json.dumps({"machine": hardware(), "versions": libraries, "steps": args.steps}))


if __name__ == "__main__":
    main()
