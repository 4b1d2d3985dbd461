"""Time, memory and agreement of `rankscope run` and TRL's SFTTrainer with PEFT on one rank study.

    python benchmarks/compare_trl.py --model DIR_OR_ID --dataset FILE --ranks 8,128,256 --out FILE.json

Each repeat runs the arms one after the other, so that machine drift affects all of them:

- rankscope: `rankscope run` in a child process, with one seed and without cost profiles
- trl: SFTTrainer, one rank after the other, each in a fresh child process
- trl-grouped (with `--grouped`): like trl, with batches of similar length. The first batch is unchanged; the rows of
  the timed steps are sorted by length, longest first. transformers' own `group_by_length` sorts at most a quarter of
  its rows at once, so on the same rows it pads no less

The TRL arms read the tokens of the study that rankscope has just made, in rankscope's order. Their adapters start from
the same values; optimizer, schedule, clipping and precision are the study's; the base's own dropout is off. So the loss
curves of `rankscope` and `trl` must agree. If they differ by more than 1e-4 (relative, float32), the arms did different
work: the ratios do not count, and the exit code is 1. trl-grouped has other batches: its losses are not compared. The
warm-up starts at a learning rate of zero, so losses show an update only from the third step on.

TRL's settings: no gradient checkpointing (TRL's default computes each forward twice), fused AdamW, no saving, no
trackers, and huge pages for torch's CPU allocator, as rankscope's own children have them. Everything else is TRL's
default, including entropy and token accuracy. On a CPU its loss scores every position, padding and prompt too, and no
setting changes that.

- seconds a step: all ranks together; the mean over all steps but the first, which warms up and is reported
  separately. Packs (rankscope) or ranks (TRL) that train one after the other are summed. TRL's clock goes from
  on_step_begin to on_step_end, which excludes forming the batch and logging; rankscope's excludes logging only
- training seconds: seconds a step times steps
- wall time: the processes' whole time, with imports and loading; only rankscope's includes tokenising, evaluation and
  the report
- peak memory: ru_maxrss of wait4 (Linux), the high-water mark of resident memory of the arm's largest process, which
  for rankscope with a small model may be the one that writes the report
- GPU peak: allocated bytes, TRL arms only; rankscope records its own in the profiles, which are off here

Tables show medians over repeats; a ratio is taken within each repeat first.
"""

import argparse
import json
import math
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from rankscope.files import read_json, read_jsonl, write_json
from rankscope.jobs.process import ENVIRONMENT
from rankscope.measure.machine import hardware, versions
from rankscope.study.study import Study

# torch and TRL are imported in the children only: a child's ru_maxrss begins with the memory of the process it was
# started from, so this one must stay small.

SEED = 0
TOLERANCE = 1e-4
"""Largest relative difference between two losses of one step, in float32, that counts as the same training."""

SHARED = ("adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay", "max_grad_norm")
"""Fields of the study's training that have the same name in TRL's configuration."""


class Cost(NamedTuple):
    """Cost of one arm in one repeat, all ranks together."""

    step_seconds: list[float]  # (steps,)
    wall_seconds: float
    peak_bytes: int
    gpu_peak_bytes: int | None
    losses: dict[int, list[float]]  # (steps,) of each rank
    dtype: str | None  # of the base; rankscope's is that of the TRL arms

    @property
    def seconds_a_step(self) -> float:
        return statistics.fmean(self.step_seconds[1:])


QUANTITIES = ("seconds_a_step", "wall_seconds", "peak_bytes")
"""Fields of `Cost` that the ratios compare."""


class Process(NamedTuple):
    """Cost of a finished child process."""

    wall_seconds: float
    peak_bytes: int


def run_child(command: Sequence[str], folder: Path) -> Process:
    """Run a command to its end; `folder` takes its output and, so that every repeat tokenises anew, its cache."""
    environment = ENVIRONMENT | os.environ | {"RANKSCOPE_CACHE": str(folder / "cache")}
    log = folder / "log.txt"
    start = time.perf_counter()
    with (
        log.open("wb") as out,
        subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True) as process,
    ):
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)  # with what it has started: an orphan would slow what runs next
            raise
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(f"{shlex.join(command)} ended with {process.returncode}:\n{log.read_text()[-4000:]}")
    return Process(seconds, usage.ru_maxrss * 1024)


def run_rankscope(args: argparse.Namespace, folder: Path) -> Cost:
    """Run the study from the command line, in `folder`/study."""
    path = folder / "study"
    command = [sys.executable, "-m", "rankscope.cli", "run", "--out", str(path), "--seeds", str(SEED)]
    for name in ("model", "dataset", "ranks", "steps", "batch_size", "max_length", "target_modules"):
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    command += ["--learning-rates", str(args.learning_rate)]
    for assignment in ("measure.profiles=false", "measure.answers=0", "training.evals=1", "data.eval_rows=8"):
        command += ["--set", assignment]
    process = run_child(command, folder)
    study = Study.open(path)
    losses: dict[int, list[float]] = {}
    packs: dict[str, list[float]] = {}  # trials of one pack have the pack's step time, which counts once
    for trial in study.spec.trials():
        rows = [row for row in read_jsonl(study.trial_folder(trial) / "metrics.jsonl") if "train_loss" in row]
        losses[trial.candidate.rank] = [row["train_loss"] for row in rows]
        packs[study.trial_record(trial).pack] = [row["step_seconds"] for row in rows]
    return Cost(_by_step(packs.values()), *process, None, losses, None)


