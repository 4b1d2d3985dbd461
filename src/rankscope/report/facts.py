"""The facts about data and machine as label and value. Unknown keys are shown under their own name."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from rankscope.nested import flatten
from rankscope.text.catalogue import Catalogue
from rankscope.text.formats import percent, size


class Fact(NamedTuple):
    label: str
    value: str


def data_facts(facts: Mapping[str, Any], text: Catalogue) -> list[Fact]:
    """The content of data/facts.json, in its order; after labels, the tokens that are masked: read, but not learnt."""
    facts = _with_masked(facts)
    return [Fact(text.get(f"fact.{key}", key), _show(key, value, text)) for key, value in flatten(facts).items()]


def machine_facts(machine: Mapping[str, Any], text: Catalogue) -> list[Fact]:
    """The content of machine.json, in its order. Names of versions are those of the packages."""
    facts = []
    for key, value in flatten(machine).items():
        group, _, name = key.partition(".")
        label = {"hardware": name, "model": f"model_{name}"}.get(group, key if group != "versions" else "")
        shown = text.get(f"machine.{label}", name or key)
        empty_gpus = label == "gpus" and not value
        facts.append(Fact(shown, text("machine.no_gpu") if empty_gpus else _show(name or key, value, text)))
    return facts


def _with_masked(facts: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in facts.items():
        found[key] = value
        side, of_labels, _ = key.partition("_label_tokens")
        tokens = facts.get(f"{side}_tokens")
        if of_labels and isinstance(value, int) and isinstance(tokens, int) and tokens:
            found[f"{side}_masked_tokens"] = f"{tokens - value:,} ({percent(1 - value / tokens)})"
    return found


def _show(key: str, value: Any, text: Catalogue) -> str:
    if value is None:
        return text("none")
    if isinstance(value, bool):
        return text("table.yes" if value else "table.no")
    if key.endswith("_bytes") and isinstance(value, int | float):
        return size(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):  # such as a GPU: its name, and its memory in brackets
        parts = [_show(name, part, text) for name, part in value.items()]
        return f"{parts[0]} ({', '.join(parts[1:])})" if len(parts) > 1 else "".join(parts)
    if isinstance(value, list | tuple):
        return ", ".join(_show(key, part, text) for part in value)
    return str(value)
