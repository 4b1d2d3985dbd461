"""What a command shows while it works: lines that stay and, in a terminal, a part that is drawn anew."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

LINE_EVERY_SECONDS = 15.0
"""Between two lines where there is no terminal."""


class Display:
    """Lines that stay and, in a terminal, a part below them that is drawn anew. Use as a context manager."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None
        self._last_line = time.monotonic() - LINE_EVERY_SECONDS

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.update(Text(""))
            self._live.stop()

    def say(self, message: str) -> None:
        """Prints a line that stays."""
        self.console.print(message, highlight=False, markup=False, soft_wrap=True)

    @property
    def is_drawn(self) -> bool:
        """Whether there is a terminal to draw in."""
        return self._live is not None

    def draw(self, part: RenderableType) -> None:
        """Draws the part anew."""
        if self._live:
            self._live.update(part)

    def line_is_due(self) -> bool:
        """Whether it is time for a line, where nothing is drawn."""
        due = time.monotonic() - self._last_line >= LINE_EVERY_SECONDS
        if due:
            self._last_line = time.monotonic()
        return due
