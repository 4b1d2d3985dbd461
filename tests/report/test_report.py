"""The report's files, from complete, partial and hostile evidence."""

import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import altair as alt
import pandas as pd
import pytest

import drawing
from drawing import images
from rankscope.report import charts, html, write
from rankscope.report.content import Content, compose
from rankscope.report.frames import POINTS, by_candidate
from rankscope.report.html import chart_page
from rankscope.report.loss import paired_difference, training_loss
from rankscope.report.markdown import escape
from rankscope.report.memory import memory_by_step
from rankscope.report.write import build
from rankscope.study.evidence import Evidence
from rankscope.text.catalogue import load
from report.report_evidence import DOUBTFUL, HOSTILE, make_evidence, make_spec, make_verdict, replace_trial

CPU_FIGURES = {
    "loss-above-best", "train-loss", "heldout-loss-steps", "cpu-memory", "cpu-memory-steps", "cpu-memory-time",
    "runtime", "loss-memory", "loss-runtime",
}  # fmt: skip
GPU_FIGURES = CPU_FIGURES | {"gpu-memory", "gpu-memory-steps", "gpu-memory-time"}


class Page(HTMLParser):
    """A page as a browser parses it: tags with their attributes, the text outside scripts, and the scripts."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._inside = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += data + "\n"

    @property
    def charts(self) -> dict[str, Any]:
        return json.loads(self.scripts[0])["charts"]


def read_page(folder: Path) -> Page:
    return Page((folder / "index.html").read_text(encoding="utf-8"))


def first_row(content: Content, section: str) -> dict[str, str]:
    table = content.section(section).tables[0]
    return dict(zip(table.headers, table.rows[0], strict=True))


def figures(folder: Path, kind: str) -> set[str]:
    return {file.stem for file in (folder / "figures").glob(f"*.{kind}")}


@pytest.fixture(scope="module")
def evidence() -> Evidence:
    return make_evidence()


@pytest.fixture(scope="module")
def folder(evidence: Evidence, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    with images():
        path = build(evidence, make_verdict(evidence), folder)
    assert path == folder / "index.html"
    return folder


def test_all_files_are_there_and_no_others(folder: Path) -> None:
    names = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    images = {f"figures/{name}.{kind}" for name in CPU_FIGURES for kind in ("svg", "png")}
    assert names == images | {"index.html", "index.ko.html", "report.md", "results.csv", "results.parquet"}


def test_a_page_in_each_language_links_to_the_other(
    evidence: Evidence, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that is asked for is index.html, and no page of an earlier report stays beside it."""
    monkeypatch.setattr(write, "other_languages", drawing.others)
    for language, other, word in (("en", "ko", "한국어"), ("ko", "en", "English")):
        (tmp_path / "report.pdf").write_bytes(b"of an earlier verdict")
        build(evidence, make_verdict(evidence), tmp_path, language)
        first, second = (Page((tmp_path / name).read_text()) for name in ("index.html", f"index.{other}.html"))
        assert ("html", {"lang": language}) in first.tags
        assert ("html", {"lang": other}) in second.tags
        assert ("a", {"href": f"index.{other}.html", "lang": other, "hreflang": other}) in first.tags
        assert ("a", {"href": "index.html", "lang": language, "hreflang": language}) in second.tags
        assert word in first.text
        assert {file.name for file in tmp_path.glob("*.*ml")} == {"index.html", f"index.{other}.html"}
        assert not (tmp_path / "report.pdf").exists()


def test_the_page_shows_its_charts_without_its_scripts(folder: Path) -> None:
    """In its own colours, and each with clipping paths of its own."""
    source = (folder / "index.html").read_text(encoding="utf-8")
    drawn = dict(re.findall(r'<div class="chart" id="([\w-]+)"[^>]*>(<svg.*?</svg>)</div>', source, re.DOTALL))
    assert len(drawn) == len(CPU_FIGURES) + 1
    for name, svg in drawn.items():
        assert svg.count("<path") > 3, name
        assert "var(--muted)" in svg
        assert set(re.findall(r'id="([\w-]+?)-clip', svg)) <= {name}
        assert not re.findall(r"url\(#(?!chart-)", svg)
        ElementTree.fromstring(svg)  # noqa: S314  # rankscope wrote it


