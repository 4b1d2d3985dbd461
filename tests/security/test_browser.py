"""A report full of hostile text, opened in a real browser: nothing of it runs, and nothing is fetched.

Every payload marks the page's root element where it runs, and asks for an address of a listener on this machine where
it is fetched. Escaping and the page's Content-Security-Policy must each be enough without the other; a page with
neither shows that the payloads work.
"""

import html
import json
import re
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import pandas as pd
import pytest
import torch
from markdown_it import MarkdownIt

from drawing import images
from folders import prepare, write_model
from rankscope.lora.saved import Factors
from rankscope.lora.svd import spectrum
from rankscope.model.load import load_tokenizer
from rankscope.report.write import build
from rankscope.resize.show import save_chart, spectrum_chart
from rankscope.spec.models import DataSpec, ModelSpec
from rankscope.study.evidence import Evidence
from rankscope.text.catalogue import load
from report.browser import need_browser
from report.report_evidence import make_evidence, make_spec, make_verdict, replace_trial

RUN = "document.documentElement.setAttribute('data-ran', 'yes')"

PAYLOADS = {
    "script": "<script>RUN; fetch('URL', {mode: 'no-cors'})</script>",
    "after title": "</title><script>RUN</script>",
    "after style": "</style><style>@import 'URL'; body { background: url(URL-background) }</style>",
    "after json": "\"}]}</script><script>RUN; new Image().src = 'URL'</script>",
    "after cdata and comment": "]]>--><svg onload=\"RUN\"><image href='URL'></image></svg>",
    "attribute": '"\' onmouseover="RUN" autofocus onfocus=RUN x="',
    "image": '"><img src=\'URL\' onerror="RUN">',
    "frame": "'><iframe src='URL'></iframe>",
    "frame of its own": '\'><iframe srcdoc="<script>parent.RUN</script>"></iframe>',
    "address": '<a id=go href="javascript:RUN">x</a> [x](javascript:RUN) ![x](URL)',
    "links": "<link rel=prefetch href='URL'><link rel=stylesheet href='URL-style'><base href='URL-base/'>",
    "template": "{{ 7 * 7 }} ${RUN} `RUN` {% raw %}",
    "moving on": "<meta http-equiv=refresh content='0; url=URL'>",
    "unseen": "\x1b[31m\x00\u202e",
}
"""RUN and URL are replaced: what a payload runs, and what it fetches."""


class Seen(NamedTuple):
    """Effects of a page that was opened."""

    ran: bool
    fetched: list[str]
    """Paths that the listener was asked for."""
    console: list[str]
    """Messages of the page's console: refusals of its policy are among them."""
    dom: str


class Lab:
    """A headless browser, and a listener that payloads point to."""

    def __init__(self, server: ThreadingHTTPServer, asked: list[str], folder: Path) -> None:
        self.server, self.asked, self.folder = server, asked, folder

    def payload(self, name: str) -> str:
        url = f"http://127.0.0.1:{self.server.server_port}/{name.replace(' ', '-')}"
        return PAYLOADS[name].replace("RUN", RUN).replace("URL", url)

    @property
    def all_payloads(self) -> str:
        return " ".join(map(self.payload, PAYLOADS))

    def open(self, source: str) -> Seen:
        browser = need_browser()
        page = self.folder / "page.html"
        page.write_text(source, encoding="utf-8")
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        command += [f"--user-data-dir={self.folder / 'profile'}", "--enable-logging=stderr"]
        command += ["--virtual-time-budget=10000", "--dump-dom", page.as_uri()]
        for _ in range(3):  # on a busy machine the browser sometimes ends before it prints the page: then there is none
            self.asked.clear()
            done = subprocess.run(command, capture_output=True, timeout=120, check=True)
            dom, log = (output.decode(errors="replace") for output in (done.stdout, done.stderr))
            root = re.search(r"<html[^>]*>", dom)
            if root is not None:
                break
        assert root is not None, log
        messages = re.findall(r"CONSOLE[:(]\d+\)?\] (.*)", log)
        return Seen("data-ran" in root[0], sorted(self.asked), messages, dom)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    asked: list[str] = []

    class Listener(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path.removeprefix("/"))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Listener) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield Lab(server, asked, tmp_path_factory.mktemp("browser"))
        server.shutdown()


