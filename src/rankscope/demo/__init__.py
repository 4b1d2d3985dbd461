"""Model and data of the embedded study: a small pretrained OPT, and instructions from Python's standard library.

Both are package data, so the embedded study needs no download. `recipes/` shows how they were made. The text
they come from is CPython's standard library, whose licence is in `LICENSE.PSF` beside this file.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

__all__ = ["data_path", "model_path"]


def model_path() -> Path:
    """Return the folder of the embedded model, to give to `from_pretrained`.

    An `OPTForCausalLM` of 4.4 million parameters (4 layers, hidden size 256, 512 positions, vocabulary 8192)
    as float16 safetensors, with its tokenizer, about 9 MB together. Like opt-350m it is post-norm, and its
    embeddings are narrower than its hidden size. It was pretrained on files that the embedded data does not
    come from; load it with `dtype=torch.float32` on a CPU.

    The folder lies in the installed package: read it, never write into it.
    """
    return Path(str(files(__name__))) / "model"


def data_path() -> Path:
    """Return the file of the embedded instruction data: JSON Lines in UTF-8, one row per line.

    Every row has three strings: `instruction`, a function's docstring; `input`, its signature; `output`, its
    body. With the prompt of CodeAlpaca a row is at most 128 tokens long under the embedded tokenizer, both
    `</s>` counted.

    The file lies in the installed package: read it, never write into it.
    """
    return Path(str(files(__name__))) / "data" / "stdlib-functions.jsonl"
