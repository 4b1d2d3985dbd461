"""The terminal. Text from models, data and studies is only shown: no control characters and no markup."""

import json
import re
import shlex
import signal
import sys
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from rankscope.text.formats import Table, strip_control_characters

if TYPE_CHECKING:
    from rankscope.text.catalogue import Catalogue


class PlainConsole(Console):
    """Console without control characters, markup and emoji codes, in tables as well.

    A paragraph is wrapped at words in a terminal, and a line in a file; a command is never broken: see `wrapped`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def print(self, *objects: Any, **options: Any) -> None:
        """Print as rich does, but a string as paragraphs; warnings are yellow."""
        if len(objects) == 1 and isinstance(objects[0], str):
            text = strip_control_characters(objects[0])
            lines = ("\n".join(wrapped(line, self.width)) if self.is_terminal else line for line in text.split("\n"))
            parts = [Text(line, style="yellow" if line.startswith(WARNINGS) else "") for line in lines]
            objects, options = (Text("\n").join(parts),), options | {"soft_wrap": True}
        super().print(*objects, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Text of a string that rich prints, table cells included."""
        return super().render_str(strip_control_characters(text), **options)


WARNINGS = ("Warning: ", "경고: ")
"""How a warning begins, in each language."""

COMMAND = re.compile(r"\s+(rankscope|pip|python|make|git|vllm|from) ")
"""How a line that is a command begins."""


def wrapped(line: str, width: int) -> Iterator[str]:
    """A line in parts of at most `width` cells, where words allow it. A command, which is an indented line or stands
    between backquotes, stays whole, so that it can be copied; an indented line that is none goes on indented."""
    found = [] if COMMAND.match(line) else re.findall(r"\s*(?:\S*`[^`]+`\S*|\S+)", line)  # each word after its space
    row, *words = found or [line]
    indent = line[: len(line) - len(line.lstrip())]
    for word in words:
        if cell_len(row) + cell_len(word) > width:
            yield row
            row = indent + word.lstrip()
        else:
            row += word
    yield row


out_console, error_console = PlainConsole(highlight=False), PlainConsole(stderr=True, highlight=False)
if not out_console.is_terminal:
    out_console.width = max(out_console.width, 120)  # room for tables in a log file


def make_table(
    headers: Sequence[str],
    rows: Iterable[Sequence[str]],
    left: Container[int] = (0,),
    title: str | None = None,
) -> RichTable:
    """Table without borders; columns at the positions `left` are aligned to the left, all others to the right. Where it
    is wider than the terminal, its cells are wrapped at words."""
    table = RichTable(box=None, pad_edge=False, header_style="bold", title=title, title_justify="left")
    rows = list(rows)
    cells = [[header, *(row[position] for row in rows)] for position, header in enumerate(headers)]
    widths = [max(cell_len(line) for cell in column for line in cell.split("\n")) for column in cells]
    words = [max((cell_len(word) for cell in column for word in cell.split()), default=0) for column in cells]
    while sum(widths) + 2 * (len(widths) - 1) > out_console.width and widths != words:
        widest = max(range(len(widths)), key=lambda position: (widths[position] > words[position], widths[position]))
        widths[widest] -= 1
    for position, header in enumerate(headers):
        justify: Any = "left" if position in left else "right"
        table.add_column(header, justify=justify, width=widths[position], overflow="fold")  # never cut a number
    for row in rows:
        table.add_row(*row)
    return table


def show(*parts: str | Table | RichTable, console: Console = out_console) -> None:
    """Print sentences and tables."""
    for part in parts:
        if isinstance(part, Table):
            left = [position for position, numeric in enumerate(part.numeric) if not numeric]
            console.print(make_table(part.headers, part.rows, left, part.caption))
        else:
            console.print(part)


def print_json(value: Mapping[str, Any]) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


@contextmanager
def stoppable(text: "Catalogue") -> Iterator[None]:
    """Let Ctrl-C or SIGTERM stop the body after its step, and say how to resume."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, partial(_stop_politely, text))
    try:
        yield
    except KeyboardInterrupt:
        again = shlex.join(["rankscope", *sys.argv[1:]])
        error_console.print(text("notice.stopped", command=again), style="yellow")
        raise typer.Exit(130) from None


def _stop_politely(text: "Catalogue", number: int, frame: FrameType | None) -> None:
    """Stop after the step in training; a second signal stops at once."""
    for again in (signal.SIGINT, signal.SIGTERM):
        signal.signal(again, signal.default_int_handler)
    error_console.print(text("notice.stopping"), style="yellow")
    raise KeyboardInterrupt
