"""Offline pages with their charts and the Vega libraries inline: the report (template.html), or one chart (chart.html).

Nothing of the model or the data can run: jinja2 escapes all text, and JSON so that it cannot close its script element;
the page's Content-Security-Policy allows the libraries and this folder's scripts, by their hashes, and no network.
Unescaped markup could neither run nor fetch (tests/security/test_browser.py). Vega evaluates its expressions with an
interpreter (`ast: true`), so that the policy needs no `unsafe-eval`.
"""

import base64
import hashlib
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

import altair as alt
import jinja2
import vl_convert
from markupsafe import Markup

from rankscope.report import charts
from rankscope.report.content import Content
from rankscope.report.figures import Panel
from rankscope.text.catalogue import Catalogue, load
from rankscope.text.formats import strip_control_characters

VEGA_LITE = ".".join(alt.SCHEMA_VERSION.lstrip("v").split(".")[:2])  # altair's version, in vl_convert's form: `6.4`


def render(
    content: Content,
    text: Catalogue,
    *,
    pages: Mapping[str, str] | None = None,
    drawn: Mapping[str, str] | None = None,
    now: Mapping[str, Any] | None = None,
) -> str:
    """The page, below 3 MB. `pages` are the file names of the same page by language; `drawn` has each chart's SVG by
    its id, which the page shows until its scripts draw; with `now` (see `rankscope.ui.watch`) it fetches news from its
    server."""
    return _page(
        "template.html",
        {"charts": specifications(content), "now": now},
        _file("draw.js") + (_file("live.js") if now else ""),
        content=content,
        text=text,
        drawn={name: Markup(svg) for name, svg in (drawn or {}).items()},  # noqa: S704  # vl_convert escapes text
        pages={name: (file, load(name)("language")) for name, file in (pages or {}).items()},
        live=now is not None,
    )


def chart_page(chart: alt.LayerChart | alt.FacetChart, title: str, text: Catalogue) -> str:
    """A page with this chart alone, in its own size; text in the chart's data cannot run either."""
    return _page("chart.html", {"charts": {"chart": _bare(chart)}}, _file("draw.js"), title=title, text=text)


def _page(template: str, page_data: Mapping[str, Any], start: str, **values: Any) -> str:
    """The filled template, with the script `start` and its data, the libraries, and a policy for these two alone."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, finalize=_without_control_characters
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    libraries = _libraries()
    return environment.from_string(_file(template)).render(
        **values,
        light=Markup(charts.declarations(charts.LIGHT)),  # noqa: S704  # colours alone
        dark=Markup(charts.declarations(charts.DARK)),  # noqa: S704  # colours alone
        page_data={"theme": charts.theme(charts.PAGE), **page_data},
        libraries=Markup(libraries),  # noqa: S704  # vl_convert's own
        start=Markup(start),  # noqa: S704  # the package's own
        script_sources=f"'{_hash(libraries)}' '{_hash(start)}'",
    )


def _file(name: str) -> str:
    return (resources.files("rankscope.report") / name).read_text(encoding="utf-8")


def _without_control_characters(value: Any) -> Any:
    return strip_control_characters(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def specifications(content: Content) -> dict[str, Any]:
    """Vega-Lite specification of each chart, by its element's id."""
    return {panel.id: _specification(panel) for figure in content.figures for panel in figure.panels}


def _specification(panel: Panel) -> dict[str, Any]:
    """Numbers have six significant digits: more than a screen shows, in a third of the bytes."""
    spec = _bare(panel.chart.properties(width="container", description=panel.label))
    for rows in spec["datasets"].values():
        for row in rows:
            row |= {key: float(f"{cell:.6g}") for key, cell in row.items() if isinstance(cell, float)}
    return spec


def _bare(chart: alt.Chart | alt.LayerChart | alt.FacetChart) -> dict[str, Any]:
    """The chart without an address that is never fetched, and without a theme, which the page has."""
    spec: dict[str, Any] = chart.to_dict(validate=False)  # tests have validated what is drawn
    return {key: value for key, value in spec.items() if key not in ("$schema", "config")}


@cache
def _libraries() -> str:
    """Vega, Vega-Lite and Vega-Embed, from vl_convert's own copy. Bundling takes about two seconds."""
    bundle = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=VEGA_LITE)
    return bundle.replace("</script", "<\\/script").replace("\r", "")


def _hash(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
