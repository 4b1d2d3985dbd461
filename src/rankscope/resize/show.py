"""Tables, sentences and chart of `rankscope resize` and `rankscope spectrum`."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd
import vl_convert

from rankscope.errors import StudyError
from rankscope.files import write_atomic
from rankscope.lora.saved import SavedAdapter
from rankscope.lora.svd import by_module
from rankscope.report.charts import theme
from rankscope.report.html import VEGA_LITE, chart_page
from rankscope.report.variants import pattern_table
from rankscope.report.write import PNG_SCALE
from rankscope.resize.command import Resized
from rankscope.resize.pattern import Proposal
from rankscope.resize.pattern import by_module as ranks_by_module
from rankscope.text.catalogue import Catalogue
from rankscope.text.formats import (
    Columns,
    Table,
    change,
    loss,
    percent,
    shown,
    signed,
    signed_percent,
    size,
    strip_control_characters,
    tabulate,
)


def rank_table(layers: pd.DataFrame, text: Catalogue) -> Table:
    """Rank of each module before and after; `layers` is that of `rankscope.resize.command.Resized`."""
    module, grouped = text("spectrum.module"), layers.groupby("module", sort=False)
    columns: Columns = {
        module: lambda row: str(row[0]),
        text("spectrum.layers"): lambda row: str(len(row[1])),
        text("resize.before"): lambda row: f"{row[1]['old_rank'].mean():.4g}",
        text("resize.after"): lambda row: f"{row[1]['new_rank'].mean():.4g}",
        text("resize.lowest"): lambda row: str(row[1]["new_rank"].min()),
        text("resize.highest"): lambda row: str(row[1]["new_rank"].max()),
        text("resize.error"): lambda row: percent(row[1]["relative_error"].max()),
    }
    return tabulate(text("resize.caption"), columns, grouped, [module])


def tried_table(found: Mapping[str, Any], text: Catalogue) -> Table:
    """Truncations whose held-out loss was measured, in order; `found` is `Resized.loss`."""
    columns: Columns = {
        text("resize.rule"): lambda one: text(f"resize.{one['rule']}"),
        text("resize.parameters_column"): lambda one: f"{one['parameters']:,}",
        text("resize.loss_column"): lambda one: loss(one["loss"]),
        text("resize.increase"): lambda one: signed_percent(one["increase"]),
        text("resize.within"): lambda one: text("resize.yes" if one["within"] else "resize.no"),
    }
    return tabulate(text("resize.tried"), columns, found["tried"], [text("resize.rule"), text("resize.within")])


def sentences(result: Resized, text: Catalogue) -> list[str]:
    """Sizes, kept energy and change in loss, a sentence each."""
    worst = result.layers.sort_values("relative_error").iloc[-1]
    before, after = result.parameters_before, result.parameters_after
    old, new = result.file_bytes_before, result.file_bytes_after
    lines = [
        text("resize.parameters", before=f"{before:,}", after=f"{after:,}", change=change(after, before)),
        text("resize.file", before=size(old), after=size(new), change=change(new, old)),
        text("resize.kept", kept=percent(result.kept_energy)),
        text("resize.worst", error=percent(worst["relative_error"]), layer=worst["layer"]),
    ]
    if (found := result.loss) is not None:
        values = {name: loss(found[name]) for name in ("before", "after")} | {"n": f"{found['examples']:,}"}
        values |= {"difference": signed(found["difference"]), "error": shown(found["standard_error"], loss, text)}
        values |= {"increase": signed_percent(found["increase"]), "limit": percent(found["max_increase"])}
        lines.append(text("resize.loss", **values))
    return [*lines, text("resize.written", folder=result.adapter)]


KINDS = (".html", ".svg", ".png")
_SPECTRUM_NUMBERS = ("rank", "rank_90", "rank_95", "rank_99", "effective_rank", "stable_rank", "frobenius_norm")


def module_table(frame: pd.DataFrame, text: Catalogue) -> Table:
    """Mean effective ranks of each module's layers; `frame` is that of `rankscope.lora.svd.spectrum`."""
    table = by_module(frame)
    rows = [[f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row] for row in table.to_numpy()]
    headers = [text(f"spectrum.{name}") for name in table.columns]
    return Table(text("spectrum.caption"), headers, [name != "module" for name in table.columns], rows)


