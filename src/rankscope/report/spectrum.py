"""A spectrum for people: a table by module, and a chart by block and module."""

from pathlib import Path

import altair as alt
import pandas as pd
import vl_convert

from rankscope.errors import StudyError
from rankscope.files import write_atomic
from rankscope.lora.svd import by_module
from rankscope.report.charts import theme
from rankscope.report.html import VEGA_LITE, chart_page
from rankscope.report.visible import visible
from rankscope.report.write import PNG_SCALE
from rankscope.text.catalogue import Catalogue
from rankscope.text.formats import Table

KINDS = (".html", ".svg", ".png")


def module_table(frame: pd.DataFrame, text: Catalogue) -> Table:
    """What the layers of each module use of their rank, in the mean; `frame` is that of `rankscope.lora.svd`."""
    table = by_module(frame)
    headers = [text(f"spectrum.{name}") for name in table.columns]
    rows = [
        [str(row["module"]), str(row["layers"])] + [f"{row[name]:.4g}" for name in table.columns[2:]]
        for row in table.to_dict("records")
    ]
    return Table(text("spectrum.caption"), headers, [name != "module" for name in table.columns], rows)


def spectrum_chart(frame: pd.DataFrame, text: Catalogue) -> alt.LayerChart | alt.FacetChart:
    """A cell a layer: how many directions hold 90% of its update's energy, of its rank."""
    shown = frame.drop(columns="singular_values").assign(share=frame["rank_90"] / frame["rank"])
    for name in ("layer", "module"):
        shown[name] = shown[name].map(visible)  # SVG is XML, which has no control characters
    shown["block"] = shown["block"].astype(str).replace("-1", text("none"))  # of no block
    modules = list(dict.fromkeys(shown["module"]))
    blocks = shown["block"].nunique()
    base = alt.Chart(shown, title=text("spectrum.title")).encode(
        x=alt.X("module:N", title=text("spectrum.module"), sort=modules, axis=alt.Axis(labelAngle=-30)),
        y=alt.Y("block:O", title=text("spectrum.block"), sort=None),
        tooltip=[
            alt.Tooltip(f"{name}:{kind}", title=text(f"spectrum.{name}"))
            for name, kind in (
                ("layer", "N"),
                ("rank", "Q"),
                ("rank_90", "Q"),
                ("rank_95", "Q"),
                ("rank_99", "Q"),
                ("effective_rank", "Q"),
                ("stable_rank", "Q"),
                ("frobenius_norm", "Q"),
            )
        ],
    )
    scale = alt.Scale(scheme="viridis", domain=[0, 1])
    cells = base.mark_rect().encode(
        color=alt.Color("share:Q", scale=scale, title=text("spectrum.share"), legend=alt.Legend(format="%"))
    )
    ink = alt.condition("datum.share > 0.6", alt.value("black"), alt.value("white"))
    numbers = base.mark_text(fontSize=11).encode(text="rank_90:Q", color=ink)
    return alt.layer(cells, numbers).properties(width=max(240, 76 * len(modules)), height=max(60, 22 * blocks))


def save_chart(chart: alt.LayerChart | alt.FacetChart, file: Path, text: Catalogue) -> None:
    """Writes the chart as a page that needs no network, SVG or PNG, by the file's ending.

    Raises:
        StudyError: the ending is none of these.
        StudyDirectoryError: the file cannot be written.
    """
    if file.suffix.lower() not in KINDS:
        raise StudyError(f"--chart {file}: not a kind of chart", f"End its name with one of: {', '.join(KINDS)}.")
    if file.suffix.lower() == ".html":  # altair's own page does not escape what stands in its data
        write_atomic(file, chart_page(chart, text("spectrum.title"), text))
        return
    svg = vl_convert.vegalite_to_svg(chart.to_dict() | {"config": theme(), "background": "white"}, vl_version=VEGA_LITE)
    write_atomic(file, svg if file.suffix.lower() == ".svg" else vl_convert.svg_to_png(svg, scale=PNG_SCALE))
