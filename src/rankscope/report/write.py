"""Write the report's files, each whole or absent."""

from io import BytesIO
from pathlib import Path

import altair as alt
import pandas as pd
import vl_convert

from rankscope.files import write_atomic
from rankscope.report import charts, html, markdown
from rankscope.report.content import compose
from rankscope.report.figures import Figure
from rankscope.study.evidence import Evidence
from rankscope.text.catalogue import Catalogue, load
from rankscope.text.verdict import Verdict

PNG_SCALE = 2.0  # pixels per point of the drawing: sharp in print and on dense screens


def build(evidence: Evidence, verdict: Verdict, folder: Path, language: str = "en", directory: str = "") -> Path:
    """Write index.html, report.md, results.csv, results.parquet and figures/ into `folder`, also on partial evidence.
    `verdict` is the content of verdict.json, or None before there is one; `directory` is the study's, as the commands
    in the report name it. Returns the path of index.html. Raises StudyError: the language has no catalogue."""
    text = load(language)
    content = compose(evidence, verdict, text, directory)
    # Figures go into other documents: where no font here has a language's letters, English beats boxes.
    drawn = content if can_draw(text) else compose(evidence, verdict, load("en"), directory)
    figures = folder / "figures"
    for figure in drawn.figures:
        for kind, image in render_image(figure).items():
            write_atomic(figures / f"{figure.name}.{kind}", image)
    for missing in drawn.missing:  # an earlier report may have had it
        for kind in ("svg", "png"):
            (figures / f"{missing.name}.{kind}").unlink(missing_ok=True)
    table = pd.concat([part.results for part in evidence.parts], ignore_index=True)
    parquet = BytesIO()
    table.to_parquet(parquet, index=False)
    write_atomic(folder / "results.csv", table.to_csv(index=False))
    write_atomic(folder / "results.parquet", parquet.getvalue())
    write_atomic(folder / "report.md", markdown.render(content, text))
    write_atomic(folder / "index.html", html.render(content, text))
    return folder / "index.html"


def render_image(figure: Figure) -> dict[str, str | bytes]:
    """The figure on white by kind (svg and png), with its title and its panels one below the other."""
    panels = [panel.chart.properties(title=panel.title) if panel.title else panel.chart for panel in figure.panels]
    chart = alt.vconcat(*panels) if len(panels) > 1 else panels[0]
    spec = chart.properties(title=figure.title).to_dict(validate=False)
    spec |= {"config": charts.theme(), "background": "white", "padding": 16}
    svg = vl_convert.vegalite_to_svg(spec, vl_version=html.VEGA_LITE)
    return {"svg": svg, "png": vl_convert.svg_to_png(svg, scale=PNG_SCALE)}


def can_draw(text: Catalogue) -> bool:
    """Whether a font on this machine has the language's letters: two letters without a glyph look the same."""
    letters = [letter for letter in text("language") if not letter.isascii()][:2]
    return len(letters) < 2 or len({vl_convert.svg_to_png(_letter_svg(letter)) for letter in letters}) == 2


def _letter_svg(letter: str) -> str:
    text = f'<text y="30" font-family="sans-serif">{letter}</text>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" width="40" height="40">{text}</svg>'