def pattern_parts(found: Proposal, file: Path, text: Catalogue) -> list[Table | str]:
    """Ranks by layer that are proposed in `file`, their size, and the command that trains them."""
    sizes = {"parameters": f"{found.parameters:,}", "uniform": f"{found.uniform_parameters:,}"}
    return [
        pattern_table(ranks_by_module(found), found.rank, text),
        text("pattern.parameters", rank=found.rank, **sizes),
        text("pattern.next", command=shlex.join(["rankscope", "run", str(file)])),
    ]


def describe_pattern(found: Proposal, file: Path) -> dict[str, Any]:
    return {"study": str(file), "rank": found.rank, "parameters": found.parameters, "ranks": found.ranks}


def spectrum_notes(saved: SavedAdapter, text: Catalogue) -> list[str]:
    """What a spectrum leaves out, and keys that PEFT does not know."""
    names = ", ".join(list(saved.others)[:3]) + ", ..." * (len(saved.others) > 3)
    notes = [text("spectrum.others", n=len(saved.others), names=names)] if saved.others else []
    return [*notes, *([text("spectrum.foreign", name=saved.foreign)] if saved.foreign else [])]


def spectrum_chart(frame: pd.DataFrame, text: Catalogue) -> alt.LayerChart | alt.FacetChart:
    """One cell per layer: directions that hold 90% of its update's energy, coloured by their share of the rank. Experts
    of a layer share a cell, which has their means."""
    shown = frame.drop(columns="singular_values").assign(share=frame["rank_90"] / frame["rank"])
    how = {name: "first" if name == "layer" else "mean" for name in shown.columns if name not in ("block", "module")}
    shown = shown.groupby(["block", "module"], sort=False, as_index=False).agg(how)
    for name in ("layer", "module"):
        shown[name] = shown[name].map(strip_control_characters)  # SVG is XML, which has no control characters
    shown["block"] = shown["block"].astype(str).replace("-1", text("none"))  # -1: outside the blocks
    modules = list(dict.fromkeys(shown["module"]))
    blocks = shown["block"].nunique()
    base = alt.Chart(shown, title=text("spectrum.title")).encode(
        x=alt.X("module:N", title=text("spectrum.module"), sort=modules, axis=alt.Axis(labelAngle=-30)),
        y=alt.Y("block:O", title=text("spectrum.block"), sort=None),
        tooltip=[
            alt.Tooltip(f"{name}:{kind}", title=text(f"spectrum.{name}"))
            for name, kind in [("layer", "N"), *((number, "Q") for number in _SPECTRUM_NUMBERS)]
        ],
    )
    scale = alt.Scale(scheme="viridis", domain=[0, 1])
    cells = base.mark_rect().encode(
        color=alt.Color("share:Q", scale=scale, title=text("spectrum.share"), legend=alt.Legend(format="%"))
    )
    ink = alt.condition("datum.share > 0.6", alt.value("black"), alt.value("white"))
    numbers = base.mark_text(fontSize=11).encode(text=alt.Text("rank_90:Q", format=".3~g"), color=ink)
    return alt.layer(cells, numbers).properties(width=max(240, 76 * len(modules)), height=max(60, 22 * blocks))


def save_chart(chart: alt.LayerChart | alt.FacetChart, file: Path, text: Catalogue) -> None:
    """Write the chart as an offline page, SVG or PNG, by the file's suffix. Raises StudyError: the suffix is none of
    these; StudyDirectoryError: the file cannot be written."""
    kind = file.suffix.lower()
    if kind not in KINDS:
        raise StudyError(f"--chart {file}: not a kind of chart", f"End its name with one of: {', '.join(KINDS)}.")
    if kind == ".html":  # altair's own page does not escape its data
        write_atomic(file, chart_page(chart, text("spectrum.title"), text))
        return
    svg = vl_convert.vegalite_to_svg(chart.to_dict() | {"config": theme(), "background": "white"}, vl_version=VEGA_LITE)
    write_atomic(file, svg if kind == ".svg" else vl_convert.svg_to_png(svg, scale=PNG_SCALE))
