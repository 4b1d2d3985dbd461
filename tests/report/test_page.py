"""The page in a real browser: charts are drawn, hover and switches work, keys reach everything, nothing is fetched.

Drawing the charts takes most of the time: tests of the page in one form follow each other, and find it open.
"""

import base64
import re
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest

from analysis.test_curve import with_cuts
from drawing import images
from rankscope.report import write
from rankscope.report.charts import DARK, LIGHT
from rankscope.report.write import build
from rankscope.study.evidence import Evidence
from rankscope.text.catalogue import LANGUAGES
from report.browser import Browser, axe
from report.report_evidence import make_evidence, make_spec, make_verdict

TRAIN_LOSS = "#chart-train-loss-0"
TAB = ("Tab", 9)


@pytest.fixture(scope="module")
def evidence() -> Evidence:
    """Evidence of a study with everything that a page can show."""
    made = make_evidence(make_spec(learning_rates=[1e-4, 2e-4]), gpu=True, steps=60)
    parts = dict.fromkeys(("base", "adapter", "gradients", "optimizer", "activations", "logits"), 300_000_000)
    row = {"parts": parts | {"process": 0, "retained": 0}, "peak_bytes": 1_800_000_000, "step_seconds": 0.5}
    candidates = {candidate.name: candidate.rank for candidate in made.spec.candidates()}
    return made._replace(
        prediction={"device": "cuda", "candidates": dict.fromkeys(candidates, row)},
        answers=answers({"base": 0} | candidates, prompts=2, words=90),
    )


def answers(ranks: dict[str, int], prompts: int, words: int) -> pd.DataFrame:
    said = dict.fromkeys(("prompt", "reference", "answer"), "word " * words)
    return pd.DataFrame(
        [
            {"example": number, "candidate": name, "rank": rank} | said
            for number in range(prompts)
            for name, rank in ranks.items()
        ]
    )


