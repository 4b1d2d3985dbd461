"""The figures of time: runtime and tokens a second against rank; and what loss costs in memory and in time."""

from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd

from rankscope.analysis.costs import noise_floor, on_front
from rankscope.report import charts_by_rank
from rankscope.report import frames as series
from rankscope.report.costs import noise_share
from rankscope.report.figures import Figure, Panel, absent, numbers, ranks_of, say, with_rates
from rankscope.report.frames import has_gpu
from rankscope.study.evidence import Evidence
from rankscope.text.catalogue import Catalogue
from rankscope.text.formats import Unit, duration, loss, rate, size, size_unit, time_unit


def speed_figures(evidence: Evidence, text: Catalogue) -> list[Figure]:
    """Runtime and tokens a second, each beside its noise."""
    runtimes, _ = series.measurements(evidence, "runtime_seconds")
    unit = time_unit(runtimes["value"].max(), text) if not runtimes.empty else Unit("", 1.0)
    return [
        _by_rank(evidence, text, "runtime", "runtime_seconds", unit, lambda seconds: duration(seconds, text)),
        _by_rank(evidence, text, "tokens", "tokens_per_second", Unit("", 1.0), "{:,.0f}".format),
    ]


def _by_rank(
    evidence: Evidence, text: Catalogue, key: str, column: str, unit: Unit, number: Callable[[float], str]
) -> Figure:
    name, title = {"runtime": "runtime", "tokens": "tokens-per-second"}[key], text(f"chart.{key}.title")
    frame, profiled = series.measurements(evidence, column)
    if frame.empty:
        return absent(name, title, text("chart.runtime.absent"))
    note = with_rates(text(f"chart.{key}.note" if profiled else f"chart.{key}.note_trials"), frame, text)
    noise = noise_floor(evidence.profiles, column) if profiled else None
    band = None
    if noise is not None:
        note = f"{note} {text('chart.noise_note', rank=noise.rank, floor=noise_share(noise))}"
        mean = float(frame.loc[frame["rank"] == noise.rank, "value"].mean()) / unit.factor
        band = (mean * max(0.0, 1 - noise.floor), mean * (1 + noise.floor))
    scaled = frame.assign(value=frame["value"] / unit.factor)
    dot = text("chart.repeat" if profiled else "chart.seed")
    y_title = text(f"chart.{key}.y", unit=unit.name)
    chart = charts_by_rank.cost_by_rank(scaled, text, ranks_of(evidence), y_title, dot, band)
    means = frame.groupby(["rank", "learning_rate"])["value"].agg(["mean", list]).reset_index()
    rows = [
        [str(row["rank"]), rate(row["learning_rate"]), number(row["mean"]), ", ".join(map(number, row["list"]))]
        for row in means.to_dict("records")
    ]
    rows += [[text("noise.row"), text("none"), noise_share(noise), text("none")]] if noise is not None else []
    headers = [text("table.rank"), text("table.learning_rate"), text("chart.mean"), text("chart.each")]
    return Figure(
        name,
        title,
        note,
        say(title, means, "mean", number, text),
        [Panel("", chart)],
        numbers(title, headers, rows, text),
    )


def trade_off_figures(
    evidence: Evidence, verdict: Mapping[str, Any] | None, table: pd.DataFrame, text: Catalogue
) -> list[Figure]:
    """Held-out loss against peak memory, of the GPU where there is one, and against runtime."""
    kind = "gpu" if has_gpu(evidence) else "cpu"
    peak = "gpu_allocated_peak_bytes" if kind == "gpu" else "rss_peak_bytes"
    known = series.heldout_by_candidate(evidence, table)
    memory, time = known[known[peak].notna()], known[known["runtime_seconds"].notna()]
    size_of = size_unit(memory[peak].max()) if not memory.empty else Unit("", 1.0)
    time_of = time_unit(time["runtime_seconds"].max(), text) if not time.empty else Unit("", 1.0)
    chosen, ranks = (verdict or {}).get("candidate"), ranks_of(evidence)
    peak_title = text(f"chart.trade_off.{kind}", unit=size_of.name)
    return [
        _trade_off(
            "loss-memory", memory.rename(columns={peak: "cost"}), chosen, ranks, peak_title, size_of, size, text
        ),
        _trade_off(
            "loss-runtime",
            time.rename(columns={"runtime_seconds": "cost"}),
            chosen,
            ranks,
            text("chart.runtime.y", unit=time_of.name),
            time_of,
            lambda seconds: duration(seconds, text),
            text,
        ),
    ]


def _trade_off(
    name: str,
    table: pd.DataFrame,
    chosen: str | None,
    ranks: list[int],
    cost_title: str,
    unit: Unit,
    number: Callable[[float], str],
    text: Catalogue,
) -> Figure:
    """`table` has the finished candidates whose `cost` is known."""
    title = text(f"chart.trade_off.{name}")
    if len(table) < 2:
        return absent(name, title, text("chart.trade_off.absent"))
    columns = ["rank", "learning_rate", "cost", "eval_loss", "eval_loss_low", "eval_loss_high"]
    frame = table[columns].assign(
        front=on_front(table, ["cost", "eval_loss"]),
        chosen=table["candidate"] == chosen,
        cost=table["cost"] / unit.factor,
    )
    note = text("chart.trade_off.note")
    if frame["chosen"].any():
        note = f"{note} {text('chart.trade_off.ring')}"
    chart = charts_by_rank.trade_off(frame, text, ranks, cost_title)
    rows = [
        [
            str(row["rank"]),
            rate(row["learning_rate"]),
            number(row["cost"] * unit.factor),
            loss(row["eval_loss"]),
            text("table.yes" if row["front"] else "table.no"),
        ]
        for row in frame.to_dict("records")
    ]
    headers = [text("table.rank"), text("table.learning_rate"), cost_title, text("table.eval_loss")]
    headers.append(text("chart.trade_off.on_front"))
    on = ", ".join(text("name.rank", rank=rank) for rank in sorted(set(frame.loc[frame["front"], "rank"])))
    alternative = text("chart.trade_off.says", title=title, ranks=on)
    return Figure(name, title, note, alternative, [Panel("", chart)], numbers(title, headers, rows, text))
