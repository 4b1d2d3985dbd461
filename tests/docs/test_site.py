"""The documentation as a site: it builds without a warning, fetches nothing, and has what a reader looks for."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import rankscope.errors
from rankscope.spec.models import StudySpec
from report.browser import Browser

ROOT = Path(__file__).parents[2]

LOADED = re.compile(
    r"""<(?:script|img|iframe|source|audio|video)\b[^>]*?\bsrc=["']?([^"'\s>]+)|<link\b([^>]*)>|"""
    r"""url\(\s*["']?([^"')]+)|@import\s+["']([^"']+)""",
    re.IGNORECASE,
)
"""Attributes whose address a browser loads by itself: scripts, images, frames, styles, fonts."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def loaded(text: str) -> Iterator[str]:
    for source, link, url, imported in LOADED.findall(text):
        if link and not re.search(r"""rel=["']?(canonical|prev|next|alternate)""", link):
            yield from re.findall(r"""href=["']?([^"'\s>]+)""", link)
        yield from filter(None, (source, url, imported))


def test_it_fetches_nothing(site: Path) -> None:
    pages = [*site.rglob("*.html"), *site.rglob("*.css")]
    assert len(pages) > 20
    for page in pages:
        external = [url for url in loaded(page.read_text(encoding="utf-8")) if re.match(r"(?i)(\w+:)?//", url)]
        assert external == [], page.relative_to(site)


def test_what_is_looked_for_is_found() -> None:
    text = '<script src="https://a/x.js"></script><link rel="stylesheet" href="//b/y.css"><a href="https://c/">c</a>'
    assert list(loaded(text + "@import 'http://d/z.css'; src: url(https://e/f.woff)")) == [
        "https://a/x.js", "//b/y.css", "http://d/z.css", "https://e/f.woff",
    ]  # fmt: skip


def test_links_stay_inside_and_have_an_end(site: Path) -> None:
    """Also those in raw HTML and in what docstrings and notebooks bring, which MkDocs does not look at."""
    for page in site.rglob("*.html"):
        if page.name == "404.html":  # its links begin at the site's root, which is wherever it is put
            continue
        for link in re.findall(r"""<a\b[^>]*?\bhref=["']?([^"'\s>]+)""", page.read_text(encoding="utf-8")):
            target = link.partition("#")[0]
            if target and not re.match(r"\w+:", target):
                path = (page.parent / target).resolve()
                assert path.is_relative_to(site.resolve())
                assert path.is_file(), f"{page.relative_to(site)}: {link}"


def test_links_work_in_the_repository_too() -> None:
    """Links between files hold on GitHub, where no file has become a page of the site."""
    for page in [*(ROOT / "docs").rglob("*.md"), ROOT / "docs" / "tour.ipynb"]:
        for link in re.findall(r"\]\((?!\w+:|#)([^)\s#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.relative_to(ROOT)}: {link}"


@pytest.mark.parametrize(
    ("page", "words"),
    [
        ("tour", ["verdict", "Use the adapter", "data:image/svg+xml"]),
        ("guides/choose-a-rank", ["not enough evidence"]),
        ("reference/command-line", ["--install-completion", "--gpu-memory", "rankscope doctor"]),
        ("reference/python", ["eval_perplexity", "trial_folder", "StudyError", "learning_rates", "conclude", "2%"]),
        ("faq", ["No verdict", "Gated", "HTTPS_PROXY", "Memory runs out"]),
        ("glossary", ["non-inferior"]),
        ("reference/errors", [kind.__name__ for kind in rankscope.errors.RankscopeError.all_kinds()]),
        ("repository/SECURITY", ["Nothing is unpickled"]),
        ("repository/tests/train/test_checkpoint.py", ["import"]),
    ],
)
def test_pages_have_what_they_are_for(site: Path, page: str, words: list[str]) -> None:
    text = (site / f"{page}.html").read_text(encoding="utf-8")
    assert [word for word in words if word not in text] == []


def test_the_reference_names_every_field(site: Path) -> None:
    text = (site / "reference/study-file.html").read_text(encoding="utf-8")
    for name, field in StudySpec.model_fields.items():
        for inside in (name, *getattr(field.annotation, "model_fields", ())):
            assert f"<td><code>{inside}</code></td>" in text


def test_it_is_searched_from_disk(site: Path, browser: Browser) -> None:
    """A page opened as a file may start no worker and fetch nothing: see docs/iframe-worker.js."""
    browser.open(site / "guides" / "trackers.html")
    browser.click("[for=__search]")
    field = "document.querySelector('.md-search__input')"
    browser.until(f"{field} === document.activeElement")
    browser.ask(f"{field}.value = 'gated'; {field}.dispatchEvent(new Event('keyup', {{bubbles: true}}))")
    browser.until("document.querySelector('.md-search-result__link') !== null")
    found = browser.ask("[...document.querySelectorAll('.md-search-result__link')].map(link => link.href)")
    assert any("faq.html" in link for link in found)
    assert any("guides/hub.html" in link for link in found)
    assert [url for url in browser.requests if not url.startswith((site.as_uri(), "data:"))] == []
