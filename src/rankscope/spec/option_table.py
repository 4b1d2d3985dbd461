"""Options of the command line and of `rankscope.run`. Imports nothing, so that `rankscope --help` is fast."""

from typing import Any, NamedTuple


class Option(NamedTuple):
    """An option that sets one field of a study."""

    field: str  # such as training.steps
    type: Any  # on the command line, where lists of numbers are text with commas
    help: str = ""  # empty for options of `rankscope.run` alone
    metavar: str | None = None  # value in the help; None for the type's name


OPTIONS = {
    "name": Option("name", str),
    "model": Option("model.id", str, "Base model: hub id, folder or .gguf file."),
    "revision": Option("model.revision", str),
    "dataset": Option("data.id", list[str], "Instruction data: file, folder or hub id. Repeat it for several.", "DATA"),
    "eval_dataset": Option("data.eval_dataset", list[str], "Data to evaluate on, instead of held-out rows.", "DATA"),
    "columns": Option(
        "data.columns", list[str], "Columns of other names: prompt=question,completion=answer.", "NAME=COLUMN"
    ),
    "chat_template": Option("data.chat_template", str, "Template of conversations, in Jinja.", "FILE|chatml"),
    "skip_bad_rows": Option("data.skip_bad_rows", bool, "Leave out rows that cannot be read, and count them."),
    "force": Option("data.force", bool, "Train even on fewer than 8 rows."),
    "loss_on": Option("data.loss_on", str),
    "ranks": Option("ranks", str, "LoRA ranks: 8,128,256, or 4..64 for 4, 8, 16 up to 64; full adds full fine-tuning."),
    "variants": Option("variants", str, "Variants beside plain LoRA: rslora,pissa,olora,loraplus,dora."),
    "alpha": Option("adapter.alpha", str, "lora_alpha: a number, or a multiple of the rank such as 2r."),
    "alphas": Option("adapter.alpha", str, "Several of them, e.g. 16,2r: each rank is judged at its best."),
    "lora_dropout": Option("adapter.lora_dropout", float),
    "use_rslora": Option("adapter.use_rslora", bool),
    "learning_rates": Option("learning_rates", str, "Peak learning rates, e.g. 1e-4,3e-4."),
    "seeds": Option("seeds", str, "Seeds to train each candidate with: 0,1,2 or 0..2."),
    "steps": Option("training.steps", int, "Optimizer steps per trial."),
    "epochs": Option("training.epochs", float, "Passes over the training rows, instead of --steps."),
    "batch_size": Option("training.batch_size", int, "Examples per trial and step."),
    "max_length": Option("data.max_length", int, "Longest sequence, in tokens; longer rows are truncated and counted."),
    "target_modules": Option(
        "adapter.target_modules", str, "all-linear, all-linear+experts, or names, e.g. q_proj,v_proj."
    ),
    "adapter_config": Option("adapter.peft", str, "An adapter_config.json of PEFT, to take its options from.", "FILE"),
    "device": Option("model.device", str, "auto, cpu, cuda, cuda:1 or mps."),
    "dtype": Option("model.dtype", str, "Type of the base model: auto, float32 or bfloat16."),
    "quantization": Option("model.quantization", str, "Quantize the base's linear layers: nf4 (4 bits) or int8."),
    "dequantize": Option("model.dequantize", bool, "Load a checkpoint in FP8 or MXFP4 as weights of --dtype."),
    "engine": Option("training.engine", str, "packed, or peft: one trial at a time with PEFT's own forward."),
    "isolated": Option("training.isolated", bool, "Train every trial alone, in its own process."),
    "margin": Option("verdict.margin", str, "Largest loss above the best of a rank that is good enough, e.g. 2%."),
    "margin_of": Option("verdict.margin_of", str, "What the margin is a share of: gain or loss."),
    "confidence": Option(
        "verdict.confidence", str, "Confidence level of intervals and verdict, e.g. 90%. Default: 95%."
    ),
    "max_gpu_memory": Option("verdict.max_gpu_memory", str, "Largest GPU memory of a recommended rank, e.g. 24GB."),
    "max_runtime": Option("verdict.max_runtime", str, "Longest training of a recommended rank, e.g. 2h."),
}
"""All options by name: the keyword of `rankscope.run`, and with dashes that of the command line."""