def test_images_hold_a_drawing(folder: Path) -> None:
    for name in CPU_FIGURES:
        svg = (folder / "figures" / f"{name}.svg").read_text()
        assert svg.startswith("<svg")
        assert svg.count("<path") > 3
        assert (folder / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_csv_and_the_parquet_are_the_results(folder: Path, evidence: Evidence) -> None:
    from_csv = pd.read_csv(StringIO((folder / "results.csv").read_text()))
    # CSV has no way to write "no text": an empty field reads as NaN.
    pd.testing.assert_frame_equal(from_csv, evidence.results.assign(reason=math.nan), check_dtype=False)
    pd.testing.assert_frame_equal(pd.read_parquet(folder / "results.parquet"), evidence.results, check_dtype=False)


def test_the_page_is_small_and_fetches_nothing(folder: Path) -> None:
    assert (folder / "index.html").stat().st_size < 3_000_000
    tags = read_page(folder).tags
    assert {tag for tag, _ in tags} & {"link", "img", "iframe", "object", "embed", "base", "form"} == set()
    addresses = [a[name] for _, a in tags for name in ("src", "href", "srcset") if name in a]
    assert [address for address in addresses if not str(address).startswith("#")] == ["index.ko.html"]
    style = re.search(r"<style>(.*?)</style>", (folder / "index.html").read_text(), re.DOTALL)
    assert style is not None
    assert "url(" not in style.group(1)
    assert "@import" not in style.group(1)


def test_the_policy_allows_the_page_s_scripts_and_nothing_else(folder: Path) -> None:
    page = read_page(folder)
    policy = next(attributes["content"] for tag, attributes in page.tags if "http-equiv" in attributes)
    rules = dict(rule.strip().split(" ", 1) for rule in str(policy).split(";"))
    assert rules["default-src"] == "'none'"
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in page.scripts[1:]]
    assert rules["script-src"] == " ".join(f"'sha256-{value}'" for value in hashes)
    assert len(hashes) == 2


def test_the_page_says_the_verdict_the_savings_and_the_cost(folder: Path) -> None:
    text = read_page(folder).text
    for expected in (
        "facebook/opt-350m on lucasmccabe-lmi/CodeAlpaca-20k · 18,980 rows · 120 steps · 3 seeds · "
        "AMD EPYC 7763, 16 cores · 2026-11-29\n",
        "Recommended rank\n8\n",
        "8\n99.6%\n(at least 99.3%)\n2.35 GB\n16 min 24 s\n3.5 MB\n",
        "Use rank 8: the lowest rank shown to keep at least 95% of what fine-tuning gains (it keeps 99.6%, at least",
        "What fine-tuning gains",
        "1.6000 nats\nheld-out loss 2.8240 before training, 1.2240 with rank 128",
        "95%\n8\n",
        "Compared with rank 256",
        "2.35 GB\n\N{MINUS SIGN}29%\ninstead of 3.29 GB",
        "16 min 24 s\n\N{MINUS SIGN}36%\ninstead of 25 min 29 s",
        "3.54 MB\n\N{MINUS SIGN}97%\ninstead of 113 MB",
        "+0.0070 nats\n0.44% of what fine-tuning gains\n95% interval: +0.0050 to +0.0100 nats",
        "Only one learning rate was tried.",
        "No GPU was used",
        "rankscope run study.yaml --out ",
        "AMD EPYC 7763",
        "a_new_fact",
        "id: facebook/opt-350m",
    ):
        assert expected in text


@pytest.mark.parametrize(
    ("language", "expected"),
    [
        ("en", ["13.4% of the rows are cut at 512 tokens", "cut off in 23 rows", "only 180 rows held out"]),
        ("ko", ["행의 13.4%가 512토큰에서", "행 23개에서 답변이", "검증 데이터가 행 180개뿐"]),
    ],
)
def test_the_report_begins_with_what_is_doubtful_about_the_data(
    evidence: Evidence, tmp_path: Path, language: str, expected: list[str]
) -> None:
    """Right below the verdict, before costs and caveats, and not among the caveats again."""
    doubtful = evidence._replace(data_facts=evidence.data_facts | DOUBTFUL)
    caveats = ["one_learning_rate", "rows_cut", "answers_cut_off", "few_held_out_rows"]
    build(doubtful, make_verdict(doubtful, caveats=caveats), tmp_path, language)
    text = load(language)
    page, markdown = read_page(tmp_path).text, (tmp_path / "report.md").read_text(encoding="utf-8")
    for report in (page, markdown.replace("\\", "")):
        after_verdict = report.index("alpha/rank)" if language == "en" else "알파/랭크)")
        after_warnings = report.index(text("saving.title", name=text("name.rank", rank=256)))
        warnings = report[after_verdict:after_warnings]
        for sentence in [text("caveat.data"), *expected, "One prompt for all rows."]:
            assert sentence in warnings
            assert report.count(sentence) == 1, "said once"
        assert text("caveat.one_learning_rate") in report
        assert "columns not read: id, source; read as prompt and answer" in report
        assert text("fact.notes") in report
    assert compose(doubtful, {}, text).warnings, "also where there is no verdict yet"


