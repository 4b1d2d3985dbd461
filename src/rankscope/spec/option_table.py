"""Options of the command line and of `rankscope.run`. Imports nothing, so that `rankscope --help` is fast."""

from typing import NamedTuple


class Option(NamedTuple):
    """An option that sets one field of a study."""

    field: str  # such as training.steps
    type: type  # on the command line, where lists are text with commas
    help: str = ""  # empty for options of `rankscope.run` alone


OPTIONS = {
    "name": Option("name", str),
    "model": Option("model.id", str, "Base model: hub id or folder."),
    "revision": Option("model.revision", str),
    "dataset": Option("data.id", str, "Instruction data: hub id, or a JSON, JSONL, CSV or Parquet file."),
    "loss_on": Option("data.loss_on", str),
    "ranks": Option("ranks", str, "LoRA ranks, e.g. 8,128,256; full adds full fine-tuning as a baseline."),
    "variants": Option("variants", str, "Variants beside plain LoRA: rslora,pissa,olora,loraplus,dora."),
    "alpha": Option("adapter.alpha", str, "lora_alpha: a number, or a multiple of the rank such as 2r."),
    "lora_dropout": Option("adapter.lora_dropout", float),
    "use_rslora": Option("adapter.use_rslora", bool),
    "learning_rates": Option("learning_rates", str, "Peak learning rates, e.g. 1e-4,3e-4."),
    "seeds": Option("seeds", str, "Seeds to train each candidate with, e.g. 0,1,2."),
    "steps": Option("training.steps", int, "Optimizer steps per trial."),
    "epochs": Option("training.epochs", float, "Passes over the training rows, instead of --steps."),
    "batch_size": Option("training.batch_size", int, "Examples per trial and step."),
    "max_length": Option("data.max_length", int, "Longest sequence, in tokens; longer rows are truncated and counted."),
    "target_modules": Option("adapter.target_modules", str, "all-linear, or names, e.g. q_proj,v_proj."),
    "device": Option("model.device", str, "auto, cpu, cuda or cuda:1."),
    "dtype": Option("model.dtype", str, "Type of the base model: auto, float32 or bfloat16."),
    "quantization": Option("model.quantization", str, "Quantize the base's linear layers: nf4 (4 bits) or int8."),
    "engine": Option("training.engine", str, "packed, or peft: one trial at a time with PEFT's own forward."),
    "isolated": Option("training.isolated", bool, "Train every trial alone, in its own process."),
    "max_gpu_memory": Option("verdict.max_gpu_memory", str, "Largest GPU memory of a recommended rank, e.g. 24GB."),
    "max_runtime": Option("verdict.max_runtime", str, "Longest training of a recommended rank, e.g. 2h."),
}
"""All options by name: the keyword of `rankscope.run`, and with dashes that of the command line."""
