"""Generated parts of the site, rebuilt by each build so that they cannot drift:

- the tour, a page made of `tour.ipynb` with the outputs that stand in it;
- the commands and their options, in `reference/command-line.md`, from the command line's own help;
- the fields of a study, in `reference/study-file.md`, from the schema that editors read;
- the fields that grow or change freely, in `guides/grow-a-study.md`, from the rules themselves;
- a page for each file elsewhere in the repository that a page links to, so that such links work here as they do there.
"""

import base64
import html
import json
import os
import posixpath
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

from rankscope.spec.schema import study_schema
from rankscope.study.growth import RULES

DOCS = Path(__file__).parent
ROOT = DOCS.parent

COMMANDS, FIELDS, GROWTH = "<!-- commands -->", "<!-- fields -->", "<!-- growth -->"
"""Placeholders for the commands, the fields, and the rules of growth."""

_LINK = re.compile(r"(?<=\]\()(?!\w+:|[/#])([^)\s#]+)")
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_PANDAS = re.compile(r'<style scoped>.*?</style>|( border="\d")? class="dataframe"', re.DOTALL)
"""Styles of pandas tables, which the site replaces by its own."""
_FENCED = re.compile(r"^(`{3,}|~{3,}).*?^\1`*\s*?$", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the tour, and a page for each file elsewhere in the repository that a page links to."""
    files.append(File.generated(config, "tour.md", content=notebook_page(DOCS / "tour.ipynb")))
    waiting = [(f"docs/{file.src_uri}", file.content_string) for file in files.documentation_pages()]
    while waiting:
        for target in _links(*waiting.pop()):
            uri = _site_uri(target)
            if uri.startswith("repository/") and files.get_file_from_path(uri) is None:
                text = repository_page(target)
                files.append(File.generated(config, uri, content=text, inclusion=InclusionLevel.NOT_IN_NAV))
                waiting.append((target, text))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Turn links within the repository into links within the site, and fill the placeholders."""
    here = page.file.src_uri
    elsewhere = here.startswith("repository/")
    folder = posixpath.dirname(here.removeprefix("repository/") if elsewhere else f"docs/{here}")

    def on_site(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, match[1]))
        known = (ROOT / target).exists() and not target.startswith("..")
        return posixpath.relpath(_site_uri(target), posixpath.dirname(here) or ".") if known else match[1]

    text = _LINK.sub(on_site, markdown)
    for place, made in ((COMMANDS, commands), (FIELDS, fields), (GROWTH, growth)):
        text = text.replace(place, made()) if place in text else text
    return text


def _links(source: str, text: str) -> list[str]:
    """Return the repository files that a text links to; `source` is its own path in the repository."""
    folder = posixpath.dirname(source)
    targets = [posixpath.normpath(posixpath.join(folder, link)) for link in _LINK.findall(_FENCED.sub("", text))]
    return [target for target in targets if not target.startswith("..") and (ROOT / target).exists()]


def _site_uri(target: str) -> str:
    """Return the path on the site of a file of the repository."""
    if target == "docs/tour.ipynb":
        return "tour.md"
    if target.startswith("docs/"):
        return target.removeprefix("docs/")
    return f"repository/{target}" if target.endswith(".md") else f"repository/{target}.md"


def repository_page(target: str) -> str:
    """Return a page with a file's text, or with the names in a folder. Markdown is returned unchanged."""
    path = ROOT / target
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8")
    if path.is_dir():
        inside = sorted(str(file.relative_to(path)) for file in path.rglob("*") if "__pycache__" not in file.parts)
        return f"# `{target}/`\n\n```text\n" + "\n".join(inside) + "\n```\n"
    language = path.suffix.removeprefix(".") or "text"
    return f"# `{target}`\n\n``````{language}\n{path.read_text(encoding='utf-8').rstrip()}\n``````\n"