def run_trl(folder: Path, grouped: bool) -> Cost:
    """Train the ranks of `folder`/study with TRL, one after the other."""
    study = folder / "study"
    processes, results = [], {}
    for candidate in Study.open(study).spec.candidates():
        result = folder / "trl.json"
        command = [sys.executable, __file__, "trl-arm", str(study), str(candidate.rank), str(result)]
        processes.append(run_child(command + ["--grouped"] * grouped, folder))
        results[candidate.rank] = read_json(result)
    gpu = [found["gpu_peak_bytes"] for found in results.values() if found["gpu_peak_bytes"] is not None]
    return Cost(
        _by_step(found["step_seconds"] for found in results.values()),
        sum(process.wall_seconds for process in processes),
        max(process.peak_bytes for process in processes),
        max(gpu, default=None),
        {rank: found["losses"] for rank, found in results.items()},
        next(found["dtype"] for found in results.values()),
    )


def _by_step(series: Iterable[Sequence[float]]) -> list[float]:
    return [sum(seconds) for seconds in zip(*series, strict=True)]


def train_with_trl(study_path: Path, rank: int, result: Path, grouped: bool) -> None:
    """Train one rank of a study with SFTTrainer and write its cost and losses to `result`; to be called in a child."""
    import torch
    from datasets import Dataset
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from rankscope.data.batches import batch_indices
    from rankscope.data.tokens import load
    from rankscope.lora.adapters import lora_config
    from rankscope.model.checks import location
    from rankscope.model.device import resolve_device, resolve_dtype
    from rankscope.model.load import load_config, load_tokenizer

    spec = Study.open(study_path).spec
    training = spec.training
    assert training.steps is not None
    (candidate,) = [candidate for candidate in spec.candidates() if candidate.rank == rank]
    device = resolve_device(spec.model.device)
    dtype = resolve_dtype(spec.model.dtype, device)
    cuda = device.type == "cuda"

    tokens = load(study_path / "data").train
    batches = [batch_indices(len(tokens), training.batch_size, SEED, step).tolist() for step in range(training.steps)]
    if any(len(batch) < training.batch_size for batch in batches):
        raise SystemExit(f"{len(tokens)} rows end in a smaller batch within {training.steps} steps: use fewer steps")
    rows = [index for batch in batches for index in batch]
    if grouped:
        warmup, timed = rows[: training.batch_size], rows[training.batch_size :]
        rows = warmup + sorted(timed, key=lambda index: -int(tokens.lengths[index]))
    dataset = Dataset.from_dict(
        {
            "input_ids": [tokens[index].ids.tolist() for index in rows],
            "completion_mask": [tokens[index].is_label.astype(int).tolist() for index in rows],
        }
    )

    config = load_config(spec.model)
    for part in (config, config.get_text_config()):
        for name, value in list(vars(part).items()):
            if name.endswith(("drop", "dropout", "dropout_prob")) and isinstance(value, float):
                setattr(part, name, 0.0)
    base: Any = AutoModelForCausalLM.from_pretrained(
        location(spec.model), config=config, dtype=dtype, use_safetensors=True, trust_remote_code=False
    )
    base.to(device)
    torch.manual_seed(SEED)
    model = get_peft_model(base, lora_config(candidate, base))

    class Stopwatch(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []

        def now(self) -> float:
            if cuda:
                torch.cuda.synchronize()
            return time.perf_counter()

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.start = self.now()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.seconds.append(self.now() - self.start)

    stopwatch = Stopwatch()
    constant = training.lr_scheduler_type == "constant"
    settings = SFTConfig(
        output_dir=str(result.with_name("trl-output")),
        max_steps=training.steps,
        per_device_train_batch_size=training.batch_size,
        learning_rate=candidate.learning_rate,
        optim="adamw_torch_fused",
        **training.model_dump(include=set(SHARED)),
        lr_scheduler_type="constant_with_warmup" if constant else training.lr_scheduler_type,
        warmup_steps=math.ceil(training.warmup_ratio * training.steps),
        bf16=dtype == torch.bfloat16,
        gradient_checkpointing=False,
        completion_only_loss=True,
        max_length=None,  # the tokens are cut already
        train_sampling_strategy="sequential",
        dataloader_pin_memory=cuda,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=SEED,
    )
    trainer = SFTTrainer(
        model, settings, train_dataset=dataset, processing_class=load_tokenizer(spec.model), callbacks=[stopwatch]
    )
    trainer.train()
    found = {
        "step_seconds": stopwatch.seconds,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "gpu_peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        "dtype": str(dtype).removeprefix("torch."),
    }
    write_json(result, found)


def largest_difference(one: Cost, other: Cost) -> float:
    """Return max |a - b| / |a| over the losses of all ranks and steps."""
    assert one.losses.keys() == other.losses.keys()
    return max(
        abs(a - b) / abs(a) for rank in one.losses for a, b in zip(one.losses[rank], other.losses[rank], strict=True)
    )


def show(costs: dict[str, list[Cost]], ratios: dict[str, dict[str, float]], steps: int) -> None:
    """Print the tables in Markdown; 1 MB is 1e6 bytes."""
    print("\n| arm | training s | s a step | first step s | wall s | peak MB | GPU peak MB |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for arm, repeats in costs.items():
        seconds, wall, peak = (statistics.median(getattr(cost, name) for cost in repeats) for name in QUANTITIES)
        first = statistics.median(cost.step_seconds[0] for cost in repeats)
        gpu = [cost.gpu_peak_bytes / 1e6 for cost in repeats if cost.gpu_peak_bytes is not None]
        row = f"{seconds * steps:.2f} | {seconds:.3f} | {first:.3f} | {wall:.1f} | {peak / 1e6:,.0f}"
        print(f"| {arm} | {row} | {f'{statistics.median(gpu):,.0f}' if gpu else '-'} |")
    print("\n| ratio | s a step | wall | peak memory |\n|---|---:|---:|---:|")
    for arm, ratio in ratios.items():
        print(f"| {arm} / rankscope | {' | '.join(f'{value:.2f}' for value in ratio.values())} |")


def compare(args: argparse.Namespace) -> bool:
    """Run all repeats, print the tables, write `--out`; return whether the ratios count."""
    costs: dict[str, list[Cost]] = {arm: [] for arm in ("rankscope", "trl", *["trl-grouped"] * args.grouped)}
    for repeat in range(args.repeats):
        with tempfile.TemporaryDirectory(prefix="rankscope-trl-") as folder:
            for arm, repeats in costs.items():
                run = Path(folder)
                cost = run_rankscope(args, run) if arm == "rankscope" else run_trl(run, arm == "trl-grouped")
                repeats.append(cost)
                print(f"{repeat + 1}/{args.repeats} {arm}: {cost.seconds_a_step:.3f} s a step", flush=True)
    ratios = {
        arm: {
            name: statistics.median(
                getattr(cost, name) / getattr(own, name) for cost, own in zip(repeats, costs["rankscope"], strict=True)
            )
            for name in QUANTITIES
        }
        for arm, repeats in costs.items()
        if arm != "rankscope"
    }
    difference = max(map(largest_difference, costs["rankscope"], costs["trl"]))
    dtype = costs["trl"][0].dtype
    counts = dtype != "float32" or difference <= TOLERANCE
    show(costs, ratios, args.steps)
    print(f"\nLargest relative difference of the loss curves ({dtype}): {difference:.2e}")
    if not counts:
        print(f"It exceeds {TOLERANCE:g}: the ratio does not count.")
    if args.out:
        machine = hardware()
        del machine["system"]
        options = {name: value for name, value in vars(args).items() if name != "out"}
        record = {
            "schema": 1,
            "options": options | {"model": Path(args.model).name, "dataset": Path(args.dataset).name},
            "machine": machine,
            "versions": versions() | {name: version(name) for name in ("trl", "accelerate")},
            "dtype": dtype,
            "largest_loss_difference": difference,
            "ratios_count": counts,
            "ratios": ratios,
            "arms": {arm: [cost._asdict() for cost in repeats] for arm, repeats in costs.items()},
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return counts


def main() -> None:
    if sys.argv[1:2] == ["trl-arm"]:  # what `run_trl` starts
        study, rank, result, *flags = sys.argv[2:]
        train_with_trl(Path(study), int(rank), Path(result), flags == ["--grouped"])
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that children are ended, too
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="embedded", help="embedded, a folder or a hub id")
    parser.add_argument("--dataset", default="embedded", help="embedded, a file or a hub id")
    parser.add_argument("--ranks", default="8,128,256")
    for option, default in (("--max-length", 1024), ("--batch-size", 8), ("--steps", 4), ("--repeats", 3)):
        parser.add_argument(option, type=int, default=default)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--target-modules", default="all-linear")
    parser.add_argument("--grouped", action="store_true", help="TRL with batches of similar length as well")
    parser.add_argument("--out", type=Path, help="a JSON file")
    args = parser.parse_args()
    if args.steps < 3 or args.repeats < 1:
        parser.error("--steps must be at least 3, or the losses show no update, and --repeats at least 1")
    sys.exit(0 if compare(args) else 1)


if __name__ == "__main__":
    main()
