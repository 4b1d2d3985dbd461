"""The terminal, in which text from models, data and studies does nothing but show."""

from typing import Any

from rich.console import Console
from rich.text import Text

from rankscope.report.visible import visible


class PlainConsole(Console):
    """A console that shows text as it is, in tables too: no control characters, no markup of rich's, no emoji codes."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """What rich makes of every string that it prints, a table's cells among them."""
        return super().render_str(visible(text), **options)
