"""Offline pages with their charts and the Vega libraries inline: the report (template.html), or one chart (chart.html).

Nothing of the model or the data can run: jinja2 escapes all text, the charts' JSON cannot close its script element, and
the page's Content-Security-Policy allows the libraries and this folder's scripts, by their hashes, and no network.
Unescaped markup could neither run nor fetch (tests/security/test_browser.py). Vega evaluates its expressions with an
interpreter (`ast: true`), so that the policy needs no `unsafe-eval`.
"""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from types import MappingProxyType
from typing import Any

import altair as alt
import jinja2
import vl_convert
from markupsafe import Markup

from rankscope.report import charts
from rankscope.report.charts import DARK, LIGHT, PAGE, declarations
from rankscope.report.content import Content
from rankscope.report.figures import Figure, Panel
from rankscope.text.catalogue import Catalogue, load
from rankscope.text.formats import strip_control_characters

VEGA_LITE = ".".join(alt.SCHEMA_VERSION.lstrip("v").split(".")[:2])  # altair's version, in vl_convert's form: `6.4`


def render(
    content: Content,
    text: Catalogue,
    *,
    pages: Mapping[str, str] = MappingProxyType({}),
    drawn: Mapping[str, str] = MappingProxyType({}),
    now: Mapping[str, Any] | None = None,
) -> str:
    """The page, below 3 MB. `pages` are the file names of the same page by language; `drawn` has each chart's SVG by
    its id, which the page shows until its scripts draw; with `now` (see `rankscope.ui.watch`) it fetches news from its
    server."""
    return _page(
        "template.html",
        {"charts": specifications(content), "now": now},
        ["draw.js", "live.js"] if now else ["draw.js"],
        content=content,
        text=text,
        chart_id=chart_id,
        panel_label=panel_label,
        drawn={name: Markup(svg) for name, svg in drawn.items()},  # noqa: S704  # vl_convert escapes text
        pages={name: (file, load(name)("language")) for name, file in pages.items()},
        detail_names=["answers", *(section.name for section in content.details), "reproduce"],
        live=now is not None,
    )


def chart_page(chart: alt.LayerChart | alt.FacetChart, title: str, text: Catalogue) -> str:
    """A page with this chart alone, in its own size; text in the chart's data cannot run either."""
    spec = chart.to_dict(validate=False)  # tests have validated what is drawn
    del spec["$schema"], spec["config"]
    return _page("chart.html", {"charts": {"chart": spec}}, ["draw.js"], title=title, text=text)


def _page(template: str, page_data: Mapping[str, Any], scripts: Sequence[str], **values: Any) -> str:
    """The filled template, with the scripts and their data, the libraries, and a policy for these two alone."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, finalize=_without_control_characters
    )
    libraries, start = _libraries(), "".join(map(_file, scripts))
    return environment.from_string(_file(template)).render(
        **values,
        light=Markup(declarations(LIGHT)),  # noqa: S704  # colours alone
        dark=Markup(declarations(DARK)),  # noqa: S704  # colours alone
        page_data=Markup(json_in_html({"theme": charts.theme(PAGE), **page_data})),  # noqa: S704  # cannot end its script element
        libraries=Markup(libraries),  # noqa: S704  # vl_convert's own
        start=Markup(start),  # noqa: S704  # the package's own
        script_sources=f"'{_hash(libraries)}' '{_hash(start)}'",
    )


def _file(name: str) -> str:
    return (resources.files("rankscope.report") / name).read_text(encoding="utf-8")


def _without_control_characters(value: Any) -> Any:
    return strip_control_characters(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def panel_label(figure: Figure, panel: Panel) -> str:
    """Text that a screen reader reads for a chart. Vega sets the chart's description on its element."""
    return f"{panel.title}. {figure.alternative}" if panel.title else figure.alternative


def specifications(content: Content) -> dict[str, Any]:
    """Vega-Lite specification of each chart, by its element's id."""
    return {
        chart_id(figure, number): _specification(panel.chart, panel_label(figure, panel))
        for figure in content.figures
        for number, panel in enumerate(figure.panels)
    }


def chart_id(figure: Figure, number: int) -> str:
    return f"chart-{figure.name}-{number}"


def json_in_html(value: Any) -> str:
    """JSON that cannot end its script element: `<`, `>` and `&` become escapes, which JSON allows in strings. Nothing
    but a string of JSON contains them. U+2028 and U+2029 are escaped by `ensure_ascii`."""
    content = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return content.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _specification(chart: alt.Chart, alternative: str) -> dict[str, Any]:
    spec: dict[str, Any] = chart.properties(width="container", description=alternative).to_dict(validate=False)
    del spec["$schema"], spec["config"]  # an address that is never fetched, and a theme that the page replaces
    spec["datasets"] = {
        name: [{key: _short(cell) for key, cell in row.items()} for row in rows]
        for name, rows in spec["datasets"].items()
    }
    return spec


def _short(value: Any) -> Any:
    """The value to six significant digits: more than a screen shows, in a third of the bytes."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


@cache
def _libraries() -> str:
    """Vega, Vega-Lite and Vega-Embed, from vl_convert's own copy. Bundling takes about two seconds."""
    bundle = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=VEGA_LITE)
    return bundle.replace("</script", "<\\/script").replace("\r", "")


def _hash(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
