"""The terminal, in which text from models, data and studies does nothing but show."""

from typing import Any

from rich.console import Console

from rankscope.report.visible import visible


class PlainConsole(Console):
    """A console that prints no control characters of the text it is given."""

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*(visible(item) if isinstance(item, str) else item for item in objects), **options)