def test_where_nothing_is_doubtful_nothing_warns(folder: Path) -> None:
    assert load("en")("caveat.data") not in read_page(folder).text
    assert 'class="warnings"' not in (folder / "index.html").read_text(encoding="utf-8")
    assert load("en")("caveat.data") not in (folder / "report.md").read_text(encoding="utf-8")


def test_rows_that_are_cut_are_told_once(evidence: Evidence) -> None:
    few, many = ({"truncated": rows} for rows in (3, 3_000))
    for facts, told in ((few, "3 rows were longer"), (many, "15% of the rows are cut")):
        content = compose(evidence._replace(data_facts=evidence.data_facts | facts), {}, load("en"))
        about = [line for line in [*content.warnings, *content.section("limits").sentences] if "cut" in line]
        assert len(about) == 1
        assert about[0].startswith(told)


def test_sections_come_in_the_order_of_the_questions(folder: Path) -> None:
    headings = re.findall(r'<h2 id="(\w+)">', (folder / "index.html").read_text())
    assert headings == [
        "loss", "costs", "trade_off", "details", "answers", "claims", "curves", "candidates", "also", "trials", "data",
        "machine", "limits", "reproduce",
    ]  # fmt: skip
    linked = [attributes["href"] for tag, attributes in read_page(folder).tags if tag == "a"]
    assert linked == ["#main", "index.ko.html", *(f"#{heading}" for heading in headings)]


def test_every_chart_has_its_place_its_words_and_its_numbers(folder: Path) -> None:
    page = read_page(folder)
    places = {str(a["id"]): str(a["aria-label"]) for _, a in page.tags if a.get("class") == "chart"}
    assert places.keys() == page.charts.keys() == {f"chart-{name}-0" for name in CPU_FIGURES} | {"chart-train-loss-1"}
    assert "Rank 8: +0.0070; Rank 128: +0.0000" in places["chart-loss-above-best-0"]
    assert "Rank 8: 16 min 24 s" in places["chart-runtime-0"]
    for name, spec in page.charts.items():
        assert spec["description"] == places[name]
        assert any(rows for rows in spec["datasets"].values())


def test_every_chart_is_a_valid_specification(folder: Path) -> None:
    for spec in read_page(folder).charts.values():
        alt.Chart.from_dict(spec | {"$schema": alt.SCHEMA_URL}, validate=True).to_dict(validate=True)


def test_the_markdown_has_the_verdict_the_tables_and_the_figures(folder: Path) -> None:
    markdown = (folder / "report.md").read_text(encoding="utf-8")
    assert "**Recommended rank: 8**" in markdown
    assert "Use rank 8:" in markdown
    rows = [line for line in markdown.splitlines() if line.startswith("| 8 | 2e-4 | 32 |")]
    assert len(rows) == 1
    assert "1.2310 ± 0.0040" in rows[0]
    assert "0.0070 \\[0.0050, 0.0100\\]" in rows[0]
    assert "1.92 GB / 2.35 GB" in rows[0]
    assert markdown.count("| r008-lr2e-4-s") == 3
    linked = set(re.findall(r"\(figures/([\w-]+)\.svg\)", markdown))
    assert linked == CPU_FIGURES
    assert markdown.count(", in numbers.") == len(CPU_FIGURES), "in words as in pictures"


