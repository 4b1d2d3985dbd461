"""Model and data of the embedded study: a small pretrained OPT, and instructions from Python's standard library.

Both are package data, so the embedded study needs no download. `recipes/` shows how they were made. The text
they come from is CPython's standard library, whose licence is in `LICENSE.PSF` beside this file.
"""

from importlib.resources import files
from pathlib import Path


def model_path() -> Path:
    """Folder of the embedded model in the installed package, to give to `from_pretrained` and never to write into.

    An `OPTForCausalLM` of 4.4 million parameters (4 layers, hidden size 256, 512 positions, vocabulary 8192) as float16
    safetensors, with its tokenizer, about 9 MB together. Like opt-350m it is post-norm, and its embeddings are narrower
    than its hidden size. It was pretrained on files that the embedded data does not come from; load it with
    `dtype=torch.float32` on a CPU.
    """
    return Path(str(files(__name__))) / "model"


def data_path() -> Path:
    """File of the embedded instruction data in the installed package: JSON Lines in UTF-8.

    Every row has three strings: `instruction`, a function's docstring; `input`, its signature; `output`, its body. With
    the prompt of CodeAlpaca a row is at most 128 tokens long under the embedded tokenizer, both `</s>` counted.
    """
    return Path(str(files(__name__))) / "data" / "stdlib-functions.jsonl"
