"""The report as Markdown, with the content of the page and links to the figures beside it."""

import re
from collections.abc import Iterable

from rankscope.report.answers import Answered
from rankscope.report.content import Content
from rankscope.report.figures import Figure, Section
from rankscope.text.catalogue import Catalogue
from rankscope.text.formats import Table, strip_control_characters


def render(content: Content, text: Catalogue) -> str:
    """The report in GitHub-flavoured Markdown, with text from the model, the data and the study escaped."""
    parts = [f"# {escape(content.title)}", escape(content.subtitle), f"## {text('section.verdict')}"]
    headline = f"{content.outcome}: {content.rank}" if content.rank else content.outcome
    parts += [f"**{escape(headline)}**", escape(content.sentence)]
    if content.next_step is not None:
        parts += [f"{escape(content.next_step.title)}:", code_block(content.next_step.command, "sh")]
    if content.warnings:
        parts += [f"**{text('caveat.data')}**", _list(content.warnings)]
    parts += [markdown_table(table) for table in (content.ranks, content.margins) if table is not None]
    if content.gain.value:
        parts += [f"{text('gain.title')}:", _list([content.gain.value, *content.gain.notes])]
    cost = [f"{text('cost.regret')}: {content.cost.value}"] if content.cost.value else []
    if cost or content.cost.notes:
        parts += [f"{text('cost.title')}:", _list([*cost, *content.cost.notes])]
    if content.savings.rows:
        lines = [
            f"{saving.label}: {text('saving.pair', value=saving.value, other=saving.instead)} ({saving.difference})"
            for saving in content.savings.rows
        ]
        parts += [f"{escape(content.savings.title)}:", _list(lines)]
    parts.append(escape(content.savings.note))
    if content.caveats:
        parts += [f"{text('caveat.title')}:", _list(content.caveats)]
    parts += [f"## {text('how.title')}", _list(content.how_to_read)]
    parts += [part for section in content.sections for part in _section(section, text)]
    parts += [f"## {text('section.answers')}", text("answer.note") if content.answers else text("answer.absent")]
    parts += [part for prompt in content.answers for part in _answers(prompt, text)]
    parts += [part for section in content.details for part in _section(section, text)]
    parts += [f"## {text('section.reproduce')}", text("reproduce.command"), code_block(content.reproduce, "sh")]
    parts += [text("reproduce.study"), code_block(content.study, "yaml")]
    return "\n\n".join(filter(None, parts)) + "\n"


def escape(value: str) -> str:
    """Plain text for a paragraph, list or table cell: without markup, HTML or a second line."""
    line = strip_control_characters(" ".join(value.split()))
    return re.sub(r"([\\`*_{}\[\]<>|~#])", r"\\\1", line.replace("&", "&amp;"))


def _section(section: Section, text: Catalogue) -> list[str]:
    parts = [f"## {text(f'section.{section.name}')}", *map(_figure, section.figures)]
    return [*parts, *map(escape, section.reasons), _list(section.sentences), *map(markdown_table, section.tables)]


def _figure(figure: Figure) -> str:
    image = f"![{escape(figure.alternative)}](figures/{figure.name}.svg)"
    numbers = [markdown_table(figure.numbers)] if figure.numbers else []
    return "\n\n".join([f"### {escape(figure.title)}", image, escape(figure.note), *numbers])


def _answers(prompt: Answered, text: Catalogue) -> list[str]:
    parts = [f"### {escape(prompt.title)}", code_block(prompt.prompt, "text")]
    for answer in prompt.answers:
        parts += [f"{escape(answer.name)}:", code_block(answer.text or text("answer.empty"), "text")]
    return parts


def markdown_table(table: Table) -> str:
    """The table, with its caption in a line above it."""
    alignment = ["---:" if numeric else "---" for numeric in table.numeric]
    lines = [[escape(header) for header in table.headers], alignment]
    lines += [[escape(cell) for cell in row] for row in table.rows]
    caption = f"{escape(table.caption)}\n\n" if table.caption else ""
    return caption + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _list(items: Iterable[str]) -> str:
    return "\n".join(f"- {escape(item)}" for item in items)


def code_block(content: str, language: str = "text") -> str:
    content = strip_control_characters(content)
    longest = max((len(run) for run in re.findall(r"`+", content)), default=0)
    fence = "`" * max(3, longest + 1)  # a fence longer than any inside, so that text cannot close it
    return f"{fence}{language}\n{content.rstrip()}\n{fence}"
