"""Answers side by side: whose, in which order, and that they stay text."""

import re
from pathlib import Path
from typing import Any

import pandas as pd

from rankscope.report.answers import LONGEST, answered
from rankscope.report.write import build
from rankscope.study.evidence import Evidence
from rankscope.text.catalogue import load
from report.report_evidence import HOSTILE, make_evidence, make_spec, make_verdict

HOSTILE_ANSWER = f'{HOSTILE}</pre></script><img src=x onerror=alert(1)>\x1b[31m\u202e ``` {{{{ 7 * 7 }}}} "]}}'


def with_answers(prompts: int = 2, text: str = "an answer", **spec: Any) -> Evidence:
    evidence = make_evidence(make_spec(**spec), steps=8)
    candidates = [("r256-lr2e-4", 256), ("base", 0), ("r008-lr2e-4", 8), ("r128-lr2e-4", 128)]
    rows = [
        {
            "example": 7 - number,
            "prompt": f"prompt {number}",
            "reference": f"reference {number}",
            "candidate": candidate,
            "rank": rank,
            "answer": f"{text} of {candidate}",
        }
        for candidate, rank in candidates
        for number in range(prompts)
    ]
    return evidence._replace(answers=pd.DataFrame(rows))


def test_each_prompt_has_the_data_s_answer_the_model_s_and_each_rank_s() -> None:
    evidence = with_answers()
    first, second = answered(evidence, make_verdict(evidence), load("en"))
    assert (first.title, first.prompt) == ("Prompt 1", "prompt 0")
    assert second.answers[0].text == "reference 1"
    assert [(answer.name, answer.text) for answer in first.answers] == [
        ("The data's own answer", "reference 0"),
        ("rank 8", "an answer of r008-lr2e-4"),
        ("Without an adapter", "an answer of base"),
        ("rank 128", "an answer of r128-lr2e-4"),
        ("rank 256", "an answer of r256-lr2e-4"),
    ]
    assert [answer.name for answer in first.answers if answer.chosen] == ["rank 8"]


def test_of_several_learning_rates_the_compared_one_is_shown() -> None:
    evidence = with_answers(learning_rates=[1e-4, 2e-4])
    other = evidence.answers.assign(candidate=evidence.answers["candidate"].str.replace("lr2e", "lr1e"))
    both = evidence._replace(answers=pd.concat([evidence.answers, other[other["rank"] > 0]]))
    verdict = make_verdict(both)
    verdict["comparison"].pop()
    names = [answer.name for answer in answered(both, verdict, load("en"))[0].answers]
    assert names[1:] == [
        "rank 8 at learning rate 1e-4",
        "Without an adapter",
        "rank 128 at learning rate 1e-4",
        "rank 256 at learning rate 1e-4",  # left out of the comparison
        "rank 256 at learning rate 2e-4",
    ]
    assert len(answered(both, {}, load("en"))[0].answers) == 2 + 6


def test_without_answers_the_page_says_so(tmp_path: Path) -> None:
    build(make_evidence(steps=8), {}, tmp_path)
    for name in ("index.html", "report.md"):
        assert "No answers were generated." in (tmp_path / name).read_text(encoding="utf-8")


def test_a_long_text_is_cut() -> None:
    answer = answered(with_answers(text="x" * 10 * LONGEST), {}, load("en"))[0].answers[1].text
    assert len(answer) == LONGEST + 1
    assert answer.endswith("x…")


def test_an_empty_answer_is_told(tmp_path: Path) -> None:
    evidence = with_answers()
    build(evidence._replace(answers=evidence.answers.assign(answer="")), {}, tmp_path)
    assert (tmp_path / "index.html").read_text(encoding="utf-8").count("<pre>\n(nothing)</pre>") == 8
    assert (tmp_path / "report.md").read_text(encoding="utf-8").count("(nothing)") == 8


def test_line_breaks_and_indents_stay(tmp_path: Path) -> None:
    evidence = with_answers()
    code = "\n    first\n\tsecond <b>"
    build(evidence._replace(answers=evidence.answers.assign(answer=code)), {}, tmp_path)
    # A browser drops the first line break after <pre>: one more stands before the text.
    assert "<pre>\n\n    first\n\tsecond &lt;b&gt;</pre>" in (tmp_path / "index.html").read_text(encoding="utf-8")


def test_hostile_answers_stay_text(tmp_path: Path) -> None:
    evidence = with_answers()
    hostile = dict.fromkeys(("prompt", "reference", "candidate", "answer"), HOSTILE_ANSWER)
    build(evidence._replace(answers=evidence.answers.assign(**hostile)), {}, tmp_path, "ko")
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    body = page[page.index("<body>") : page.index('<script type="application/json"')]
    assert "<script" not in body
    assert "<img" not in body
    assert "&lt;script&gt;alert(1)&lt;/script&gt;&lt;/pre&gt;" in body
    assert not set("\x1b\u202e") & set(page)
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    outside_code = re.sub(r"^(`{3,})\w*\n.*?^\1$", "", markdown, flags=re.DOTALL | re.MULTILINE)
    assert "<script" not in outside_code
    assert not set("\x1b\u202e") & set(markdown)