def test_korean_report(evidence: Evidence, tmp_path: Path) -> None:
    build(evidence, make_verdict(evidence), tmp_path, "ko")
    page = read_page(tmp_path)
    assert ("html", {"lang": "ko"}) in page.tags
    for expected in (
        "권장 랭크",
        "랭크 8 사용을 권장합니다",
        "스텝에 따른 학습 손실",
        "GPU를 사용하지 않았으므로",
    ):
        assert expected in page.text
    assert "Recommended" not in page.text
    assert "**권장 랭크: 8**" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_with_a_gpu_its_memory_is_drawn_once_a_rank(tmp_path: Path) -> None:
    evidence = make_evidence(make_spec(learning_rates=[1e-4, 2e-4]), gpu=True, steps=40)
    build(evidence, make_verdict(evidence), tmp_path)
    page = read_page(tmp_path)
    drawn = {f"chart-{name}-0" for name in GPU_FIGURES | {"learning-rate-map"}}
    assert page.charts.keys() == drawn | {"chart-train-loss-1"}
    (bars,) = [rows for rows in page.charts["chart-gpu-memory-0"]["datasets"].values() if rows]
    assert [row["rank"] for row in bars] == [8, 128, 256]
    assert "No GPU" not in page.text
    assert "no GPU" not in page.text
    assert "Peak GPU memory\n4.81 GB" in page.text
    assert "Compared with rank 256 at learning rate 1e-4" in page.text
    assert "NVIDIA H100 (80.0 GB)" in page.text


def test_a_long_study_of_many_candidates_stays_small(tmp_path: Path) -> None:
    spec = make_spec(ranks=[4, 8, 16, 32, 64, 128, 256], learning_rates=[1e-4, 2e-4, 4e-4], seeds=[0])
    evidence = make_evidence(spec, steps=1500, profiles=False)
    frame, steps_a_point = training_loss(evidence, by_candidate(evidence, {})["candidate"])
    assert steps_a_point == 8
    assert len(frame) <= POINTS
    content = compose(evidence, make_verdict(evidence), load("en"))
    specs = [panel.chart.to_dict() for figure in content.figures for panel in figure.panels]
    assert len(json.dumps(specs)) < 1_500_000


def test_nothing_has_run_yet(tmp_path: Path) -> None:
    complete = make_evidence(profiles=False)
    empty = complete.results.assign(status="pending", train_loss=math.nan, eval_loss=math.nan, steps=math.nan)
    evidence = complete._replace(results=empty, curves=complete.curves.iloc[:0], machine={}, data_facts={})
    build(evidence, {}, tmp_path)
    page = read_page(tmp_path)
    assert page.charts == {}
    assert not (tmp_path / "figures").exists()
    assert "There is no verdict yet." in page.text
    assert page.text.count("pending") == 9
    assert "nan" not in page.text


def test_a_rebuilt_report_keeps_no_figure_that_it_no_longer_has(
    evidence: Evidence, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "render_image", lambda _: {"svg": "<svg/>", "png": b"png"})
    build(evidence, make_verdict(evidence), tmp_path)
    assert figures(tmp_path, "svg") == CPU_FIGURES
    build(evidence._replace(profiles=pd.DataFrame(), samples=pd.DataFrame()), make_verdict(evidence), tmp_path)
    assert figures(tmp_path, "svg") == figures(tmp_path, "png") == {
        "train-loss", "loss-above-best", "heldout-loss-steps",
    }  # fmt: skip
    page = read_page(tmp_path)
    assert "Costs were not profiled" in page.text
    assert "Runtime was not measured" in page.text


def test_one_rank_and_one_seed() -> None:
    evidence = make_evidence(make_spec(ranks=[8], seeds=[0]), steps=20)
    verdict = make_verdict(evidence, "not_enough_evidence", caveats=["one_seed", "one_learning_rate"], more_seeds=2)
    content = compose(evidence, verdict, load("en"))
    assert content.rank == ""
    assert content.savings.rows == []
    assert content.caveats[0].startswith("Between ranks that share only one seed")
    row = first_row(content, "candidates")
    assert row["Held-out loss"] == "1.2270"
    assert row["Loss above the best (nats)"] == "0.0000", "nothing to compare it with, so no interval is missing"
    (panel,) = next(figure.panels for figure in content.figures if figure.name == "train-loss")
    marks = str(panel.chart.to_dict())
    assert "'area'" not in marks
    assert "'line'" in marks