@pytest.fixture(scope="module")
def page(evidence: Evidence, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with images(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(write, "render_image", lambda _: {})  # beside the page
        return write.build(evidence, make_verdict(evidence), tmp_path_factory.mktemp("page"))


def paper(browser: Browser) -> str:
    return str(browser.ask("getComputedStyle(document.body).backgroundColor"))


def rgb(colour: str) -> str:
    return f"rgb({', '.join(str(int(colour[start : start + 2], 16)) for start in (1, 3, 5))})"


SEEN = """[...document.querySelectorAll('.chart')].filter(chart => chart.checkVisibility()
    && chart.querySelectorAll('svg [class*=mark-] path, svg [class*=mark-] text').length >= 10
    && chart.querySelector('svg').getBoundingClientRect().height > 200).length"""


def test_without_scripts_the_figures_are_seen_and_printed(browser: Browser, page: Path) -> None:
    """As in mail, or where JavaScript is off."""
    browser.open(page, scripts=False, width=390)
    assert browser.ask("document.querySelectorAll('.chart.vega-embed').length") == 0
    assert browser.ask(SEEN) >= 5
    assert browser.ask("document.documentElement.scrollWidth") == 390
    assert browser.messages == []
    assert 2 <= printed_pages(browser) <= 8


def printed_pages(browser: Browser) -> int:
    """Pages of paper that hold the report's first level, without its details."""
    browser.ask("document.querySelectorAll('.level').forEach(level => { level.open = false; })")
    printed = base64.b64decode(browser.call("Page.printToPDF")["data"])
    return len(re.findall(rb"/Type\s*/Page\b", printed))


def test_a_phone_scrolls_tables_and_answers_but_not_the_page(browser: Browser, page: Path) -> None:
    browser.show(page.with_name("index.ko.html"), width=390)
    assert browser.ask("document.documentElement.scrollWidth") == 390
    assert (
        browser.ask(
            "Math.max(...[...document.querySelectorAll('.chart svg')].map(s => s.getBoundingClientRect().right))"
        )
        <= 390
    )
    answers = browser.ask(
        "(({scrollWidth, clientWidth}) => [scrollWidth, clientWidth])(document.querySelector('.answers'))"
    )
    assert answers[0] > answers[1]


@pytest.mark.parametrize(("name", "width"), [("index.ko.html", 390), ("index.html", 1280)])
def test_every_chart_is_drawn_in_silence(browser: Browser, page: Path, name: str, width: int) -> None:
    browser.show(page.with_name(name), width=width)
    marks = browser.ask(
        "[...document.querySelectorAll('.chart')].map(chart => "
        "[chart.id, chart.querySelectorAll('[class*=mark-] path, [class*=mark-] line, [class*=mark-] text').length])"
    )
    assert len(marks) == 14
    assert {name: count for name, count in marks if count < 10} == {}
    assert browser.messages == []
    assert browser.requests == []


def test_hover_shows_values(browser: Browser, page: Path) -> None:
    browser.show(page)
    for place, expected in {
        f"{TRAIN_LOSS} svg": ("rank 8", "rank 128", "rank 256"),
        "#chart-loss-above-best-0 .mark-symbol.role-mark path": ("1e-4", "+0.0070"),
        "#chart-gpu-memory-0 .mark-rect.role-mark path": ("0.3", "Base weights"),
        "#chart-loss-runtime-0 .mark-symbol.role-mark[class*=layer_3] path": ("1e-4", "1.229"),  # the chosen one's
        "#chart-learning-rate-map-0 .mark-rect.role-mark path": ("1e-4", "1.229"),
    }.items():
        browser.hover(place)
        browser.until("document.querySelector('#vg-tooltip-element.visible') !== null")
        shown = browser.ask("document.querySelector('#vg-tooltip-element').innerText")
        assert [part for part in expected if part not in shown] == [], (place, shown)
        browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=1, y=1)
        browser.until("document.querySelector('#vg-tooltip-element.visible') === null")
    assert browser.messages == []


def test_keys_reach_the_skip_link_the_switches_and_the_numbers(browser: Browser, page: Path) -> None:
    browser.show(page)  # where nothing has had the focus yet
    reached = []
    for _ in range(40):
        browser.press(*TAB)
        reached.append(
            browser.ask(
                "(e => e.id || e.getAttribute('href') || e.tagName + '.' + e.className)(document.activeElement)"
            )
        )
    assert reached[0] == "#main"
    assert reached[1] == "index.ko.html"
    assert reached.index("theme-auto") < reached.index("#loss") < reached.index("#details") < reached.index("SUMMARY.")
    browser.ask("document.querySelector('figure summary').focus()")
    browser.press("Enter", 13, "\r")
    browser.until("document.querySelector('figure details').open")
    assert "1e-4" in browser.ask("document.querySelector('figure details table').innerText")


def test_a_screen_reader_hears_names_and_sentences_and_no_marks(browser: Browser, page: Path) -> None:
    browser.show(page)
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    heard = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes if not node["ignored"]]
    roles = [role for role, _ in heard]
    assert {"main", "navigation", "banner", "contentinfo", "region", "heading", "radio", "link"} <= set(roles)
    assert not [role for role in roles if role.startswith("graphics")], "thousands of points say less than a sentence"
    unnamed = [
        role for role, name in heard if role in ("region", "group", "figure", "navigation", "radio") and not name
    ]
    assert unnamed == []
    assert (
        "group",
        "Held-out loss against steps. Rank 8: 1.2290; Rank 128: 1.2220; Rank 256: 1.2270.",
    ) in heard
    levels = browser.ask("[...document.querySelectorAll('h1, h2, h3, h4')].map(h => +h.tagName[1])")
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels)), "no level is left out"


def test_the_report_is_printed_on_few_pages(browser: Browser, page: Path) -> None:
    browser.show(page)
    assert 2 <= printed_pages(browser) <= 8


@pytest.mark.parametrize("dark", [False, True])
def test_axe_finds_nothing(browser: Browser, page: Path, dark: bool) -> None:
    browser.show(page, dark=dark)
    browser.ask(f"{axe()}; null")
    found = browser.ask("axe.run().then(found => found.violations.map(v => [v.id, v.nodes.map(node => node.html)]))")
    assert found == []


def test_the_theme_follows_the_system_and_the_switch(browser: Browser, page: Path) -> None:
    line = f"getComputedStyle(document.querySelector('{TRAIN_LOSS} .mark-line path')).stroke"
    browser.show(page, dark=True)
    assert (paper(browser), browser.ask(line)) == (rgb(DARK["paper"]), rgb(DARK["rank-0"]))
    browser.media(dark=False)
    assert (paper(browser), browser.ask(line)) == (rgb(LIGHT["paper"]), rgb(LIGHT["rank-0"]))
    for name, colours in (("dark", DARK), ("light", LIGHT)):
        browser.click(f"#theme-{name}")
        browser.media(dark=name == "light")  # the switch is stronger than the system
        assert (paper(browser), browser.ask(line)) == (rgb(colours["paper"]), rgb(colours["rank-0"]))
    browser.click("#theme-auto")
    assert paper(browser) == rgb(DARK["paper"])


