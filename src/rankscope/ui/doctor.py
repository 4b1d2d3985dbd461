"""Facts of the system for `rankscope doctor`: versions, devices, optional packages."""

import shutil
import sys
from typing import Any

from rankscope.errors import install_command
from rankscope.measure.machine import hardware, installed, versions
from rankscope.text.formats import size
from rankscope.track import TRACKERS
from rankscope.ui.console import out_console

EXTRAS = {name: name for name in TRACKERS} | {"search": "optuna", "ray": "ray", "quantization": "bitsandbytes"}
"""Packages of the optional parts, by the name of the extra."""


def describe_system() -> dict[str, Any]:
    """Everything that `rankscope doctor --json` prints."""
    optional = {extra: installed(package) for extra, package in EXTRAS.items()}
    return {"versions": versions(), "hardware": hardware(), "optional": optional}


def show_system() -> None:
    found = describe_system()
    facts, free = found["hardware"], shutil.disk_usage(".").free
    gpus = [f"{gpu['name']}, {size(gpu['memory_bytes'])}" for gpu in facts["gpus"]]
    lines = [(name, version or "not installed") for name, version in found["versions"].items()]
    lines += [("cpu", f"{facts['cpu']}, {facts['cores']} cores, {size(facts['memory_bytes'])}")]
    lines += [("gpu", gpu) for gpu in gpus or ["none that torch can use: studies run on the CPU"]]
    advice = " (on a CPU jemalloc takes less memory and time; optional: `apt install libjemalloc2`)"
    lines += [("allocator", facts["allocator"] + advice * (sys.platform == "linux" and facts["allocator"] == "system"))]
    for extra, version in found["optional"].items():
        lines += [(extra, version or f"not installed (optional: `{install_command(extra)}`)")]
    for name, text in [*lines, ("disk", f"{size(free)} free here")]:
        out_console.print(f"{name:<14} {text}")