def test_the_largest_rank_saves_nothing_and_the_best_costs_nothing(evidence: Evidence) -> None:
    largest = compose(evidence, make_verdict(evidence, chosen=2), load("en"))
    assert (largest.savings.title, largest.savings.rows) == ("", []), "it is not compared with itself"
    assert largest.savings.note.startswith("This is the largest rank compared")
    best = compose(evidence, make_verdict(evidence, chosen=1), load("en"))
    assert best.cost.value == ""
    assert best.cost.notes == ["Nothing. It has the lowest held-out loss of all candidates compared."]


def test_a_seed_may_diverge_after_the_verdict(evidence: Evidence) -> None:
    """The live page reads the evidence of now, and may have the verdict of a moment ago."""
    content = compose(replace_trial(evidence, 0, status="diverged"), make_verdict(evidence), load("en"))
    drawn = Page(html.render(content, load("en"))).charts
    assert any("diverged" in str(rows) for rows in drawn["chart-loss-above-best-0"]["datasets"].values())


def test_a_diverged_trial_is_told_and_left_out(evidence: Evidence) -> None:
    changed = replace_trial(
        evidence,
        0,
        status="diverged",
        reason="loss is not finite at step 12",
        eval_loss=math.nan,
        train_loss=math.nan,
    )
    content = compose(changed, make_verdict(changed), load("en"))
    assert content.section("trials").tables[0].rows[0][4:] == [
        "diverged",
        "loss is not finite at step 12",
        "120",
        *[load("en")("none")] * 2,
    ]
    row = first_row(content, "candidates")
    assert row["Seeds finished"] == "2 / 3"
    assert (row["Held-out loss"], row["Training loss"]) == ("diverged", load("en")("none")), "no mean over survivors"
    assert sorted(training_loss(changed, changed.results["candidate"]).frame["rank"].unique()) == [128, 256]
    also = first_row(content, "also")
    assert (also["Held-out loss"], also["Perplexity"], also["Diverged"]) == ("–", "–", "1 / 3")


def test_of_unfinished_trials_the_finished_ones_are_drawn(evidence: Evidence) -> None:
    changed = replace_trial(evidence, 0, status="interrupted")
    drawn = training_loss(changed, changed.results["candidate"]).frame
    assert set(drawn.loc[drawn["rank"] == 8, "seed"]) == {1, 2}
    assert set(drawn.loc[drawn["rank"] == 128, "seed"]) == {0, 1, 2}


def test_a_loss_above_the_untrained_model_s_is_worse_than_no_training(evidence: Evidence) -> None:
    low = evidence._replace(untrained=evidence.untrained.assign(loss=1.23))
    content = compose(low, make_verdict(low), load("en"))
    candidates = content.section("candidates").tables[0]
    cells = [row[candidates.headers.index("Held-out loss")] for row in candidates.rows]
    assert ["worse than\nno training" in cell for cell in cells] == [True, False, False]
    old = compose(evidence._replace(untrained=pd.DataFrame()), make_verdict(evidence), load("en"))
    assert "worse" not in str(old.section("candidates").tables[0].rows)


def test_an_interval_wider_than_the_gain_is_none(evidence: Evidence) -> None:
    verdict = make_verdict(evidence)
    verdict["comparison"][2] |= {"regret_low": 0.0, "regret_high": 1.7, "eval_loss_low": 0.1, "eval_loss_high": 2.9}
    table = by_candidate(evidence, verdict).set_index("rank")
    assert table["few_seeds"].tolist() == [False, False, True]
    assert table[["regret_high", "eval_loss_low"]].isna().sum(axis=1).tolist() == [0, 0, 2]
    content = compose(evidence, verdict, load("en"))
    candidates = content.section("candidates").tables[0]
    at = candidates.headers.index("Loss above the best (nats)")
    assert candidates.rows[2][at] == "0.0050\ntoo few seeds\nfor an interval"
    unknown = by_candidate(evidence, verdict | {"gain": None})
    assert not unknown["few_seeds"].any()


def test_an_open_verdict_has_its_guess_and_its_command_on_page_and_in_markdown(
    evidence: Evidence, tmp_path: Path
) -> None:
    verdict = make_verdict(evidence, "not_enough_evidence", more_seeds=2)
    build(evidence, verdict, tmp_path, directory="studies/mine")
    page, markdown = read_page(tmp_path).text, (tmp_path / "report.md").read_text(encoding="utf-8")
    for report in (page, markdown):
        for expected in (
            "No verdict yet",
            "3 seeds are too few; about 2 more seeds would settle it",
            "Best guess: rank 8",
            "To settle it",
            "rankscope run studies/mine --until-settled\n",
            "Keeps at least",
        ):
            assert expected in report
        assert "egret" not in report.replace("regret_", "")