def test_paper_is_light_whatever_the_theme_and_shows_what_is_cut_on_a_screen(browser: Browser, page: Path) -> None:
    browser.show(page, dark=True)
    browser.click("#theme-dark")
    browser.media(dark=True, paper=True)
    assert paper(browser) == rgb(LIGHT["paper"])
    hidden = browser.ask("['nav', '.switches'].map(s => getComputedStyle(document.querySelector(s)).display)")
    assert hidden == ["none"] * 2
    assert browser.ask("getComputedStyle(document.querySelector('.answers')).overflowX") == "visible"


def test_charts_of_cuts_and_of_variants_are_drawn_in_silence(browser: Browser, tmp_path: Path) -> None:
    evidence = with_cuts({4: 2.0, 16: 1.8}, {(0, 4): 2.1, (8, 4): 2.0, (0, 16): 1.8})
    row = {"candidate": "r004-lr2e-4-pissa", "difference": -0.02, "low": -0.03, "high": -0.01, "outcome": "better"}
    verdict = make_verdict(evidence) | {"variants": [row | {"variant": "pissa", "rank": rank} for rank in (4, 16)]}
    browser.open(build(evidence._replace(variants=evidence), verdict, tmp_path))
    caveats = browser.ask("document.querySelector('.caveats').innerText")
    assert "Better at the same rank: PiSSA, rank 4; PiSSA, rank 16." in caveats, "the verdict does not name them"
    for name in ("cut-loss-rank", "variants"):
        assert browser.ask(f"document.querySelectorAll('[id^=chart-{name}] .mark-symbol path').length") > 1
    assert browser.messages == []
    assert browser.requests == []


@pytest.mark.slow
@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 844)])
@pytest.mark.parametrize("language", LANGUAGES)
def test_warnings_about_the_data_are_on_the_first_screen(
    browser: Browser, evidence: Evidence, tmp_path: Path, language: str, width: int, height: int
) -> None:
    few = evidence._replace(data_facts=evidence.data_facts | {"rows_eval": 96})
    browser.open(build(few, make_verdict(few), tmp_path, language), width=width, height=height)
    box = browser.ask("(({top, bottom}) => [top, bottom])(document.querySelector('.warnings').getBoundingClientRect())")
    assert 0 < box[0] < box[1] <= height
    assert "96" in browser.ask("document.querySelector('.warnings li').innerText")


@pytest.mark.slow
@pytest.mark.parametrize("language", LANGUAGES)
def test_the_gain_the_margins_and_the_next_command_are_on_the_first_screen(
    browser: Browser, evidence: Evidence, tmp_path: Path, language: str
) -> None:
    browser.open(build(evidence, make_verdict(evidence, "not_enough_evidence", more_seeds=2), tmp_path, language))
    for place, expected in ((".next code", "--until-settled"), (".first tbody th", "8"), (".first tr.chosen", "95%")):
        assert expected in browser.ask(f"document.querySelector('{place}').innerText")
        assert browser.ask(f"document.querySelector('{place}').getBoundingClientRect().bottom") <= 800
    assert browser.messages == []


def test_text_can_be_read_on_its_background() -> None:
    """Contrast is at least 4.5, which WCAG 2.2 requires of text."""
    for colours in (LIGHT, DARK):
        for name in ("ink", "muted", "accent", "good", "warning"):
            for under in ("paper", "raised"):
                assert contrast(colours[name], colours[under]) >= 4.5, (name, under)


def contrast(one: str, other: str) -> float:
    lights = sorted((luminance(one), luminance(other)))
    return (lights[1] + 0.05) / (lights[0] + 0.05)


def luminance(colour: str) -> float:
    parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(share * part for share, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.slow
def test_the_largest_page_stays_below_its_size(tmp_path: Path) -> None:
    spec = make_spec(ranks=[4, 8, 16, 32, 64, 128, 256], learning_rates=[1e-4, 2e-4, 4e-4], seeds=[0, 1])
    evidence = make_evidence(spec, steps=1200, gpu=True)
    candidates = {candidate.name: candidate.rank for candidate in spec.candidates()}
    long = evidence._replace(answers=answers(candidates, prompts=8, words=9999))
    with images():
        page = build(long, make_verdict(evidence), tmp_path)
    assert page.stat().st_size < 3_000_000