@pytest.fixture(scope="module")
def folder(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a study whose every name and text is hostile, and whose rows are."""
    root, bad = tmp_path_factory.mktemp("hostile"), lab.all_payloads
    evidence = _evidence(root, bad)
    evidence = evidence._replace(spec=evidence.spec.model_copy(update={"name": bad}))  # which no study may have
    with images():
        build(evidence, _verdict(evidence, bad), root / "report")
    return root / "report"


def _evidence(root: Path, bad: str) -> Evidence:
    model = write_model(root / "model")
    data = root / f"{PAYLOADS['script'].replace('/', '∕')}.jsonl"
    rows = [{"instruction": f"{bad} {number}", "input": bad, "output": bad} for number in range(12)]
    data.write_text("\n".join(map(json.dumps, rows)))
    tokenizer = load_tokenizer(ModelSpec(id=str(model)))
    facts = prepare(DataSpec(id=str(data), max_length=100_000), tokenizer, 300).facts
    spec = make_spec(
        model={"id": bad, "revision": bad},
        data={"id": bad, "revision": bad, "config": bad, "split": bad, "template": f"{bad} {{instruction}} {{input}}"},
        adapter={"target_modules": [bad]},
        measure={"forgetting": bad},
    )
    evidence = make_evidence(spec, steps=8, gpu=True)
    evidence = replace_trial(evidence, 0, status="failed", reason=bad)
    evidence = replace_trial(evidence, 1, status=bad, reason=f"{bad}\n\n# {bad}", trial=bad, target_modules=bad)
    names = ("prompt", "reference", "candidate", "answer")
    return evidence._replace(
        answers=pd.DataFrame([{"example": 0, "rank": 8, **dict.fromkeys(names, bad)}]),
        divided=[bad],
        data_facts=facts | {"id": bad, "revision": bad, "general_text": bad, bad: {bad: [bad]}},
        machine={
            "hardware": {"cpu": bad, "gpus": [{"name": bad, "memory_bytes": 1}], bad: bad},
            "versions": {"rankscope": bad, bad: bad},
            "model": {"id": bad, "revision": bad, bad: bad},
            "device": bad,
        },
    )


def _verdict(evidence: Evidence, bad: str) -> dict[str, object]:
    return make_verdict(evidence, caveats=[bad], left_out=[bad], undetermined=[bad])


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    return (folder / "index.html").read_text(encoding="utf-8")


def test_the_payloads_work_where_nothing_stops_them(lab: Lab) -> None:
    together = "".join(lab.payload(name) for name in PAYLOADS if name != "moving on")
    seen = lab.open(f"<!doctype html><title>x</title><body>{together}")
    assert seen.ran
    assert {"script", "image", "frame", "links", "after-style-background", "links-style"} <= set(seen.fetched)
    assert "moving-on" in lab.open(f"<!doctype html><body>{lab.payload('moving on')}").fetched


@pytest.mark.parametrize(
    "name", ["script", "after title", "after json", "after cdata and comment", "image", "frame of its own"]
)
def test_each_payload_that_should_run_does(name: str, lab: Lab) -> None:
    before = {"after title": "<title>", "after json": '<script>x = {"y": [{"z": "'}
    assert lab.open(f"<!doctype html><body>{before.get(name, '')}{lab.payload(name)}").ran


def test_nothing_in_a_hostile_report_runs_and_nothing_is_fetched(lab: Lab, page: str) -> None:
    seen = lab.open(page)
    assert not seen.ran
    assert seen.fetched == []
    assert seen.console == [], "the policy refuses none of the page's own parts"
    charts = page.count('<div class="chart"')
    assert charts >= 8
    assert seen.dom.count('"chart vega-embed') >= 5, "the page's own scripts have drawn those that are seen"
    assert seen.dom.count("<svg") >= charts
    assert "7 * 7" in html.unescape(seen.dom)
    assert not set("\x00\x1b\u202e") & set(seen.dom)


def test_escaping_alone_is_enough(lab: Lab, page: str) -> None:
    without = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    assert without != page
    seen = lab.open(without)
    assert (seen.ran, seen.fetched) == (False, [])


def test_the_policy_alone_is_enough(lab: Lab, page: str) -> None:
    """The payload that leaves the page by a refresh is left out: no policy in a page can refuse it."""
    raw = "".join(lab.payload(name) for name in PAYLOADS if name != "moving on")
    seen = lab.open(re.sub(r"<main[^>]*>", lambda main: main[0] + raw, page, count=1))
    assert (seen.ran, seen.fetched) == (False, [])
    assert len([message for message in seen.console if "Content Security Policy" in message]) >= 5


def test_figures_have_no_script_and_refer_to_nothing(folder: Path) -> None:
    figures = sorted((folder / "figures").glob("*.svg"))
    assert len(figures) >= 8
    for figure in figures:
        check_figure(figure)
        assert RUN not in figure.read_text()


def check_figure(figure: Path) -> None:
    for element in ElementTree.parse(figure).iter():  # noqa: S314  # rankscope wrote it
        assert element.tag.rpartition("}")[2] not in ("script", "foreignObject", "image", "style", "a", "use")
        for name, value in element.attrib.items():
            assert not name.rpartition("}")[2].lower().startswith(("on", "href")), figure
            if name != "aria-label":  # which is text
                assert not re.search(r"url\((?!['\"]?#)|javascript:|https?:", value), figure


@pytest.fixture(scope="module")
def charts(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The chart of an adapter whose layers have hostile names, of every kind."""
    folder = tmp_path_factory.mktemp("charts")
    torch.manual_seed(0)
    names = [*map(lab.payload, PAYLOADS), "\x00\x1b]0;x\x07\u202e"]
    layers = [
        Factors(f"model.layers.{block}.{name}", torch.randn(2, 8), torch.randn(8, 2), 1.0, ("", ""))
        for block in range(2)
        for name in names
    ]
    text = load("en")
    chart = spectrum_chart(spectrum(layers), text)
    for kind in ("html", "svg"):
        save_chart(chart, folder / f"chart.{kind}", text)
    return folder


def test_a_chart_s_own_page_runs_and_fetches_nothing(lab: Lab, charts: Path) -> None:
    page = (charts / "chart.html").read_text(encoding="utf-8")
    seen = lab.open(page)
    assert (seen.ran, seen.fetched, seen.console) == (False, [], [])
    assert "<svg" in seen.dom, "the page's own scripts have drawn"
    assert "7 * 7" in html.unescape(seen.dom)
    without = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    assert without != page
    seen = lab.open(without)
    assert (seen.ran, seen.fetched) == (False, []), "escaping alone is enough"
    raw = "".join(lab.payload(name) for name in PAYLOADS if name != "moving on")
    seen = lab.open(page.replace("<body>", f"<body>{raw}"))
    assert (seen.ran, seen.fetched) == (False, []), "the policy alone is enough"


def test_a_chart_s_figure_is_harmless(charts: Path) -> None:
    check_figure(charts / "chart.svg")


def test_a_browser_can_be_required(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("RANKSCOPE_REQUIRE_BROWSER", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no browser"):
        need_browser()
    monkeypatch.setenv("RANKSCOPE_REQUIRE_BROWSER", "1")
    with pytest.raises(pytest.fail.Exception, match="no browser"):
        need_browser()


def test_the_markdown_renders_to_its_own_figures_and_nothing_else(folder: Path) -> None:
    """The renderer passes HTML through, as some do."""
    source = (folder / "report.md").read_text(encoding="utf-8")
    rendered = MarkdownIt("commonmark", {"html": True}).enable("table").render(source)
    tags = re.findall(r"<[a-z][^>]*>", rendered)
    names = {re.split(r"[\s>/]", tag[1:])[0] for tag in tags}
    assert names <= {
        "h1", "h2", "h3", "p", "strong", "ul", "li", "table", "thead", "tbody", "tr", "th", "td", "img", "pre", "code",
    }  # fmt: skip
    sources = re.findall(r'<img src="([^"]*)"', rendered)
    assert len(sources) == rendered.count("<img") >= 8
    assert all(re.fullmatch(r"figures/[a-z-]+\.svg", image) for image in sources)
    assert not set("\x00\x1b\u202e") & set(source)