def test_hostile_text_stays_text(evidence: Evidence, tmp_path: Path) -> None:
    spec = make_spec(model={"id": HOSTILE}, data={"id": f"x]({HOSTILE})|`"})
    hostile = make_evidence(spec, steps=8)
    hostile = hostile._replace(spec=spec.model_copy(update={"name": f"{HOSTILE} ```"}))
    hostile = replace_trial(hostile, 0, status="failed", reason=f"{HOSTILE}</script><!-- | \n## heading")
    hostile = hostile._replace(
        data_facts={
            "id": HOSTILE,
            HOSTILE: {HOSTILE: HOSTILE},
            "prompt": "${alert(1)} {{ 7 * 7 }}",
            "warnings": [HOSTILE],
            "notes": [HOSTILE],
        },
        machine={
            "hardware": {"gpus": [{"name": HOSTILE}]},
            "versions": {HOSTILE: HOSTILE},
            "model": {"id": HOSTILE},
        },
    )
    verdict = make_verdict(hostile, caveats=[HOSTILE])
    build(hostile, verdict, tmp_path)
    page = read_page(tmp_path)
    assert [attributes.get("type") for tag, attributes in page.tags if tag == "script"] == [
        "application/json",
        None,
        None,
    ]
    assert [name for _, attributes in page.tags for name in attributes if name.startswith("on")] == []
    assert HOSTILE in page.text
    assert "{{ 7 * 7 }}" in page.text
    assert "alert(1)" not in "".join(page.scripts)
    markdown = (tmp_path / "report.md").read_text()
    outside_code = re.sub(r"^(`{3,})\w*\n.*?^\1$", "", markdown, flags=re.DOTALL | re.MULTILINE)
    assert "<script" not in outside_code.replace("\\<", "")
    assert "\n## heading" not in markdown
    assert "````sh\nrankscope run study.yaml --out '<script>alert(1)</script> ```'\n````" in markdown


def test_an_empty_comparison_is_a_verdict_too(evidence: Evidence) -> None:
    empty: dict[str, Any] = {"comparison": [], "best_candidate": None, "gain": None, "margins": [], "guess": None}
    verdict = make_verdict(evidence, "not_enough_evidence", seeds=0, **empty)
    content = compose(evidence, verdict, load("en"))
    assert content.sentence == "There is no verdict yet: no rank has finished its trials."
    assert (content.rank, content.savings.title, content.cost.value) == ("", "", "")


def test_embedded_model_and_data_are_named_in_words() -> None:
    evidence = make_evidence(make_spec(model={"id": "embedded"}, data={"id": "embedded"}), steps=8)
    content = compose(evidence, {}, load("en"))
    assert content.subtitle.startswith("the embedded model on the embedded data · ")


def test_files_are_named_without_their_folders() -> None:
    """A report goes to others, whom the home of its author does not concern."""
    data = ["/home/me/rows.jsonl", "owner/rows"]
    evidence = make_evidence(make_spec(model={"id": "/home/me/models/opt"}, data={"id": data}), steps=8)
    evidence = evidence._replace(data_facts=evidence.data_facts | {"id": " + ".join(data)})
    content = compose(evidence, {}, load("en"))
    assert content.subtitle.startswith("opt on rows.jsonl + owner/rows · ")
    facts = [row for name in ("data", "machine") for row in content.section(name).tables[0].rows]
    assert {"rows.jsonl + owner/rows", "opt"} <= {value for _, value in facts}
    assert "/home/me" not in str(facts)


def test_json_cannot_leave_its_script() -> None:
    value = "</script><!-- <script> &amp; \u2028"
    chart = alt.Chart(pd.DataFrame({"value": [value]})).mark_text().encode(text="value:N")
    written = Page(chart_page(alt.layer(chart), "a chart", load("en"))).scripts[0]
    assert not set("<>&\u2028") & set(written)
    (rows,) = json.loads(written)["charts"]["chart"]["datasets"].values()
    assert rows == [{"value": value}]


