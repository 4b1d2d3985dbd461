"""Jobs of compare_trl.py that need torch, TRL or PEFT, each in a process of its own.

python benchmarks/trl_jobs.py JOB.json         # writes result.json beside it
"""

import heapq
import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from compare_trl import GROUPED, SEED, Case
from rankscope.files import read_json, write_json
from rankscope.measure.machine import hardware
from rankscope.spec.models import StudySpec

SHARED = ("adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay", "max_grad_norm")
"""Fields of the study's training that have the same name in TRL's configuration."""


def train_with_trl(case: Case, folder: Path, arm: str) -> dict[str, Any]:
    """Train all ranks with SFTTrainer, one after the other over one base; save their adapters in `folder`."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from rankscope.lora.adapters import lora_config
    from rankscope.model.checks import location
    from rankscope.model.load import load_config
    from rankscope.train.prepare import prepare_data

    spec = case.spec()
    rows = trl_rows(case, prepare_data(spec).train, arm.endswith(GROUPED))
    config = load_config(spec.model)
    for part in (config, config.get_text_config()):
        for name, value in list(vars(part).items()):
            if name.endswith(("drop", "dropout", "dropout_prob")) and isinstance(value, float):
                setattr(part, name, 0.0)
    precision = arm.removesuffix(GROUPED)
    dtype = torch.bfloat16 if precision == "TRL bfloat16" else torch.float32
    base: Any = AutoModelForCausalLM.from_pretrained(
        location(spec.model), config=config, dtype=dtype, use_safetensors=True, trust_remote_code=False
    )
    seconds, found = [], {"losses": {}, "adapters": {}}
    for candidate in sorted(spec.candidates(), key=lambda one: -one.rank):
        torch.manual_seed(SEED)
        model = get_peft_model(base, lora_config(candidate, base))
        times, losses = train_rank(spec, candidate, model, rows, folder, precision != "TRL float32")
        seconds.append(times)
        found["losses"][candidate.rank] = losses
        found["adapters"][candidate.rank] = str(folder / f"adapter-{candidate.rank}")
        model.save_pretrained(found["adapters"][candidate.rank])
        base = model.unload()
    lengths = [len(ids) for ids in rows["input_ids"]][case.batch_size :]
    starts = range(0, len(lengths), case.batch_size)
    padded = sum(case.batch_size * max(lengths[start : start + case.batch_size]) for start in starts)
    found["step_seconds"] = [sum(each) for each in zip(*seconds, strict=True)]
    return found | {"padded": padded / sum(lengths), "trl": version("trl")}


def trl_rows(case: Case, tokens: Any, grouped: bool, seed: int = SEED) -> dict[str, list[list[int]]]:
    """The rows of rankscope's batches, in its order; `grouped`: rows as long as each batch's mean in their place."""
    from rankscope.data.batches import batch_indices

    batches = [batch_indices(len(tokens), case.batch_size, seed, step).tolist() for step in range(case.steps)]
    if any(len(batch) < case.batch_size for batch in batches):
        raise SystemExit(f"{len(tokens)} rows end in a smaller batch within {case.steps} steps: use fewer steps")
    if grouped:
        free = set(range(len(tokens)))
        for number, batch in enumerate(batches):
            mean = statistics.fmean(tokens.lengths[batch])
            batches[number] = heapq.nsmallest(len(batch), free, key=lambda index: abs(tokens.lengths[index] - mean))
            free -= set(batches[number])
    rows = [index for batch in batches for index in batch]
    return {
        "input_ids": [tokens[index].ids.tolist() for index in rows],
        "completion_mask": [tokens[index].is_label.astype(int).tolist() for index in rows],
    }


def train_rank(
    spec: StudySpec, candidate: Any, model: Any, rows: dict[str, Any], folder: Path, autocast: bool
) -> tuple[list[float], list[float]]:
    """Train one adapter with SFTTrainer; returns the seconds and the loss of each step."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from rankscope.model.device import synchronize
    from rankscope.model.load import load_tokenizer

    training, seconds = spec.training, []
    cuda = model.device.type == "cuda"
    assert training.steps is not None

    class Stopwatch(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            synchronize(model.device)
            self.start = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            synchronize(model.device)
            seconds.append(time.perf_counter() - self.start)

    constant = training.lr_scheduler_type == "constant"
    settings = SFTConfig(
        output_dir=str(folder / "trl-output"),
        max_steps=training.steps,
        per_device_train_batch_size=training.batch_size,
        learning_rate=candidate.learning_rate,
        optim="adamw_torch_fused",
        **training.model_dump(include=set(SHARED)),
        lr_scheduler_type="constant_with_warmup" if constant else training.lr_scheduler_type,
        warmup_steps=math.ceil(training.warmup_ratio * training.steps),
        bf16=autocast,
        use_cpu=not cuda,
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
        model,
        settings,
        train_dataset=Dataset.from_dict(rows),
        processing_class=load_tokenizer(spec.model),
        callbacks=[Stopwatch()],
    )
    trainer.train()
    return seconds, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def held_out_losses(case: Case, folder: Path, adapters: dict[str, str]) -> dict[str, Any]:
    """Loss a label token on the held-out rows, without an adapter and with each, over the base in float32."""
    import torch
    from peft import PeftModel

    from rankscope.model.load import load_model
    from rankscope.train.prepare import prepare_data

    spec = case.spec()
    rows = prepare_data(spec).eval
    model: Any = load_model(spec.model.model_copy(update={"dtype": "float32", "device": "cpu"}))

    def loss() -> float:
        total = labels = 0.0
        for row in (rows[number] for number in range(len(rows))):
            ids, learned = torch.from_numpy(row.ids).long(), torch.from_numpy(row.is_label[1:]).bool()
            logits = model(input_ids=ids[None]).logits[0, :-1][learned]
            total += torch.nn.functional.cross_entropy(logits.float(), ids[1:][learned], reduction="sum").item()
            labels += int(learned.sum())
        return total / labels

    with torch.no_grad():
        before, after = loss(), {}
        for rank, adapter in adapters.items():
            model = PeftModel.from_pretrained(model, adapter)
            after[rank] = loss()
            model = model.unload()
    return {"before": before, "after": after, "rows": len(rows)}


def product_rates(case: Case, folder: Path) -> dict[str, Any]:
    """FLOP/s of plain products of the model's linear layers over 1,024 tokens, by dtype, and what they ran on."""
    import torch

    from plain_products import product_rate
    from rankscope.model.load import skeleton

    layers = [part for part in skeleton(case.spec().model).modules() if isinstance(part, torch.nn.Linear)]
    shapes = Counter((1024, layer.in_features, layer.out_features) for layer in layers)
    rates = {name: product_rate(shapes, torch.device("cpu"), getattr(torch, name), 3) for name in DTYPES}
    machine = {name: value for name, value in hardware().items() if name in ("cpu", "cores", "torch_threads")}
    return {"rates": rates, "machine": machine}


DTYPES = ("float32", "bfloat16")
JOBS: dict[str, Callable[..., dict[str, Any]]] = {
    job.__name__: job for job in (train_with_trl, held_out_losses, product_rates)
}


def main(file: Path) -> None:
    job = read_json(file)
    more = {name: job[name] for name in ("arm", "adapters") if name in job}
    write_json(file.with_name("result.json"), JOBS[job["job"]](Case(**job["case"]), file.parent, **more))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
