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
    `pdf` asks for it, report.pdf into `folder`, also on partial evidence and without a verdict, and remove what an
    earlier report had beside them. `directory` is the study's, as the commands in the report name it. Returns the path
    of index.html. Raises StudyError: the language has no catalogue, or nothing here prints."""
    text = load(language)
    pages = {language: "index.html"} | {name: f"index.{name}.html" for name in other_languages(language)}
    contents = {name: compose(evidence, verdict, load(name), directory) for name in pages}
    # Figures go into other documents: where no font here has a language's letters, English beats boxes.
    drawn = contents[language if can_draw(text) else "en"]
    files: dict[str, str | bytes] = {
        f"figures/{figure.name}.{kind}": image
        for figure in drawn.figures
        for kind, image in render_image(figure).items()
    }
    table = pd.concat(map(scored_results, evidence.parts), ignore_index=True)
    parquet = BytesIO()
    table.to_parquet(parquet, index=False)
    files |= {"results.csv": table.to_csv(index=False), "results.parquet": parquet.getvalue()}
    files["report.md"] = markdown.render(contents[language], text)
    for name, own in contents.items():
        files[pages[name]] = html.render(own, load(name), pages=pages, drawn=draw_charts(own))
    for name, written in files.items():
        write_atomic(folder / name, written)
    earlier = {folder / f"index.{language}.html", folder / "report.pdf"}
    earlier |= {*folder.glob("figures/*.svg"), *folder.glob("figures/*.png")}
    for file in earlier - {folder / name for name in files}:
        file.unlink(missing_ok=True)
    if pdf:
        write_atomic(folder / "report.pdf", print_pdf(folder / "index.html"))
    return folder / "index.html"


def other_languages(language: str) -> list[str]:
    return [name for name in LANGUAGES if name != language]


def render_image(figure: Figure) -> dict[str, str | bytes]:
    """The figure on white by kind (svg and png), with its title and its charts one below the other."""
    panels = [
        chart.properties(width=figure.width, **({"title": title} if title else {}))
        for title, chart in figure.charts.items()
    ]
    chart = alt.vconcat(*panels) if len(panels) > 1 else panels[0]
    svg = _svg(chart.properties(title=figure.title), charts.LIGHT, background="white", padding=16)
    return {"svg": svg, "png": vl_convert.svg_to_png(svg, scale=PNG_SCALE)}


def draw_charts(content: Content) -> dict[str, str]:
    """Each chart of the page as SVG, by its element's id: what is seen where no script runs, as in mail. Its colours
    are the page's, and its names of clipping paths its own."""
    found = {}
    for figure in content.figures:
        for panel in figure.panels:
            svg = _svg(panel.chart.properties(width=figure.width), charts.PAGE)
            svg = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), svg)
            svg = re.sub(r'(id="|url\(#)', rf"\g<1>{panel.id}-", svg)
            found[panel.id] = svg.replace("<svg ", '<svg aria-hidden="true" ', 1)
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
