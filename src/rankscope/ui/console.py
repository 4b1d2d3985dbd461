"""The terminal. Text from models, data and studies is only shown: no control characters and no markup."""

import errno
import json
import os
import shlex
import signal
import sys
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import typer
from rich.console import Console, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from rankscope.errors import shortened
from rankscope.text.formats import Table, strip_control_characters


class PlainConsole(Console):
    """Console without control characters, markup and emoji codes, in tables as well."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Text of a string that rich prints, table cells included; lines that begin with `Warning: ` are yellow."""
        rendered = super().render_str(strip_control_characters(text), **options)
        rendered.highlight_regex(r"(?m)^Warning: .*", "yellow")
        return rendered


out_console, error_console = PlainConsole(highlight=False), PlainConsole(stderr=True, highlight=False)
if not out_console.is_terminal:
    out_console.width = max(out_console.width, 120)  # room for tables in a log file


def make_table(
    headers: Sequence[str],
    rows: Iterable[Sequence[RenderableType]],
    left: Container[int] = (0,),
    title: str | None = None,
    no_wrap: bool = False,
) -> RichTable:
    """Table without borders; columns at the positions `left` are aligned to the left, all others to the right."""
    table = RichTable(box=None, pad_edge=False, header_style="bold", title=title, title_justify="left")
    for position, header in enumerate(headers):
        justify: Any = "left" if position in left else "right"
        table.add_column(header, justify=justify, no_wrap=no_wrap, overflow="fold")  # never cut a number
    for row in rows:
        table.add_row(*row)
    return table


def print_table(table: Table) -> None:
    left = [position for position, numeric in enumerate(table.numeric) if not numeric]
    out_console.print(make_table(table.headers, table.rows, left, table.caption))


def print_json(value: Mapping[str, Any]) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def show_system_error(error: OSError) -> bool:
    """Print an error of the system in a line, with advice. Whether there is any; else nothing is printed."""
    todo = _TODO.get(error.errno or 0)
    if todo is None:
        return False
    if error.filename is None:  # the output failed: else Python writes the rest of it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    name = "the output" if error.filename is None else shortened(str(error.filename))
    error_console.print(f"error: {name}: {error.strerror}\n  {todo}", style="red", soft_wrap=True)
    return True


_TODO = {
    errno.ENAMETOOLONG: "Give a shorter name.",
    errno.ENOSPC: "Make room there, and run again: a study that has begun goes on where it was.",
    errno.EIO: "See what is wrong with that device, and run again.",
}


@contextmanager
def stoppable() -> Iterator[None]:
    """Let Ctrl-C or SIGTERM stop the body after its step, and say how to resume."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop_politely)
    try:
        yield
    except KeyboardInterrupt:
        again = shlex.join(["rankscope", *sys.argv[1:]])
        error_console.print(f"Stopped. To resume, run the same command:\n  {again}", style="yellow")
        raise typer.Exit(130) from None


def _stop_politely(number: int, frame: FrameType | None) -> None:
    """Stop after the step in training; a second signal stops at once."""
    for again in (signal.SIGINT, signal.SIGTERM):
        signal.signal(again, signal.default_int_handler)
    error_console.print("Stopping after this step. Ctrl-C again stops at once.", style="yellow")
    raise KeyboardInterrupt
