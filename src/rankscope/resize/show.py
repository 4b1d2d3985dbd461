"""Tables, sentences and chart of `rankscope resize` and `rankscope spectrum`."""

from pathlib import Path

import altair as alt
import pandas as pd
import vl_convert

from rankscope.errors import StudyError
from rankscope.files import write_atomic
from rankscope.lora.svd import by_module
from rankscope.report.charts import theme
from rankscope.report.html import VEGA_LITE, chart_page
from rankscope.report.write import PNG_SCALE
from rankscope.resize.command import LossChange, Resized
from rankscope.text import formats
from rankscope.text.catalogue import Catalogue
from rankscope.text.formats import Columns, Table, change, loss, percent, signed, signed_percent, size, tabulate


def rank_table(layers: pd.DataFrame, text: Catalogue) -> Table:
    """Rank of each module before and after; `layers` is that of `rankscope.resize.command.Resized`."""
    module = text("spectrum.module")
    columns: Columns = {
        module: lambda row: str(row[0]),
        text("spectrum.layers"): lambda row: str(len(row[1])),
        text("resize.before"): lambda row: f"{row[1]['old_rank'].mean():.4g}",
        text("resize.after"): lambda row: f"{row[1]['new_rank'].mean():.4g}",
        text("resize.lowest"): lambda row: str(row[1]["new_rank"].min()),
        text("resize.highest"): lambda row: str(row[1]["new_rank"].max()),
        text("resize.error"): lambda row: percent(row[1]["relative_error"].max()),
    }
    return tabulate(text("resize.caption"), columns, layers.groupby("module", sort=False), [module])


def tried_table(found: LossChange, text: Catalogue) -> Table:
    """Truncations whose held-out loss was measured, in order."""
    columns: Columns = {
        "rule": lambda one: text(f"resize.{one.rule}"),
        "parameters_column": lambda one: f"{one.parameters:,}",
        "loss_column": lambda one: loss(one.losses.mean),
        "increase": lambda one: signed_percent(one.increase),
        "within": lambda one: text("resize.yes" if one.increase <= found.limit else "resize.no"),
    }
    headed = {text(f"resize.{name}"): cell for name, cell in columns.items()}
    return tabulate(text("resize.tried"), headed, found.tried, [text("resize.rule"), text("resize.within")])


def sentences(result: Resized, text: Catalogue) -> list[str]:
    """Sizes, kept energy and change in loss, a sentence each."""
    worst = max(result.layers.to_dict("records"), key=lambda row: float(row["relative_error"]))
    (before, after), (old_bytes, new_bytes) = result.parameters, result.file_bytes
    lines = [
        text("resize.parameters", before=f"{before:,}", after=f"{after:,}", change=change(after, before)),
        text("resize.file", before=size(old_bytes), after=size(new_bytes), change=change(new_bytes, old_bytes)),
        text("resize.kept", kept=percent(result.kept_energy)),
        text("resize.worst", error=percent(worst["relative_error"]), layer=worst["layer"]),
    ]
    if (found := result.loss) is not None:
        error = found.difference.standard_error
        values = {
            "before": loss(found.before.mean),
            "after": loss(found.after.mean),
            "n": f"{len(found.before.loss):,}",
        }
        values |= {"difference": signed(found.difference.mean), "error": "–" if error is None else f"{error:.4f}"}
        values |= {"increase": signed_percent(found.increase), "limit": percent(found.limit)}
        lines.append(text("resize.loss", **values))
    return [*lines, text("resize.written", folder=result.folder)]


KINDS = (".html", ".svg", ".png")
_SPECTRUM_NUMBERS = ("rank", "rank_90", "rank_95", "rank_99", "effective_rank", "stable_rank", "frobenius_norm")


def module_table(frame: pd.DataFrame, text: Catalogue) -> Table:
    """Mean effective ranks of each module's layers; `frame` is that of `rankscope.lora.svd.spectrum`."""
    table, columns = by_module(frame), Columns()
    for name in table.columns:
        form = str if name in ("module", "layers") else "{:.4g}".format
        columns[text(f"spectrum.{name}")] = lambda row, name=name, form=form: form(row[name])  # type: ignore[misc]
    return tabulate(text("spectrum.caption"), columns, table.to_dict("records"), [text("spectrum.module")])


def spectrum_chart(frame: pd.DataFrame, text: Catalogue) -> alt.LayerChart | alt.FacetChart:
    """One cell per layer: directions that hold 90% of its update's energy, coloured by their share of the rank. Experts
    of a layer share a cell, which has their means."""
    shown = frame.drop(columns="singular_values").assign(share=frame["rank_90"] / frame["rank"])
    how = {name: "first" if name == "layer" else "mean" for name in shown.columns if name not in ("block", "module")}
    shown = shown.groupby(["block", "module"], sort=False, as_index=False).agg(how)
    for name in ("layer", "module"):
        shown[name] = shown[name].map(formats.strip_control_characters)  # SVG is XML, which has no control characters
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
