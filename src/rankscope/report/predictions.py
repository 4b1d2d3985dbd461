"""The prediction beside the measurement: peak memory by part, and the time of a step."""

import math

import pandas as pd

from rankscope.report.tables import has_gpu
from rankscope.study.folder import Evidence
from rankscope.text.catalogue import Catalogue
from rankscope.text.formats import Table, change, known, rate, size


def prediction_tables(evidence: Evidence, text: Catalogue) -> list[Table]:
    """One row a candidate; empty where no memory was predicted."""
    predicted = evidence.prediction.get("candidates", {})
    peak = "gpu_allocated_peak_bytes" if has_gpu(evidence) else "rss_peak_bytes"
    rows = []
    for candidate in evidence.spec.candidates():
        found = predicted.get(candidate.name)
        if not found or not found["parts"]:
            continue
        parts, total, seconds = found["parts"], found["peak_bytes"], found["step_seconds"]
        measured = _measured(evidence.profiles, candidate.name, peak, "max")
        measured_seconds = _measured(evidence.profiles, candidate.name, "step_seconds_median", "median")
        adapter = parts["adapter"] + parts["gradients"] + parts["optimizer"]
        rows.append(
            [
                str(candidate.rank),
                rate(candidate.learning_rate),
                *map(size, (parts["base"], adapter, parts["activations"], parts["logits"])),
                size(parts["process"] + parts["retained"]),
                size(total),
                size(measured) if known(measured) else text("none"),
                change(total, measured) if known(measured) else text("none"),
                f"{seconds:.3g}" if seconds is not None else text("none"),
                f"{measured_seconds:.3g}" if known(measured_seconds) else text("none"),
            ]
        )
    names = ["base", "adapter", "activations", "logits", "other", "predicted", "measured", "difference"]
    names += ["seconds_predicted", "seconds_measured"]
    headers = [text("table.rank"), text("table.learning_rate"), *(text(f"prediction.{name}") for name in names)]
    return [Table(text("prediction.title"), headers, [True] * len(headers), rows)] if rows else []


def _measured(profiles: pd.DataFrame, candidate: str, column: str, how: str) -> float:
    """Of the candidate's own repeats, not the control's; NaN where it was not profiled."""
    if profiles.empty or column not in profiles:
        return math.nan
    own = (profiles["candidate"] == candidate) & ~profiles["control"]
    return float(profiles.loc[own, column].astype("float64").agg(how))
