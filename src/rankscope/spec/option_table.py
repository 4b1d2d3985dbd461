"""Options of the command line and of `rankscope.run`. Imports nothing, so that `rankscope --help` is fast."""

from typing import Any, NamedTuple


class Option(NamedTuple):
    """An option that sets one field of a study."""

    field: str  # such as training.steps
    type: Any  # on the command line, where lists of numbers are text with commas
    help: str = ""  # empty for options of `rankscope.run` alone
    default: str = ""  # in the help: a value that may be given, or what holds without one; empty for a switch, off
    metavar: str | None = None  # value in the help; None for the type's name
    least: int | None = None  # smallest number that the command line takes


_GIVEN = "the study's; else embedded"
_DATA = "Instruction data: file, folder or hub id. Repeat it for several."
_COLUMNS = "Columns of other names: prompt=question,completion=answer."
_RANKS = "LoRA ranks: a list, or 4..64 for 4, 8 up to 64; full adds full fine-tuning."
_VARIANTS = "Variants beside plain LoRA: rslora,pissa,olora,loraplus,dora."
_MODULES = "Layers to adapt: all-linear, all-linear+experts, or names: q_proj,v_proj."
_CONFIG = "An adapter_config.json of PEFT, to take its options from."
_LENGTH = "Longest sequence, in tokens; longer rows are truncated and counted."
_MARGIN = "Largest loss above the best of a rank that is good enough, e.g. 2%."
_MEMORY = "Largest GPU memory of a recommended rank, e.g. 24GB."
_TASK = "Score on a task too: exact_match, choice, regex:PATTERN, my.py:score, lm_eval:TASK."
_ENGINE = "packed, or peft: one trial at a time with PEFT's own forward."

OPTIONS = {
    "name": Option("name", str),
    "model": Option("model.id", str, "Base model: hub id, folder or .gguf file.", _GIVEN),
    "revision": Option("model.revision", str),
    "dataset": Option("data.id", list[str], _DATA, _GIVEN, "DATA"),
    "eval_dataset": Option("data.eval_dataset", list[str], "Data to evaluate on.", "rows held out", "DATA"),
    "columns": Option("data.columns", list[str], _COLUMNS, "names as they are", "NAME=COLUMN"),
    "chat_template": Option("data.chat_template", str, "Jinja template of chats.", "the tokenizer's", "FILE|chatml"),
    "skip_bad_rows": Option("data.skip_bad_rows", bool, "Leave out rows with missing or wrong fields, and count them."),
    "force": Option("data.force", bool, "Train even on fewer than 8 rows."),
    "loss_on": Option("data.loss_on", str),
    "ranks": Option("ranks", str, _RANKS, "8,128,256"),
    "variants": Option("variants", str, _VARIANTS, "none"),
    "alpha": Option("adapter.alpha", str, "lora_alpha: numbers, or multiples of the rank such as 2r.", "32"),
    "alphas": Option("adapter.alpha", str),
    "lora_dropout": Option("adapter.lora_dropout", float),
    "use_rslora": Option("adapter.use_rslora", bool),
    "learning_rates": Option("learning_rates", str, "Peak learning rates, e.g. 1e-4,3e-4.", "2e-4"),
    "seeds": Option("seeds", str, "Seeds to train each candidate with: a list, or 0..4.", "0..2"),
    "steps": Option("training.steps", int, "Optimizer steps per trial.", "those of --epochs"),
    "epochs": Option("training.epochs", float, "Passes over the training rows, instead of --steps.", "1"),
    "batch_size": Option("training.batch_size", int, "Examples per trial and step.", "8"),
    "max_length": Option("data.max_length", int, _LENGTH, "1024"),
    "target_modules": Option("adapter.target_modules", str, _MODULES, "all-linear"),
    "adapter_config": Option("adapter.peft", str, _CONFIG, "none", "FILE"),
    "device": Option("model.device", str, "auto, cpu, cuda, cuda:1 or mps.", "auto"),
    "dtype": Option("model.dtype", str, "Type of the base model: auto, float32 or bfloat16.", "auto"),
    "quantization": Option("model.quantization", str, "Quantize the base: nf4 (4 bits) or int8.", "none"),
    "dequantize": Option("model.dequantize", bool, "Load a checkpoint in FP8 or MXFP4 as weights of --dtype."),
    "engine": Option("training.engine", str, _ENGINE, "packed"),
    "isolated": Option("training.isolated", bool, "Train every trial alone, in its own process."),
    "task": Option("measure.task", str, _TASK, "none"),
    "margin": Option("verdict.margin", str, _MARGIN, "5%"),
    "margin_of": Option("verdict.margin_of", str, "What the margin is a share of: gain, or loss (then 1%).", "gain"),
    "by": Option("verdict.by", str, "What the verdict follows: loss, or task.", "task where there is one"),
    "confidence": Option("verdict.confidence", str, "Confidence level of intervals and verdict.", "95%"),
    "max_gpu_memory": Option("verdict.max_gpu_memory", str, _MEMORY, "no limit"),
    "max_runtime": Option("verdict.max_runtime", str, "Longest training of a recommended rank, e.g. 2h.", "no limit"),
}
"""All options by name: the keyword of `rankscope.run`, and with dashes that of the command line."""
