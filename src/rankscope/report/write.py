"""Write the report's files, each whole or absent."""

import re
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd
import vl_convert

from rankscope.files import write_atomic
from rankscope.report import charts, html, markdown
from rankscope.report.content import Content, compose
from rankscope.report.figures import Figure
from rankscope.report.frames import scored_results
from rankscope.report.pdf import print_pdf
from rankscope.study.evidence import Evidence
from rankscope.text.catalogue import LANGUAGES, Catalogue, load
from rankscope.text.verdict import Verdict

PNG_SCALE = 2.0  # pixels per point of the drawing: sharp in print and on dense screens


def build(
    evidence: Evidence, verdict: Verdict, folder: Path, language: str = "en", directory: str = "", pdf: bool = False
) -> Path:
    """Write index.html, its pages in the other languages, report.md, results.csv, results.parquet, figures/ and, where
    `pdf` asks for it, report.pdf into `folder`, also on partial evidence. `verdict` is the content of verdict.json, or
    None before there is one; `directory` is the study's, as the commands in the report name it. Returns the path of
    index.html. Raises StudyError: the language has no catalogue, or nothing here prints."""
    text = load(language)
    pages = {language: "index.html"} | {name: f"index.{name}.html" for name in other_languages(language)}
    contents = {name: compose(evidence, verdict, load(name), directory) for name in pages}
    content = contents[language]
    # Figures go into other documents: where no font here has a language's letters, English beats boxes.
    drawn = contents[language if can_draw(text) else "en"]
    figures = folder / "figures"
    for figure in drawn.figures:
        for kind, image in render_image(figure).items():
            write_atomic(figures / f"{figure.name}.{kind}", image)
    for missing in drawn.missing:  # an earlier report may have had it
        for kind in ("svg", "png"):
            (figures / f"{missing.name}.{kind}").unlink(missing_ok=True)
    table = pd.concat(map(scored_results, evidence.parts), ignore_index=True)
    parquet = BytesIO()
    table.to_parquet(parquet, index=False)
    write_atomic(folder / "results.csv", table.to_csv(index=False))
    write_atomic(folder / "results.parquet", parquet.getvalue())
    write_atomic(folder / "report.md", markdown.render(content, text))
    for name, own in contents.items():
        write_atomic(folder / pages[name], html.render(own, load(name), pages=pages, drawn=draw_charts(own)))
    for old in (f"index.{language}.html", "report.pdf"):  # of an earlier report
        (folder / old).unlink(missing_ok=True)
    if pdf:
        write_atomic(folder / "report.pdf", print_pdf(folder / "index.html"))
    return folder / "index.html"


def other_languages(language: str) -> list[str]:
    return [name for name in LANGUAGES if name != language]


def render_image(figure: Figure) -> dict[str, str | bytes]:
    """The figure on white by kind (svg and png), with its title and its panels one below the other."""
    sized = {"width": figure.width}
    panels = [
        panel.chart.properties(**sized | ({"title": panel.title} if panel.title else {})) for panel in figure.panels
    ]
    chart = alt.vconcat(*panels) if len(panels) > 1 else panels[0]
    svg = _svg(chart.properties(title=figure.title), charts.LIGHT, background="white", padding=16)
    return {"svg": svg, "png": vl_convert.svg_to_png(svg, scale=PNG_SCALE)}


def draw_charts(content: Content) -> dict[str, str]:
    """Each chart of the page as SVG, by its element's id: what is seen where no script runs, as in mail. Its colours
    are the page's, and its names of clipping paths its own."""
    found = {}
    for figure in content.figures:
        for number, panel in enumerate(figure.panels):
            name = html.chart_id(figure, number)
            svg = _svg(panel.chart.properties(width=figure.width), charts.PAGE)
            svg = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), svg)
            svg = re.sub(r'(id="|url\(#)', rf"\g<1>{name}-", svg)
            found[name] = svg.replace("<svg ", '<svg aria-hidden="true" ', 1)
    return found


def _svg(chart: alt.Chart | alt.VConcatChart, colours: Mapping[str, str], **more: Any) -> str:
    spec = chart.to_dict(validate=False) | {"config": charts.theme(colours)} | more
    return vl_convert.vegalite_to_svg(spec, vl_version=html.VEGA_LITE)


def can_draw(text: Catalogue) -> bool:
    """Whether a font on this machine has the language's letters: two letters without a glyph look the same."""
    letters = [letter for letter in text("language") if not letter.isascii()][:2]
    return len(letters) < 2 or len({vl_convert.svg_to_png(_letter_svg(letter)) for letter in letters}) == 2


def _letter_svg(letter: str) -> str:
    text = f'<text y="30" font-family="sans-serif">{letter}</text>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" width="40" height="40">{text}</svg>'
