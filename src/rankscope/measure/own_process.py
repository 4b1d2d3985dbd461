"""Memory that a job's process takes by itself: Python, its libraries, and their buffers after one small step.

    python -m rankscope.measure.own_process

prints it. It differs between systems, versions of the libraries and numbers of threads: it is measured, once for each.
"""

import hashlib
import importlib
import json
import logging
import subprocess
import sys
from contextlib import suppress
from functools import cache
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rankscope.data.cache import cache_folder
from rankscope.errors import RankscopeError
from rankscope.files import find_json, write_json
from rankscope.measure.cores import job_environment
from rankscope.measure.machine import hardware, versions
from rankscope.measure.sampler import resident
from rankscope.model.load import freeze
from rankscope.spec.candidates import Candidate, Trial
from rankscope.spec.models import TrainingSpec
from rankscope.train.loop import choose_engine
from rankscope.train.probe import probe_tokens
from rankscope.train.step import make_train_state, train_step

_log = logging.getLogger(__name__)


@cache
def own_process_bytes() -> int:
    """Private memory of a job's process without its work, in bytes: as once measured for these versions, or now."""
    facts = {"versions": versions(), "hardware": hardware() | {"memory_bytes": None}}
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_folder("process")
    file = folder and folder / f"{key}.json"
    with suppress(RankscopeError):  # corrupt: measured again
        if file and (known := find_json(file)):
            return int(known["bytes"])
    command = [sys.executable, "-m", "rankscope.measure.own_process"]
    done = subprocess.run(command, capture_output=True, text=True, env=job_environment(), check=True)
    found = int(done.stdout.split()[-1])
    try:
        if file:
            write_json(file, {"schema": 1, "bytes": found})
    except OSError as error:
        _log.warning("not cached: %s. Set RANKSCOPE_CACHE to a folder that can be written.", error)
    return found


def take_small_step() -> None:
    """Train a tiny model for one step, in memory."""
    shape: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    model = freeze(LlamaForCausalLM(LlamaConfig(vocab_size=256, num_hidden_layers=2, **shape)), torch.float32)
    adapter: dict[str, Any] = {"rank": 4, "learning_rate": 1e-3, "lora_alpha": 8, "lora_dropout": 0.0}
    candidate = Candidate(**adapter, target_modules="all-linear", use_rslora=False, init_lora_weights="kaiming")
    trial, training = Trial(candidate=candidate, seed=0), TrainingSpec(batch_size=2)
    state = make_train_state(model, trial, training, 1)
    train_step(choose_engine(model, [state], training).engine, [state], probe_tokens(model), training, 0)


if __name__ == "__main__":
    for job in ("worker", "packs", "profiles"):  # what a job imports; by name, since imports run leftwards
        importlib.import_module(f"rankscope.jobs.{job}")
    take_small_step()
    found = resident()
    print(found.rss if found.private is None else found.private)