def test_markdown_escape() -> None:
    assert escape("a | b\n# [x](y) <b> `c` 5 * 3") == "a \\| b \\# \\[x\\](y) \\<b\\> \\`c\\` 5 \\* 3"


def test_by_candidate_defines_each_number(evidence: Evidence) -> None:
    table = by_candidate(evidence, make_verdict(evidence)).set_index("rank")
    assert list(table.index) == [8, 128, 256]
    row = table.loc[8]
    assert row["eval_loss"] == pytest.approx(1.231)
    assert row["eval_loss_sd"] == pytest.approx(0.004)
    assert row["regret"] == pytest.approx(0.007)
    base = 1.9e9 + 3.1e6 * 8
    assert row["cpu_mean_bytes"] == pytest.approx(base)
    assert row["cpu_peak_bytes"] == pytest.approx(base * 1.22 + 1e6)  # the higher of two repeats
    assert row["step_seconds"] == pytest.approx(0.413)  # the median of 0.408 and 0.418
    assert row["runtime_seconds"] == pytest.approx(960 + 8 * 2.2 + 6)
    assert math.isnan(row["gpu_allocated_peak_bytes"])


def test_training_losses_are_compared_at_the_same_step_with_the_same_seed(evidence: Evidence) -> None:
    """What both have in common, such as a hard batch, is gone; what is left has its interval over seeds."""
    seeds = training_loss(evidence, evidence.results["candidate"]).frame
    hard = seeds["seed"] * 5.0 + seeds["step"] % 3
    apart = {(8, 0): 0.0, (8, 1): 0.0, (8, 2): 0.0, (128, 0): 0.1, (128, 1): 0.2, (128, 2): 0.3}
    keys = list(zip(seeds["rank"], seeds["seed"], strict=True))
    found = paired_difference(seeds.assign(train_loss=hard + pd.Series([apart.get(key, 0.0) for key in keys])))
    of_128 = found[found["rank"] == 128]
    assert of_128["mean"].to_numpy() == pytest.approx(0.2)
    assert (of_128["high"] - of_128["mean"]).to_numpy() == pytest.approx(4.302653 * 0.1 / math.sqrt(3))
    assert found.loc[found["rank"] == 8, ["mean", "low", "high"]].to_numpy() == pytest.approx(0.0)
    one = paired_difference(seeds[seeds["seed"] == 0])
    assert one["low"].tolist() == one["mean"].tolist() == one["high"].tolist()
    noisy = found.assign(step=found["step"]).merge(seeds[seeds["seed"] == 0], on=["rank", "step"])
    assert one.loc[one["rank"] == 128, "mean"].diff().std() < noisy.loc[noisy["rank"] == 128, "train_loss"].diff().std()


def test_memory_is_drawn_from_training_samples_only(evidence: Evidence) -> None:
    frame = memory_by_step(evidence, "rss_bytes")
    assert sorted(frame["step"].unique()) == list(range(1, 9))
    row = frame[(frame["rank"] == 8) & (frame["step"] == 3)].iloc[0]
    samples = evidence.samples
    expected = samples[(samples["rank"] == 8) & (samples["step"] == 3)]["rss_bytes"]
    assert (row["mean"], row["low"], row["high"]) == pytest.approx((expected.mean(), expected.min(), expected.max()))
    assert memory_by_step(evidence, "gpu_allocated_bytes").empty


def test_ranks_beyond_the_palette_still_differ() -> None:
    ranks = [1, 2, 4, 8, 16, 32, 64, 128, 256]
    dashes = charts.cycle(ranks, charts.DASHES).to_dict()["range"]
    colours = charts.theme()["range"]["category"]
    pairs = {(colours[index % len(colours)], tuple(dash)) for index, dash in enumerate(dashes)}
    assert len(pairs) == len(ranks)


def test_a_machine_without_the_letters_draws_figures_in_english(
    evidence: Evidence, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "_letter_svg", lambda letter: '<svg xmlns="http://www.w3.org/2000/svg"/>')
    monkeypatch.setattr(write, "other_languages", drawing.others)
    monkeypatch.setattr(write, "render_image", lambda figure: {"svg": figure.title})
    build(evidence, make_verdict(evidence), tmp_path, "ko")
    assert (tmp_path / "figures" / "train-loss.svg").read_text() == "Training loss against steps"
    assert "권장 랭크" in read_page(tmp_path).text
