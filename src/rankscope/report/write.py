"""Writes the report's files, each whole or absent."""

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import altair as alt
import pandas as pd
import vl_convert

from rankscope.files import write_atomic
from rankscope.report import charts, html, markdown
from rankscope.report.content import compose
from rankscope.report.figures import Figure
from rankscope.study.evidence import Evidence
from rankscope.text.catalogue import Catalogue, load

PNG_SCALE = 2.0
"""Pixels for each point of the drawing: sharp in print and on dense screens."""


class Image(NamedTuple):
    svg: str
    png: bytes


def write_report(
    evidence: Evidence,
    verdict: Mapping[str, Any] | None,
    folder: Path,
    language: str,
    *,
    study_name: str,
    reproduce: str,
) -> Path:
    """See `rankscope.report.build`."""
    text = load(language)
    content = compose(evidence, verdict, text, study_name, reproduce)
    # Figures go into other documents: where no font here has a language's letters, English beats boxes.
    drawn = content if can_draw(text) else compose(evidence, verdict, load("en"), study_name, reproduce)
    for figure in drawn.figures:
        file = folder / "figures" / figure.name
        if figure.panels:
            image = render_image(figure)
            write_atomic(file.with_suffix(".svg"), image.svg)
            write_atomic(file.with_suffix(".png"), image.png)
        else:  # an earlier report may have had it
            file.with_suffix(".svg").unlink(missing_ok=True)
            file.with_suffix(".png").unlink(missing_ok=True)
    table = pd.concat([part.results for part in evidence.parts], ignore_index=True)
    write_atomic(folder / "results.csv", table.to_csv(index=False))
    parquet = BytesIO()
    table.to_parquet(parquet, index=False)
    write_atomic(folder / "results.parquet", parquet.getvalue())
    write_atomic(folder / "report.md", markdown.render(content, text))
    page = folder / "index.html"
    write_atomic(page, html.render(content, text))
    return page


def render_image(figure: Figure) -> Image:
    """The figure on white, with its title; panels stand under one another."""
    panels = [panel.chart.properties(title=panel.title) if panel.title else panel.chart for panel in figure.panels]
    chart = alt.vconcat(*panels) if len(panels) > 1 else panels[0]
    spec = chart.properties(title=figure.title).to_dict(validate=False) | {
        "config": charts.theme(),
        "background": "white",
    }
    spec["padding"] = 16
    svg = vl_convert.vegalite_to_svg(spec, vl_version=html.VEGA_LITE)
    return Image(svg, vl_convert.svg_to_png(svg, scale=PNG_SCALE))


def can_draw(text: Catalogue) -> bool:
    """Whether a font on this machine has the language's letters: two letters that it lacks look the same."""
    letters = [letter for letter in text("language") if not letter.isascii()][:2]
    if len(letters) < 2:
        return True
    return len({vl_convert.svg_to_png(_letter_svg(letter)) for letter in letters}) == 2


def _letter_svg(letter: str) -> str:
    text = f'<text y="30" font-family="sans-serif">{letter}</text>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" width="40" height="40">{text}</svg>'
