"""Model and data of the embedded study: a small pretrained OPT, and instructions from Python's standard library, whose
licence is in `LICENSE.PSF` beside this file. `recipes/` shows how they were made.
"""

from importlib.resources import files
from pathlib import Path


def model_path() -> Path:
    """Folder of an `OPTForCausalLM` of 4.4 million parameters as float16 safetensors, with its tokenizer: 4 layers,
    hidden size 256, 512 positions, vocabulary 8192. Like opt-350m it is post-norm, and its embeddings are narrower than
    its hidden size. It was pretrained on files that the embedded data does not come from."""
    return Path(str(files(__name__))) / "model"


def data_path() -> Path:
    """File of instructions, JSON Lines: `instruction`, a function's docstring; `input`, its signature; `output`, its
    body. With the prompt of CodeAlpaca a row is at most 128 tokens long, both `</s>` counted."""
    return Path(str(files(__name__))) / "data" / "stdlib-functions.jsonl"
