"""The terminal, in which text from models, data and studies does nothing but show."""

import json
import shlex
import signal
import sys
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.text import Text

from rankscope.text.formats import visible

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table as RichTable

    from rankscope.text.formats import Table


class PlainConsole(Console):
    """A console that shows text as it is, in tables too: no control characters, no markup of rich's, no emoji codes."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """What rich makes of every string that it prints, a table's cells among them."""
        return super().render_str(visible(text), **options)


out_console = PlainConsole(highlight=False)


if not out_console.is_terminal:
    out_console.width = max(out_console.width, 120)  # a table in a log file is not to be squeezed


error_console = PlainConsole(stderr=True, highlight=False)


def make_table(
    headers: Sequence[str],
    rows: Iterable[Sequence["RenderableType"]],
    left: Container[int] = (0,),
    title: str | None = None,
    no_wrap: bool = False,
) -> "RichTable":
    """Table without borders; columns at the positions `left` are aligned to the left, all others to the right."""
    from rich.table import Table as RichTable

    table = RichTable(box=None, pad_edge=False, header_style="bold", title=title, title_justify="left")
    for position, header in enumerate(headers):
        table.add_column(header, justify="left" if position in left else "right", no_wrap=no_wrap)
    for row in rows:
        table.add_row(*row)
    return table


def print_table(table: "Table") -> None:
    left = [position for position, numeric in enumerate(table.numeric) if not numeric]
    out_console.print(make_table(table.headers, table.rows, left, table.caption))


def print_json(value: Mapping[str, Any]) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


@contextmanager
def stoppable() -> Iterator[None]:
    """Lets Ctrl-C, and a polite kill, end the body so that the same command goes on; it says so."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop_politely)
    try:
        yield
    except KeyboardInterrupt:
        again = shlex.join(["rankscope", *sys.argv[1:]])
        error_console.print(f"Stopped. The same command goes on where it was:\n  {again}", markup=False, style="yellow")
        raise typer.Exit(130) from None


def _stop_politely(number: int, frame: FrameType | None) -> None:
    """The first Ctrl-C ends the run, after the step that trains; the second at once."""
    for again in (signal.SIGINT, signal.SIGTERM):
        signal.signal(again, signal.default_int_handler)
    error_console.print("Stopping after this step, with a checkpoint. Ctrl-C again stops at once.", style="yellow")
    raise KeyboardInterrupt
