"""`rankscope report --pdf`: printed by a browser, where there is one."""

import re
from pathlib import Path

import pytest

from rankscope.errors import MissingExtraError, StudyDirectoryError
from rankscope.report import pdf
from rankscope.report.pdf import print_pdf
from rankscope.report.write import build
from report.browser import need_browser
from report.report_evidence import make_evidence, make_verdict


def test_the_pdf_is_the_page_as_it_lies_there(tmp_path: Path) -> None:
    need_browser()
    evidence = make_evidence(steps=8)
    build(evidence, make_verdict(evidence), tmp_path, pdf=True)
    printed = (tmp_path / "report.pdf").read_bytes()
    assert printed.startswith(b"%PDF")
    assert 1 <= len(re.findall(rb"/Type\s*/Page\b", printed)) <= 8
    page = tmp_path / "scripted.html"
    page.write_text("<script>document.write('<p>x</p>'.repeat(9999))</script>")
    assert len(re.findall(rb"/Type\s*/Page\b", print_pdf(page))) == 1, "no script runs"


def test_without_a_browser_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pdf, "BROWSERS", ("no-such-browser",))
    with pytest.raises(
        MissingExtraError, match=r"neither Chromium nor Chrome is on PATH\n.*in any browser and print it"
    ):
        pdf.find_browser()


def test_a_browser_that_prints_nothing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, page = tmp_path / "chromium", tmp_path / "index.html"
    page.write_text("<p>x</p>")
    program.write_text("#!/bin/sh\necho one >&2\necho no display >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(pdf, "BROWSERS", (str(program),))
    with pytest.raises(StudyDirectoryError, match="chromium printed nothing: no display"):
        print_pdf(page)