@cache
def commands() -> str:
    """Return the commands in Markdown, by typer, with one heading each."""
    command = [sys.executable, "-m", "typer", "rankscope.cli", "utils", "docs", "--name", "rankscope"]
    plain = os.environ | {"NO_COLOR": "1", "TERM": "dumb"}
    text = subprocess.run(command, check=True, capture_output=True, encoding="utf-8", env=plain).stdout
    return text[text.index("## ") :]


_NO_BOUND = 1 << 63
"""Bound of 64-bit integers, which is no use to a reader."""


def fields() -> str:
    """Return tables of a study's fields, one for the study itself and one for each group in it."""
    schema = study_schema()
    text = _table(schema)
    for name, field in schema["properties"].items():
        if "$ref" in field:
            group = schema["$defs"][field["$ref"].rpartition("/")[2]]
            text += f"\n### {name}\n\n{group['description']}\n\n{_table(group)}"
    return text


def growth() -> str:
    """Return a table of the rules of a study's growth."""
    effects = {"grows": "grows", "free": "the newest value holds", "fixed": "another study"}
    rows = [f"| `{field}` | {effects[rule.kind]} | {rule.reason} |" for field, rule in RULES.items()]
    return "\n".join(["| field | another value | why |", "|---|---|---|", *rows])


def _table(group: dict[str, Any]) -> str:
    rows = ["| field | value | default | |", "|---|---|---|---|"]
    for name, field in group["properties"].items():
        is_group = "$ref" in field
        value = f"[a group](#{name})" if is_group else _values(field)
        default = "" if is_group or field.get("default") is None else f"`{json.dumps(field['default']).strip(chr(34))}`"
        required = "needed" if name in group.get("required", []) else default
        rows.append(f"| `{name}` | {value} | {required} | {field['description']} |")
    return '<div class="fields" markdown>\n\n' + "\n".join(rows) + "\n\n</div>\n"


def _values(field: dict[str, Any]) -> str:
    """Return the values of a field, in words."""
    if "anyOf" in field:
        return " or ".join(_values(one) for one in field["anyOf"] if one.get("type") != "null")
    if "const" in field or "enum" in field:
        return " or ".join(f"`{one}`" for one in field.get("enum", [field.get("const")]))
    if field["type"] == "array":
        return "a list of these" if "anyOf" in field["items"] else "a list"
    if field["type"] == "object":
        values = field["additionalProperties"]
        return "names and values" if values is True else f"a name and a {_values(values)}, for each"
    words = {"integer": "whole number", "number": "number", "string": "text", "boolean": "`true` or `false`"}
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {field[bound]:,}" for bound, sign in signs.items() if field.get(bound, _NO_BOUND) < _NO_BOUND]
    return " ".join([words[field["type"]], ", ".join(bounds)]).strip()


def notebook_page(path: Path) -> str:
    """Return a notebook as Markdown, with its outputs."""
    notebook = nbformat.read(path, as_version=4)
    return "\n\n".join(_cell(cell) for cell in notebook.cells)


def _cell(cell: Any) -> str:
    if cell.cell_type == "markdown":
        return str(cell.source)
    parts = [f"```python\n{cell.source}\n```", *(_output(output) for output in cell.outputs)]
    return "\n\n".join(part for part in parts if part)


def _output(output: Any) -> str:
    """Return an output in the richest form that needs no script."""
    if output.output_type == "stream":
        return _box(f"<pre><code>{html.escape(_COLOURS.sub('', output.text).rstrip())}</code></pre>")
    data = output.data
    if "text/html" in data:
        return _box(_PANDAS.sub("", data["text/html"]))
    if "image/svg+xml" in data:
        encoded = base64.b64encode(data["image/svg+xml"].encode()).decode()
        return _box(f'<img alt="" src="data:image/svg+xml;base64,{encoded}">')
    return _box(f"<pre><code>{html.escape(data['text/plain'])}</code></pre>")


def _box(content: str) -> str:
    """Return a block of HTML, which in Markdown must not be indented or have blank lines outside a `pre`."""
    return f'<div class="notebook-output">\n{content}\n</div>'
