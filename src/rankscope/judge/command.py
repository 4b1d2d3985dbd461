"""`rankscope judge`: what runs of other tools can say about rank, and the study that would settle it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import yaml

from rankscope.errors import StudyError
from rankscope.files import no_such, write_atomic
from rankscope.judge.confounders import SETTINGS, Finding, confounders, limits, normalised
from rankscope.judge.differences import differences
from rankscope.judge.readers import RSLORA, Skipped, read_runs
from rankscope.spec.resolve import YamlDumper, resolve_spec
from rankscope.text.catalogue import Catalogue, load

YOUR_ROWS, YOUR_BASE = "your-rows.jsonl", "your-base-model"  # in a proposed study, where the runs name none


class Judged(NamedTuple):
    runs: pd.DataFrame
    skipped: list[Skipped]
    confounders: list[Finding]
    limits: list[Finding]
    differences: list[dict[str, Any]]
    study: dict[str, Any]  # fields of a study.yaml


def judge(paths: Sequence[Path], out: Path | None = None, language: str = "en") -> Judged:
    """Judge runs, in words of `language`, and write a study to `out`. Raises StudyError: no such path, `out` is there;
    DataError: no run."""
    if missing := [path for path in paths if not path.exists()]:
        raise StudyError(no_such(missing[0]), "Give what a training run has written.")
    if out is not None and out.exists():
        raise StudyError(f"{out} exists", "Choose another --out, or remove it.")
    text, (runs, skipped) = load(language), read_runs(paths)
    runs = normalised(runs)
    shown = differences(runs)
    found = Judged(runs, skipped, confounders(runs, text), limits(runs, text), shown, propose(runs, shown))
    if out is not None:
        write_atomic(out, study_text(found, text))
    return found


def describe(found: Judged) -> dict[str, Any]:
    """`Judged` as one JSON object; null for what is not recorded or not finite."""
    rows = json.loads(found.runs.to_json(orient="records", double_precision=15))
    findings = {name: [one._asdict() for one in getattr(found, name)] for name in ("skipped", "confounders", "limits")}
    return {"runs": rows, **findings, "differences": found.differences, "study": found.study}


def propose(runs: pd.DataFrame, shown: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Fields of a study that crosses what the runs confound: every rank with the rates and alphas that were tried, at
    least three seeds, the same rows and steps for all."""
    tried: dict[str, list[Any]] = {name: sorted(set(runs[name].dropna())) for name in (*SETTINGS, "alpha", "scaling")}
    agreed = {name: values[0] for name, values in tried.items() if len(values) == 1}
    rslora, data = runs["variant"].str.contains(RSLORA, regex=False), agreed.get("data", YOUR_ROWS)
    alphas = [f"{agreed['scaling']:g}r"] if "scaling" in agreed and not rslora.any() else tried["alpha"][:4]
    if len(alphas) == 1 and len(tried["scaling"]) > 1 and not rslora.any():  # one alpha: its factor falls with rank
        alphas = [*alphas, f"{tried['scaling'][-1]:g}r"]
    modules = agreed.get("target_modules", "all-linear").split(", ")
    training = {"steps": int(tried["steps"][-1])} if tried["steps"] else {"epochs": 1}
    factor = {"use_rslora": True} if rslora.all() else {}
    values: dict[str, Any] = {
        "name": "judged", "model": {"id": agreed.get("base_model", YOUR_BASE)},
        "data": {"id": YOUR_ROWS if {"@", ","} & set(data) else data},
        "ranks": sorted(int(rank) for rank in runs["rank"].unique()),
        "seeds": list(range(max([3, *(len(one["seeds"]) + (one["more_seeds"] or 0) for one in shown)]))),
        "learning_rates": tried["learning_rate"][-4:] or [2e-4],
        "adapter": {"alpha": alphas or [32.0], "target_modules": modules} | factor,
        "training": training | ({"batch_size": int(agreed["batch_size"])} if "batch_size" in agreed else {}),
    }  # fmt: skip
    try:
        resolve_spec(values)
    except StudyError:  # values of a file that no study takes: a pattern in the place of names, a rate of 0
        values |= {"learning_rates": [2e-4], "adapter": {"target_modules": ["all-linear"]}, "training": {"epochs": 1}}
    return values


def study_text(found: Judged, text: Catalogue) -> str:
    """The study.yaml, with comments on what is still to be filled in."""
    unnamed = [name for name in ("model", "data") if found.study[name]["id"] in (YOUR_BASE, YOUR_ROWS)]
    lines = [text("judge.unnamed", field=f"{name}.id") for name in unnamed]
    lines += [text("judge.below_peak", field="learning_rates")] * bool(found.runs["rate_logged"].any())
    kept = {"LoRA"} | ({RSLORA} if found.study["adapter"].get("use_rslora") else set())
    left_out = {part for variant in found.runs["variant"] for part in variant.split(" + ")} - kept
    lines += [text("judge.not_in_study", part=repr(part)) for part in sorted(left_out)]
    how: dict[str, Any] = {"sort_keys": False, "allow_unicode": True, "default_flow_style": None}
    return "".join([*(f"# {line}\n" for line in lines), yaml.dump(found.study, Dumper=YamlDumper, **how)])
