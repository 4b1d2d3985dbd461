"""Facts about the machine of a study: hardware, versions, model, devices."""

import os
import platform
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

from rankscope import __version__
from rankscope.files import text_or_empty
from rankscope.measure.allocator import allocator
from rankscope.measure.cores import threads
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
        "torch_threads": torch.get_num_threads() if "OMP_NUM_THREADS" in os.environ else threads(),  # of a job
        "allocator": allocator(),  # likewise
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": [{"name": gpu.name, "memory_bytes": gpu.total_memory} for gpu in gpus],
    }


def _cpu_name() -> str:
    lines = text_or_empty(Path("/proc/cpuinfo")).splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


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
    """Content of machine.json: date, hardware, versions, device and base model."""
    model = {
        "id": spec.model.id,
        "revision": commit(spec.model) or spec.model.revision,
        "parameters": parameters,
        "dtype": site.dtype,
        "quantization": spec.model.quantization,
    }
    date = datetime.now(UTC).date().isoformat()
    return {"date": date, "hardware": site.hardware, "versions": site.versions, "model": model, "device": site.device}


COMPARED = ("cpu", "cores", "torch_threads", "allocator", "gpus")
"""Hardware that costs depend on; `system` and `memory_bytes` change with every kernel."""

NOT_IN_COSTS = ("datasets", "tokenizers", "pandas", "altair")
"""Libraries that only read the data or draw: their versions are logged, but costs do not depend on them."""

Changes = dict[str, dict[str, list[Any]]]  # by group, `machine` or `versions`, and field: [before, now]


def changes(machine: Mapping[str, Any], log: Sequence[Mapping[str, Any]], site: Site) -> Changes:
    """Fields in which `site` differs from the last machine of a study. `machine` is machine.json, `log` the `changed`
    of each later entry in the study's log. Only fields that both have are compared."""
    known, now = _facts(machine), _facts(site._asdict() | {"model": {"dtype": site.dtype}})
    for changed in log:
        for group, fields in changed.items():
            known[group] |= {field: values[-1] for field, values in fields.items()}
    found = {
        group: {name: [old, now[group][name]] for name, old in fields.items() if now[group].get(name, old) != old}
        for group, fields in known.items()
    }
    return {group: fields for group, fields in found.items() if fields}


def changes_of_costs(machine: Mapping[str, Any], site: Site) -> list[str]:
    """`changes` since machine.json that costs depend on: `cpu: A → B`."""
    fields = [field for group in changes(machine, (), site).values() for field in group.items()]
    return [f"{name}: {before} → {now}" for name, (before, now) in fields if name not in NOT_IN_COSTS]


def _facts(machine: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    facts = {name: machine["hardware"][name] for name in COMPARED if name in machine["hardware"]}
    if "device" in machine:
        facts["device"] = str(machine["device"]).partition(":")[0]
    if "dtype" in machine["model"]:
        facts["dtype"] = machine["model"]["dtype"]
    return {"machine": facts, "versions": dict(machine["versions"])}
