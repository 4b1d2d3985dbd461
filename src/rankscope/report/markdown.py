"""The report as Markdown, with the content of the page and links to the figures beside it."""

import re
from collections.abc import Iterable

from rankscope.report.answers import Answered
from rankscope.report.content import Content
from rankscope.report.figures import Figure
from rankscope.report.other_metrics import Fact
from rankscope.text.catalogue import Catalogue
from rankscope.text.formats import Table, strip_control_characters


def render(content: Content, text: Catalogue) -> str:
    """The report in GitHub-flavoured Markdown, with text from the model, the data and the study escaped."""
    parts = [f"# {escape(content.title)}", escape(content.subtitle), f"## {text('section.verdict')}"]
    headline = f"{content.outcome}: {content.rank}" if content.rank else content.outcome
    parts += [f"**{escape(headline)}**", escape(content.sentence)]
    if content.next_step is not None:
        parts += [f"{escape(content.next_step.title)}:", _code(content.next_step.command, "sh")]
    if content.warnings:
        parts += [f"**{text('caveat.data')}**", _list(content.warnings)]
    if content.gain.value:
        parts += [f"{text('gain.title')}:", _list([content.gain.value, *content.gain.notes])]
    if content.margins is not None:
        parts.append(markdown_table(content.margins))
    if content.savings.rows:
        lines = [
            f"{saving.label}: {text('saving.pair', value=saving.value, other=saving.instead)} ({saving.difference})"
            for saving in content.savings.rows
        ]
        parts += [f"{escape(content.savings.title)}:", _list(lines)]
    parts.append(escape(content.savings.note))
    cost = [f"{text('cost.regret')}: {content.cost.value}"] if content.cost.value else []
    if cost or content.cost.notes:
        parts += [f"{text('cost.title')}:", _list([*cost, *content.cost.notes])]
    if content.caveats:
        parts += [f"{text('caveat.title')}:", _list(content.caveats)]
    parts += [f"## {text('how.title')}", _list(content.how_to_read)]
    for section in content.sections:
        parts += [f"## {text(f'section.{section.name}')}", *map(_figure, section.figures)]
        parts += [*map(escape, section.reasons), _list(section.sentences), *map(markdown_table, section.tables)]
    parts += [f"## {text('section.claims')}", _list(content.claims) or text("claim.absent")]
    parts += [f"## {text('section.answers')}", text("answer.note") if content.answers else text("answer.absent")]
    parts += [part for prompt in content.answers for part in _answers(prompt, text)]
    parts += [f"## {text('section.candidates')}", markdown_table(content.candidates), escape(content.noise)]
    parts += [_list(content.coverage), *map(markdown_table, content.costs), text("unit.note")]
    parts += [f"## {text('section.also')}", markdown_table(content.also), *map(escape, content.also_notes)]
    parts += [f"## {text('section.trials')}", markdown_table(content.trials)]
    parts += [f"## {text('section.data')}", _facts(content.data, text)]
    parts += [f"## {text('section.machine')}", _facts(content.machine, text)]
    parts += [f"## {text('section.reproduce')}", text("reproduce.command"), _code(content.reproduce, "sh")]
    parts += [text("reproduce.study"), _code(content.study, "yaml")]
    parts += [f"## {text('section.limits')}", _list(content.limits)]
    return "\n\n".join(filter(None, parts)) + "\n"


def escape(value: str) -> str:
    """Plain text for a paragraph, list or table cell: without markup, HTML or a second line."""
    line = strip_control_characters(" ".join(value.split()))
    return re.sub(r"([\\`*_{}\[\]<>|~#])", r"\\\1", line.replace("&", "&amp;"))


def _figure(figure: Figure) -> str:
    image = f"![{escape(figure.alternative)}](figures/{figure.name}.svg)"
    numbers = [markdown_table(figure.numbers)] if figure.numbers else []
    return "\n\n".join([f"### {escape(figure.title)}", image, escape(figure.note), *numbers])


def _answers(prompt: Answered, text: Catalogue) -> list[str]:
    parts = [f"### {escape(prompt.title)}", _code(prompt.prompt, "text")]
    for answer in prompt.answers:
        parts += [f"{escape(answer.name)}:", _code(answer.text or text("answer.empty"), "text")]
    return parts


def markdown_table(table: Table) -> str:
    """The table, with its caption in a line above it."""
    alignment = ["---:" if numeric else "---" for numeric in table.numeric]
    lines = [[escape(header) for header in table.headers], alignment]
    lines += [[escape(cell) for cell in row] for row in table.rows]
    caption = f"{escape(table.caption)}\n\n" if table.caption else ""
    return caption + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _facts(facts: list[Fact], text: Catalogue) -> str:
    if not facts:
        return text("table.missing")
    rows = [[fact.label, fact.value] for fact in facts]
    return markdown_table(Table(text("table.facts"), [text("table.key"), text("table.value")], [False, False], rows))


def _list(items: Iterable[str]) -> str:
    return "\n".join(f"- {escape(item)}" for item in items)


def _code(content: str, language: str) -> str:
    content = strip_control_characters(content)
    longest = max((len(run) for run in re.findall(r"`+", content)), default=0)
    fence = "`" * max(3, longest + 1)  # a fence longer than any inside, so that text cannot close it
    return f"{fence}{language}\n{content.rstrip()}\n{fence}"
