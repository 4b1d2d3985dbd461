"""Facts about the machine of a study: hardware, versions, model, devices."""

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

from rankscope import __version__
from rankscope.model.load import commit
from rankscope.spec.models import StudySpec

PACKAGES = ("torch", "transformers", "peft", "datasets", "tokenizers", "safetensors", "numpy", "pandas", "altair")


def versions() -> dict[str, str | None]:
    """Versions of Python, rankscope and the libraries that affect results; None if not installed."""
    return {"python": platform.python_version(), "rankscope": __version__} | {p: installed(p) for p in PACKAGES}


def hardware() -> dict[str, Any]:
    """Processor, memory and GPUs; sizes in bytes."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = map(torch.cuda.get_device_properties, range(count))
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": [{"name": gpu.name, "memory_bytes": gpu.total_memory} for gpu in gpus],
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


class Site(NamedTuple):
    """Machines and devices on which a launcher runs its jobs."""

    kind: str  # cpu or cuda
    here: bool  # only this machine
    free_bytes: int  # on the device with the least
    device: str  # torch's name
    dtype: str  # of the base model there
    hardware: dict[str, Any]  # see `hardware`; with a list of `nodes` if there are several
    versions: dict[str, str | None]


def describe_machine(spec: StudySpec, parameters: int, site: Site) -> dict[str, Any]:
    """Content of machine.json: hardware, versions, device and base model."""
    model = {
        "id": spec.model.id,
        "revision": commit(spec.model) or spec.model.revision,
        "parameters": parameters,
        "dtype": site.dtype,
        "quantization": spec.model.quantization,
    }
    return {"hardware": site.hardware, "versions": site.versions, "model": model, "device": site.device}
